"""The names that files use for the arrays of a layout.

Most files use the layout's own names. Keras's HDF5 files number the variables of a layer, and the
names of nested dicts are joined by dots or by slashes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from anymha.interchange.files.formats import Format
from anymha.interchange.layout import Layout
from anymha.interchange.name_index import NameIndex

HDF5 = ("Keras weights (HDF5)", "Keras model")
_LAYERS = ("query", "key", "value", "gate", "attention_output")
_PARTS = ("kernel", "bias")
_GATE = "_gate_dense"


def _hdf5_names(mark: str) -> dict[str, str]:
    """Keras's names in HDF5: the attribute that holds a layer, and the number of the variable."""
    layers = {name: f"{mark}{name.removeprefix('attention_')}_dense" for name in _LAYERS}
    layers["gate"] = _GATE
    return {
        f"{name}/{part}": f"{layer}/vars/{number}"
        for name, layer in layers.items()
        for number, part in enumerate(_PARTS)
    }


KERAS = {
    "keras.MultiHeadAttention": _hdf5_names(""),
    "keras.GroupQueryAttention": _hdf5_names("_"),
}


@dataclass(frozen=True)
class FileNaming:
    """The names of a layout's arrays in a file.

    Args:
        layout: The layout.
        names: The file's names by the layout's.
        separator: What stands between the parts of the file's names.
    """

    layout: Layout
    names: Mapping[str, str]
    separator: str

    def prefixes(self, index: NameIndex) -> list[str]:
        """The prefix of each layer's names, out of all names in the file."""
        prefixes: set[str] = set()
        for required in self.layout.required():
            mark, *others = (self.names[name] for name in required)
            prefixes |= {
                prefix
                for prefix in index.prefixes(mark)
                if all(prefix + other in index for other in others)
            }
        return sorted(prefixes, key=natural_key)

    def layer_names(self, names: Container[str], prefix: str) -> dict[str, str]:
        """The file's names of one layer's arrays by the layout's, without the prefix."""
        return {name: place for name, place in self.names.items() if prefix + place in names}


def file_namings(layout: Layout, file_format: Format) -> list[FileNaming]:
    """The namings that a format's files may have for a layout; new files have the first."""
    numbered = file_format.name in HDF5 and layout.name in KERAS
    first = [FileNaming(layout, KERAS[layout.name], "/")] if numbered else []
    other = "." if layout.separator == "/" else "/"
    plain = {name: name for name in layout.names()}
    joined = {name: name.replace(layout.separator, other) for name in plain}
    namings = [FileNaming(layout, plain, layout.separator), FileNaming(layout, joined, other)]
    return first + (namings if joined != plain else namings[:1])


def natural_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by their value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
