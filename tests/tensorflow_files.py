"""Checkpoints of TensorFlow, made by hand, with right checksums."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from anymha.interchange.files.crc32c import crc32c
from anymha.interchange.files.sorted_table import MAGIC, masked
from anymha.interchange.files.tensorflow_checkpoint import DTYPES, GRAPH

GRAPH_KIND = 7


def varint(number: int) -> bytes:
    head = b""
    while number > 0x7F:
        head += bytes([number & 0x7F | 0x80])
        number >>= 7
    return head + bytes([number])


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def row(key: bytes, value: bytes, shared: int = 0) -> bytes:
    """An entry of a block, whose key has the first bytes of the one before."""
    own = key[shared:]
    return varint(shared) + varint(len(own)) + varint(len(value)) + own + value


def block(rows: bytes, packing: bytes = b"\0") -> bytes:
    """A block, how it is packed, and its checksum."""
    content = rows + (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + packing
    return content + masked(crc32c(content)).to_bytes(4, "little")


def table_of(data: bytes, places: bytes) -> bytes:
    """A table of blocks of data and the block of their places."""
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(places) - 5)
    return data + places + footer.ljust(40, b"\0") + MAGIC


def index_of_rows(rows: bytes) -> bytes:
    """An index with one block of data."""
    data = block(rows)
    return table_of(data, block(row(b"\xff", varint(0) + varint(len(data) - 5))))


def index_of(values: Mapping[bytes, bytes]) -> bytes:
    """An index with these values by key."""
    return index_of_rows(b"".join(row(key, values[key]) for key in sorted(values)))


HEADER = field(1, 1) + field(3, b"\x08\x01")
"""One file of data."""


def entry(kind: int, shape: tuple[int, ...], begin: int, size: int, checksum: int = 0) -> bytes:
    """What an index says of a variable."""
    axes = b"".join(field(2, field(1, size)) for size in shape)
    places = field(4, begin) + field(5, size)
    return field(1, kind) + field(2, axes) + places + b"\x35" + checksum.to_bytes(4, "little")


def checkpoint(arrays: Mapping[str, np.ndarray], graph: bool = True) -> dict[str, bytes]:
    """The files of a checkpoint; with a graph of objects, whose paths are numbers."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    values, data, nodes = {b"": HEADER}, b"", b""
    for number, (name, array) in enumerate(arrays.items()):
        key = f"layer/{number}/.ATTRIBUTES/VARIABLE_VALUE" if graph else name
        content = array.tobytes()
        check = masked(crc32c(content))
        values[key.encode()] = entry(
            kinds[array.dtype], array.shape, len(data), len(content), check
        )
        data += content
        attribute = field(1, b"VARIABLE_VALUE") + field(2, name.encode()) + field(3, key.encode())
        nodes += field(1, field(1, b"\x08\1\x12\1a") + field(2, attribute))
    if graph:
        length = len(nodes).to_bytes(4, "little")
        stated = masked(crc32c(length)).to_bytes(4, "little")
        text = varint(len(nodes)) + stated + nodes
        check = masked(crc32c(length + stated + nodes))
        values[GRAPH] = entry(GRAPH_KIND, (), len(data), len(text), check)
        data += text
    return {"a.index": index_of(values), "a.data-00000-of-00001": data}
