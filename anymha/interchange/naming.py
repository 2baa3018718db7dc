"""How the names of a layout are spelled in a file.

Most files have the names of the layout. Keras's HDF5 files name the variables of a layer by number;
and names of nested dicts may be joined by dots or by slashes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from anymha.interchange.files.formats import Format
from anymha.interchange.layout import Layout

HDF5 = ("Keras weights (HDF5)", "Keras model")
_LAYERS = ("query", "key", "value", "gate", "attention_output")
_PARTS = ("kernel", "bias")
_GATE = "_gate_dense"


def _in_hdf5(mark: str) -> dict[str, str]:
    """Keras's names in HDF5: of each attribute that holds a layer, its variables by number."""
    layers = {name: f"{mark}{name.removeprefix('attention_')}_dense" for name in _LAYERS}
    layers["gate"] = _GATE
    return {
        f"{name}/{part}": f"{layer}/vars/{number}"
        for name, layer in layers.items()
        for number, part in enumerate(_PARTS)
    }


KERAS = {
    "keras.MultiHeadAttention": _in_hdf5(""),
    "keras.GroupQueryAttention": _in_hdf5("_"),
}


@dataclass(frozen=True)
class Spelled:
    """A layout as a file spells it.

    Args:
        layout: The layout.
        names: The file's names by the layout's.
        separator: What stands between the parts of the file's names.
    """

    layout: Layout
    names: Mapping[str, str]
    separator: str

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """What the names of each layer begin with, in the file's names."""
        held, found = set(names), {}
        for required in self.layout.required():
            mark, *others = (self.names[name] for name in required)
            for name in held:
                start = name.removesuffix(mark)
                whole = name.endswith(mark) and start[-1:] in ("", ".", "/")
                if whole and all(start + one in held for one in others):
                    found[start] = None
        return sorted(found, key=_natural)

    def held(self, names: Container[str], prefix: str) -> dict[str, str]:
        """The names in the file of one layer's arrays, by their names in the layout."""
        return {name: prefix + one for name, one in self.names.items() if prefix + one in names}


def spellings(layout: Layout, one: Format) -> list[Spelled]:
    """How files of a format may spell a layout; a new file has the first."""
    if one.name in HDF5 and layout.name in KERAS:
        return [Spelled(layout, KERAS[layout.name], "/")]
    other = "." if layout.separator == "/" else "/"
    plain = {name: name for name in layout.names()}
    joined = {name: name.replace(layout.separator, other) for name in plain}
    return [Spelled(layout, plain, layout.separator), Spelled(layout, joined, other)]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers within names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
