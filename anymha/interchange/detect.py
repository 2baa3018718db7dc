"""The attention layers of a file, found by names and shapes, and the layouts that they may have.

Nothing is decided: several layouts may have the same names and shapes and mean different things,
and then all are given.
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
from anymha.interchange.naming import Spelled, spellings
from anymha.options.config import AttentionConfig

_NUMBER = re.compile(r"(?<![^./_])\d+(?![^./])")
_LETTERS = "ijklmnop"
WIDEST = 2**24
"""No axis of an attention layer is longer; of hostile shapes no divisors are looked for."""


@dataclass(frozen=True)
class Candidate:
    """A layout that a layer may have.

    Args:
        spelled: The layout, as the file spells it.
        held: The names in the file by the names in the layout, without the prefix.
        shapes: Shapes by the names in the layout.
    """

    spelled: Spelled
    held: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The layout's name."""
        return self.spelled.layout.name


@dataclass
class Group:
    """Layers of one kind, whose names differ in numbers alone.

    Args:
        pattern: What their names begin with, with letters for the numbers.
        prefixes: What the names of each begin with.
        fits: The layouts that they may have.
        misfits: Layouts with these names that they cannot have, and why.
        tensors: Shape and dtype of each array of the first layer, by its name there.
    """

    pattern: str
    prefixes: list[str]
    fits: list[Candidate]
    misfits: dict[str, str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> AttentionConfig | None:
        """The config that the shapes tell; None where they leave the heads open."""
        if not self.fits:
            return None
        try:
            arrays = {
                name: np.zeros(shape, np.float16) for name, shape in self.fits[0].shapes.items()
            }
            return self.fits[0].spelled.layout.to_canonical(arrays)[1]
        except AnymhaError:
            return None


def find(tensors: Mapping[str, Tensor], one: Format) -> list[Group]:
    """The attention layers of a file, those that are alike together.

    Args:
        tensors: Shape and dtype of each tensor of the file.
        one: The file's format.
    """
    candidates: dict[str, list[Candidate]] = {}
    for name in layouts():
        for spelled in spellings(get_layout(name), one):
            for prefix in spelled.prefixes(tensors):
                candidates.setdefault(prefix, []).append(candidate(spelled, tensors, prefix))
    groups: dict[object, Group] = {}
    for prefix in sorted(candidates):
        fits, misfits = sifted(candidates[prefix])
        held = {n: tensors[prefix + n] for c in candidates[prefix] for n in c.held.values()}
        key = (pattern_of(prefix), tuple(c.name for c in fits), tuple(held.items()))
        group = groups.setdefault(key, Group(key[0], [], fits, misfits, held))
        group.prefixes.append(prefix)
    return list(groups.values())


def candidate(spelled: Spelled, tensors: Mapping[str, Tensor], prefix: str) -> Candidate:
    """What the layer with that prefix has of a layout."""
    held = spelled.held(tensors, prefix)
    shapes = {name: tensors[place].shape for name, place in held.items()}
    return Candidate(spelled, {n: p.removeprefix(prefix) for n, p in held.items()}, shapes)


def sifted(candidates: list[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """The layouts that a layer may have; and those that it cannot have, and why.

    A layout that leaves an array over which another one knows is not the layer's.
    """
    misfits: dict[str, str] = {}
    fits = []
    for one in candidates:
        reason = _impossible(one.shapes) or one.spelled.layout.fits(one.shapes)
        if reason is None:
            fits.append(one)
        else:
            misfits[one.name] = reason
    best = []
    for one in fits:
        known = set(one.held.values())
        more = next((c for c in fits if set(c.held.values()) > known), None)
        if more is None:
            best.append(one)
        else:
            left = ", ".join(n for n in more.held.values() if n not in known)
            misfits[one.name] = f"it has no {left}, as {more.name!r} has."
    return best, {n: r for n, r in misfits.items() if n not in {c.name for c in best}}


def _impossible(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, shape in shapes.items():
        if not all(0 < size <= WIDEST for size in shape):
            return f"`{name}` of shape {shape} takes no layer of attention."
    return None


def pattern_of(prefix: str) -> str:
    """The prefix with letters for its numbers: ``encoder.layer.{i}.attention.``."""
    letters = iter(_LETTERS)
    return _NUMBER.sub(lambda found: f"{{{next(letters, 'q')}}}", prefix)


def numbers_of(prefix: str) -> dict[str, str]:
    """The prefix's numbers by their letters."""
    return dict(zip(_LETTERS, _NUMBER.findall(prefix), strict=False))


def matches(prefix: str, pattern: str) -> bool:
    """Whether a layer's prefix begins as a pattern says.

    Args:
        prefix: The prefix.
        pattern: A text; a letter in braces stands for a number, a star for any text. It ends where
            a part of the prefix ends.
    """
    parts = re.split(r"(\{[a-z]\}|\*)", pattern)
    told = {"*": ".*"}
    text = "".join(
        r"\d+" if re.fullmatch(r"\{[a-z]\}", part) else told.get(part, re.escape(part))
        for part in parts
    )
    end = "" if pattern.endswith((".", "/", "*")) or not pattern else r"(?=[./]|$)"
    return re.match(text + end, prefix) is not None
