"""Zip archives: members are read in place, within bounds; nothing is ever extracted."""

from __future__ import annotations

import os
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
from anymha.text import quoted, shown

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

MAX_PARSED = 20
PARSED_BYTES = 2**20
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
        if stream is None:
            stream, size = open_stream(path)
        else:
            size = stream.seek(0, os.SEEK_END)
        self._stream, self._size = stream, size
        try:
            with self._guard("it is not a complete zip archive"):
                self._zip = zipfile.ZipFile(self._stream)
            self._check_members()
        except BaseException:
            self._stream.close()
            raise
        self.sizes = {info.filename: info.file_size for info in self._zip.infolist()}

    def _check_members(self) -> None:
        members = self._zip.infolist()
        seen = set()
        for info in members:
            name = info.filename
            if name in seen:
                raise self._broken(f"it has two members {quoted(name)}")
            if info.compress_type not in METHODS or info.flag_bits & 1:
                reason = f"its member {quoted(name)} is encrypted, or neither stored nor deflated"
                raise self._broken(reason)
            if info.header_offset + info.compress_size > self._size:
                raise self._broken(f"its member {quoted(name)} reaches beyond its end")
            if not fits_memory(info.file_size, info.compress_size):
                raise self._broken(
                    f"its member {quoted(name)} claims {info.file_size} bytes in "
                    f"{info.compress_size}, as an archive does that is made to fill the memory"
                )
            seen.add(name)
        claimed, stored = sum(info.file_size for info in members), self._size
        if not fits_memory(claimed, stored):  # members may lie one over the other
            raise self._broken(f"its members claim {claimed} bytes in {stored}")

    def check_plain(self, name: str, most: int) -> None:
        """Check that a member that is read as a whole and then parsed is of a likely size.

        Args:
            name: The member.
            most: The most bytes; of a compressed one also `MAX_PARSED` times its bytes in the file,
                as parsed values take more memory and time than arrays.

        Raises:
            FileError: it is larger.
        """
        info = self._zip.getinfo(name)
        if info.file_size > min(most, max(MAX_PARSED * info.compress_size, PARSED_BYTES)):
            raise self._broken(
                f"its member {quoted(name)} claims {info.file_size} bytes in {info.compress_size}"
            )

    def _broken(self, reason: str) -> FileError:
        return broken(self.path, self.kind, reason)

    @contextmanager
    def _guard(self, reason: str) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except _WRONG as error:
            raise self._broken(f"{reason} ({shown(error)})") from error

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A member as a stream; reading to its end checks its checksum."""
        with self._guard(f"its member {quoted(name)} is broken"), self._zip.open(name) as stream:
            yield cast(BinaryIO, stream)

    def read(self, name: str) -> bytes:
        """A member's bytes."""
        with self.open(name) as stream:
            content = stream.read()
        if len(content) != self.sizes[name]:
            raise self._broken(f"its member {quoted(name)} is cut short")
        return content

    def array(self, name: str, tensor: Tensor, skip: int = 0) -> np.ndarray:
        """A member's bytes after the first `skip`, all of them, as an array."""
        with self.open(name) as stream:
            stream.read(skip)
            array = read_array(tensor, stream)
            rest = stream.read(1)  # the checksum is looked at where there is nothing more
        if array is None or rest:
            reason = f"its member {quoted(name)} does not have the length that its array needs"
            raise self._broken(reason)
        return array

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._stream.close()
