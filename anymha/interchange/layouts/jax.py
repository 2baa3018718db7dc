"""JAX's libraries: Flax (nnx and linen), Equinox, Haiku.

References:
    Flax 0.12, ``nnx/nn/attention.py`` and ``linen/attention.py``; Equinox 0.13,
    ``nn/_attention.py``; Haiku 0.0.17, ``_src/attention.py``.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import one_memory, same_heads, same_widths, vector_output
from anymha.interchange.packing import QKV, Piece, linear


def pieces(names: tuple[str, ...], form: str, parts: tuple[str, str]) -> tuple[Piece, ...]:
    """The four projections under these names."""
    pairs = zip(PROJECTIONS, names, strict=True)
    return tuple(p for pair in pairs for p in linear(*pair, form=form, parts=parts))


FLAX = pieces((*QKV, "out"), "heads", ("/kernel", "/bias"))
NORM = "layer norms of queries and keys, without a bias, before the logits (`normalize_qk`)"
NORMS = (Extra("query_ln/scale", NORM), Extra("key_ln/scale", NORM))
EQUINOX = tuple(f"{name}_proj" for name in PROJECTIONS)

LAYOUTS = (
    Layout(
        "flax.nnx.MultiHeadAttention",
        (Form(FLAX),),
        extras=NORMS,
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
)
