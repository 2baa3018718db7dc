"""One call's lengths and axes: how its arrays come into the shapes that `attend` takes.

Inputs become (B, length, D), masks and bias something that broadcasts to (B, H, T, S).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from anymha.attention.masks import all_of
from anymha.framework.protocol import Array, Dim, Ops
from anymha.layer.arguments import BY_NAME, PLACES, Kind
from anymha.layer.axes import PLAIN, Axes, fold, fold_mask

PADDING = ("query_mask", "value_mask", "key_mask")


class CallShape(NamedTuple):
    """The lengths of a call, and the shapes that follow from them.

    Args:
        axes: Which axes of the inputs are batch, and which are attended over.
        batch: Lengths of the batch axes.
        heads: Number of query heads H.
        queries: Lengths of the attention axes of the query.
        keys: Lengths of the attention axes of key and value.
        folded: B, T and S.
        query_heads: (B, T, H, d_k), likewise those of key and value with K heads.
        key_heads: As that.
        value_heads: As that.
        output: (B, T, *O), or (B, T) where O is the query's width.
        masks: For masks with a fixed place for each axis, by name, the shape in which they
            broadcast to (B, H, T, S).
        is_plain: Whether inputs are (B, T, D) as they are, and nothing is masked but by position.
        only_mask: Where inputs are (B, T, D) and a `value_mask` or a `key_mask` is the only mask:
            its name, and its shape (B, S, 1); else None.
    """

    axes: Axes
    batch: tuple[Dim, ...]
    heads: int
    queries: tuple[Dim, ...]
    keys: tuple[Dim, ...]
    folded: tuple[Dim, Dim, Dim]
    query_heads: tuple[Dim, ...]
    key_heads: tuple[Dim, ...]
    value_heads: tuple[Dim, ...]
    output: tuple[Dim, ...]
    masks: Mapping[str, tuple[Dim, ...]]
    is_plain: bool
    only_mask: tuple[str, tuple[Dim, ...]] | None

    def inputs(
        self,
        ops: Ops,
        inputs: tuple[Array, Array, Array],
        query_mask: Array | None,
        key_mask: Array | None,
    ) -> tuple[Array, Array, Array]:
        """Query, key and value (B, length, D), zero where padding masks exclude the position.

        An excluded position must not influence anything, and ``0 * NaN`` is NaN: the values
        themselves go, not only their probabilities.

        Args:
            ops: The backend.
            inputs: Query, key and value.
            query_mask: (B, 1, T, 1) booleans, or None.
            key_mask: (B, 1, 1, S) booleans, or None.
        """
        query, key, value = inputs
        of_query, of_value = value is query, key is value
        if self.axes is not PLAIN:
            query = fold(ops, query, self.axes)
            value = query if of_query else fold(ops, value, self.axes)
            key = value if of_value else fold(ops, key, self.axes)
        if key_mask is not None:
            shape = ops.shape(key_mask)
            rows = ops.reshape(key_mask, (shape[0], shape[3], 1))
            key, value = _without_rows(ops, rows, key, value)
        if query_mask is not None:
            shape = ops.shape(query_mask)
            query = ops.where(ops.reshape(query_mask, (shape[0], shape[2], 1)), query, 0.0)
        return query, key, value

    def inputs_by_only_mask(
        self, ops: Ops, inputs: tuple[Array, Array, Array], arrays: Mapping[str, Array]
    ) -> tuple[Array, Array, Array, Array]:
        """What `inputs` and `padding` give where there is an `only_mask`, as most calls have.

        Returns:
            Query, key, value, and the mask (B, 1, 1, S).
        """
        query, key, value = inputs
        name, rows = cast(Any, self.only_mask)
        mask = arrays[name]
        key, value = _without_rows(ops, ops.reshape(mask, rows), key, value)
        return query, key, value, ops.reshape(mask, self.masks[name])

    def padding(self, ops: Ops, arrays: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
        """Which queries and which keys count: (B, 1, T, 1) and (B, 1, 1, S) booleans."""
        query_mask, value_mask, key_mask = map(arrays.get, PADDING)
        if query_mask is not None:
            query_mask = self.fold_mask(ops, "query_mask", query_mask)
        if value_mask is not None:
            value_mask = self.fold_mask(ops, "value_mask", value_mask)
        if key_mask is not None:
            key_mask = self.fold_mask(ops, "key_mask", key_mask)
        if value_mask is None or key_mask is None:
            return query_mask, key_mask if value_mask is None else value_mask
        return query_mask, ops.logical_and(value_mask, key_mask)

    def segments(self, ops: Ops, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """The segments of queries (1 or B, T) and keys (1 or B, S); one array where both are."""
        ids, key_ids = arrays["segment_ids"], arrays.get("key_segment_ids")
        ids = self.fold_mask(ops, "segment_ids", ids)
        ids = ops.reshape(ids, (ops.shape(ids)[0], -1))
        if key_ids is None:
            return ids, ids
        key_ids = self.fold_mask(ops, "key_segment_ids", key_ids)
        return ids, ops.reshape(key_ids, (ops.shape(key_ids)[0], -1))

    def of_segments(
        self,
        ops: Ops,
        arrays: Mapping[str, Array],
        query_mask: Array | None,
        key_mask: Array | None,
    ) -> tuple[Array | None, Array | None]:
        """The masks of `padding` that exclude positions of negative segments too."""
        ids, key_ids = self.segments(ops, arrays)
        valid = ops.reshape(ids > -1, (ops.shape(ids)[0], 1, -1, 1))
        key_valid = ops.reshape(key_ids > -1, (ops.shape(key_ids)[0], 1, 1, -1))
        return all_of(ops, [query_mask, valid]), all_of(ops, [key_mask, key_valid])

    def fold_mask(self, ops: Ops, name: str, array: Array) -> Array:
        """A mask or a bias spread over (B, H, T, S); its rank tells which axes it has."""
        if self.axes is PLAIN:
            shape = self.masks.get(name)
            return array if shape is None else ops.reshape(array, shape)
        argument = BY_NAME[name]
        *_, form = argument.axes
        lengths = {"B": self.batch, "H": (self.heads,), "T": self.queries, "S": self.keys}
        if argument.kind is Kind.BIAS:
            lacking = sum(len(lengths[axis]) for axis in form) - len(array.shape)
            array = ops.reshape(array, (*[1] * lacking, *ops.shape(array)))
        else:
            rank = len(array.shape)
            fits = (f for f in argument.axes if sum(len(lengths[a]) for a in f) == rank)
            form = next(fits, form)
        groups = [lengths[axis] for axis in form]
        return fold_mask(ops, array, groups, [PLACES[axis] for axis in form])

    def positions(
        self, ops: Ops, arrays: Mapping[str, Array], offset: Any, like: Array
    ) -> dict[str, Array]:
        """The positions of queries (1 or B, T) and keys (1 or B, S), those of the call or indices.

        Args:
            ops: The backend.
            arrays: The call's arrays by name.
            offset: The index of the first query: an int, or int32 integers (B,).
            like: An array on whose device they are made.
        """
        given = {
            n: self.fold_mask(ops, n, arrays[n]) for n in ("positions", "key_positions")
            if n in arrays
        }  # fmt: skip
        given = {n: ops.reshape(x, (ops.shape(x)[0], -1)) for n, x in given.items()}
        return positions_of(ops, given, self.folded[1:], offset, like)

    def unfolded_scores(self, ops: Ops, scores: Array) -> Array:
        """Scores (B, H, T, S) with each axis of the groups on its own."""
        if self.axes is PLAIN:
            return scores
        return ops.reshape(scores, (*self.batch, self.heads, *self.queries, *self.keys))


def positions_of(
    ops: Ops, given: Mapping[str, Array], lengths: Sequence[Dim], offset: Any, like: Array
) -> dict[str, Array]:
    """Positions of queries (1 or B, T) and keys (1 or B, S): those that are given, or indices."""
    found, device = dict(given), ops.device(like)
    for name, length in zip(("positions", "key_positions"), lengths, strict=True):
        if name in found:
            continue
        found[name] = ops.reshape(ops.arange(0, length, dtype=ops.int32, device=device), (1, -1))
        if name == "positions" and not (type(offset) is int and offset == 0):
            start = offset if type(offset) is int else ops.reshape(offset, (-1, 1))
            found[name] = found[name] + start
    return found


def _without_rows(ops: Ops, rows: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Key and value (B, S, D), zero where `rows` (B, S, 1) are False; one array stays one."""
    without = ops.where(rows, value, 0.0)
    return (without if key is value else ops.where(rows, key, 0.0)), without


def only_mask(masks: Mapping[str, Array], shapes: Mapping[str, tuple[Dim, ...]]) -> Any:
    """The name of the only mask of a call on (B, T, D) and its shape (B, S, 1), if it is padding.

    Args:
        masks: Masks and bias by name.
        shapes: Their shapes, from `mask_shapes`.
    """
    if len(masks) != 1:
        return None
    (name,) = masks
    if name not in ("value_mask", "key_mask"):
        return None
    batch, _, _, keys = shapes[name]
    return name, (batch, keys, 1)


def mask_shapes(ops: Ops, masks: Mapping[str, Array]) -> dict[str, tuple[Dim, ...]]:
    """The shape in which each mask of a call on (B, T, D) broadcasts to (B, H, T, S).

    Those that have four axes, and the bias, which broadcasts by itself, have none here.
    """
    shapes = {}
    for name, array in masks.items():
        argument = BY_NAME[name]
        rank = len(array.shape)
        if argument.kind is not Kind.BIAS and rank != 4:
            shape: list[Dim] = [1, 1, 1, 1]
            for axis, length in zip(argument.form_of_rank(rank), ops.shape(array), strict=True):
                shape[PLACES[axis]] = length
            shapes[name] = tuple(shape)
    return shapes
