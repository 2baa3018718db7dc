"""Blocks of queries, each with the keys that it can see: attention in memory that grows with T.

A block sees all keys of its rows, so its softmax is whole, and dropout, masks, bias and softcap
mean in it what they mean in one piece. Causality and windows leave out the keys that no row of a
block sees. How many rows a block has changes the speed and the memory, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from anymha.attention.masks import Visibility

SEGMENTS = 8
"""How many pieces of code a compiled loop may have for blocks that see different keys."""

ENOUGH = 128
"""Rows with which a matrix product is about as fast as with more; fewer see fewer keys in vain."""


@dataclass(frozen=True)
class Run:
    """Blocks of equally many rows, one after another, that are given the same keys.

    Args:
        start: The first row.
        count: How many blocks.
        rows: Rows in a block, an even number but in the last block of all.
        low: The first key.
        high: The key behind the last.
    """

    start: int
    count: int
    rows: int
    low: int
    high: int

    @property
    def stop(self) -> int:
        """The row behind the last."""
        return self.start + self.count * self.rows


def plan_runs(
    visible: Visibility, queries: int, keys: int, elements: int, *, unrolled: bool
) -> tuple[Run, ...]:
    """The blocks of T queries.

    Args:
        visible: What a query sees by its position.
        queries: T, at least 1.
        keys: S, at least 1.
        elements: How many logits a block may have for each of its heads.
        unrolled: Whether each block is computed by itself, in an ordinary loop, and may have keys
            of its own; else only each of `SEGMENTS` groups of blocks may.
    """
    if not isinstance(visible.offset, int) or visible.everything:
        return tuple(_split(0, queries, (0, keys), elements))
    length = _even(math.ceil(queries / SEGMENTS))
    if unrolled:
        length = min(_rows(_span(visible, keys), elements), max(length, ENOUGH))
    runs: list[Run] = []
    for start in range(0, queries, length):
        stop = min(start + length, queries)
        runs += _split(start, stop, seen_keys(visible, start, stop, keys), elements)
    return tuple(runs)


def seen_keys(visible: Visibility, start: int, stop: int, keys: int) -> tuple[int, int]:
    """The first key that rows from `start` to `stop` see, and the one behind the last.

    One more where they see none, so that there is something to be masked.
    """
    low, high = 0, keys
    if visible.left is not None:
        low = min(max(0, start + visible.offset - visible.left), keys - 1)
    if visible.right is not None:
        high = min(max(low + 1, stop + visible.offset + visible.right), keys)
    return low, high


def _split(start: int, stop: int, keys: tuple[int, int], elements: int) -> Iterator[Run]:
    """Rows in blocks of `elements` logits, and what is left over in a block of its own."""
    low, high = keys
    rows = min(_even(elements // (high - low)), stop - start)
    count = (stop - start) // rows
    yield Run(start, count, rows, low, high)
    done = start + count * rows
    if done < stop:
        yield Run(done, 1, stop - done, low, high)


def _span(visible: Visibility, keys: int) -> int:
    """How many keys one query sees at most."""
    left = keys if visible.left is None else visible.left
    right = keys if visible.right is None else visible.right
    return min(keys, left + right + 1)


def _rows(span: int, elements: int) -> int:
    """How many rows fit where a block of n rows has n * (n + span) logits."""
    return _even(int((math.sqrt(span * span + 4 * elements) - span) / 2))


def _even(rows: int) -> int:
    """An even number of rows, at least 2: one word of the dropout's generator serves two rows."""
    return max(2, (rows + 1) // 2 * 2)
