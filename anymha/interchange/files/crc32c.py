"""The checksum CRC-32C, in NumPy: the register of many spans of the bytes moves at once.

References:
    RFC 3720, "Internet Small Computer Systems Interface", section 12.1, and appendix B.4.
    TensorFlow 2.21, ``tensorflow/core/lib/hash/crc32c.h``, for the masked form.
"""

from __future__ import annotations

import numpy as np

from anymha.interchange.files.reader import CHUNK

_POLYNOMIAL = 0x82F63B78
_U4 = np.uint32


def _stepped(registers: np.ndarray, bits: int) -> np.ndarray:
    """The registers after so many bits of zero."""
    for _ in range(bits):
        registers = registers >> _U4(1) ^ _U4(_POLYNOMIAL) * (registers & _U4(1))
    return registers


_LATER = _stepped(np.arange(2**16, dtype=_U4), 16)
"""The register that the later two of four bytes leave."""
_EARLIER = _stepped(_LATER, 16)
_SHIFTS = [_stepped(_U4(1) << np.arange(32, dtype=_U4), 8)]
"""What 1, 2, 4, 8 ... bytes of zeros make of each bit of the register."""


def _shifted(registers: np.ndarray, power: int) -> np.ndarray:
    """The registers after ``2**power`` bytes of zeros."""
    while len(_SHIFTS) <= power:
        _SHIFTS.append(_shifted(_SHIFTS[-1], len(_SHIFTS) - 1))
    bits = registers[:, None] >> np.arange(32, dtype=_U4) & _U4(1)
    return np.bitwise_xor.reduce(bits * _SHIFTS[power], axis=1)


def _register(block: np.ndarray, power: int) -> np.ndarray:
    """The register, 0 before, after ``2**power`` bytes, 4 at least."""
    span = max(power // 2, 2)
    registers = np.zeros(2 ** (power - span), _U4)
    for words in np.ascontiguousarray(block.view("<u4").reshape(len(registers), -1).T):
        halves = (registers ^ words).astype("<u4", copy=False).view("<u2")
        registers = _EARLIER.take(halves[::2]) ^ _LATER.take(halves[1::2])
    for width in range(span, power):
        registers = _shifted(registers[::2], width) ^ registers[1::2]
    return registers


def crc32c(content: bytes | memoryview) -> int:
    """The CRC-32C of bytes."""
    data = np.frombuffer(content, np.uint8)
    register = np.full(1, 2**32 - 1, _U4)
    first = len(data) % CHUNK
    for begin in range(first - CHUNK if first else 0, len(data), CHUNK):
        part = data[max(begin, 0) : begin + CHUNK]
        if len(part) < 4:
            for byte in part:
                register = _stepped(register ^ byte, 8)
            continue
        power = (len(part) - 1).bit_length()
        block = np.zeros(2**power, np.uint8)
        block[len(block) - len(part) :] = part
        block[len(block) - len(part) :][:4] ^= register.astype("<u4").view(np.uint8)
        register = _register(block, power)  # zeros before the bytes change nothing
    return int(~register[0])
