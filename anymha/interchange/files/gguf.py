"""GGUF, the files of llama.cpp: texts and numbers by key, then tensors, many in quantised blocks.

This module reads the header and plain numbers. Quantised tensors are announced as float32, and
dequantised by the functions of the package gguf, which is needed for them alone. Values of
`metadata` are the file's single texts and numbers, and as ``tensor types`` the names of the types.

References:
    ggml, ``docs/gguf.md``.
    gguf 0.19, ``gguf/quants.py``.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.optional import require_library
from anymha.interchange.files.reader import CHUNK, Tensor, fits_memory
from anymha.interchange.files.streams import Malformed, StreamReader
from anymha.text import quoted, shown

KIND = "a GGUF"
TYPES = "tensor types"
SIZES = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv",
         "head_dim": "key_length"}  # fmt: skip
"""The names that a `config.json` has for sizes, and those of GGUF's metadata."""
MAX_TEXT = 100_000
MAX_AXES = 8
MAX_DEPTH = 4
_VERSIONS = (2, 3)
_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip

DTYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}
"""The types of plain numbers; the others are blocks of quantised ones."""
QUANTISED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class GgufReader(StreamReader):
    """An open GGUF file."""

    def __init__(self, path: Path) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        super().__init__(path, KIND)

    def _parse(self) -> None:
        if self._take(4) != b"GGUF":
            raise Malformed("it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in _VERSIONS:
            raise Malformed(f"it has the version {version}, and {_VERSIONS} are read")
        tensors, values = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._text()
            metadata[key] = self._value(self._number("I"))
        if metadata.get("split.count", 1) != 1:
            raise FileError(
                f"{shown(self.path)} is one of {quoted(metadata['split.count'])} parts of a "
                "model. Merge them first, with llama.cpp's `llama-gguf-split --merge`."
            )
        shapes = {}
        for _ in range(tensors):
            name, shape, kind, offset = self._entry()
            if name in shapes:
                raise Malformed(f"it has {quoted(name)} twice")
            shapes[name], self._places[name] = shape, (kind, offset)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            raise Malformed(f"its alignment is {quoted(alignment)}")
        begin = -(-self._stream.tell() // alignment) * alignment
        self._places = {n: (kind, begin + at) for n, (kind, at) in self._places.items()}
        self.set_tensors({name: self._tensor(name, shape) for name, shape in shapes.items()})
        model = f"{metadata.get('general.architecture')}.attention"
        sizes = {name: metadata.get(f"{model}.{key}") for name, key in SIZES.items()}
        self.config = {name: size for name, size in sizes.items() if type(size) is int}
        self.metadata = {k: str(v) for k, v in metadata.items() if v is not None}
        kinds = {kind for kind, _ in self._places.values()}
        self.metadata[TYPES] = ", ".join(QUANTISED.get(k) or DTYPES[k].name for k in sorted(kinds))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor. GGUF's first axis is the fastest one."""
        name, axes = self._text(), self._number("I")
        if axes > MAX_AXES:
            raise Malformed(f"{quoted(name)} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        if any(size >= 2**63 for size in shape):
            raise Malformed(f"{quoted(name)} has the shape {shape}")
        return name, shape, self._number("I"), self._number("Q")

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        kind, begin = self._places[name]
        if kind not in DTYPES and kind not in QUANTISED:
            raise Malformed(f"{quoted(name)} has the unknown type {kind}")
        tensor = Tensor(shape, DTYPES.get(kind, np.dtype(np.float32)))
        stored = self._size - begin
        fits = tensor.bytes <= stored if kind in DTYPES else fits_memory(tensor.bytes, stored)
        if stored < 0 or not fits:
            raise Malformed(f"{quoted(name)} of shape {shape} reaches over the file's end")
        return tensor

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata; None for an array."""
        if kind == _TEXT:
            return self._long_text(keep=depth == 0)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY or depth > MAX_DEPTH:
            raise Malformed(f"its metadata has a value of the kind {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize("<" + _NUMBERS[inner]))
        elif inner == _TEXT:
            self._skip_texts(count)
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return None

    def _skip_texts(self, count: int) -> None:
        """Leave out texts, a million of which are usual in a tokenizer."""
        length = struct.Struct("<Q").unpack_from
        begin = self._stream.tell()
        while count:
            content, at = self._stream.read(CHUNK), 0
            while count and at + 8 <= len(content):
                at += 8 + length(content, at)[0]
                count -= 1
            begin += at
            if not at or begin > self._size:
                raise Malformed("it ends too early")
            self._stream.seek(begin)

    def _text(self) -> str:
        size = self._number("Q")
        if size > min(MAX_TEXT, self._size - self._stream.tell()):
            raise Malformed(f"it has a name of {size} bytes")
        return self._take(size).decode("utf-8")

    def _long_text(self, keep: bool) -> str | None:
        """A text of the metadata; None for one that is long or not kept."""
        size = self._number("Q")
        if keep and size <= MAX_TEXT:
            return self._take(size).decode("utf-8")
        self._skip(size)
        return None

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _read(self, name: str) -> np.ndarray:
        kind, begin = self._places[name]
        tensor = self.tensors[name]
        if not tensor.size:
            return np.empty(tensor.shape, tensor.dtype)
        blocks = tensor if kind in DTYPES else self._blocks(name, kind, tensor)
        array = self._elements(name, begin, blocks)
        return array if kind in DTYPES else self._dequantised(name, kind, array)

    def _blocks(self, name: str, kind: int, tensor: Tensor) -> Tensor:
        """The bytes of a quantised tensor."""
        gguf = require_library("gguf", self.path, "gguf")
        try:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, gguf.GGMLQuantizationType(kind))
        except (ValueError, KeyError, IndexError) as error:
            raise self.broken(f"{quoted(name)} of {QUANTISED[kind]}: {error}") from error
        blocks = Tensor(tuple(map(int, shape)), np.dtype(np.uint8))
        if blocks.bytes > self._size - self._places[name][1]:
            raise self.broken(f"it ends within {quoted(name)}")
        return blocks

    def _dequantised(self, name: str, kind: int, blocks: np.ndarray) -> np.ndarray:
        gguf = require_library("gguf", self.path, "gguf")
        try:
            array = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
        except (NotImplementedError, ValueError, gguf.QuantError) as error:
            raise FileError(
                f"{shown(self.path)}: {quoted(name)} is quantised as {QUANTISED[kind]}, which the "
                "package gguf cannot dequantise."
            ) from error
        return np.ascontiguousarray(array, np.float32).reshape(self.tensors[name].shape)


def open_gguf(path: Path) -> GgufReader:
    """The tensors of a GGUF file.

    Raises:
        FileError: it cannot be read, or is broken; or the package gguf is missing and a tensor
            that is read is quantised.
    """
    return GgufReader(path)
