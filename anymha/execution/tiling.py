"""Tiles of queries, each with the keys that it can see: attention in memory that grows with T.

A tile has all keys of its queries, so its softmax is whole, and dropout, masks, bias and features
mean in it what they mean in one piece. Causality and windows leave out the keys that no query of a
tile sees. The height of a tile changes the speed and the memory, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from anymha.attention.masks import PositionMask

SEGMENTS = 8
"""How many pieces of code a compiled loop may have for tiles that see different keys."""

ENOUGH = 128
"""Queries with which a matrix product is about as fast as with more. Flatter tiles compute fewer
logits that causality masks."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of equal height, one below the other, over the same keys.

    Args:
        start: The first query.
        count: Number of tiles.
        height: Queries in a tile, an even number but in the last tile of all.
        key_start: The first key.
        key_stop: The key after the last.
    """

    start: int
    count: int
    height: int
    key_start: int
    key_stop: int

    @property
    def stop(self) -> int:
        """The query after the last."""
        return self.start + self.count * self.height

    def single(self) -> Iterator[Tiles]:
        """Each of them by itself."""
        for number in range(self.count):
            yield replace(self, start=self.start + number * self.height, count=1)


def plan_tiles(
    position_mask: PositionMask, queries: int, keys: int, elements: int, *, eager_loop: bool
) -> tuple[Tiles, ...]:
    """The tiles of T queries.

    Args:
        position_mask: What a query sees by its position.
        queries: T, at least 1.
        keys: S, at least 1.
        elements: How many logits a tile may have for each of its heads.
        eager_loop: Whether each tile is computed by itself, in an ordinary loop, and may have keys
            of its own; else only each of `SEGMENTS` groups of tiles may.
    """
    if not isinstance(position_mask.offset, int) or position_mask.is_open:
        return tuple(_split(0, queries, (0, keys), elements))
    length = _even(math.ceil(queries / SEGMENTS))
    if eager_loop:
        length = min(_height(_span(position_mask, keys), elements), max(length, ENOUGH))
    tiles: list[Tiles] = []
    for start in range(0, queries, length):
        stop = min(start + length, queries)
        tiles += _split(start, stop, seen_keys(position_mask, start, stop, keys), elements)
    return tuple(tiles)


def seen_keys(position_mask: PositionMask, start: int, stop: int, keys: int) -> tuple[int, int]:
    """The first key that queries from `start` to `stop` see, and the one after the last.

    One more where they see none, so that there is something to be masked.
    """
    key_start, key_stop = 0, keys
    if position_mask.left is not None:
        key_start = min(max(0, start + position_mask.offset - position_mask.left), keys - 1)
    if position_mask.right is not None:
        last = stop + position_mask.offset + position_mask.right
        key_stop = min(max(key_start + 1, last), keys)
    return key_start, key_stop


def _split(start: int, stop: int, keys: tuple[int, int], elements: int) -> Iterator[Tiles]:
    """Queries in tiles of `elements` logits, and what is left over in a tile of its own."""
    key_start, key_stop = keys
    height = min(_even(elements // (key_stop - key_start)), stop - start)
    count = (stop - start) // height
    yield Tiles(start, count, height, key_start, key_stop)
    rest = start + count * height
    if rest < stop:
        yield Tiles(rest, 1, stop - rest, key_start, key_stop)


def _span(position_mask: PositionMask, keys: int) -> int:
    """How many keys one query sees at most."""
    left = keys if position_mask.left is None else position_mask.left
    right = keys if position_mask.right is None else position_mask.right
    return min(keys, left + right + 1)


def _height(span: int, elements: int) -> int:
    """How many queries fit where a tile of n queries has n * (n + span) logits."""
    return _even(int((math.sqrt(span * span + 4 * elements) - span) / 2))


def _even(height: int) -> int:
    """An even height, at least 2: one word of the dropout's generator serves two rows."""
    return max(2, (height + 1) // 2 * 2)
