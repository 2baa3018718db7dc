"""TensorFlow's checkpoints, and the variables of SavedModels; TensorFlow is not needed.

An index, a sorted table, says where each variable's elements lie in the files of data. Variables
have the names that their checkpoint's graph of objects gives them, as ``dense/kernel``; where it
gives one name twice, with the path of attributes before it; where it gives none, the path.

References:
    TensorFlow 2.21, ``tensorflow/core/protobuf/tensor_bundle.proto`` and
    ``trackable_object_graph.proto``; ``tensorflow/core/util/saved_tensor_slice_util.cc`` for the
    keys of parts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.crc32c import crc32c
from anymha.interchange.files.protobuf import fields, varint
from anymha.interchange.files.reader import (
    MAX_AXES,
    Reader,
    Tensor,
    bytes_of,
    joined,
    open_stream,
    read_array,
)
from anymha.interchange.files.sorted_table import entries, masked
from anymha.interchange.files.streams import Malformed, closed_if_broken
from anymha.text import quoted, shown

KIND = "a TensorFlow checkpoint's"
GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
MAX_INDEX = 2**24
DTYPES = {
    1: np.dtype(np.float32), 2: np.dtype(np.float64), 3: np.dtype(np.int32),
    4: np.dtype(np.uint8), 5: np.dtype(np.int16), 6: np.dtype(np.int8),
    8: np.dtype(np.complex64), 9: np.dtype(np.int64), 10: np.dtype(np.bool_),
    14: np.dtype(ml_dtypes.bfloat16), 17: np.dtype(np.uint16), 18: np.dtype(np.complex128),
    19: np.dtype(np.float16), 22: np.dtype(np.uint32), 23: np.dtype(np.uint64),
    24: np.dtype(ml_dtypes.float8_e5m2), 25: np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip
LEFT_OUT = (7, 20, 21)
"""Texts, and the handles and variants of TensorFlow's objects, which are no numbers."""


@dataclass(frozen=True)
class _Place:
    """Where the elements of a variable, or of a part of it, lie.

    Args:
        kind: TensorFlow's number of the dtype.
        shape: The shape.
        file: The number of the file of data.
        begin: The first byte.
        size: The number of bytes.
        checksum: That of the bytes, masked.
        parts: Where each part of the variable begins and how long it is, by axis; a length of -1
            stands for all of the axis.
    """

    kind: int
    shape: tuple[int, ...]
    file: int
    begin: int
    size: int
    checksum: int
    parts: tuple[tuple[tuple[int, int], ...], ...]


class TensorflowReader(Reader):
    """An open checkpoint of TensorFlow; texts and other things that are no numbers are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        prefix = _prefix(path)
        self._files = [prefix.with_name(f"{prefix.name}.index")]
        self._data: list[tuple[BinaryIO, int]] = []
        self._steps = count()
        self._parts: dict[str, list[tuple[tuple[slice, ...], _Place]]] = {}
        with closed_if_broken(self):
            self._parse(prefix)

    def _parse(self, prefix: Path) -> None:
        stream, size = open_stream(self._files[0])
        with stream:
            if size > MAX_INDEX:
                raise Malformed(f"its index has {size} bytes, and {MAX_INDEX} are the most")
            table = entries(stream.read())
        self._open_data(prefix, table.pop(b"", b""))
        places = {key: self._place(value) for key, value in table.items()}
        names = self._names(places) if GRAPH in places else {}
        tensors = {}
        for key in sorted(places):
            place = places[key]
            if key.startswith(b"\0") or key == GRAPH or place.kind in LEFT_OUT:
                continue
            text = key.decode("utf-8")
            if place.kind not in DTYPES:
                raise Malformed(
                    f"{quoted(text)} has elements of TensorFlow's type {place.kind}, which is not "
                    "read"
                )
            name = names.get(text, text.removesuffix(VALUE))
            name = text if name in tensors else name
            tensors[name] = Tensor(place.shape, DTYPES[place.kind])
            self._parts[name] = self._parts_of(name, key, place, places)
        self.set_tensors(tensors)

    def _open_data(self, prefix: Path, header: bytes) -> None:
        """Open the files of data, whose number the header states."""
        numbers = dict(self._numbers(header))
        shards = numbers.get(1, 0)
        if numbers.get(2):
            raise Malformed("its numbers are not little-endian")
        if not 1 <= shards < 100_000:
            raise Malformed("its index does not say how many files of data there are")
        for shard in range(shards):
            file = prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}")
            if not file.is_file():
                raise self.broken(f"its data, {shown(prefix.name)}.data-..., do not lie beside it")
            self._data.append(open_stream(file))
            self._files.append(file)

    def _numbers(self, message: bytes) -> Iterator[tuple[int, int]]:
        """The fields of a message that are numbers."""
        for number, wire, begin, _ in fields(io.BytesIO(message), 0, len(message), self._steps):
            if wire == 0:
                yield number, begin

    def _messages(self, message: bytes, number: int) -> Iterator[bytes]:
        """The messages, or texts, in the fields of a number."""
        for found, wire, begin, end in fields(io.BytesIO(message), 0, len(message), self._steps):
            if found == number and wire == 2:
                yield message[begin:end]

    def _place(self, value: bytes) -> _Place:
        shape: tuple[int, ...] = ()
        parts = []
        numbers = {}
        for number, wire, begin, end in fields(io.BytesIO(value), 0, len(value), self._steps):
            if number == 2 and wire == 2:
                axes = self._messages(value[begin:end], 2)
                shape = tuple(dict(self._numbers(axis)).get(1, 0) for axis in axes)
            elif number == 7 and wire == 2:
                parts.append(self._extents(value[begin:end]))
            elif wire == 5:
                numbers[number] = int.from_bytes(value[begin:end], "little")
            elif wire == 0:
                numbers[number] = begin
        kind, file, begin, size, checksum = (numbers.get(one, 0) for one in (1, 3, 4, 5, 6))
        return _Place(kind, shape, file, begin, size, checksum, tuple(parts))

    def _extents(self, message: bytes) -> tuple[tuple[int, int], ...]:
        """Begin and length of a part, by axis; a length of -1 stands for all of the axis."""
        pairs = [dict(self._numbers(extent)) for extent in self._messages(message, 1)]
        return tuple((pair.get(1, 0), pair.get(2, -1)) for pair in pairs)

    def _parts_of(
        self, name: str, key: bytes, whole: _Place, places: dict[bytes, _Place]
    ) -> list[tuple[tuple[slice, ...], _Place]]:
        """Where each part of a variable lies in it and in the files; one part is the usual case."""
        if not whole.parts:
            self._check(name, whole, Tensor(whole.shape, DTYPES[whole.kind]))
            return [((), whole)]
        found = []
        for part in whole.parts:
            place = places.get(_part_key(key, part))
            ends = [
                (begin, begin + (size if length < 0 else length))
                for (begin, length), size in zip(part, whole.shape, strict=False)
            ]
            shape = tuple(end - begin for begin, end in ends)
            if len(part) != len(whole.shape) or any(
                end > size for (_, end), size in zip(ends, whole.shape, strict=False)
            ):
                raise Malformed(f"a part of {quoted(name)} lies outside of it")
            if place is None or place.kind != whole.kind or place.shape != shape:
                raise Malformed(f"a part of {quoted(name)} is missing")
            self._check(name, place, Tensor(shape, DTYPES[whole.kind]))
            found.append((tuple(slice(*one) for one in ends), place))
        size = sum(Tensor(place.shape, np.dtype(np.uint8)).size for _, place in found)
        if size != Tensor(whole.shape, np.dtype(np.uint8)).size:
            raise Malformed(f"parts of {quoted(name)} are missing")
        return found

    def _check(self, name: str, place: _Place, tensor: Tensor) -> None:
        """Check that elements have their size, and lie in their file."""
        if len(place.shape) > MAX_AXES or tensor.bytes != place.size:
            raise Malformed(
                f"{quoted(name)} of shape {quoted(place.shape)} takes {tensor.bytes} bytes, and "
                f"its index says {place.size}"
            )
        if place.file >= len(self._data) or place.begin + place.size > self._data[place.file][1]:
            raise Malformed(f"{quoted(name)} reaches over the end of its file")

    def _names(self, places: dict[bytes, _Place]) -> dict[str, str]:
        """The variables' own names by their keys, where they tell them apart."""
        graph = self._graph(places[GRAPH])
        self._steps = count()
        named = {}
        for node in self._messages(graph, 1):
            for attribute in self._messages(node, 2):
                full, key = (next(self._messages(attribute, n), b"").decode() for n in (2, 3))
                named[key] = full.removesuffix(":0")
        keys = [key.decode("utf-8") for key in places if not key.startswith(b"\0")]
        full = {key: named.get(key) or key.removesuffix(VALUE) for key in keys}
        longer = {
            key: f"{key.removesuffix(VALUE).rpartition('/')[0]}/{name}"
            for key, name in full.items()
        }
        counts, longer_counts = Counter(full.values()), Counter(longer.values())
        names = {key: longer[key] for key in keys if longer_counts[longer[key]] == 1}
        return names | {key: name for key, name in full.items() if counts[name] == 1}

    def _graph(self, place: _Place) -> bytes:
        """The graph of objects: a text after its length and the checksum of the length."""
        if place.size > MAX_INDEX:
            raise Malformed(f"its graph of objects takes {place.size} bytes")
        self._check("the graph of objects", place, Tensor((place.size,), np.dtype(np.uint8)))
        stream, _ = self._data[place.file]
        stream.seek(place.begin)
        content = stream.read(place.size)
        length, at = varint(content, 0, len(content))
        stated, graph = content[at : at + 4], content[at + 4 :]
        before = length.to_bytes(4 if length < 2**32 else 8, "little") + stated
        if length != len(graph) or masked(crc32c(before + graph)) != place.checksum:
            raise Malformed("its graph of objects is damaged")
        return graph

    def _read(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        if parts[0][0] == ():
            return self._elements(name, parts[0][1])
        pieces = ((where, self._elements(name, place)) for where, place in parts)
        array = joined(self.tensors[name], pieces)
        if array is None:
            raise self.broken(f"parts of {quoted(name)} overlap")
        return array

    def _elements(self, name: str, place: _Place) -> np.ndarray:
        stream, _ = self._data[place.file]
        stream.seek(place.begin)
        array = read_array(Tensor(place.shape, DTYPES[place.kind]), stream)
        if array is None:
            raise self.broken(f"it ends within {quoted(name)}")
        if masked(crc32c(bytes_of(array))) != place.checksum:
            raise self.broken(f"the checksum of {quoted(name)} is wrong")
        return array

    def files(self) -> list[Path]:
        """The index, and the files of data."""
        return self._files

    def close(self) -> None:
        """Close the files of data."""
        for stream, _ in self._data:
            stream.close()


def _part_key(key: bytes, part: tuple[tuple[int, int], ...]) -> bytes:
    """The key of a part of a variable, in TensorFlow's code that keeps the order of numbers."""
    name = key.replace(b"\0", b"\0\xff")
    axes = bytes([1, len(part)]) if part else b"\0"
    return b"\0" + name + b"\0\1" + axes + b"".join(_ordered(n) for pair in part for n in pair)


def _ordered(number: int) -> bytes:
    """A number with a sign: as many ones before it as it has bytes."""
    length = 1
    while not -(2 ** (7 * length - 1)) <= number < 2 ** (7 * length - 1):
        length += 1
    ones = (2**length - 1) << 7 * length  # instead of the bits of the sign
    return (number % 2 ** (8 * length) ^ ones).to_bytes(length, "big")


def _prefix(path: Path) -> Path:
    """The checkpoint's name, without the ends of its files' names."""
    if path.name == "saved_model.pb":
        return path.parent / "variables" / "variables"
    return path.with_suffix("") if path.suffix == ".index" else path


def open_tensorflow(path: Path) -> TensorflowReader:
    """The variables of a checkpoint or a SavedModel.

    Args:
        path: The ``.index`` file, the checkpoint's name without an end, or ``saved_model.pb``.

    Raises:
        FileError: it cannot be read, or is broken.
    """
    if not _prefix(path).with_name(f"{_prefix(path).name}.index").is_file():
        raise FileError(f"{shown(path)} cannot be read: the checkpoint's .index file is missing.")
    return TensorflowReader(path)
