"""The known formats of files, a line each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import FileError
from anymha.interchange.files.paths import kind_of
from anymha.interchange.files.reader import Reader, Tensor, Writer, check_total, limited
from anymha.interchange.files.siblings import siblings
from anymha.text import shown

FOLDER = "/"
"""The "suffix" of formats that are a folder."""


@dataclass(frozen=True)
class Format:
    """A format of files.

    Args:
        name: Its name.
        suffixes: The ends of its files' names.
        reader: The module and the function that opens a file.
        writer: The module and the function that begins a new one; None where it is only read.
        separator: The text between the parts of a tensor's name.
        metadata: Whether its files can have texts besides the tensors.
    """

    name: str
    suffixes: tuple[str, ...]
    reader: str
    writer: str | None = None
    separator: str = "."
    metadata: bool = False


_HERE = "anymha.interchange.files"
FORMATS = (
    Format("safetensors", (".safetensors",), "safetensors:open_safetensors",
           "safetensors:create_safetensors", metadata=True),
    Format("sharded safetensors", (".safetensors.index.json",), "sharded:open_sharded"),
    Format("NumPy", (".npz",), "npz:open_npz", "npz:create_npz"),
    Format("torch", (".pt", ".pth", ".bin"), "torch_reader:open_torch",
           "torch_writer:create_torch"),
    Format("Keras weights (HDF5)", (".h5", ".hdf5"), "hdf5:open_hdf5", "hdf5:create_hdf5", "/"),
    Format("Keras model", (".keras",), "keras:open_keras", separator="/"),
    Format("ONNX", (".onnx",), "onnx:open_onnx"),
    Format("Orbax checkpoint", (FOLDER,), "orbax:open_orbax", separator="/"),
)  # fmt: skip


def format_of(path: Path) -> Format:
    """The format of a file, by the end of its name; of a folder, Orbax's.

    Raises:
        FileError: no format has files of that name.
    """
    if kind_of(path) == "folder":
        return next(one for one in FORMATS if FOLDER in one.suffixes)
    for one in FORMATS:
        if path.name.lower().endswith(one.suffixes):
            return one
    raise FileError(
        f"{shown(path)} has a name of no known format. Known are: {_listed(FORMATS)}, and the "
        "folders of Orbax."
    )


def open_file(path: Path, max_bytes: int | None = None) -> Reader:
    """The tensors of a file of any known format, to be closed or used in a `with`.

    Args:
        path: The file.
        max_bytes: The most bytes that its arrays may take together, whatever the file claims.
            Default: 100 times the bytes of the file, and 64 MiB always.

    Raises:
        FileError: the format is not known, or the file cannot be read or is broken; or its arrays
            take more than is allowed.
        ArgumentError: `max_bytes` is not a positive integer.
    """
    if kind_of(path) == "nothing":
        raise FileError(f"{shown(path)} cannot be read: there is no such file.")
    with limited(max_bytes):
        reader: Reader = _function(format_of(path).reader)(path)
        try:
            check_total(reader)
        except BaseException:
            reader.close()
            raise
    return reader


def files_of(path: Path) -> list[Path]:
    """All files that a source consists of, as far as they can be found: it must not be written to.

    Those are the file, what it needs, and what an index next to it names together with it.
    """
    try:
        with open_file(path) as reader:
            files = reader.files()
    except FileError:  # what reads it may know more of it
        files = [path]
    return [*files, *siblings(path)]


def create_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> AbstractContextManager[Writer]:
    """A context in which a new file is written, one tensor at a time.

    Args:
        path: The file; the end of its name says the format.
        tensors: Shape and dtype of each tensor that will be written.
        metadata: Texts besides the tensors, for a format that has them.

    Raises:
        FileError: the format is not written, or cannot hold the tensors.
    """
    return _function(writable_format(path).writer)(path, tensors, metadata or {})


def writable_format(path: Path) -> Format:
    """The format of a file to be written.

    Raises:
        FileError: no such format is written.
    """
    file_format = format_of(path)
    if file_format.writer is None:
        written = [one for one in FORMATS if one.writer]
        raise FileError(
            f"{shown(path)}: {file_format.name} is only read. Written are: {_listed(written)}."
        )
    return file_format


def _listed(formats: Any) -> str:
    return ", ".join(suffix for one in formats for suffix in one.suffixes if suffix != FOLDER)


def _function(place: str | None) -> Any:
    module, _, name = str(place).partition(":")
    return getattr(importlib.import_module(f"{_HERE}.{module}"), name)
