"""Safetensors: a header of JSON that says where each tensor lies, then their bytes.

This module reads the header and checks every claim: its length, the dtypes, and the spans of
the tensors, which must fill the file without a gap or an overlap. Writing puts the header first,
so a file of any size is written one tensor at a time.

References:
    Hugging Face, "safetensors", https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.reader import (
    MAX_AXES,
    Tensor,
    bytes_of,
    check_all_written,
    check_array,
)
from anymha.interchange.files.streams import Malformed, StreamReader
from anymha.text import quoted, shown

KIND = "a safetensors"
MAX_HEADER = 100_000_000  # the format's own limit

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsReader(StreamReader):
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)

    def _parse(self) -> None:
        tensors, self._starts, self.metadata = _parsed(self._stream, self._size)
        self.set_tensors(tensors)

    def _read(self, name: str) -> np.ndarray:
        return self._elements(name, self._starts[name], self.tensors[name])


def open_safetensors(path: Path) -> SafetensorsReader:
    """The tensors of a safetensors file.

    Raises:
        FileError: it cannot be read, or is broken.
    """
    return SafetensorsReader(path)


def _parsed(
    stream: BinaryIO, size: int
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """The tensors, where each begins in the file, and the metadata."""
    if size < 8:
        raise Malformed(f"it has {size} bytes, and the length of the header alone takes 8")
    length = int.from_bytes(stream.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise Malformed(
            f"its header claims {length} bytes, where the file has {size} and the format allows "
            f"{MAX_HEADER}"
        )
    header = _json(stream.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("its metadata must be texts by name")
    begin = 8 + length
    tensors, spans = {}, {}
    for name, entry in header.items():
        tensors[name], spans[name] = _entry(name, entry)
    _check_spans(spans, size - begin)
    return tensors, {name: begin + start for name, (start, _) in spans.items()}, metadata


def _json(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            raise Malformed("its header has a name twice")
        return unique

    try:
        header = parse_json(text, object_pairs_hook=once)
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"its header is not JSON ({shown(error)})") from error
    if not isinstance(header, dict):
        raise Malformed("its header is not a JSON object")
    return header


def _entry(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{quoted(name)} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Malformed(
            f"{quoted(name)} has the dtype {quoted(dtype)}; known are {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or len(shape) > MAX_AXES:
        raise Malformed(f"{quoted(name)} has the shape {quoted(shape)} and the span {quoted(span)}")
    tensor = Tensor(tuple(shape), DTYPES[dtype])
    if span[1] - span[0] != tensor.bytes:
        raise Malformed(
            f"{quoted(name)} takes {tensor.bytes} bytes as {dtype} of shape {tensor.shape}, but "
            f"its span has {span[1] - span[0]}"
        )
    return tensor, (span[0], span[1])


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_spans(spans: Mapping[str, tuple[int, int]], size: int) -> None:
    ordered = [(0, 0), *sorted(spans.values()), (size, size)]
    for (_, end), (start, _) in pairwise(ordered):
        if start != end:
            raise Malformed(
                f"its tensors must fill the {size} bytes after the header; one ends at byte {end}, "
                f"the next begins at {start}"
            )


class _SafetensorsWriter:
    def __init__(self, stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Any) -> None:
        self._stream, self._tensors, self._missing = stream, tensors, set(tensors)
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # aligns each
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._starts: dict[str, int] = {}
        end = 0
        for name in order:
            start, end = end, end + tensors[name].bytes
            self._starts[name] = start
            header[name] = {
                "dtype": NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
        self._begin = 8 + len(text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write an announced tensor."""
        array = check_array(name, array, self._tensors[name])
        self._stream.seek(self._begin + self._starts[name])
        self._stream.write(bytes_of(array))
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that the file is complete."""
        check_all_written(self._missing)


@contextmanager
def create_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[_SafetensorsWriter]:
    """A new safetensors file, which is there once all its tensors are.

    Raises:
        FileError: it cannot be written, or cannot hold a dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise FileError(
                f"A safetensors file cannot hold `{shown(name)}` of dtype {tensor.dtype}. It can "
                f"hold: {', '.join(str(dtype) for dtype in NAMES)}."
            )
    with atomic_file(path) as stream:
        writer = _SafetensorsWriter(stream, tensors, metadata)
        yield writer
        writer.finish()
