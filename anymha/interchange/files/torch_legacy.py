"""torch's files before 1.6: pickles in sequence, then the elements of each storage.

The pickles are the magic number, the version of the form, facts about the machine, the saved object
and the storages' keys. Then each storage follows in the order of the keys: the number of its
elements in 8 bytes, and the elements.

References:
    PyTorch 2.13, ``torch/serialization.py``, `_legacy_save`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from anymha.interchange.files.content import TORCH_LEGACY, head_of
from anymha.interchange.files.pickles import PickleMachine, RefusedPickle, Storage
from anymha.interchange.files.reader import Tensor, open_stream, read_array
from anymha.interchange.files.torch_reader import (
    MAX_PICKLE,
    TorchReader,
    dtype_of,
)
from anymha.text import quoted

_PICKLES, _SAVED = 5, 3
_COUNT = 8  # bytes of the number of elements before them


class _Bounded:
    """A stream that never reads, or takes memory for, more than there is."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.tell = stream.tell

    def read(self, count: int) -> bytes:
        return self._stream.read(min(count, self._size - self._stream.tell()))

    def readline(self) -> bytes:
        return self._stream.readline(self._size - self._stream.tell())


class LegacyTorchReader(TorchReader):
    """An open file of torch before 1.6."""

    def _open(self) -> None:
        self._stream, self._size = open_stream(self.path)
        self._starts: dict[str, tuple[int, int]] = {}

    def _run_pickle(self) -> Any:
        program = cast(BinaryIO, _Bounded(self._stream, min(self._size, MAX_PICKLE)))
        machines = [PickleMachine(program) for _ in range(_PICKLES)]
        _, version, system, saved, keys = (machine.run() for machine in machines)
        if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise RefusedPickle("it has another version, or its numbers are not little-endian")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise RefusedPickle("it has no list of its storages")
        self._find_storages(keys, machines[_SAVED].storages)
        return saved

    def _find_storages(self, keys: list[str], storages: dict[str, Storage]) -> None:
        """Find where each storage begins, and how many bytes it has."""
        sizes = {key: dtype_of(storage)[1] for key, storage in storages.items()}
        at = self._stream.tell()
        for key in keys:
            self._stream.seek(at)
            count = int.from_bytes(self._stream.read(_COUNT), "little", signed=True)
            length = count * sizes.get(key, 0)
            at += _COUNT
            if key not in sizes or key in self._starts or not 0 <= length <= self._size - at:
                raise RefusedPickle(f"its storage {quoted(key)} is missing, not used, or cut short")
            self._starts[key] = at, length
            at += length

    def _stored_bytes(self, storage: Storage) -> int | None:
        return self._starts.get(storage.key, (0, None))[1]

    def _storage(self, storage: Storage, size: int) -> np.ndarray:
        self._stream.seek(self._starts[storage.key][0])
        array = read_array(Tensor((size,), np.dtype(np.uint8)), self._stream)
        if array is None:
            raise self.broken(f"it ends within its storage {storage.key!r}")
        return array

    def close(self) -> None:
        """Close the file."""
        self._kept = None
        self._stream.close()


def open_any_torch(path: Path) -> TorchReader:
    """The tensors of a file of torch, of either form.

    Raises:
        FileError: it cannot be read, is broken, or holds code.
    """
    legacy = head_of(path).startswith(TORCH_LEGACY)
    return LegacyTorchReader(path) if legacy else TorchReader(path)
