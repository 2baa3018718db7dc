"""torch's ``.pt``, ``.pth`` and ``.bin``: a zip archive of a pickle and of the tensors' bytes.

Neither torch nor Python's pickle is used: the pickle is read as data by `pickles`, so nothing in a
file can run, and the files are read and written where torch is not installed.

References:
    PyTorch 2.13, ``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anymha.interchange.files.archive import Archive
from anymha.interchange.files.pickles import PickleMachine, RefusedPickle, Storage, StridedTensor
from anymha.interchange.files.reader import Reader, Tensor, fits_memory
from anymha.text import quoted, shown

KIND = "a torch"
MAX_PICKLE = 100_000_000
MAX_VALUES = 1_000_000
MAX_DEPTH = 32

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
UNTYPED = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}


class TorchReader(Reader):
    """An open file of torch. Nested dicts give names with dots; other values are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        self._kept: tuple[Storage, np.ndarray] | None = None
        self._open()
        try:
            self._tensors: dict[str, StridedTensor] = {}
            self.set_tensors(self._collect(self._run_pickle()))
        except RefusedPickle as error:
            self.close()
            raise self.broken(str(error)) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._archive = Archive(self.path, KIND)

    def _run_pickle(self) -> Any:
        """The saved object, whose tensors are `StridedTensor`s."""
        self._root = self._pickle_folder()
        return PickleMachine(self._archive.read(f"{self._root}data.pkl")).run()

    def _stored_bytes(self, storage: Storage) -> int | None:
        """How many bytes of a storage there are in the file; None where it has no such storage."""
        return self._archive.sizes.get(f"{self._root}data/{storage.key}")

    def _storage(self, storage: Storage, size: int) -> np.ndarray:
        """The bytes of a storage."""
        record = f"{self._root}data/{storage.key}"
        return self._archive.array(record, Tensor((size,), np.dtype(np.uint8)))

    def _collect(self, saved: Any) -> Iterator[tuple[str, Tensor]]:
        for name, strided in _flat(saved, (), count()):
            self._tensors[name] = strided
            yield name, self._checked_tensor(name, strided)

    def _pickle_folder(self) -> str:
        sizes = self._archive.sizes
        roots = [name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in sizes:
            raise RefusedPickle(
                "it must hold one `data.pkl`, as `torch.save(model.state_dict(), file)` writes it; "
                "programs of TorchScript are not read"
            )
        self._archive.check_plain(f"{roots[0]}data.pkl", MAX_PICKLE)
        if f"{roots[0]}byteorder" in sizes and self._archive.read(f"{roots[0]}byteorder") != (
            b"little"
        ):
            raise RefusedPickle("its numbers are not little-endian")
        return roots[0]

    def _checked_tensor(self, name: str, strided: StridedTensor) -> Tensor:
        storage, dtype = strided.storage, _dtype(strided)
        stored = dtype_of(storage)[1] * storage.size
        if self._stored_bytes(storage) != stored:
            raise RefusedPickle(
                f"the elements of {quoted(name)} are missing, or fewer or more than it says"
            )
        tensor = Tensor(strided.shape, dtype)
        last = sum((n - 1) * s for n, s in zip(strided.shape, strided.strides, strict=True))
        if tensor.size and (strided.offset + last + 1) * dtype.itemsize > stored:
            raise RefusedPickle(f"{quoted(name)} reaches beyond its elements")
        if not fits_memory(tensor.bytes, stored):
            raise RefusedPickle(f"{quoted(name)} claims {tensor.bytes} bytes out of {stored}")
        return tensor

    def _read(self, name: str) -> np.ndarray:
        strided, tensor = self._tensors[name], self.tensors[name]
        if not tensor.size:
            return np.empty(tensor.shape, tensor.dtype)
        unit = tensor.dtype.itemsize
        strides = [stride * unit for stride in strided.strides]
        content = self._elements(strided.storage)
        view = np.ndarray(tensor.shape, tensor.dtype, content.data, strided.offset * unit, strides)
        return np.array(view, order="C")

    def _elements(self, storage: Storage) -> np.ndarray:
        """The bytes of a storage; the last one is kept, for tensors that share it."""
        if self._kept is None or self._kept[0] != storage:
            self._kept = None
            size = dtype_of(storage)[1] * storage.size
            self._kept = storage, self._storage(storage, size)
        return self._kept[1]

    def close(self) -> None:
        """Close the file."""
        self._kept = None
        self._archive.close()


def dtype_of(storage: Storage) -> tuple[np.dtype | None, int]:
    """The dtype of a storage, None where it is untyped, and the bytes of its unit."""
    if storage.dtype == "UntypedStorage":
        return None, 1
    if storage.dtype not in STORAGES:
        raise RefusedPickle(f"it has elements of the kind {shown(storage.dtype)}")
    return STORAGES[storage.dtype], STORAGES[storage.dtype].itemsize


def _dtype(strided: StridedTensor) -> np.dtype:
    dtype, _ = dtype_of(strided.storage)
    if dtype is None and strided.dtype in UNTYPED:
        return UNTYPED[strided.dtype]
    if dtype is None or strided.dtype is not None:
        raise RefusedPickle(f"it has a tensor of {shown(strided.dtype)} in {strided.storage.dtype}")
    return dtype


def _flat(
    value: Any, keys: tuple[str, ...], steps: Iterator[int]
) -> Iterator[tuple[str, StridedTensor]]:
    """The tensors of nested dicts, with the keys joined by dots."""
    if isinstance(value, StridedTensor):
        yield ".".join(keys) if keys else "tensor", value
    elif isinstance(value, dict):
        if len(keys) == MAX_DEPTH:
            raise RefusedPickle(f"its dicts are nested more than {MAX_DEPTH} deep")
        for key, item in value.items():
            if next(steps) == MAX_VALUES:  # dicts within dicts can name the same one many times
                raise RefusedPickle(f"its dicts have more than {MAX_VALUES} values")
            if isinstance(key, (str, int)):
                yield from _flat(item, (*keys, str(key)), steps)
