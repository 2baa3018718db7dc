"""JAX's libraries: Flax (nnx and linen), Equinox, Haiku; Flax's BERT, and Gemma.

References:
    Flax 0.12, ``nnx/nn/attention.py`` and ``linen/attention.py``; Equinox 0.13,
    ``nn/_attention.py``; Haiku 0.0.17, ``_src/attention.py``; transformers 4,
    ``modeling_flax_bert.py``; gemma 3, ``gm/nn/_modules.py``.
"""

from __future__ import annotations

from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form
from anymha.interchange.layout import Layout
from anymha.interchange.layouts.encoders import norm_need
from anymha.interchange.layouts.rotary import HALVES, SCALE, SOFTCAP, rotary
from anymha.interchange.limits import one_memory, same_heads, same_widths, vector_output
from anymha.interchange.packing import QKV, Piece, linear


def pieces(names: tuple[str, ...], form: str, parts: tuple[str, str]) -> tuple[Piece, ...]:
    """The four projections under these names."""
    pairs = zip(PROJECTIONS, names, strict=True)
    return tuple(p for pair in pairs for p in linear(*pair, form=form, parts=parts))


def einsum(name: str, holds: tuple[str, ...]) -> tuple[Piece, ...]:
    """The kernel of an einsum, for one projection or several."""
    return (Piece(f"{name}/w", holds, "kernel", "einsum"),)


FLAX = pieces((*QKV, "out"), "heads", ("/kernel", "/bias"))
NORM = norm_need(QueryKeyNorm("layer"))  # `normalize_qk`, with Flax's own `epsilon`
NORMS = tuple(Extra(f"{name}_ln/scale", weight=f"{name}_norm.scale") for name in ("query", "key"))
FLAX_BERT = ("self/query", "self/key", "self/value", "output/dense")
GEMMA_OUTPUT = Piece("attn_vec_einsum/w", ("output",), "kernel", "heads")
EQUINOX = tuple(f"{name}_proj" for name in PROJECTIONS)

LAYOUTS = (
    Layout(
        "flax.nnx.MultiHeadAttention",
        (Form(FLAX),),
        extras=NORMS,
        needs=(NORM,),
        limits=(same_widths, vector_output, one_memory),
        options=("compute_dtype",),
        together=PROJECTIONS,
        reference="flax/nnx/nn/attention.py",
        separator="/",
    ),
    Layout(
        "flax.linen.MultiHeadDotProductAttention",
        (Form(FLAX),),
        extras=NORMS,
        needs=(NORM,),
        limits=(same_heads, same_widths, vector_output),
        together=PROJECTIONS,
        reference="flax/linen/attention.py",
        separator="/",
    ),
    Layout(
        "equinox.MultiheadAttention",
        (Form(pieces(EQUINOX, "linear", (".weight", ".bias"))),),
        limits=(same_heads,),
        reference="equinox/nn/_attention.py",
    ),
    Layout(
        "haiku.MultiHeadAttention",
        (Form(pieces((*QKV, "linear"), "matrix", ("/w", "/b"))),),
        limits=(same_heads,),
        together=PROJECTIONS,
        reference="haiku/_src/attention.py",
        separator="/",
    ),
    Layout(
        "transformers.flax_bert",
        (Form(pieces(FLAX_BERT, "matrix", ("/kernel", "/bias"))),),
        extras=tuple(Extra(f"output/LayerNorm/{part}") for part in ("scale", "bias")),
        limits=(same_heads,),
        reference="models/bert/modeling_flax_bert.py",
        separator="/",
    ),
    Layout(
        "gemma.Attention",
        (
            Form((*einsum("qkv_einsum", QKV), GEMMA_OUTPUT), "alike", (same_heads,)),
            Form(
                (
                    *einsum("q_einsum", ("query",)),
                    *einsum("kv_einsum", ("key", "value")),
                    GEMMA_OUTPUT,
                ),
                "grouped",
            ),
        ),
        extras=tuple(
            Extra(f"_{name}_norm/scale", shows=("head_dim", 0), weight=f"{name}_norm.scale")
            for name in ("query", "key")
        ),
        limits=(vector_output,),
        scale="free",
        options=("sliding_window",),
        needs=(
            rotary(HALVES),
            SCALE,
            SOFTCAP,
            norm_need(QueryKeyNorm(scale="one_plus_weight"), "rms_norm_eps"),
        ),
        reference="gemma/gm/nn/_modules.py",
        separator="/",
    ),
)
