"""torch's distributed checkpoints (DCP): a folder whose ``.metadata`` says where each piece lies.

The metadata is a pickle, which torch would run; here it is read as data, like every pickle. Each
piece of a tensor is a file of torch of its own, one after another in the ``.distcp`` files.

References:
    PyTorch 2.13, ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from anymha.interchange.files.archive import Archive
from anymha.interchange.files.pickles import (
    PickledName,
    PickledObject,
    PickleMachine,
    RefusedPickle,
)
from anymha.interchange.files.reader import Reader, Tensor, fits_memory, joined, open_stream
from anymha.interchange.files.torch_reader import (
    KIND,
    MAX_PICKLE,
    STORAGES,
    UNTYPED,
    TorchReader,
)
from anymha.text import quoted, shown

METADATA = ".metadata"
_HOME = "torch.distributed.checkpoint"
_CLASSES = (
    *(f"{_HOME}.metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    f"{_HOME}.filesystem._StorageInfo", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib._local.PosixPath",
)  # fmt: skip
_DTYPES = {
    **{name: STORAGES[f"{kind}Storage"] for name, kind in {
        "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16",
        "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte",
        "bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble",
    }.items()},
    **UNTYPED,
}  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor: where it begins in the tensor, its shape, and its place on the disk."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int


class _Span(io.RawIOBase):
    """A part of a file, as a stream of its own."""

    def __init__(self, stream: BinaryIO, begin: int, length: int) -> None:
        super().__init__()
        self._stream, self._begin, self._length, self._at = stream, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._begin + self._at)
        content = self._stream.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _PieceReader(TorchReader):
    """A file of torch within another file."""

    def __init__(self, path: Path, span: _Span) -> None:
        self._span = span
        super().__init__(path)

    def _open(self) -> None:
        self._archive = Archive(self.path, KIND, cast(BinaryIO, io.BufferedReader(self._span)))


class DistributedReader(Reader):
    """An open distributed checkpoint; only the tensors that are asked for are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a torch distributed checkpoint's")
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        try:
            self.set_tensors(self._parsed(self._metadata()))
        except (RefusedPickle, TypeError, LookupError, AttributeError, ValueError) as error:
            self.close()
            if isinstance(error, OSError):
                raise
            raise self.broken(f"its {METADATA!r}: {shown(error)}") from error
        except BaseException:
            self.close()
            raise

    def _metadata(self) -> dict[str, Any]:
        stream, size = open_stream(self.path / METADATA)
        with stream:
            if size > MAX_PICKLE:
                raise RefusedPickle(f"it has more than {MAX_PICKLE} bytes")
            return _state(PickleMachine(stream.read(), _CLASSES).run())

    def _parsed(self, metadata: dict[str, Any]) -> dict[str, Tensor]:
        places: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
        for index, info in metadata["storage_data"].items():
            key = _state(index)
            if key.get("offset") is not None:
                if not isinstance(key["fqn"], str):
                    raise RefusedPickle("a piece has no tensor's name")
                places.setdefault(key["fqn"], {})[_sizes(key["offset"])] = _state(info)
        tensors = {}
        for name, entry in metadata["state_dict_metadata"].items():
            if entry.kind.endswith(".TensorStorageMetadata"):
                tensors[name] = self._tensor(name, _state(entry), places.get(name, {}))
        spans = sorted(
            (one.file, one.begin, one.begin + one.length)
            for pieces in self._pieces.values()
            for one in pieces
        )
        for (file, _, end), (other, begin, _) in pairwise(spans):
            if file == other and begin < end:  # reading the same bytes again takes time
                raise RefusedPickle(f"two pieces lie in the same bytes of {quoted(file)}")
        return tensors

    def _tensor(self, name: str, entry: dict[str, Any], places: dict[Any, Any]) -> Tensor:
        dtype = entry["properties"].state[0]
        if not isinstance(dtype, PickledName) or dtype.name not in _DTYPES:
            raise RefusedPickle(f"{quoted(name)} has elements of {quoted(dtype)}")
        tensor = Tensor(_sizes(entry["size"]), _DTYPES[dtype.name])
        pieces = [_piece(_state(chunk), places) for chunk in entry["chunks"]]
        for piece in pieces:
            ends = [a + n for a, n in zip(piece.offsets, piece.shape, strict=True)]
            if any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
                raise RefusedPickle(f"a piece of {quoted(name)} lies outside of it")
            if piece.begin + piece.length > self._opened(piece.file)[1]:
                raise RefusedPickle(f"{piece.file!r:.100} ends within a piece of {quoted(name)}")
        if sum(Tensor(piece.shape, tensor.dtype).size for piece in pieces) != tensor.size:
            raise RefusedPickle(f"pieces of {quoted(name)} are missing")
        if not fits_memory(tensor.bytes, sum(piece.length for piece in pieces)):
            raise RefusedPickle(f"{quoted(name)} claims {tensor.bytes} bytes")
        self._pieces[name] = pieces
        return tensor

    def _opened(self, file: str) -> tuple[BinaryIO, int]:
        if file not in self._files:
            self._files[file] = open_stream(self.path / file)
        return self._files[file]

    def _read(self, name: str) -> np.ndarray:
        array = joined(self.tensors[name], self._read_pieces(name))
        if array is None:
            raise self.broken(f"pieces of {quoted(name)} overlap")
        return array

    def _read_pieces(self, name: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The place of each piece in its tensor, and its elements."""
        for piece in self._pieces[name]:
            span = _Span(self._opened(piece.file)[0], piece.begin, piece.length)
            with _PieceReader(self.path / piece.file, span) as reader:
                (inner,) = reader.tensors.values() or (None,)
                if inner != Tensor(piece.shape, self.tensors[name].dtype):
                    raise self.broken(f"a piece of {quoted(name)} is {inner}")
                place = tuple(
                    slice(a, a + n) for a, n in zip(piece.offsets, piece.shape, strict=True)
                )
                yield place, reader.read(*reader.tensors)

    def files(self) -> list[Path]:
        """The metadata, and the files that hold the pieces."""
        return [self.path / METADATA, *(self.path / file for file in self._files)]

    def close(self) -> None:
        """Close the files."""
        for stream, _ in self._files.values():
            stream.close()


def _state(value: Any) -> dict[str, Any]:
    """The attributes of an object."""
    if not isinstance(value, PickledObject) or not isinstance(value.state, dict):
        raise RefusedPickle(f"it has {quoted(value)} where an object is needed")
    return value.state


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(n) is not int or not 0 <= n < 2**63 for n in value):
        raise RefusedPickle(f"it has {quoted(value)} where a shape is needed")
    return value


def _piece(chunk: dict[str, Any], places: dict[Any, Any]) -> _Piece:
    offsets, shape = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
    info = places[offsets]
    file, begin, length = (info[name] for name in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not file.strip(".") or set(file) & set("/\\:\0"):
        raise RefusedPickle(f"a piece lies in {quoted(file)}, not in the folder")
    if info.get("transform_descriptors"):
        raise RefusedPickle("its pieces are compressed or transformed otherwise")
    begin, length = _sizes((begin, length))
    if not length:
        raise RefusedPickle(f"a piece in {quoted(file)} has no bytes")
    return _Piece(offsets, shape, file, begin, length)


def open_distributed(path: Path) -> DistributedReader:
    """The tensors of a distributed checkpoint.

    Raises:
        FileError: it cannot be read, or is broken.
    """
    return DistributedReader(path)
