"""One call's lengths and axes: how its arrays come into the shapes that `attend` takes.

Inputs become (B, length, D), masks and bias something that broadcasts to (B, H, T, S).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.arguments import BY_NAME, PLACES, Kind
from anymha.layer.axes import PLAIN, Axes, fold, fold_mask

PADDING = ("query_mask", "value_mask", "key_mask")


@dataclass(frozen=True)
class CallShape:
    """The lengths of a call.

    Args:
        axes: Which axes of the inputs are batch, and which are attended over.
        batch: Lengths of the batch axes.
        heads: Number of query heads H.
        queries: Lengths of the attention axes of the query.
        keys: Lengths of the attention axes of key and value.
        folded: B, T and S.
        is_plain: Whether inputs are (B, T, D) as they are, and nothing is masked but by position.
    """

    axes: Axes
    batch: tuple[Dim, ...]
    heads: int
    queries: tuple[Dim, ...]
    keys: tuple[Dim, ...]
    folded: tuple[Dim, Dim, Dim]
    is_plain: bool

    def inputs(
        self,
        ops: Ops,
        arrays: Mapping[str, Array],
        query_mask: Array | None,
        key_mask: Array | None,
    ) -> tuple[Array, Array, Array]:
        """Query, key and value (B, length, D), zero where padding masks exclude the position.

        An excluded position must not influence anything, and ``0 * NaN`` is NaN: the values
        themselves go, not only their probabilities.

        Args:
            ops: The backend.
            arrays: "query", "key" and "value".
            query_mask: (B, 1, T, 1) booleans, or None.
            key_mask: (B, 1, 1, S) booleans, or None.
        """
        query, key, value = arrays["query"], arrays["key"], arrays["value"]
        of_query, of_value = value is query, key is value
        if self.axes is not PLAIN:
            query = fold(ops, query, self.axes)
            value = query if of_query else fold(ops, value, self.axes)
            key = value if of_value else fold(ops, key, self.axes)
        if key_mask is not None:
            value = _kept(ops, value, key_mask)
            key = value if of_value else _kept(ops, key, key_mask)
        if query_mask is not None:
            query = _kept(ops, query, query_mask)
        return query, key, value

    def padding(self, ops: Ops, arrays: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
        """Which queries and which keys count: (B, 1, T, 1) and (B, 1, 1, S) booleans."""
        query_mask, value_mask, key_mask = [
            self.fold_mask(ops, name, arrays[name]) if name in arrays else None for name in PADDING
        ]
        if value_mask is None or key_mask is None:
            return query_mask, key_mask if value_mask is None else value_mask
        return query_mask, ops.logical_and(value_mask, key_mask)

    def fold_mask(self, ops: Ops, name: str, array: Array) -> Array:
        """A mask or a bias spread over (B, H, T, S); its rank tells which axes it has."""
        argument = BY_NAME[name]
        *_, form = argument.axes
        if self.axes is PLAIN:
            if argument.kind is Kind.BIAS or len(array.shape) == 4:
                return array
            shape = [1, 1, 1, 1]
            form = argument.form_of_rank(len(array.shape))
            for axis, length in zip(form, ops.shape(array), strict=True):
                shape[PLACES[axis]] = length
            return ops.reshape(array, tuple(shape))
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

    def unfolded_scores(self, ops: Ops, scores: Array) -> Array:
        """Scores (B, H, T, S) with each axis of the groups on its own."""
        if self.axes.plain:
            return scores
        return ops.reshape(scores, (*self.batch, self.heads, *self.queries, *self.keys))


def _kept(ops: Ops, x: Array, mask: Array) -> Array:
    """`x` (B, length, D), zero where a padding mask (B, 1, T, 1) or (B, 1, 1, S) is False."""
    shape = ops.shape(mask)
    return ops.where(ops.reshape(mask, (shape[0], product(shape[2:]), 1)), x, 0.0)
