"""The chunks of HDF5's datasets, unpacked here within bounds.

HDF5's own filters trust the sizes that a file states: they unpack a chunk to any size, and read
beyond its end where it is too short; h5py's `read_direct_chunk` writes beyond its buffer. Here a
chunk's length is known before it is read and after each step. Of the filters those that h5py
offers for every file are known: gzip, shuffle, Fletcher's checksum.

References:
    The HDF Group, "HDF5 File Format Specification", version 3, sections on filters.
    J. Fletcher, "An arithmetic checksum for serial transmissions" (1982).
"""

from __future__ import annotations

import math
import os
import zlib
from typing import Any, BinaryIO

import numpy as np

from anymha.interchange.files.reader import Tensor

DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3
_CHECKSUM = 4


class BrokenChunk(ValueError):
    """Chunks that do not hold what the dataset says."""


class Chunks:
    """The chunks of a dataset; nothing is read yet.

    Args:
        dataset: The dataset, of h5py.
        stream: The file, which HDF5 reads too.
        usual_type: Whether the elements are stored as `dataset.dtype` says.

    Attributes:
        unpacked: The bytes of all chunks when they are unpacked.

    Raises:
        BrokenChunk: a filter is not known, or the elements are not of a usual type.
    """

    def __init__(self, dataset: Any, stream: BinaryIO, usual_type: bool) -> None:
        self._dataset, self._stream = dataset, stream
        self._file_size = stream.seek(0, os.SEEK_END)
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        known = {DEFLATE, SHUFFLE, FLETCHER32}
        if dataset.file.userblock_size:
            raise BrokenChunk("has chunks, and the file begins with other bytes than HDF5's")
        if not set(filters) <= known or len(set(filters)) < len(filters) or not usual_type:
            raise BrokenChunk("is packed in another way than by gzip, shuffle and fletcher32")
        self._filters = filters
        self._shape = tuple(int(size) for size in dataset.chunks)
        self._bytes = math.prod(self._shape) * dataset.dtype.itemsize
        self._grid = [-(-n // c) for n, c in zip(dataset.shape, self._shape, strict=True)]
        self.unpacked = math.prod(self._grid) * self._bytes

    def read(self, tensor: Tensor) -> np.ndarray:
        """The elements, in the dtype of the file; a chunk that is not stored is zero.

        Raises:
            BrokenChunk: a chunk lies beyond the file, is there twice, or has another size.
        """
        dataset = self._dataset
        array = np.zeros(tensor.shape, dataset.dtype)
        stored: list[Any] = []
        dataset.id.chunk_iter(stored.append)
        if len({tuple(chunk.chunk_offset) for chunk in stored}) < len(stored):
            raise BrokenChunk("has a chunk twice")
        if len(stored) < math.prod(self._grid) and has_own_fill_value(dataset):
            raise BrokenChunk("lacks chunks, in whose place a fill value of the file's own stands")
        for chunk in stored:
            if chunk.byte_offset is None or chunk.byte_offset + chunk.size > self._file_size:
                raise BrokenChunk(f"has a chunk of {chunk.size} bytes beyond the end of the file")
            begins = tuple(chunk.chunk_offset)
            if any(np.greater_equal(begins, tensor.shape)):
                continue  # the dataset was made smaller
            if any(np.mod(begins, self._shape)):
                raise BrokenChunk("has a chunk between two others")
            self._stream.seek(chunk.byte_offset)
            content = self._unpacked(self._stream.read(chunk.size), chunk.filter_mask)
            block = np.frombuffer(content, dataset.dtype)
            place = tuple(slice(b, b + c) for b, c in zip(begins, self._shape, strict=True))
            part = array[place]
            part[...] = block.reshape(self._shape)[tuple(map(slice, part.shape))]
        return array

    def _unpacked(self, content: bytes, mask: int) -> bytes:
        """A chunk's elements, by the inverse of each filter that was not left out."""
        applied = [one for i, one in enumerate(self._filters) if not mask >> i & 1]
        while applied:
            last = applied.pop()
            sums = _CHECKSUM * applied.count(FLETCHER32)
            if last == DEFLATE:
                content = _inflated(content, self._bytes + sums)
            elif last == FLETCHER32:
                content = _checked(content)
            else:
                content = _unshuffled(content, self._dataset.dtype.itemsize)
        if len(content) != self._bytes:
            raise BrokenChunk(f"has a chunk of {len(content)} bytes, where one takes {self._bytes}")
        return content


def has_own_fill_value(dataset: Any) -> bool:
    """Whether what is not stored has a value that the file states; zero otherwise.

    That value is never read: HDF5's library reads beyond its end where a damaged file has it of
    another dtype than the elements.
    """
    user_defined = 2  # H5D_FILL_VALUE_USER_DEFINED
    return dataset.id.get_create_plist().fill_value_defined() == user_defined


def _inflated(content: bytes, most: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(content, most + 1)
    except zlib.error as error:
        raise BrokenChunk(f"has a chunk that is not packed by gzip ({error})") from error
    if not inflater.eof or len(plain) > most:
        raise BrokenChunk(f"has a chunk that is cut short, or unpacks to more than {most} bytes")
    return plain


def _unshuffled(content: bytes, size: int) -> bytes:
    """The bytes of each element together again: the file has all first ones, all second ones..."""
    count = len(content) // size
    data = np.frombuffer(content, np.uint8)
    return data[: size * count].reshape(size, count).T.tobytes() + content[size * count :]


def _checked(content: bytes) -> bytes:
    """The content without its checksum at the end, if that is right."""
    plain, stored = content[:-_CHECKSUM], content[-_CHECKSUM:]
    words = np.frombuffer(plain + bytes(len(plain) % 2), ">u2").astype(np.uint64)
    weights = np.arange(words.size, 0, -1, dtype=np.uint64) % np.uint64(65535)
    sums = [int(np.sum(words)) % 65535, int(np.sum(words * weights)) % 65535]
    found = [int.from_bytes(stored[i : i + 2], "little") % 65535 for i in (0, 2)]
    if len(content) < _CHECKSUM or found != sums:
        raise BrokenChunk("has a chunk whose checksum is wrong")
    return plain
