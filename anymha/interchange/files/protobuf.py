"""The wire format of protocol buffers, as far as ONNX needs it: fields, without a schema.

References:
    Google, "Protocol Buffers", section "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

VARINT, FIXED64, SPAN, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}


class MalformedMessage(ValueError):
    """Bytes that are not a message."""


def fields(stream: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message in ``[begin, end)`` of a stream.

    Yields:
        Number, wire type, and the span of its content in the stream; for a varint its value and 0.

    Raises:
        MalformedMessage: they do not fill the span.
    """
    position = begin
    while position < end:
        stream.seek(position)
        tag, position = _varint(stream, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, position = _varint(stream, position)
            if position > end:
                raise MalformedMessage("a number runs over the end of its message")
            yield number, wire, value, 0
            continue
        if wire == SPAN:
            length, position = _varint(stream, position)
        elif wire in _SIZES:
            length = _SIZES[wire]
        else:
            raise MalformedMessage(f"it has the wire type {wire}")
        if not number or position + length > end:
            raise MalformedMessage("a field runs over the end of its message")
        yield number, wire, position, position + length
        position += length


def varints(content: bytes) -> list[int]:
    """A sequence of unsigned numbers.

    Raises:
        MalformedMessage: the last one is cut short.
    """
    numbers, number, shift = [], 0, 0
    for byte in content:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number & (2**64 - 1))
            number, shift = 0, 0
        elif shift > 63:
            raise MalformedMessage("a number has more than ten bytes")
    if shift:
        raise MalformedMessage("a number is cut short")
    return numbers


def _varint(stream: BinaryIO, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise MalformedMessage("it ends within a number")
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number, position + shift // 7 + 1
    raise MalformedMessage("a number has more than ten bytes")
