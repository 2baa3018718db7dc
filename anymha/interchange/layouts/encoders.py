"""Families of transformers without rotary positions, as BERT, ViT, CLIP, BART, DeBERTa.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; for ViT's names in published files
    ``conversion_mapping.py``. He et al. (2021), DeBERTa.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form, Need
from anymha.interchange.layout import Layout
from anymha.interchange.limits import same_heads
from anymha.interchange.model_needs import NormNeed
from anymha.interchange.packing import Piece, fused, linear


def four(*names: str, biased: tuple[str, ...] = PROJECTIONS) -> tuple[Piece, ...]:
    """Four linear layers; some may have a bias."""
    pairs = zip(PROJECTIONS, names, strict=True)
    return tuple(piece for pair in pairs for piece in linear(*pair, bias=pair[0] in biased))


def projections(output: str, biased: tuple[str, ...] = PROJECTIONS) -> tuple[Piece, ...]:
    """Four linear layers of the names that most families have."""
    return four("q_proj", "k_proj", "v_proj", output, biased=biased)


def family(name: str, *forms: Form, **options: Any) -> Layout:
    """The layout of a family of transformers with one key head for each query head."""
    reference = f"models/{name}/modeling_{name}.py"
    fixed = {"limits": (same_heads,), "reference": reference}
    return Layout(f"transformers.{name}", forms, **fixed, **options)


def one_kernel(
    kernel: str, output: str, packing: str = "blocks", *, bias: bool = True,
    output_bias: bool | None = None, name: str = "",
) -> Form:  # fmt: skip
    """One linear layer for queries, keys and values, and one for the output."""
    biased = bias if output_bias is None else output_bias
    return Form((*fused(kernel, packing, bias=bias), *linear("output", output, bias=biased)), name)


def norm_weights(
    names: str, parts: tuple[str, ...] = ("weight",), *, letters: bool = True, **options: Any
) -> tuple[Extra, ...]:
    """The weights of norms of queries and keys.

    Args:
        names: Their name, with ``{}`` for q and k, or for query and key.
        parts: The names of the scale and of the bias, as far as there are.
        letters: Whether the first letters stand for queries and keys.
        **options: Of each `Extra`.
    """
    return tuple(
        Extra(
            f"{names.format(word[0] if letters else word)}.{part}",
            weight=f"{word}_norm.{canonical}",
            **options,
        )
        for word in ("query", "key")
        for part, canonical in zip(parts, ("scale", "bias"), strict=False)
    )


def norm_need(norm: QueryKeyNorm, key: str = "", **options: Any) -> NormNeed:
    """The need of a norm of queries and keys, whose `eps` a configuration states as `key`."""
    kind = {"rms": "RMS norms", "layer": "layer norms", "l2": "L2 norms"}[norm.kind]
    over = {"head": "each head", "heads": "each head, weights of its own for each,"}.get(
        norm.over, "the whole width"
    )
    factor = {"weight": "the weight", "one_plus_weight": "1 + the weight"}.get(norm.scale, "")
    place = "after they are rotated" if norm.after_rotary else "before they are rotated"
    fields = {f.name: getattr(norm, f.name) for f in dataclasses.fields(norm) if f.name != "eps"}
    default = QueryKeyNorm()
    fields = {n: value for n, value in fields.items() if value != getattr(default, n)}
    words = "".join(f"{name}={value!r}, " for name, value in fields.items())
    return NormNeed(
        "query_key_norm",
        f"{kind} of queries and keys over {over}{f' times {factor},' * bool(factor)} {place}",
        key,
        example=f"anymha.QueryKeyNorm({words}eps=...)",
        norm=norm,
        **options,
    )


def norm_after(name: str) -> tuple[Extra, ...]:
    """A norm after the attention, in the same module: the attention itself is the same."""
    return tuple(Extra(f"{name}.{part}") for part in ("weight", "bias", "gamma", "beta"))


def disentangled(name: str, form: Form, refused: dict[str, str]) -> Layout:
    """The layout of a DeBERTa: plain attention where `relative_attention` is off."""
    terms = Need(
        "relative_attention",
        "terms of relative positions beside the logits, and all of them over the root of the width "
        "times 1 + the number of `pos_att_type`, where `relative_attention` is set (as it is in "
        "the published models)",
        "relative_attention",
    )
    options = {"extras": NORM, "needs": (terms,), "scale": "free", "refused": refused}
    return family(name, form, **options)


def refusing(names: Iterable[str], reason: str) -> dict[str, str]:
    """One reason for several arrays."""
    return {f"{name}.{part}": reason for name in names for part in ("weight", "bias")}


NORM = norm_after("output.LayerNorm")
DISENTANGLED = (
    "it projects embeddings of relative positions, whose products with queries and keys are added "
    "to the logits (disentangled attention)."
)
TALKING = "it mixes the heads before or after the softmax (talking heads)."
DISTANCES = Extra(
    "self.distance_embedding.weight",
    "learned embeddings of relative positions, multiplied with queries and maybe keys "
    "(`position_embedding_type`)",
    shows=("head_dim", 1),
)


LAYOUTS = (
    Layout(
        "transformers.bert",
        (Form(four("self.query", "self.key", "self.value", "output.dense")),),
        extras=(*NORM, DISTANCES),
        reference="models/bert/modeling_bert.py",
    ),
    family("albert", Form(four("query", "key", "value", "dense")), extras=norm_after("LayerNorm")),
    family("distilbert", Form(four("q_lin", "k_lin", "v_lin", "out_lin"))),
    family(
        "mpnet",
        Form(four("q", "k", "v", "o")),
        needs=(
            "the learned bias of relative positions, `encoder.relative_attention_bias`, one for "
            "all layers (pass it as `attention_bias`)",
        ),
    ),
    # Rows of the one kernel lie by heads; queries and values alone have a bias.
    disentangled(
        "deberta",
        Form(
            (
                *fused("self.in_proj", "groups", bias=False),
                Piece("self.q_bias", ("query",), "bias"),
                Piece("self.v_bias", ("value",), "bias"),
                *linear("output", "output.dense"),
            )
        ),
        refusing(("self.pos_proj", "self.pos_q_proj"), DISENTANGLED)
        | refusing(("self.head_logits_proj", "self.head_weights_proj"), TALKING),
    ),
    disentangled(
        "deberta_v2",
        Form(four("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")),
        refusing(("self.pos_key_proj", "self.pos_query_proj"), DISENTANGLED),
    ),
    # Conformers have these names too: ESPnet, NeMo, FastSpeech 2, Wav2Vec2-BERT.
    family(
        "wav2vec2_bert",
        Form(four("linear_q", "linear_k", "linear_v", "linear_out")),
        extras=(
            Extra(
                "linear_pos.weight",
                "the projection of relative positions, `linear_pos.weight`, whose products with "
                "the queries are added to the logits",
            ),
            *(
                Extra(
                    f"pos_bias_{letter}",
                    f"a bias of each query head, `pos_bias_{letter}`, beside the keys or positions",
                    shows=("num_heads", 0),
                )
                for letter in "uv"
            ),
            Extra(DISTANCES.array.removeprefix("self."), DISTANCES.need, shows=DISTANCES.shows),
        ),
        needs=(
            Need(
                "input_rotary",
                "rotary positions on the inputs of queries and keys, where "
                "`position_embeddings_type` of the model's configuration is 'rotary'",
                "position_embeddings_type",
            ),
        ),
    ),
    family("blip", one_kernel("qkv", "projection")),
    family(
        "vit",
        Form(projections("o_proj"), "module"),
        Form(
            four("attention.query", "attention.key", "attention.value", "output.dense"), "published"
        ),
    ),
    family("clip", Form(projections("out_proj"))),
    family("opt", Form(projections("out_proj"))),
    family("bart", Form(projections("out_proj"))),
    family("whisper", Form(projections("out_proj", biased=("query", "value", "output")))),
)
