"""Boolean masks: which key a query may attend to. True = may attend, everywhere.

Masks stay in their small shapes (padding is (B, 1, 1, S), causality is (1, 1, T, S)) and are only
broadcast where they meet the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from anymha.errors import DtypeError
from anymha.framework.dtypes import dtype_name
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import described

SMALL = 1 << 14
"""Masks of up to so many elements are kept where calls repeat,"""

MOST_KEPT = 32
"""and so many of them."""

FAR = 1 << 30
"""No sequence is so long: larger offsets mean the same, and a window of that width is open."""


@dataclass(frozen=True)
class TileOrigin:
    """Where a tile of the logits begins: the index of its first element on each of (B, H, T, S).

    Args:
        batch: Index on the batch axis.
        head: Index on the axis of query heads.
        query: Index on the axis of queries, an even number.
        key: Index on the axis of keys.
    """

    batch: Any = 0
    head: Any = 0
    query: Any = 0
    key: int = 0


@dataclass(frozen=True)
class PositionMask:
    """Which keys a query sees by its position alone.

    Query i of batch b stands at ``p = i + offset[b]`` and sees key j when
    ``p - left <= j <= p + right``; None leaves that side open.

    Args:
        left: Keys visible before the query's own position, or None for all.
        right: Keys visible after it, or None for all. Causal attention is ``right=0``.
        offset: Position of the first query among the keys: an int, or integers (B,).
        kept: Where masks of small tiles are kept for the next call; None for nowhere.
    """

    left: int | None = None
    right: int | None = None
    offset: Any = 0
    kept: dict[Any, Array] | None = field(default=None, compare=False, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether every query sees every key."""
        return self.left is None and self.right is None

    def at(self, ops: Ops, offset: Any) -> PositionMask:
        """The mask of queries whose first stands at `offset`: an int, or integers (B,)."""
        if not isinstance(offset, int):
            size = ops.astype(offset, ops.float32)  # which holds integers of every dtype
            offset = ops.where(size > FAR, FAR, ops.astype(offset, ops.int32))
            offset = ops.where(size < -FAR, -FAR, offset)
        return replace(self, offset=offset)

    def of_batch(self, ops: Ops, index: Any) -> PositionMask:
        """The mask of one member of the batch; `ops` has `narrow`."""
        offset = self.offset
        if isinstance(offset, int) or not len(offset.shape) or offset.shape[0] == 1:
            return self
        return replace(self, offset=ops.capabilities.narrow(offset, index, 1, axis=0))

    def mask(
        self, ops: Ops, origin: TileOrigin, queries: Dim, keys: Dim, *, like: Array
    ) -> Array | None:
        """Booleans for a tile of queries and keys, or None where all see all.

        Args:
            ops: The backend.
            origin: Where the tile begins; its batch and head do not matter.
            queries: Number of queries T.
            keys: Number of keys S.
            like: An array on whose device the mask is made.

        Returns:
            (1 or B, 1, T, S) booleans.
        """
        if self.left is None and self.right is None:
            return None
        kept, offset = self.kept, self.offset
        if kept is None or type(offset) is not int or queries * keys > SMALL:
            return self._made(ops, origin, queries, keys, ops.device(like))
        place = (offset, origin.query, origin.key, queries, keys, ops.device(like))
        if place not in kept:
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[place] = self._made(ops, origin, queries, keys, ops.device(like))
        return kept[place]

    def _made(self, ops: Ops, origin: TileOrigin, queries: Dim, keys: Dim, device: Any) -> Array:
        rows = ops.arange(0, queries, dtype=ops.int32, device=device)
        columns = ops.arange(0, keys, dtype=ops.int32, device=device)
        rows = ops.reshape(rows, (1, 1, -1, 1)) + origin.query
        columns = ops.reshape(columns, (1, 1, 1, -1))
        offset = self.offset
        if not isinstance(offset, int):
            offset = ops.reshape(ops.astype(offset, ops.int32), (-1, 1, 1, 1))
        distance = columns + origin.key - (rows + offset)  # [1 or B, 1, T, S]
        sides = []
        if self.left is not None:
            sides.append(distance >= -self.left)
        if self.right is not None:
            sides.append(distance <= self.right)
        return reduce(ops.logical_and, sides)


def position_mask(
    is_causal: bool, window: tuple[int | None, int | None] | None, offset: Any
) -> PositionMask:
    """The `PositionMask` of a causal flag and a window of keys to the left and right."""
    sides = window or (None, None)
    left, right = (None if side is None or side >= FAR else side for side in sides)
    return PositionMask(left, 0 if is_causal else right, offset)


def all_of(ops: Ops, masks: Iterable[Array | None]) -> Array | None:
    """The AND of those masks that are there, broadcast; None where none is."""
    present = [mask for mask in masks if mask is not None]
    return reduce(ops.logical_and, present) if present else None


def check_boolean(mask: Array, name: str) -> None:
    """Refuse a mask that is not boolean.

    A float mask in a boolean's place is silently inverted by several libraries (0 becomes False);
    here it is an error.

    Raises:
        DtypeError: `mask` is not boolean; the message says what to pass instead.
    """
    if dtype_name(mask.dtype) not in ("bool", "bool_"):
        raise DtypeError(
            f"`{name}` must be boolean, True = may attend. Received: {described(mask)}. "
            "Pass an additive mask as `attention_bias` (`bias` in `dot_product_attention`), "
            f"and a 0/1 mask as booleans, `{name} != 0`."
        )
