"""Known answers of the dropout's generator: which elements stay, for some seeds.

They were computed from the formula in `anymha.attention.dropout` by another program, in whole
numbers of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KnownMask:
    """A keep mask that every backend gives."""

    seed: int  # The seed
    threshold: int  # The rate of dropout in units of 1/65536
    shape: tuple[int, int, int, int]  # (B, H, T, S)
    packed: str  # The mask in row-major order, eight elements a byte, the first one highest, in hex

    @property
    def mask(self) -> np.ndarray:
        """(B, H, T, S) booleans, True where the element stays."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.packed), np.uint8))
        return bits[: math.prod(self.shape)].reshape(self.shape).astype(bool)

    def __str__(self) -> str:
        return f"seed={self.seed}"


KNOWN_MASKS = (
    KnownMask(0, 19661, (2, 2, 3, 8), "ffb372bbffad99daefe7f018"),
    KnownMask(11, 19661, (1, 2, 4, 8), "f55a79700d2ff2fe"),
    KnownMask(-7, 32768, (2, 1, 3, 8), "5a75a13f2dc7"),
    KnownMask(2**40 + 5, 6554, (1, 2, 3, 8), "feffffff9dff"),
)
