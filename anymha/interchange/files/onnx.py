"""ONNX: the arrays of a model's graph by name, its initialisers and the values of `Constant` nodes.

Weights of linear layers that the exporter renamed have their former names, where the graph tells
them; see `onnx_graph`. Such matrices are transposed back.

This module reads the file, so the package onnx is not needed. Elements may lie in another file next
to it, of a plain name; any other place is refused.

References:
    ONNX 1.23, ``onnx/onnx.proto3``, messages `ModelProto`, `GraphProto` and `TensorProto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from anymha.interchange.files.onnx_graph import Node, former_names
from anymha.interchange.files.protobuf import (
    SPAN,
    VARINT,
    MalformedMessage,
    TooManyFields,
    fields,
    varints,
)
from anymha.interchange.files.reader import MAX_AXES, Tensor, open_stream, read_array
from anymha.interchange.files.streams import StreamReader
from anymha.text import quoted

KIND = "an ONNX"
MAX_FILES = 500
MAX_DEPTH = 100
_SHORT = 4096
"""Messages of so many bytes, and nodes, are searched for the name of a file as a whole."""
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_INPUT, _OUTPUT, _NODE_NAME, _OPERATOR, _ATTRIBUTE = 1, 2, 3, 4, 5
_VALUE = 5
"""The field of an attribute that is a tensor."""
_DIMS, _TYPE, _FLOATS, _INT32S, _INT64S, _NAME, _RAW, _DOUBLES, _UINT64S = (
    1, 2, 4, 5, 7, 8, 9, 10, 11,
)  # fmt: skip
_EXTERNAL, _LOCATION = 13, 14
_FIXED = {_RAW: None, _FLOATS: np.dtype("<f4"), _DOUBLES: np.dtype("<f8")}
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "pair"},
}
"""The messages within a message that lead to tensors, by the numbers of their fields."""
_VARINTS = (_INT32S, _INT64S, _UINT64S)

DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    24: np.dtype(ml_dtypes.float8_e8m0fnu),
}

FLOATS = tuple(dtype for dtype in DTYPES.values() if dtype.kind in "fV")
"""The dtypes of weights; of other constants those of one axis, as shapes, are left out."""


@dataclass
class _Initializer:
    """An initialiser, with the spans of its elements in the file."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    contents: list[tuple[int, int, int]] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)


class OnnxReader(StreamReader):
    """The arrays of an open ONNX file; texts and numbers of four bits are left out."""

    def __init__(self, path: Path) -> None:
        self._initializers: dict[str, _Initializer] = {}
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        self._nodes: list[Node] = []
        self._constants: dict[str, tuple[int, int]] = {}
        self._former: dict[str, tuple[str, bool]] = {}
        self._places: dict[str, None] = {}
        self._steps = count()
        super().__init__(path, KIND)

    def _parse(self) -> None:
        self._collect()
        self._collect_places()
        tensors = {name: self._tensor(one) for name, one in self._initializers.items()}
        self.set_tensors(self._named(tensors))

    def _collect(self) -> None:
        graphs = [
            (begin, end)
            for number, wire, begin, end in fields(self._stream, 0, self._size, self._steps)
            if number == _GRAPH and wire == SPAN
        ]
        if len(graphs) != 1:
            raise MalformedMessage(f"it has {len(graphs)} graphs, where a model has one")
        spans: list[tuple[int, int]] = []
        steps = count()
        for number, wire, begin, end in fields(self._stream, *graphs[0], self._steps):
            if number == _INITIALIZER and wire == SPAN:
                initializer = self._initializer(begin, end)
                if initializer.name in self._initializers:
                    raise MalformedMessage(f"it has {quoted(initializer.name)} twice")
                if initializer.kind in DTYPES:
                    self._initializers[initializer.name] = initializer
            elif number == _NODE and wire == SPAN:
                spans.append((begin, end))
        try:
            self._nodes = [self._node(*span, steps) for span in spans]
        except TooManyFields:  # of a graph so large its arrays alone are read
            self._constants.clear()
        for name, span in self._constants.items():
            value = replace(self._initializer(*span), name=name)
            is_weight = value.dims and (value.dims[1:] or DTYPES.get(value.kind) in FLOATS)
            if value.kind in DTYPES and is_weight:
                self._initializers.setdefault(name, value)

    def _node(self, begin: int, end: int, steps: Iterator[int]) -> Node:
        node = Node()
        values: list[tuple[int, int]] = []
        for number, wire, start, stop in fields(self._stream, begin, end, steps):
            if wire != SPAN:
                continue
            if number in (_INPUT, _OUTPUT):
                names = node.inputs if number == _INPUT else node.outputs
                names.append(_text(self._bytes(start, stop)))
            elif number == _NODE_NAME:
                node.name = _text(self._bytes(start, stop))
            elif number == _OPERATOR:
                node.operator = _text(self._bytes(start, stop))
            elif number == _ATTRIBUTE:
                values.append((start, stop))
        if node.operator == "Constant" and len(values) == len(node.outputs) == 1:
            for number, wire, start, stop in fields(self._stream, *values[0], steps):
                if number == _VALUE and wire == SPAN:
                    self._constants[node.outputs[0]] = start, stop
        return node

    def _named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their former names, as far as they are known."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._former = former_names(self._nodes, shapes)
        self._nodes.clear()
        renamed = {name for name, folded in self._former.values() if folded}
        named = {name: tensor for name, tensor in tensors.items() if name not in renamed}
        for former, (name, folded) in self._former.items():
            shape = tensors[name].shape
            named[former] = Tensor(shape[::-1] if folded else shape, tensors[name].dtype)
        return named

    def _initializer(self, begin: int, end: int) -> _Initializer:
        initializer, is_external = _Initializer(), False
        for number, wire, start, stop in fields(self._stream, begin, end, self._steps):
            if number == _DIMS:
                sizes = [start] if wire == VARINT else varints(self._bytes(start, stop)).tolist()
                initializer.dims += sizes
                if len(initializer.dims) > MAX_AXES:
                    raise MalformedMessage(f"it has an initializer of more than {MAX_AXES} axes")
            elif number == _TYPE and wire == VARINT:
                initializer.kind = start
            elif number == _LOCATION and wire == VARINT:
                is_external = start == 1
            elif number == _NAME and wire == SPAN:
                initializer.name = _text(self._bytes(start, stop))
            elif number == _EXTERNAL and wire == SPAN:
                key, value = self._pair(start, stop, self._steps)
                initializer.external[key] = value
            elif number in (*_FIXED, *_VARINTS):
                if wire != SPAN:
                    raise MalformedMessage("it has numbers that are not packed")
                initializer.contents.append((number, start, stop))
        if is_external != bool(initializer.external):
            raise MalformedMessage(
                f"{quoted(initializer.name)} does not say where its elements lie"
            )
        return initializer

    def _pair(self, begin: int, end: int, steps: Iterator[int]) -> tuple[str, str]:
        pair = {
            part: _text(self._bytes(start, stop))
            for part, kind, start, stop in fields(self._stream, begin, end, steps)
            if kind == SPAN
        }
        return pair.get(1, ""), pair.get(2, "")

    def _collect_places(self) -> None:
        """Collect the files that any elements lie in, also those of nodes and of their graphs."""
        steps, waiting = count(), [("model", 0, self._size, 0)]
        while waiting:
            kind, begin, end, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise MalformedMessage("its graphs lie too deep in one another")
            if kind == "pair":
                key, place = self._pair(begin, end, steps)
                if key == "location":
                    self._places[place] = None
            elif (kind != "node" and end - begin > _SHORT) or b"location" in self._bytes(
                begin, end
            ):
                waiting += [
                    (_PARTS[kind][number], start, stop, depth + 1)
                    for number, wire, start, stop in fields(self._stream, begin, end, steps)
                    if wire == SPAN and number in _PARTS[kind]
                ]

    def _bytes(self, begin: int, end: int) -> bytes:
        self._stream.seek(begin)
        return self._stream.read(end - begin)

    def _tensor(self, initializer: _Initializer) -> Tensor:
        tensor = Tensor(tuple(initializer.dims), DTYPES[initializer.kind])
        if initializer.external:
            offset, stored = self._external_span(initializer, tensor)
            if offset + tensor.bytes > stored:
                raise MalformedMessage(
                    f"{quoted(initializer.name)} reaches beyond the file that holds it"
                )
            return tensor
        if len(initializer.contents) > 1:
            raise MalformedMessage(f"{quoted(initializer.name)} has its elements twice")
        number, begin, end = initializer.contents[0] if initializer.contents else (_RAW, 0, 0)
        stored = end - begin
        if number in _FIXED:
            fits = stored == tensor.bytes and _FIXED[number] in (None, tensor.dtype)
        else:
            fits = tensor.size <= stored <= 10 * tensor.size and tensor.dtype.kind not in "c"
        if not fits:
            raise MalformedMessage(
                f"{quoted(initializer.name)} takes {tensor.bytes} bytes, but has {stored}"
            )
        return tensor

    def _external_span(self, initializer: _Initializer, tensor: Tensor) -> tuple[int, int]:
        """The offset of the elements in the file next to this one, and that file's length."""
        place = initializer.external.get("location", "")
        offset, length = initializer.external.get("offset", "0"), initializer.external.get("length")
        if not place.strip(".") or set(place) & set("/\\:\0"):
            raise MalformedMessage(
                f"the elements of {quoted(initializer.name)} lie in {quoted(place)}, not next to "
                "the file"
            )
        if not (offset.isascii() and offset.isdigit()) or len(offset) > 19:
            raise MalformedMessage(f"{quoted(initializer.name)} begins at {quoted(offset)}")
        if length not in (None, str(tensor.bytes)):
            raise MalformedMessage(
                f"{quoted(initializer.name)} takes {tensor.bytes} bytes, but has {quoted(length)}"
            )
        if len(self._places) > MAX_FILES:
            raise MalformedMessage(f"its elements lie in more than {MAX_FILES} files")
        if place not in self._files:
            self._files[place] = open_stream(self.path.parent / place)
        return int(offset), self._files[place][1]

    def _read(self, name: str) -> np.ndarray:
        if name in self._former:
            place, folded = self._former[name]
            array = self._stored(place)
            return np.ascontiguousarray(array.T) if folded else array
        return self._stored(name)

    def _stored(self, name: str) -> np.ndarray:
        """The array of that name in the graph."""
        initializer = self._initializers[name]
        tensor = Tensor(tuple(initializer.dims), DTYPES[initializer.kind])
        number, begin, end = initializer.contents[0] if initializer.contents else (_RAW, 0, 0)
        if number in _VARINTS:
            return self._counted(name, tensor, self._bytes(begin, end))
        stream = self._stream
        if initializer.external:
            stream = self._files[initializer.external["location"]][0]
            begin, _ = self._external_span(initializer, tensor)
        stream.seek(begin)
        array = read_array(tensor, stream)
        if array is None:
            raise self.broken(f"it ends within {quoted(name)}")
        return array

    def _counted(self, name: str, tensor: Tensor, content: bytes) -> np.ndarray:
        """Elements that are written as varints: integers, or the bits of small floats."""
        try:
            numbers = varints(content)
        except MalformedMessage as error:
            raise self.broken(f"{quoted(name)}: {error}") from error
        if len(numbers) != tensor.size:
            raise self.broken(f"{quoted(name)} has {len(numbers)} elements, not {tensor.size}")
        words = numbers.astype("<u8").view(np.uint8).reshape(-1, 8)
        narrow = np.ascontiguousarray(words[:, : tensor.dtype.itemsize])
        return narrow.reshape(-1).view(tensor.dtype).reshape(tensor.shape)

    def files(self) -> list[Path]:
        """The file, and those next to it that any elements lie in, also those left out."""
        return [self.path, *(self.path.parent / place for place in self._places if place)]

    def close(self) -> None:
        """Close the file, and those next to it."""
        for stream in (self._stream, *(stream for stream, _ in self._files.values())):
            stream.close()


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedMessage("one of its names is not text") from error


def open_onnx(path: Path) -> OnnxReader:
    """The arrays of an ONNX file.

    Raises:
        FileError: it cannot be read, is broken, or has elements that are not next to it.
    """
    return OnnxReader(path)
