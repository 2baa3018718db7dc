"""Attention over any axes: how N-D inputs fold into (B, T, D), and back.

`attention_axes` names the axes over which attention runs; the others, but the last, are batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anymha.errors import ShapeError
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import is_known, product


@dataclass(frozen=True)
class Axes:
    """Which axes of the inputs are batch, and which are attended over; both in order.

    Args:
        batch: Positive indices of the batch axes.
        attention: Positive indices of the attention axes, in the order named.
    """

    batch: tuple[int, ...]
    attention: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that puts batch first, then attention, then the features."""
        return (*self.batch, *self.attention, len(self.batch) + len(self.attention))

    def split(self, shape: Sequence[Dim]) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
        """The lengths of the batch axes and of the attention axes."""
        return tuple(shape[i] for i in self.batch), tuple(shape[i] for i in self.attention)


PLAIN = Axes((0,), (1,))
"""The axes of (B, T, D)."""


def resolve_axes(attention_axes: tuple[int, ...] | None, rank: int) -> Axes:
    """The `Axes` of inputs of that rank.

    Raises:
        ShapeError: an axis is out of range, is the last, is named twice, or none is left.
    """
    if attention_axes is None:
        if rank < 3:
            raise ShapeError(
                "`query` must have at least 3 axes, (batch, length, features). Received: "
                f"{rank} axes. Add the axis, or name the axes with `attention_axes`."
            )
        return PLAIN if rank == 3 else Axes((0,), tuple(range(1, rank - 1)))
    attention = tuple(axis + rank if axis < 0 else axis for axis in attention_axes)
    if not all(0 <= axis < rank - 1 for axis in attention) or len(set(attention)) < len(attention):
        raise ShapeError(
            f"`attention_axes` must name different axes of the inputs, not the last, which holds "
            f"the features. Received: {attention_axes}, and inputs of {rank} axes."
        )
    axes = Axes(tuple(a for a in range(rank - 1) if a not in attention), attention)
    return PLAIN if axes == PLAIN else axes


def fold(ops: Ops, x: Array, axes: Axes) -> Array:
    """An input (.., D) as (B, T, D)."""
    if axes is PLAIN:
        return x
    batch, lengths = axes.split(ops.shape(x))
    if axes.order != tuple(range(len(axes.order))):
        x = ops.permute_dims(x, axes.order)
    return ops.reshape(x, (product(batch), product(lengths), x.shape[-1]))


def unfold(ops: Ops, x: Array, axes: Axes, lengths: Sequence[Dim]) -> Array:
    """A result (B, T, *O) with the batch and attention axes where the input has them.

    Args:
        ops: The backend.
        x: (B, T, *O).
        axes: The axes of the input.
        lengths: The lengths of the batch axes and of the attention axes of the query.
    """
    if axes is PLAIN:
        return x
    output = ops.shape(x)[2:]
    x = ops.reshape(x, (*lengths, *output))
    places = len(axes.batch) + len(axes.attention)
    back = tuple(axes.order[:places].index(i) for i in range(places))
    if back == tuple(range(places)):
        return x
    return ops.permute_dims(x, (*back, *range(places, places + len(output))))


def fold_mask(
    ops: Ops, mask: Array, groups: Sequence[Sequence[Dim]], places: Sequence[int]
) -> Array:
    """A mask over groups of axes, each group folded into one axis, spread over (B, H, T, S).

    Args:
        ops: The backend.
        mask: One axis for each axis of each group, of its length or 1.
        groups: The lengths of the axes of each group: batch, heads, queries, keys, or some.
        places: The place of each group in (B, H, T, S); the other places become 1.

    Returns:
        A mask of rank 4.
    """
    own, folded, full = ops.shape(mask), [1, 1, 1, 1], []
    for group, place in zip(groups, places, strict=True):
        lengths = own[len(full) : len(full) + len(group)]
        # Several axes fold into one only at full length; one axis, or ones, broadcast later.
        if len(group) > 1 and not all(is_known(n) and n == 1 for n in lengths):
            lengths = tuple(group)
        full += lengths
        folded[place] = product(lengths)
    if any(len(group) > 1 for group in groups):
        mask = ops.broadcast_to(mask, tuple(full))
    return ops.reshape(mask, tuple(folded))
