"""The wire format of protocol buffers: fields, without a schema.

References:
    Google, "Protocol Buffers", section "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

import numpy as np

from anymha.interchange.files.streams import Malformed

MAX_FIELDS = 250_000
"""The most fields that are read of one file; a graph has one for each node and initialiser."""
MAX_VARINT = 10
VARINT, FIXED64, SPAN, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}


class MalformedMessage(Malformed):
    """Bytes that are not a message."""


class TooManyFields(MalformedMessage):
    """A message, or several together, that would take too long."""


def fields(
    stream: BinaryIO, begin: int, end: int, steps: Iterator[int] | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message in ``[begin, end)`` of a stream.

    Args:
        stream: The stream.
        begin: Where the message begins.
        end: Where it ends.
        steps: Counts the fields of several messages together.

    Yields:
        Number, wire type, and the span of its content in the stream; for a varint its value and 0.

    Raises:
        MalformedMessage: they do not fill the span.
        TooManyFields: they are more than `MAX_FIELDS`.
    """
    position, steps = begin, count() if steps is None else steps
    while position < end:
        if next(steps) >= MAX_FIELDS:
            raise TooManyFields(f"it has more than {MAX_FIELDS} fields")
        stream.seek(position)
        head = stream.read(2 * MAX_VARINT)
        tag, used = varint(head, 0, len(head))
        number, wire = tag >> 3, tag & 7
        value, used = varint(head, used, len(head)) if wire in (VARINT, SPAN) else (0, used)
        position += used
        if wire == VARINT:
            if position > end:
                raise MalformedMessage("a number runs over the end of its message")
            yield number, wire, value, 0
            continue
        if wire != SPAN and wire not in _SIZES:
            raise MalformedMessage(f"it has the wire type {wire}")
        length = _SIZES.get(wire, value)
        if not number or position + length > end:
            raise MalformedMessage("a field runs over the end of its message")
        yield number, wire, position, position + length
        position += length


def varints(content: bytes) -> np.ndarray:
    """A sequence of unsigned numbers, as uint64.

    Raises:
        MalformedMessage: the last one is cut short, or one has more than ten bytes.
    """
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if data.size and data[-1] >= 0x80:
        raise MalformedMessage("a number is cut short")
    starts = np.concatenate([[0], ends[:-1] + 1]) if data.size else ends
    lengths = ends - starts + 1
    if np.any(lengths > MAX_VARINT):
        raise MalformedMessage("a number has more than ten bytes")
    numbers = np.zeros(ends.size, np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = lengths > place
        bits = (data[starts[longer] + place] & 0x7F).astype(np.uint64)
        numbers[longer] |= bits << np.uint64(7 * place)
    return numbers


def varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at a place, and where it ends.

    Raises:
        MalformedMessage: it does not end before `end`, or has more than ten bytes.
    """
    number, span = 0, content[at : min(at + MAX_VARINT, end)]
    for place, byte in enumerate(span):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    if len(span) < MAX_VARINT:
        raise MalformedMessage("it ends within a number")
    raise MalformedMessage("a number has more than ten bytes")
