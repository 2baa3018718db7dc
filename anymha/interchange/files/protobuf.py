"""The wire format of protocol buffers, as far as ONNX needs it: fields, without a schema.

References:
    Google, "Protocol Buffers", section "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

VARINT, FIXED64, SPAN, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}


class Malformed(ValueError):
    """Bytes that are no message."""


def fields(stream: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message in ``[begin, end)`` of a stream.

    Yields:
        Number, wire type, and the span of its content in the stream; for a varint its value and 0.

    Raises:
        Malformed: they do not fill the span.
    """
    place = begin
    while place < end:
        stream.seek(place)
        tag, place = _varint(stream, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(stream, place)
            if place > end:
                raise Malformed("a number runs over the end of its message")
            yield number, wire, value, 0
            continue
        if wire == SPAN:
            length, place = _varint(stream, place)
        elif wire in _SIZES:
            length = _SIZES[wire]
        else:
            raise Malformed(f"it has the wire type {wire}")
        if not number or place + length > end:
            raise Malformed("a field runs over the end of its message")
        yield number, wire, place, place + length
        place += length


def varints(content: bytes) -> list[int]:
    """Numbers one after another, unsigned.

    Raises:
        Malformed: the last one is cut short.
    """
    found, number, shift = [], 0, 0
    for byte in content:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(number & (2**64 - 1))
            number, shift = 0, 0
        elif shift > 63:
            raise Malformed("a number has more than ten bytes")
    if shift:
        raise Malformed("a number is cut short")
    return found


def _varint(stream: BinaryIO, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise Malformed("it ends within a number")
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number, place + shift // 7 + 1
    raise Malformed("a number has more than ten bytes")
