"""HDF5, as in Keras's ``.weights.h5``: datasets by path, as ``layers/dense/vars/0``.

Only what lies in the file itself is read: links to other places and datasets whose elements lie in
other files are refused. bfloat16 and float8 are opaque bytes with an attribute `dtype` that names
them, bfloat16 as Keras writes it; opaque bytes without one are refused.

References:
    Keras 3.15, ``keras/src/saving/saving_lib.py``, `H5IOStore`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.hdf5_chunks import BrokenChunk, Chunks, has_own_fill_value
from anymha.interchange.files.hdf5_tables import CheckedTables
from anymha.interchange.files.names import MAX_GROUPS, MAX_NAME, OUTPUT
from anymha.interchange.files.optional import require_library
from anymha.interchange.files.reader import (
    Reader,
    Tensor,
    check_all_written,
    check_array,
    fits_memory,
    open_stream,
)
from anymha.text import quoted, shown

KIND = "an HDF5"
KINDS = "biufc"
MAX_LINKS = 1_000
"""The most second names of datasets that a file may have; each is looked at anew."""
OPAQUE = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}


class Hdf5Reader(Reader):
    """An open HDF5 file.

    Args:
        path: The file.
        stream: A stream of its bytes; default the file at `path`.
        kind: The format's name in messages.
    """

    def __init__(self, path: Path, stream: BinaryIO | None = None, kind: str = KIND) -> None:
        super().__init__(path, kind)
        self._h5py = require_library("h5py", path, "hdf5")
        self._stream = open_stream(path)[0] if stream is None else stream
        self._size = self._stream.seek(0, 2)
        self._file: Any = None
        self._datasets: dict[str, Any] = {}
        self._chunks: dict[str, Chunks] = {}
        self._unpacked = 0
        self._addresses: set[int] = set()
        self._links = 0
        try:
            with self._guard():
                self._file = self._h5py.File(CheckedTables(self._stream), "r")
                self.set_tensors(self._walk(self._file, ""))
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except Exception as error:  # of HDF5's library, which raises nearly every kind
            raise self.broken(shown(error).rstrip(".")) from error

    def _walk(self, group: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        if self._is_known(group) or prefix.count("/") > MAX_GROUPS:
            raise self.broken(f"its group {quoted(prefix)} holds itself, or lies too deep")
        for key in group:
            name = f"{prefix}{key}"
            if len(name) > MAX_NAME:
                raise self.broken(f"its name {quoted(name)} is too long")
            if not isinstance(group.get(key, getlink=True), self._h5py.HardLink):
                raise self.broken(
                    f"{quoted(name)} is a link to another place, which is not followed"
                )
            item = group[key]
            if isinstance(item, self._h5py.Group):
                yield from self._walk(item, f"{name}/")
            elif isinstance(item, self._h5py.Dataset):
                self._links += self._is_known(item)
                if self._links > MAX_LINKS:
                    raise self.broken(f"it has more than {MAX_LINKS} second names of datasets")
                # Older names of TensorFlow's variables end with an operation's output.
                plain = name.removesuffix(OUTPUT)
                name = name if plain.removeprefix(prefix) in group else plain
                self._datasets[name] = item
                yield name, self._tensor(name, item)

    def _is_known(self, item: Any) -> bool:
        """Whether a group or dataset was seen before, under another name."""
        address = self._h5py.h5o.get_info(item.id).addr
        known = address in self._addresses
        self._addresses.add(address)
        return known

    def _tensor(self, name: str, item: Any) -> Tensor:
        if item.external or item.is_virtual or item.shape is None:
            raise self.broken(f"the elements of {quoted(name)} do not lie in this file")
        dtype = item.dtype
        if dtype.kind == "V":
            named = OPAQUE.get(self._opaque(item))
            if named is None or named.itemsize != dtype.itemsize:
                raise self.broken(f"{quoted(name)} holds bytes without the name of their dtype")
            dtype = named
        elif dtype.kind not in KINDS:
            raise self.broken(f"{quoted(name)} holds {dtype}, not numbers")
        tensor = Tensor(tuple(int(size) for size in item.shape), dtype.newbyteorder("="))
        if not fits_memory(tensor.bytes, item.id.get_storage_size()):
            raise self.broken(
                f"{quoted(name)} claims {tensor.bytes} bytes in {item.id.get_storage_size()}, as a "
                "file does that is made to fill the memory"
            )
        own_fill_value = has_own_fill_value(item)  # raises where the file's words about it clash
        if item.chunks is not None:
            self._check_chunks(name, item)
        elif own_fill_value and tensor.bytes and item.id.get_storage_size() == 0:
            raise self.broken(f"{quoted(name)} is not stored, and has a fill value of its own")
        return tensor

    def _check_chunks(self, name: str, item: Any) -> None:
        """Look at how a dataset is packed, before anything of it is read."""
        stored = self._h5py.h5t.py_create(item.dtype, logical=True)
        try:
            chunks = Chunks(item, self._stream, bool(item.id.get_type().equal(stored)))
        except BrokenChunk as error:
            raise self.broken(f"{quoted(name)} {error}") from error
        self._unpacked += chunks.unpacked
        if not fits_memory(self._unpacked, self._size):
            raise self.broken(f"{quoted(name)} has chunks that unpack to {chunks.unpacked} bytes")
        self._chunks[name] = chunks

    def _opaque(self, item: Any) -> str:
        """The name of an opaque dtype.

        Keras stores it as a text of variable length, in another place of the file. That place is
        not read: Keras has such texts for bfloat16 alone, and HDF5's library can read for ever on
        a file that is damaged there.
        """
        if "dtype" not in item.attrs:
            return ""
        kind = item.attrs.get_id("dtype").get_type()
        if not isinstance(kind, self._h5py.h5t.TypeStringID):
            return ""
        if kind.is_variable_str():
            return "bfloat16"
        if kind.get_size() > MAX_NAME:
            return ""
        return bytes(item.attrs["dtype"]).decode("ascii")

    def _read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        with self._guard():
            array = self._elements(name, tensor)
            if array.dtype.kind == "V":
                array = np.ascontiguousarray(array).view(tensor.dtype)
            return np.ascontiguousarray(array, tensor.dtype).reshape(tensor.shape)

    def _elements(self, name: str, tensor: Tensor) -> np.ndarray:
        """The elements in the file's dtype."""
        if name not in self._chunks:
            return np.asarray(self._datasets[name][()])
        try:
            return self._chunks[name].read(tensor)
        except BrokenChunk as error:
            raise self.broken(f"{quoted(name)} {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._datasets.clear()
        self._chunks.clear()
        if self._file is not None:
            self._file.close()
        self._stream.close()


def open_hdf5(path: Path) -> Hdf5Reader:
    """The datasets of an HDF5 file.

    Raises:
        FileError: it cannot be read, is broken, or reaches outside itself; or h5py is missing.
    """
    return Hdf5Reader(path)


class _Hdf5Writer:
    def __init__(self, file: Any, tensors: Mapping[str, Tensor]) -> None:
        self._file, self._tensors, self._missing = file, tensors, set(tensors)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write an announced tensor."""
        array = check_array(name, array, self._tensors[name])
        opaque = array.dtype.name in OPAQUE
        values = array.view(f"V{array.dtype.itemsize}") if opaque else array
        dataset = self._file.create_dataset(name, data=values)
        if opaque:
            named = array.dtype.name
            dataset.attrs["dtype"] = named if named == "bfloat16" else np.bytes_(named)
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that the file is complete."""
        check_all_written(self._missing)


@contextmanager
def create_hdf5(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[_Hdf5Writer]:
    """A new HDF5 file, which is there once all its datasets are. It has no metadata.

    Raises:
        FileError: it cannot be written, or cannot hold a dtype; or h5py is missing.
    """
    h5py = require_library("h5py", path, "hdf5")
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in KINDS and tensor.dtype.name not in OPAQUE:
            raise FileError(f"An HDF5 file cannot hold `{shown(name)}` of dtype {tensor.dtype}.")
    with atomic_file(path) as stream, h5py.File(stream, "w") as file:
        writer = _Hdf5Writer(file, tensors)
        yield writer
        writer.finish()
