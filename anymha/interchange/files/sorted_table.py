"""Sorted tables of keys and values, as LevelDB's: the form of a TensorFlow checkpoint's index.

Blocks of entries, in which a key has the beginning of the one before, and a block of the blocks'
places. Checksums of blocks are looked at; packed blocks, which TensorFlow does not write, are
refused.

References:
    LevelDB, ``doc/table_format.md``.
    TensorFlow 2.21, ``tensorflow/core/lib/io/table_builder.cc``.
"""

from __future__ import annotations

from collections.abc import Iterator

from anymha.interchange.files.crc32c import crc32c
from anymha.interchange.files.protobuf import varint
from anymha.interchange.files.reader import MAX_NAMES
from anymha.interchange.files.streams import Malformed

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48
TRAILER = 5
"""The bytes after a block: how it is packed, and its checksum."""
MAX_ENTRIES, MAX_BLOCKS = 100_000, 4_000


def masked(checksum: int) -> int:
    """A CRC-32C as it is stored beside what it is of."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) % 2**32


def entries(content: bytes) -> dict[bytes, bytes]:
    """The values of a table by their keys.

    Raises:
        Malformed: it is none, or is broken.
    """
    if len(content) < FOOTER or not content.endswith(MAGIC):
        raise Malformed("its index does not end as one of TensorFlow does")
    at = end = len(content)
    at -= FOOTER
    _, at = varint(content, at, end)  # the place of a block that is not used
    _, at = varint(content, at, end)
    offset, at = varint(content, at, end)
    size, at = varint(content, at, end)
    found: dict[bytes, bytes] = {}
    letters = done = 0
    for number, (_, handle) in enumerate(_block(content, offset, size)):
        offset, at = varint(handle, 0, len(handle))
        if offset < done or number == MAX_BLOCKS:
            raise Malformed("blocks of its index lie over one another, or are too many")
        size, _ = varint(handle, at, len(handle))
        done = offset + size
        for key, value in _block(content, offset, size):
            letters += len(key)
            if key in found:
                raise Malformed("its index has a name twice")
            if letters > MAX_NAMES or len(found) == MAX_ENTRIES:
                raise Malformed(f"its index has more than {MAX_ENTRIES} names, or too long ones")
            found[key] = value
    return found


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block."""
    end = offset + size
    trailer = content[end : end + TRAILER]
    if len(trailer) < TRAILER or size < 8:
        raise Malformed("a block of its index lies outside of it")
    if trailer[0]:
        raise Malformed("a block of its index is packed")
    if masked(crc32c(content[offset : end + 1])) != int.from_bytes(trailer[1:], "little"):
        raise Malformed("the checksum of its index is wrong")
    restarts = int.from_bytes(content[end - 4 : end], "little")
    end -= 4 * (restarts + 1)
    key, at = b"", offset
    while at < end:
        shared, at = varint(content, at, end)
        own, at = varint(content, at, end)
        length, at = varint(content, at, end)
        if shared > len(key) or at + own + length > end:
            raise Malformed("an entry of its index reaches over its block")
        key = key[:shared] + content[at : at + own]
        at += own + length
        yield key, content[at - length : at]
    if at != end:
        raise Malformed("a block of its index is broken")
