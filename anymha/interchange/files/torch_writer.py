"""Writes ``.pt`` files of torch, one tensor at a time, without torch.

References:
    PyTorch 2.13, ``torch/serialization.py`` and ``torch/_utils.py``.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.reader import Tensor, bytes_of, check_all_written, check_array
from anymha.interchange.files.torch_reader import STORAGES, UNTYPED
from anymha.text import shown

ALIGNMENT = 64
_HEADER = 30  # bytes of a zip member's header before its name
_ZIP64 = 20  # bytes that a member of more than 2 GB adds
_TYPED = {dtype: name for name, dtype in STORAGES.items()}
_PLAIN = {dtype: name for name, dtype in UNTYPED.items()}


class _TorchWriter:
    def __init__(
        self, archive: zipfile.ZipFile, stream: BinaryIO, tensors: Mapping[str, Tensor]
    ) -> None:
        self._archive, self._stream, self._tensors = archive, stream, tensors
        self._missing = set(tensors)
        self._keys = {name: str(number) for number, name in enumerate(tensors)}
        self._add("data.pkl", _program(tensors))
        self._add("byteorder", b"little")
        self._add("version", b"3\n")

    def _add(self, name: str, content: bytes | memoryview) -> None:
        """A member whose bytes begin at a multiple of the alignment."""
        info = zipfile.ZipInfo(f"archive/{name}")
        large = len(content) >= 2**31 - 1
        end = self._stream.tell() + _HEADER + len(info.filename) + _ZIP64 * large + 4
        padding = -end % ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with self._archive.open(info, "w", force_zip64=large) as member:
            member.write(content)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a tensor that was announced."""
        array = check_array(name, array, self._tensors[name])
        self._add(f"data/{self._keys[name]}", bytes_of(array))
        self._missing.discard(name)

    def finish(self) -> None:
        """See to it that the file is complete."""
        check_all_written(self._missing)


@contextmanager
def create_torch(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[_TorchWriter]:
    """A new ``.pt`` file with a dict of tensors, which is there once all are. It has no metadata.

    Raises:
        FileError: it cannot be written, or cannot hold a dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPED and tensor.dtype not in _PLAIN:
            raise FileError(f"A torch file cannot hold `{shown(name)}` of dtype {tensor.dtype}.")
    with atomic_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        writer = _TorchWriter(archive, stream, tensors)
        yield writer
        writer.finish()


def _program(tensors: Mapping[str, Tensor]) -> bytes:
    """The pickle of a dict of tensors."""
    items = b"".join(
        _text(name) + _rebuilt(str(number), tensor)
        for number, (name, tensor) in enumerate(tensors.items())
    )
    return b"\x80\x02}(" + items + b"u."


def _rebuilt(key: str, tensor: Tensor) -> bytes:
    """The call that makes a tensor of its storage."""
    typed = tensor.dtype in _TYPED
    kind = (
        _name("torch", _TYPED[tensor.dtype]) if typed else _name("torch.storage", "UntypedStorage")
    )
    size = tensor.size if typed else tensor.bytes
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _int(size) + b"tQ"
    strides = [
        int(np.prod(tensor.shape[axis + 1 :], dtype=object)) for axis in range(len(tensor.shape))
    ]
    place = _int(0) + _tuple(tensor.shape) + _tuple(strides)
    hooks = b"\x89" + _name("collections", "OrderedDict") + b")R"
    dtype = b"" if typed else _name("torch", _PLAIN[tensor.dtype])
    version = "v2" if typed else "v3"
    function = _name("torch._utils", f"_rebuild_tensor_{version}")
    return function + b"(" + storage + place + hooks + dtype + b"tR"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(content)) + content


def _int(number: int) -> bytes:
    content = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _tuple(numbers: object) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"  # type: ignore[call-overload]
