"""anymha's own names and shapes, the canonical form, as in the files of `anymha.save`."""

from __future__ import annotations

from anymha.interchange.forms import Form
from anymha.interchange.layout import Layout
from anymha.interchange.pieces import linear
from anymha.options import PROJECTIONS

PIECES = tuple(
    piece
    for name in PROJECTIONS
    for piece in linear(name, name, form="heads", parts=(".kernel", ".bias"))
)

LAYOUTS = (Layout("anymha", (Form(PIECES),), scale="free", reference="anymha/config.py"),)
