"""Flax's msgpack, as ``flax_model.msgpack``: nested dicts of arrays, read in place.

An array is an extension of msgpack that holds its shape, dtype and elements; one of more than 1 GiB
is a dict of chunks. Nothing is decoded but keys, shapes and dtypes, so any file is read one array
at a time, and neither Flax nor msgpack is needed.

References:
    msgpack's specification, https://github.com/msgpack/msgpack/blob/master/spec.md.
    Flax 0.12, ``flax/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anymha.interchange.files.reader import Tensor
from anymha.interchange.files.streams import Malformed, StreamReader
from anymha.text import quoted

KIND = "a Flax msgpack"
MAX_DEPTH = 32
MAX_VALUES = 200_000
MAX_TEXT = 100_000
CHUNKED = "__msgpack_chunked_array__"
_ARRAY = 1  # the extension's number; 2 and 3 are single numbers, which are left out
KINDS = "biufc"

# Sizes in bytes of what follows the first byte of a value: the number of values or bytes in it.
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_DICTS = {0xDE: 2, 0xDF: 4}
_NUMBERS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
            0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # fmt: skip


Value = tuple[str, Any]
"""The kind of a value, "dict", "list", "bytes", "extension" or "number", and its size or itself."""


class MsgpackReader(StreamReader):
    """An open file of Flax. Keys of nested dicts are joined by slashes; numbers are left out."""

    def __init__(self, path: Path) -> None:
        self._parts: dict[str, list[tuple[int, Tensor]]] = {}
        self._steps = count()
        super().__init__(path, KIND)

    def _parse(self) -> None:
        self.set_tensors(self._walk((), 0))  # which looks at each name before the next is made
        if self._stream.tell() != self._size:
            raise Malformed("there are bytes after its end")

    def _walk(self, keys: tuple[str, ...], depth: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the value that comes next."""
        if next(self._steps) == MAX_VALUES:
            raise Malformed(f"its dicts have more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise Malformed(f"its dicts are nested more than {MAX_DEPTH} deep")
        kind, size = self._value()
        if kind == "dict":
            for number in range(size):
                key = self._key()
                if number == 0 and key == CHUNKED:
                    yield self._chunked("/".join(keys), size)
                    return
                yield from self._walk((*keys, key), depth + 1)
        elif kind == "list":
            for number in range(size):
                yield from self._walk((*keys, str(number)), depth + 1)
        elif kind == "bytes":
            self._skip(size)
        elif kind == "extension":
            part = self._array(*size)
            if part is not None:
                yield self._announce("/".join(keys) if keys else "array", [part], part[1])

    def _announce(
        self, name: str, parts: list[tuple[int, Tensor]], tensor: Tensor
    ) -> tuple[str, Tensor]:
        if name in self._parts:
            raise Malformed(f"it has {quoted(name)} twice")
        self._parts[name] = parts
        return name, tensor

    def _value(self) -> Value:
        """The head of the value that comes next; of a number, all of it."""
        (first,) = self._take(1)
        if first <= 0x7F or first >= 0xE0:
            return "number", first if first <= 0x7F else first - 256
        if first <= 0x8F:
            return "dict", first & 15
        if first <= 0x9F:
            return "list", first & 15
        if first <= 0xBF:
            return "bytes", first & 31
        if first in _NUMBERS:
            content = self._take(_NUMBERS[first])
            return "number", int.from_bytes(content) if 0xCC <= first <= 0xCF else None
        if 0xD4 <= first <= 0xD8:  # an extension of 1, 2, 4, 8 or 16 bytes
            return "extension", (self._take(1)[0], 1 << (first - 0xD4))
        for kind, widths in (("bytes", _BYTES), ("list", _LISTS), ("dict", _DICTS)):
            if first in widths:
                return kind, int.from_bytes(self._take(widths[first]))
        if first in _EXTENSIONS:
            size = int.from_bytes(self._take(_EXTENSIONS[first]))
            return "extension", (self._take(1)[0], size)
        raise Malformed(f"byte {self._stream.tell() - 1} is none of msgpack's")

    def _key(self) -> str:
        kind, size = self._value()
        if kind == "bytes" and size <= MAX_TEXT:
            return self._take(size).decode("utf-8")
        if kind == "number" and size is not None:
            return str(size)
        raise Malformed("a key is no text")

    def _array(self, code: int, size: int) -> tuple[int, Tensor] | None:
        """Where the elements of an array begin, and its shape and dtype."""
        end = self._stream.tell() + size
        if code != _ARRAY:
            self._skip(size)
            return None
        if self._value() != ("list", 3):
            raise Malformed("an array is not a shape, a dtype and elements")
        kind, axes = self._value()
        if kind != "list" or axes > 64:
            raise Malformed("an array's shape is no list")
        sizes = [self._value() for _ in range(axes)]
        if any(kind != "number" or axis is None or axis < 0 for kind, axis in sizes):
            raise Malformed("an array has a shape that is none")
        tensor = Tensor(tuple(axis for _, axis in sizes), self._dtype())
        kind, stored = self._value()
        start = self._stream.tell()
        if kind != "bytes" or stored != tensor.bytes or start + stored != end:
            raise Malformed(f"an array of shape {tensor.shape} has {stored!s:.40} bytes")
        self._skip(stored)
        return start, tensor

    def _dtype(self) -> np.dtype:
        name = self._key()
        dtype = _named_dtype(name)
        if dtype is None:
            raise Malformed(f"it has elements of {quoted(name)}, not numbers")
        return dtype

    def _chunked(self, name: str, size: int) -> tuple[str, Tensor]:
        """An array that is in chunks: a dict whose first entry has been read up to its value."""
        self._value()
        if size != 3 or self._key() != "shape":
            raise Malformed("an array in chunks has no shape")
        shape = self._numbered()
        if self._key() != "chunks":
            raise Malformed("an array in chunks has no chunks")
        kind, chunks = self._value()
        if kind != "dict":
            raise Malformed("an array's chunks are no dict")
        parts = []
        for number in range(chunks):
            key, (kind, extension) = self._key(), self._value()
            part = self._array(*extension) if kind == "extension" else None
            if key != str(number) or part is None or part[1].dtype != (parts or [part])[0][1].dtype:
                raise Malformed("an array's chunks do not fit one another")
            parts.append(part)
        tensor = Tensor(shape, parts[0][1].dtype) if parts else None
        if tensor is None or sum(part.size for _, part in parts) != tensor.size:
            raise Malformed("an array's chunks do not fit its shape")
        return self._announce(name, parts, tensor)

    def _numbered(self) -> tuple[int, ...]:
        """A tuple of sizes, which Flax writes as a dict with the keys "0", "1", ..."""
        kind, axes = self._value()
        if kind != "dict" or axes > 64:
            raise Malformed("an array's shape is no dict")
        pairs = [(self._key(), self._value()) for _ in range(axes)]
        for number, (key, (kind, axis)) in enumerate(pairs):
            if key != str(number) or kind != "number" or axis is None or axis < 0:
                raise Malformed("an array has a shape that is none")
        return tuple(axis for _, (_, axis) in pairs)

    def _read(self, name: str) -> np.ndarray:
        arrays = [
            self._elements(name, start, Tensor((part.size,), part.dtype))
            for start, part in self._parts[name]
        ]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole.reshape(self.tensors[name].shape)


@lru_cache(64)
def _named_dtype(name: str) -> np.dtype | None:
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name)) if name.isidentifier() else None
    except TypeError:
        return None
    is_number = dtype is not None and dtype.name == name and dtype.kind in KINDS + "V"
    return dtype if is_number else None


def open_msgpack(path: Path) -> MsgpackReader:
    """The arrays of a file that `flax.serialization.to_bytes` wrote.

    Raises:
        FileError: it cannot be read, or is broken.
    """
    return MsgpackReader(path)
