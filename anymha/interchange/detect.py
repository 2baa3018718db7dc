"""Detect the attention layers of a file, and the layouts that they may have.

Names and shapes decide. Several layouts may have the same ones and mean different things by them:
then all of them are listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from anymha.errors import AnymhaError
from anymha.interchange.files.formats import Format
from anymha.interchange.files.reader import Tensor
from anymha.interchange.layouts import get_layout, layouts
from anymha.interchange.naming import FileNaming, file_namings
from anymha.options.config import AttentionConfig

_NUMBER = re.compile(r"(?<![^./_])\d+(?![^./])")
_LETTERS = "ijklmnop"
MAX_AXIS = 2**24
"""No axis of an attention layer is longer; hostile shapes must not cost a search for divisors."""


@dataclass(frozen=True)
class LayoutFit:
    """A layout that a layer may have.

    Args:
        naming: The layout, and its names in the file.
        names: The file's names by the layout's, without the layer's prefix.
        shapes: Shapes by the layout's names.
    """

    naming: FileNaming
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The layout's name."""
        return self.naming.layout.name


@dataclass
class LayerGroup:
    """Layers of one kind, whose names differ in numbers alone.

    Args:
        pattern: What their names begin with, with letters for the numbers.
        prefixes: What the names of each begin with.
        fits: The layouts that they may have.
        misfits: The layouts that have these names and do not fit, and the reasons.
        tensors: Shape and dtype of each array of the first layer, by its name there.
    """

    pattern: str
    prefixes: list[str]
    fits: list[LayoutFit]
    misfits: dict[str, str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> AttentionConfig | None:
        """The config that the shapes show; None where they leave the number of heads open."""
        if not self.fits:
            return None
        best = self.fits[0]
        try:
            arrays = {name: np.zeros(shape, np.float16) for name, shape in best.shapes.items()}
            return best.naming.layout.to_canonical(arrays)[1]
        except AnymhaError:
            return None


def find_layer_groups(tensors: Mapping[str, Tensor], file_format: Format) -> list[LayerGroup]:
    """Find the attention layers of a file, grouped by names that differ in numbers alone.

    Args:
        tensors: Shape and dtype of each tensor of the file.
        file_format: The file's format.
    """
    candidates: dict[str, list[LayoutFit]] = {}
    for name in layouts():
        for naming in file_namings(get_layout(name), file_format):
            for prefix in naming.prefixes(tensors):
                candidates.setdefault(prefix, []).append(layout_fit(naming, tensors, prefix))
    groups: dict[object, LayerGroup] = {}
    for prefix in sorted(candidates):
        fits, misfits = select_fits(candidates[prefix])
        layer = {n: tensors[prefix + n] for c in candidates[prefix] for n in c.names.values()}
        key = (pattern_of(prefix), tuple(fit.name for fit in fits), tuple(layer.items()))
        group = groups.setdefault(key, LayerGroup(key[0], [], fits, misfits, layer))
        group.prefixes.append(prefix)
    return list(groups.values())


def layout_fit(naming: FileNaming, tensors: Mapping[str, Tensor], prefix: str) -> LayoutFit:
    """The arrays of a layout that the layer with that prefix has."""
    names = naming.layer_names(tensors, prefix)
    shapes = {name: tensors[prefix + place].shape for name, place in names.items()}
    return LayoutFit(naming, names, shapes)


def select_fits(candidates: list[LayoutFit]) -> tuple[list[LayoutFit], dict[str, str]]:
    """Split candidates into the layouts that a layer may have, and the others with the reasons.

    A layout does not fit where it leaves out an array that another layout knows.
    """
    misfits: dict[str, str] = {}
    fits = []
    for candidate in candidates:
        reason = _oversized(candidate.shapes) or candidate.naming.layout.fits(candidate.shapes)
        if reason is None:
            fits.append(candidate)
        else:
            misfits[candidate.name] = reason
    best = []
    for fit in fits:
        known = set(fit.names.values())
        larger = next((other for other in fits if set(other.names.values()) > known), None)
        if larger is None:
            best.append(fit)
        else:
            left = ", ".join(name for name in larger.names.values() if name not in known)
            misfits[fit.name] = f"it has no {left}, as {larger.name!r} has."
    names = {fit.name for fit in best}
    return best, {name: reason for name, reason in misfits.items() if name not in names}


def _oversized(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, shape in shapes.items():
        if not all(0 < size <= MAX_AXIS for size in shape):
            return f"no attention layer has an array as large as `{name}` of shape {shape}."
    return None


def pattern_of(prefix: str) -> str:
    """The prefix with letters for its numbers: ``encoder.layer.{i}.attention.``."""
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda match: f"{{{next(letters, 'q')}}}", prefix)


def numbers_of(prefix: str) -> dict[str, str]:
    """The prefix's numbers by their letters."""
    return dict(zip(_LETTERS, _NUMBER.findall(prefix), strict=False))


def matches(prefix: str, pattern: str) -> bool:
    """Whether a layer's prefix begins with a pattern.

    Args:
        prefix: The prefix.
        pattern: A text; a letter in braces stands for a number, a star for any text. It ends where
            a part of the prefix ends.
    """
    parts = re.split(r"(\{[a-z]\}|\*)", pattern)
    text = "".join(
        r"\d+" if re.fullmatch(r"\{[a-z]\}", part) else ".*" if part == "*" else re.escape(part)
        for part in parts
    )
    end = "" if pattern.endswith((".", "/", "*")) or not pattern else r"(?=[./]|$)"
    return re.match(text + end, prefix) is not None
