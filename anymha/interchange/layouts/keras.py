"""Keras: the canonical shapes; the output projection has another name.

References:
    Keras 3.15, ``src/layers/attention/multi_head_attention.py`` and
    ``grouped_query_attention.py``.
"""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.forms import Form
from anymha.interchange.layout import Layout
from anymha.interchange.limits import (
    gate_of_each_element,
    output_as_query,
    same_heads,
    same_widths,
    vector_output,
)
from anymha.interchange.packing import QKV, linear
from anymha.options.training import OBJECTS

NAMES = dict(zip(PROJECTIONS, (*QKV, "attention_output"), strict=True)) | {"gate": "gate"}
PIECES = tuple(
    piece
    for projection, name in NAMES.items()
    for piece in linear(
        projection, name, form="heads", parts=("/kernel", "/bias"), optional=projection == "gate"
    )
)

LAYOUTS = (
    Layout(
        "keras.MultiHeadAttention",
        (Form(PIECES),),
        limits=(same_heads, gate_of_each_element),
        options=("attention_axes", "sliding_window", "gate", "compute_dtype", *OBJECTS),
        together=tuple(NAMES),
        reference="keras/src/layers/attention/multi_head_attention.py",
        separator="/",
    ),
    Layout(
        "keras.GroupQueryAttention",
        (Form(PIECES),),
        limits=(same_widths, vector_output, output_as_query, gate_of_each_element),
        options=("sliding_window", "gate", "compute_dtype", *OBJECTS),
        together=tuple(NAMES),
        reference="keras/src/layers/attention/grouped_query_attention.py",
        separator="/",
    ),
)
