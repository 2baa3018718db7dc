"""`Decoded`: how sequences were read step by step, as facts of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Decoded:
    """The calls in which the columns of a batch were read, and the columns that are padding.

    A cache holds the valid columns of each row, one after the other; padding is not held.
    """

    valid: np.ndarray  # (B, T) booleans; False = padding
    calls: np.ndarray  # (T,) the number of the call that reads a column, from 0 on
    joined: bool = False  # Whether the first call is one call for each row, whose caches are joined
    # (B,) After the first call, row b stands where row order[b] of the batch stood before it;
    # None: rows stay
    turned: np.ndarray | None = None
    # How many of the first columns are read again before each call after the first, and taken back
    drafted: int = 0

    @cached_property
    def places(self) -> np.ndarray:
        """(B, T): how many valid columns stand before each in its row."""
        counts = np.cumsum(self.valid, axis=1)
        return counts - self.valid

    @cached_property
    def begins(self) -> np.ndarray:
        """(B, T): how many positions of its row the cache held before a column's call."""
        first = np.searchsorted(self.calls, self.calls)  # the call's first column
        return self.places[:, first]

    @cached_property
    def ends(self) -> np.ndarray:
        """(B, T): how many it held after that call."""
        last = np.searchsorted(self.calls, self.calls, side="right") - 1
        return self.places[:, last] + self.valid[:, last]

    @cached_property
    def rounds(self) -> np.ndarray:
        """(B, T): how many calls before a column's read something of its row."""
        count = self.calls[-1] + 1
        read = np.stack([self.valid[:, self.calls == call].any(1) for call in range(count)], 1)
        return (np.cumsum(read, axis=1) - read)[:, self.calls]

    @property
    def ragged(self) -> bool:
        """Whether there is padding."""
        return not self.valid.all()

    def of_batch(self, at: int) -> Decoded:
        """The facts for one element of the batch."""
        return Decoded(self.valid[at : at + 1], self.calls, self.joined)
