"""NumPy's ``.npz``: a zip archive of arrays, each with a header of its own.

NumPy writes the dtypes of `ml_dtypes` as raw bytes without their names, so bfloat16 and float8 are
refused in both directions; Python objects are never read.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from anymha.errors import FileError
from anymha.interchange.files.archive import Archive
from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.reader import Reader, Tensor, check_all_written, check_array
from anymha.text import quoted, shown

KIND = "an .npz"
SUFFIX = ".npy"
KINDS = "biufcUS"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NpzReader(Reader):
    """An open ``.npz`` file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        self._archive = Archive(path, KIND)
        self._headers: dict[str, tuple[int, bool, np.dtype]] = {}
        try:
            self.set_tensors(self._collect())
        except BaseException:
            self.close()
            raise

    def _collect(self) -> Iterator[tuple[str, Tensor]]:
        for member in self._archive.sizes:
            if member.endswith(SUFFIX):
                name = member.removesuffix(SUFFIX)
                tensor, self._headers[name] = self._header(member)
                yield name, tensor

    def _header(self, member: str) -> tuple[Tensor, tuple[int, bool, np.dtype]]:
        with self._archive.open(member) as stream:
            try:
                shape, order, dtype = _parsed(stream)
            except FileError:
                raise
            except Exception as error:  # of NumPy's parser, which raises what Python's own does
                raise self.broken(
                    f"the header of {quoted(member)} is broken ({shown(error)})"
                ) from error
            begin = stream.tell()
        if dtype.kind not in KINDS or not dtype.itemsize:
            raise self.broken(
                f"{quoted(member)} holds {dtype}, not numbers"
                + (" (NumPy writes bfloat16 and float8 so, without saying which they were)"
                   if dtype.kind == "V" else "")
            )  # fmt: skip
        tensor = Tensor(tuple(shape), dtype.newbyteorder("="))
        if begin + tensor.bytes != self._archive.sizes[member]:
            raise self.broken(
                f"{quoted(member)} has {self._archive.sizes[member] - begin} bytes after its "
                f"header, and {dtype} of shape {quoted(tensor.shape)} takes {tensor.bytes}"
            )
        return tensor, (begin, order, dtype)

    def _read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        begin, reverse, dtype = self._headers[name]
        shape = tensor.shape[::-1] if reverse else tensor.shape
        array = self._archive.array(name + SUFFIX, Tensor(shape, dtype), begin)
        array = array.T if reverse else array
        return np.ascontiguousarray(array, tensor.dtype).reshape(tensor.shape)

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


def _parsed(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"it has the version {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's parser, about what it then refuses
        shape, order, dtype = _HEADERS[version](stream)
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"it has the shape {shape}")
    return shape, order, dtype


def open_npz(path: Path) -> NpzReader:
    """The arrays of an ``.npz`` file.

    Raises:
        FileError: it cannot be read, or is broken.
    """
    return NpzReader(path)


class _NpzWriter:
    def __init__(self, archive: zipfile.ZipFile, tensors: Mapping[str, Tensor]) -> None:
        self._archive, self._tensors, self._missing = archive, tensors, set(tensors)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write an announced tensor."""
        array = check_array(name, array, self._tensors[name])
        with self._archive.open(name + SUFFIX, "w", force_zip64=True) as stream:
            npy.write_array(stream, array, allow_pickle=False)
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that the file is complete."""
        check_all_written(self._missing)


@contextmanager
def create_npz(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[_NpzWriter]:
    """A new ``.npz`` file, which is there once all its arrays are. It holds no metadata.

    Raises:
        FileError: it cannot be written, or cannot hold a dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in KINDS or tensor.dtype.isbuiltin == 2:
            raise FileError(
                f"An .npz file cannot hold `{shown(name)}` of dtype {tensor.dtype}: NumPy writes "
                "it without its name. Write a .safetensors file."
            )
    with atomic_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        writer = _NpzWriter(archive, tensors)
        yield writer
        writer.finish()
