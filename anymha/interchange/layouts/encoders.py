"""Families of transformers with plain attention, as anymha's: BERT, ViT, CLIP, OPT, BART, Whisper.

References:
    transformers 5.23, ``models/<family>/modeling_<family>.py``; for ViT's names in published files
    ``conversion_mapping.py``.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import same_heads
from anymha.interchange.packing import Piece, linear


def four(*names: str, biased: tuple[str, ...] = PROJECTIONS) -> tuple[Piece, ...]:
    """Four linear layers; some may have a bias."""
    pairs = zip(PROJECTIONS, names, strict=True)
    return tuple(piece for pair in pairs for piece in linear(*pair, bias=pair[0] in biased))


def projections(output: str, biased: tuple[str, ...] = PROJECTIONS) -> tuple[Piece, ...]:
    """Four linear layers of the names that most families have."""
    return four("q_proj", "k_proj", "v_proj", output, biased=biased)


def family(name: str, *forms: Form) -> Layout:
    """The layout of a family of transformers with one key head for each query head."""
    reference = f"models/{name}/modeling_{name}.py"
    return Layout(f"transformers.{name}", forms, limits=(same_heads,), reference=reference)


# A norm after the attention, in the same module: it changes nothing in the attention itself.
NORM = tuple(Extra(f"output.LayerNorm.{part}") for part in ("weight", "bias", "gamma", "beta"))
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
