"""anymha's own names and shapes, the canonical form, as in the files of `anymha.save`."""

from __future__ import annotations

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.compared_options import ALL_OPTIONS
from anymha.interchange.forms import Form
from anymha.interchange.layout import Layout
from anymha.interchange.packing import linear

PIECES = tuple(
    piece
    for name in PROJECTIONS
    for piece in linear(name, name, form="heads", parts=(".kernel", ".bias"))
)

LAYOUTS = (
    Layout(
        "anymha",
        (Form(PIECES),),
        scale="free",
        options=ALL_OPTIONS,
        reference="anymha/options/config.py",
    ),
)
