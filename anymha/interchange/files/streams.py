"""Formats of one file that is read from its beginning: a header, then the elements at known places.

Nothing is read, and no memory taken, beyond what the file has.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from anymha.interchange.files.reader import Reader, Tensor, open_stream, read_array
from anymha.text import quoted


class Malformed(ValueError):
    """Bytes that are not those of the format; the message continues "it is no such file: "."""


@contextmanager
def closed_if_broken(reader: Reader) -> Iterator[None]:
    """Close a reader where its file cannot be parsed, and say that it is broken.

    Raises:
        FileError: the file is malformed.
    """
    try:
        yield
    except (Malformed, UnicodeDecodeError) as error:
        reader.close()
        raise reader.broken(str(error)) from error
    except BaseException:
        reader.close()
        raise


class StreamReader(Reader):
    """An open file of such a format; only the tensors that are asked for are read.

    Args:
        path: The file.
        kind: The format's name in messages, with its article.

    Raises:
        FileError: it cannot be read, or is broken.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind)
        self._stream, self._size = open_stream(path)
        with closed_if_broken(self):
            self._parse()

    @abc.abstractmethod
    def _parse(self) -> None:
        """Read the header, and set the tensors."""

    def _take(self, size: int) -> bytes:
        """The next bytes."""
        content = self._stream.read(size)
        if len(content) < size:
            raise Malformed("it ends too early")
        return content

    def _skip(self, size: int) -> None:
        """Leave out the next bytes."""
        if self._stream.tell() + size > self._size:
            raise Malformed("it ends too early")
        self._stream.seek(size, 1)

    def _elements(self, name: str, start: int, tensor: Tensor) -> np.ndarray:
        """The array that begins at a place of the file; `name` is for messages."""
        self._stream.seek(start)
        array = read_array(tensor, self._stream)
        if array is None:
            raise self.broken(f"it ends within {quoted(name)}")
        return array

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
