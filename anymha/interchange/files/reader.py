"""The interface of all formats: first the shapes and dtypes of tensors by name, then their values.

Before memory is taken, the claims of the file are compared with its length. One array, and all
arrays of a file together, may take `SAFE_BYTES`, or `MAX_EXPANSION` times their bytes in the file,
whichever is more; or as many bytes as the caller of `open_file` allows. So a small file cannot fill
the memory, or the disk that it is converted to.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from anymha.errors import ArgumentError, FileError
from anymha.interchange.files.names import name_fault
from anymha.interchange.files.paths import kind_of, readable, stat_of
from anymha.text import quoted, shown

SAFE_BYTES = 64 * 2**20
MAX_EXPANSION = 100
CHUNK = 2**20
MAX_NAMES = 2**26
"""The most characters of all names together: a group's name counts in each of its tensors'."""
MAX_AXES = 64
"""The most axes of an array of NumPy."""

_max_bytes: ContextVar[int | None] = ContextVar("max_bytes", default=None)


@dataclass(frozen=True)
class Tensor:
    """An array without its values.

    Args:
        shape: Its shape.
        dtype: Its dtype, also one of `ml_dtypes`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize


class Reader(abc.ABC):
    """The tensors of an open file.

    Args:
        path: The file.
        kind: The format's name in messages, with its article.

    Attributes:
        tensors: Shape and dtype by name, in the file's order.
        metadata: The file's texts besides its tensors.
        config: The sizes of the model that the file states, by the names of a `config.json`.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.tensors: Mapping[str, Tensor] = {}
        self.metadata: Mapping[str, str] = {}
        self.config: Mapping[str, int] = {}

    def files(self) -> list[Path]:
        """The files that are read."""
        return [self.path]

    def set_tensors(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Set `tensors`.

        Raises:
            FileError: a name occurs twice, is too long, or is no text, for example half a surrogate
                pair; or a shape is none that an array can have.
        """
        found: dict[str, Tensor] = {}
        characters = 0
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, tensor in cast(Iterable[tuple[str, Tensor]], pairs):
            characters += len(name)
            fault = name_fault(name)
            if characters > MAX_NAMES:
                fault = "is too long, with all others together"
            if fault is not None:
                raise self.broken(f"its name {quoted(name)} {fault}")
            if name in found:
                raise self.broken(f"it has {quoted(name)} twice")
            if not _may_be_array(tensor):
                raise self.broken(f"{quoted(name)} has the shape {quoted(tensor.shape)}")
            found[name] = tensor
        self.tensors = found

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, C-contiguous, in its own dtype.

        Raises:
            FileError: there is no such tensor, or it is broken or cannot be read.
        """
        if name not in self.tensors:
            raise FileError(f"{shown(self.path)} holds no tensor {quoted(name)}.")
        try:
            with readable(self.path):
                return self._read(name)
        except MemoryError as error:
            raise FileError(
                f"{shown(self.path)} cannot be read: {quoted(name)} takes "
                f"{self.tensors[name].bytes} bytes, and so much memory is not free."
            ) from error

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file."""

    def broken(self, reason: str) -> FileError:
        """The error for a broken file, with the reason."""
        return broken(self.path, self.kind, reason)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Writer(Protocol):
    """A file that is being written."""

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a tensor that was announced; any of them may be next."""


Create = Callable[
    [Path, Mapping[str, Tensor], Mapping[str, str]],
    AbstractContextManager[Writer],
]
"""Opens a context; the file appears once every announced tensor is written in it."""


def broken(path: Path, kind: str, reason: str) -> FileError:
    """The error for a file that is not of its kind."""
    return FileError(f"{shown(path)} is not {kind} file that can be read: {reason}.")


def open_stream(path: Path) -> tuple[BinaryIO, int]:
    """The file, and its length.

    Raises:
        FileError: it cannot be read.
    """
    if kind_of(path) == "special":
        raise FileError(f"{shown(path)} cannot be read: it is not a regular file.")
    with readable(path):
        return path.open("rb"), path.stat().st_size


def check_bytes(name: str, value: int | None) -> None:
    """Check an argument that is a number of bytes, or None.

    Raises:
        ArgumentError: it is not a positive integer.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise ArgumentError(
            f"`{name}` must be a positive integer or None. Received: {quoted(value)}."
        )


@contextmanager
def limited(max_bytes: int | None) -> Iterator[None]:
    """Let `fits_memory` allow so many bytes; None for what it allows by default.

    Raises:
        ArgumentError: `max_bytes` is not a positive integer.
    """
    check_bytes("max_bytes", max_bytes)
    token = _max_bytes.set(max_bytes)
    try:
        yield
    finally:
        _max_bytes.reset(token)


def _may_be_array(tensor: Tensor) -> bool:
    """Whether NumPy can make the array; axes of length 0 do not count for its limit of bytes."""
    sizes = tensor.shape
    if len(sizes) > MAX_AXES or any(not 0 <= n < 2**63 for n in sizes):
        return False
    return math.prod(n for n in sizes if n) * tensor.dtype.itemsize < 2**63


def fits_memory(claimed: int, stored: int) -> bool:
    """Whether `claimed` bytes of arrays may be made from `stored` bytes of a file."""
    allowed = _max_bytes.get()
    return claimed <= (max(SAFE_BYTES, MAX_EXPANSION * stored) if allowed is None else allowed)


def check_total(reader: Reader) -> None:
    """Check that all arrays together may be made from the file.

    Raises:
        FileError: they may not.
    """
    claimed = sum(tensor.bytes for tensor in reader.tensors.values())
    stored = sum(status.st_size for file in reader.files() if (status := stat_of(file)))
    if not fits_memory(claimed, stored):
        raise reader.broken(
            f"its arrays take {claimed} bytes, more than is allowed for a file of {stored}; if you "
            "trust it, pass `max_bytes` (in the shell --max-bytes)"
        )


def read_array(tensor: Tensor, stream: BinaryIO) -> np.ndarray | None:
    """The next bytes of a stream as an array; None where there are too few."""
    array = np.empty(tensor.shape, tensor.dtype)
    buffer = bytes_of(array)
    done = 0
    while done < len(buffer):
        count = cast(Any, stream).readinto(buffer[done : done + CHUNK])
        if not count:
            return None
        done += count
    return array


def joined(
    tensor: Tensor, pieces: Iterable[tuple[tuple[slice, ...], np.ndarray]]
) -> np.ndarray | None:
    """The array of pieces, each with its place in it; None where they leave a gap."""
    array, filled = np.empty(tensor.shape, tensor.dtype), np.zeros(tensor.shape, bool)
    for place, piece in pieces:
        array[place], filled[place] = piece, True
    return array if filled.all() else None


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def check_array(name: str, array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """`array`, C-contiguous, if it has the announced shape and dtype.

    Raises:
        ValueError: it is of another shape or dtype.
    """
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"`{name}` was announced as {tensor.dtype} of shape {tensor.shape}. Received: "
            f"{array.dtype} of shape {array.shape}."
        )
    return array


def check_all_written(missing: set[str]) -> None:
    """Check that every announced tensor is written.

    Raises:
        ValueError: one is missing.
    """
    if missing:
        raise ValueError(f"These were announced and not written: {', '.join(sorted(missing))}.")
