"""Zip archives: members are read in place, within bounds; nothing is ever extracted."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.reader import Tensor, broken, fits_memory, open_stream, read_array

_WRONG = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""The errors of `zipfile` on archives that are broken, encrypted or of an unknown method."""

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """An open zip archive.

    Args:
        path: The file.
        kind: The format's name in messages, with its article.
        stream: A stream of its bytes; default the file at `path`.

    Attributes:
        sizes: The members' sizes by name, as the archive claims them.
    """

    def __init__(self, path: Path, kind: str, stream: BinaryIO | None = None) -> None:
        self.path, self.kind = path, kind
        self._stream = open_stream(path)[0] if stream is None else stream
        try:
            with self._guard("it is not a complete zip archive"):
                self._zip = zipfile.ZipFile(self._stream)
            self._check_members()
        except BaseException:
            self._stream.close()
            raise
        self.sizes = {info.filename: info.file_size for info in self._zip.infolist()}

    def _check_members(self) -> None:
        seen = set()
        for info in self._zip.infolist():
            name = info.filename
            if name in seen:
                raise broken(self.path, self.kind, f"it has two members {name!r}")
            if info.compress_type not in METHODS or info.flag_bits & 1:
                reason = f"its member {name!r} is encrypted, or neither stored nor deflated"
                raise broken(self.path, self.kind, reason)
            if not fits_memory(info.file_size, info.compress_size):
                raise broken(
                    self.path,
                    self.kind,
                    f"its member {name!r} claims {info.file_size} bytes in {info.compress_size}, "
                    "as an archive does that is made to fill the memory",
                )
            seen.add(name)

    @contextmanager
    def _guard(self, reason: str) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except _WRONG as error:
            raise broken(self.path, self.kind, f"{reason} ({error})") from error

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A member as a stream; reading to its end checks its checksum."""
        with self._guard(f"its member {name!r} is broken"), self._zip.open(name) as stream:
            yield cast(BinaryIO, stream)

    def read(self, name: str) -> bytes:
        """A member's bytes."""
        with self.open(name) as stream:
            content = stream.read()
        if len(content) != self.sizes[name]:
            raise broken(self.path, self.kind, f"its member {name!r} is cut short")
        return content

    def array(self, name: str, tensor: Tensor, skip: int = 0) -> np.ndarray:
        """A member's bytes after the first `skip`, all of them, as an array."""
        with self.open(name) as stream:
            stream.read(skip)
            array = read_array(tensor, stream)
            rest = stream.read(1)  # the checksum is looked at where there is nothing more
        if array is None or rest:
            reason = f"its member {name!r} does not have the length that its array needs"
            raise broken(self.path, self.kind, reason)
        return array

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._stream.close()
