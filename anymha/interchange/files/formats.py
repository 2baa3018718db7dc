"""The known formats of files, a line each; a file's own bytes count for more than its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from anymha.errors import FileError
from anymha.interchange.files import content
from anymha.interchange.files.folders import BELOW, WEIGHTS, folder_kind, refuse_folder
from anymha.interchange.files.names import (
    hdf5_fault,
    name_fault,
    npz_fault,
    safetensors_fault,
)
from anymha.interchange.files.paths import kind_of, readable
from anymha.interchange.files.reader import (
    Reader,
    Tensor,
    Writer,
    check_bytes,
    check_total,
    limited,
)
from anymha.interchange.files.sharded import (
    INDEX,
    ShardedReader,
    create_sharded,
    shard_index,
    split_shards,
)
from anymha.interchange.files.siblings import siblings
from anymha.text import quoted, shown

MAX_SHARD_BYTES = 5 * 10**9
"""The size of shards where none is stated."""
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
        begins: Whether a file with these first bytes may be of the format; None where any may.
        name_fault: Why it cannot hold a tensor's name among all those of a file, in words.
    """

    name: str
    suffixes: tuple[str, ...]
    reader: str
    writer: str | None = None
    separator: str = "."
    metadata: bool = False
    begins: Callable[[bytes], bool] | None = None
    name_fault: Callable[[str, Collection[str]], str | None] = lambda name, names: None


_HERE = "anymha.interchange.files"
_SHARDS = "shards"
"""Stands for the reader of an index, whose files are of another format."""
FORMATS = (
    Format("safetensors", (".safetensors",), "safetensors:open_safetensors",
           "safetensors:create_safetensors", metadata=True, begins=content.is_safetensors,
           name_fault=safetensors_fault),
    Format("sharded safetensors", (".safetensors.index.json",), _SHARDS,
           "safetensors:create_safetensors", metadata=True, begins=content.is_json,
           name_fault=safetensors_fault),
    Format("sharded torch", (".bin.index.json", ".pt.index.json"), _SHARDS,
           "torch_writer:create_torch", begins=content.is_json),
    Format("sharded Flax msgpack", (".msgpack.index.json",), _SHARDS, None, "/",
           begins=content.is_json),
    Format("sharded HDF5", (".h5.index.json",), _SHARDS, None, "/", begins=content.is_json),
    Format("NumPy", (".npz",), "npz:open_npz", "npz:create_npz", begins=content.is_zip,
           name_fault=npz_fault),
    Format("torch", (".pt", ".pth", ".bin", ".ckpt", ".pth.tar"), "torch_legacy:open_any_torch",
           "torch_writer:create_torch", begins=content.is_torch),
    Format("Keras weights (HDF5)", (".h5", ".hdf5"), "hdf5:open_hdf5", "hdf5:create_hdf5", "/",
           begins=content.is_hdf5, name_fault=hdf5_fault),
    Format("Keras model", (".keras",), "keras:open_keras", separator="/", begins=content.is_zip),
    Format("ONNX", (".onnx",), "onnx:open_onnx", begins=content.is_onnx),
    Format("GGUF", (".gguf",), "gguf:open_gguf", begins=content.is_gguf),
    Format("Flax msgpack", (".msgpack",), "msgpack:open_msgpack", separator="/",
           begins=content.is_msgpack),
    Format("TensorFlow checkpoint", (".index", "saved_model.pb", FOLDER),
           "tensorflow_checkpoint:open_tensorflow", separator="/"),
    Format("torch distributed checkpoint", (FOLDER,), "torch_distributed:open_distributed"),
    Format("Orbax checkpoint", (FOLDER,), "orbax:open_orbax", separator="/"),
)  # fmt: skip
_BY_NAME = {one.name: one for one in FORMATS}


def format_of(path: Path) -> Format:
    """The format of a file or a folder, as `locate` finds it.

    Raises:
        FileError: it is of no known format.
    """
    return locate(path)[0]


def locate(path: Path) -> tuple[Format, Path]:
    """The format of a file or folder, and the file that holds the weights.

    A file's first bytes decide; where they fit the format of its name, or nothing else, its name
    does. In a folder of Hugging Face it is the file of weights, or their index.

    Raises:
        FileError: it is of no known format, and what it is, where that is known; or it cannot be
            read.
    """
    with readable(path):
        return _located(path)


def _located(path: Path) -> tuple[Format, Path]:
    kind = kind_of(path)
    if kind == "folder":
        return _locate_in(path)
    named = _named(path.name)
    if kind == "nothing":
        if path.name and kind_of(path.with_name(f"{path.name}.index")) == "file":
            return _BY_NAME["TensorFlow checkpoint"], path
        if named is None:
            raise _missing(path)
        return named, path
    head = content.head_of(path)
    content.refuse_by_name(path)
    if named is not None and (named.begins is None or named.begins(head)):
        return named, path
    name = content.format_name(path, head)
    if name is not None:
        return _BY_NAME[name], path
    content.refuse(path, head)
    if named is None:
        raise FileError(
            f"{shown(path)} is of no known format, neither by its name nor by its first bytes. "
            f"Known are: {_listed(FORMATS)}, and the folders of Hugging Face, Orbax, TensorFlow "
            "and torch."
        )
    return named, path


def _locate_in(folder: Path) -> tuple[Format, Path]:
    kind = folder_kind(folder)
    if kind is not None:
        return _BY_NAME[kind[0]], kind[1]
    for name in WEIGHTS:
        if (folder / name).is_file():
            return locate(folder / name)
    files = _weights_among(folder.iterdir())  # which raises where the folder is closed
    indices = [one for one in files if one.name.endswith(INDEX)]
    if len(indices or files) == 1:
        return locate((indices or files)[0])
    below = chain.from_iterable(map(folder.glob, BELOW))
    raise refuse_folder(folder, files or _weights_among(below))


def _weights_among(paths: Iterable[Path]) -> list[Path]:
    """The files that may be weights, by their names."""
    return [one for one in sorted(paths) if one.is_file() and _named(one.name)]


def open_file(path: Path, max_bytes: int | None = None) -> Reader:
    """The tensors of a file or folder of any known format, to be closed or used in a `with`.

    Args:
        path: The file.
        max_bytes: The most bytes that its arrays may take together, whatever the file claims.
            Default: 100 times the bytes of the file, and 64 MiB always.

    Raises:
        FileError: the format is not known, or the file cannot be read or is broken; or its arrays
            take more than is allowed.
        ArgumentError: `max_bytes` is not a positive integer.
    """
    file_format, file = locate(path)
    if kind_of(file) == "nothing" and file_format.name != "TensorFlow checkpoint":
        raise _missing(path)
    with limited(max_bytes), readable(path):
        reader = _reader(file_format, file, max_bytes)
        try:
            check_total(reader)
        except BaseException:
            reader.close()
            raise
    return reader


def _missing(path: Path) -> FileError:
    return FileError(f"{shown(path)} cannot be read: there is no such file.")


def _reader(file_format: Format, file: Path, max_bytes: int | None) -> Reader:
    if file_format.reader != _SHARDS:
        return _function(file_format.reader)(file)
    inner = _named(file.name.removesuffix(INDEX))
    suffixes = inner.suffixes if inner else ()
    return ShardedReader(file, lambda shard: open_file(shard, max_bytes), suffixes)


def files_of(path: Path) -> list[Path]:
    """All files that a source consists of, as far as they can be found: it must not be written to.

    Those are the file, what it needs, and what an index next to it names together with it.
    """
    try:
        with open_file(path) as reader:
            files = reader.files()
    except FileError:  # what reads it may know more of it
        files = [path]
    return [*files, *siblings(files)]


def create_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> AbstractContextManager[Writer]:
    """A context in which a new file is written, one tensor at a time.

    Args:
        path: The file; the end of its name says the format.
        tensors: Shape and dtype of each tensor that will be written.
        metadata: Texts besides the tensors, for a format that has them.
        max_shard_bytes: The most bytes of tensors in a file. Where there are more, or `path` is an
            index, files next to it and an index of them are written, as
            ``model-00001-of-00002.safetensors`` and ``model.safetensors.index.json``.

    Raises:
        FileError: the format is not written, or cannot hold the tensors.
    """
    file_format = writable_format(path)
    for name in tensors:
        fault = name_fault(name) or file_format.name_fault(name, tensors.keys())
        if fault is not None:
            raise FileError(
                f"{shown(path.name)}: {file_format.name} cannot hold the name {quoted(name)}, as "
                f"it {fault}."
            )
    create = _function(file_format.writer)
    index, *shards = new_files(path, tensors, max_shard_bytes)
    if not shards:
        return create(path, tensors, metadata or {})
    limit = max_shard_bytes or MAX_SHARD_BYTES
    return create_sharded(index, tensors, metadata or {}, create, limit)


def new_files(
    path: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int | None = None
) -> list[Path]:
    """The files that `create_file` writes: the one to open, then the shards where there are any.

    Raises:
        ArgumentError: `max_shard_bytes` is no positive integer.
        FileError: the format is not written.
    """
    check_bytes("max_shard_bytes", max_shard_bytes)
    size = sum(tensor.bytes for tensor in tensors.values())
    is_index = writable_format(path).reader == _SHARDS
    if not is_index and (max_shard_bytes is None or size <= max_shard_bytes):
        return [path]
    return [shard_index(path), *split_shards(path, tensors, max_shard_bytes or MAX_SHARD_BYTES)]


def writable_format(path: Path) -> Format:
    """The format of a file to be written, by the end of its name.

    Raises:
        FileError: no such format is written.
    """
    written = _listed(one for one in FORMATS if one.writer)
    if kind_of(path) == "folder":
        raise FileError(f"{shown(path)}: a folder is only read. Written are: {written}.")
    file_format = _named(path.name)
    if file_format is None:
        raise FileError(f"{shown(path)} has a name of no known format. Written are: {written}.")
    if file_format.writer is None:
        raise FileError(f"{shown(path)}: {file_format.name} is only read. Written are: {written}.")
    return file_format


def _named(name: str) -> Format | None:
    """The format with the longest of the suffixes that end a name."""
    endings = [(len(suffix), number) for number, one in enumerate(FORMATS)
               for suffix in one.suffixes if name.lower().endswith(suffix)]  # fmt: skip
    return FORMATS[max(endings)[1]] if endings else None


def _listed(formats: Iterable[Format]) -> str:
    return ", ".join(suffix for one in formats for suffix in one.suffixes if suffix != FOLDER)


def _function(place: str | None) -> Any:
    module, _, name = str(place).partition(":")
    return getattr(importlib.import_module(f"{_HERE}.{module}"), name)
