"""The interface of all formats: first the shapes and dtypes of tensors by name, then their values.

Before memory is taken for an array, the claims of the file are compared with its length. An array
may take at most `SAFE_BYTES`, or `MAX_EXPANSION` times its bytes in the file, whichever is more; so
a small file cannot fill the memory.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np

from anymha.errors import FileError

SAFE_BYTES = 64 * 2**20
MAX_EXPANSION = 100
CHUNK = 2**20


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
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.tensors: Mapping[str, Tensor] = {}
        self.metadata: Mapping[str, str] = {}

    def files(self) -> list[Path]:
        """The files that are read."""
        return [self.path]

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set `tensors`.

        Raises:
            FileError: a name is no text, for example half a surrogate pair.
        """
        for name in tensors:
            try:
                name.encode("utf-8")
            except UnicodeEncodeError as error:
                raise self.broken(f"its name {name!r} is no text") from error
        self.tensors = tensors

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, C-contiguous, in its own dtype.

        Raises:
            FileError: there is no such tensor, or it is broken.
        """
        if name not in self.tensors:
            raise FileError(f"{self.path} holds no tensor {name!r}.")
        return self._read(name)

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
    return FileError(f"{path} is not {kind} file that can be read: {reason}.")


def open_stream(path: Path) -> tuple[BinaryIO, int]:
    """The file, and its length.

    Raises:
        FileError: it cannot be read.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FileError(f"{path} cannot be read: it is not a regular file.")
        stream = path.open("rb")
        return stream, path.stat().st_size
    except FileError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read: {reason}.") from error


def fits_memory(claimed: int, stored: int) -> bool:
    """Whether an array of `claimed` bytes may be made from `stored` bytes of a file."""
    return claimed <= max(SAFE_BYTES, MAX_EXPANSION * stored)


def read_array(tensor: Tensor, stream: BinaryIO) -> np.ndarray | None:
    """The next bytes of a stream as an array; None where there are too few."""
    array = np.empty(tensor.shape, tensor.dtype)
    buffer = bytes_of(array)
    done = 0
    while done < len(buffer):
        chunk = stream.read(min(CHUNK, len(buffer) - done))
        if not chunk:
            return None
        buffer[done : done + len(chunk)] = chunk
        done += len(chunk)
    return array


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
