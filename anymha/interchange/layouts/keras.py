"""Keras: the canonical shapes; the output projection has another name.

References:
    Keras 3.15, ``src/layers/attention/multi_head_attention.py`` and
    ``grouped_query_attention.py``.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Extra, Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import output_as_query, same_heads, same_widths, vector_output
from anymha.interchange.packing import QKV, linear
from anymha.options.training import OBJECTS

NAMES = dict(zip(PROJECTIONS, (*QKV, "attention_output"), strict=True))
PIECES = tuple(
    piece
    for projection, name in NAMES.items()
    for piece in linear(projection, name, form="heads", parts=("/kernel", "/bias"))
)
GATE = "a gate: the heads' outputs are multiplied by sigmoid(query . gate) (Keras's `use_gate`)"

LAYOUTS = (
    Layout(
        "keras.MultiHeadAttention",
        (Form(PIECES),),
        extras=(Extra("gate/kernel", GATE), Extra("gate/bias", GATE)),
        limits=(same_heads,),
        options=("attention_axes", "sliding_window", "compute_dtype", *OBJECTS),
        together=PROJECTIONS,
        reference="keras/src/layers/attention/multi_head_attention.py",
        separator="/",
    ),
    Layout(
        "keras.GroupQueryAttention",
        (Form(PIECES),),
        extras=(Extra("gate/kernel", GATE), Extra("gate/bias", GATE)),
        limits=(same_widths, vector_output, output_as_query),
        options=("sliding_window", "compute_dtype", *OBJECTS),
        together=PROJECTIONS,
        reference="keras/src/layers/attention/grouped_query_attention.py",
        separator="/",
    ),
)
