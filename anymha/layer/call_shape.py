"""One call's lengths and axes: how its arrays come into the shapes that `attend` takes.

Inputs become (B, length, D), masks and bias something that broadcasts to (B, H, T, S).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anymha.attention.masks import all_of
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.axes import Axes, fold, fold_mask


@dataclass(frozen=True)
class Frame:
    """What is known of a call before its values are.

    Args:
        ops: The backend.
        axes: Which axes of the inputs are batch, and which are attended over.
        batch: Lengths of the batch axes.
        heads: Number of query heads H.
        queries: Lengths of the attention axes of the query.
        keys: Lengths of the attention axes of key and value.
        source: Which array each of query, key and value is.
    """

    ops: Ops
    axes: Axes
    batch: tuple[Dim, ...]
    heads: int
    queries: tuple[Dim, ...]
    keys: tuple[Dim, ...]
    source: Mapping[str, str]

    def inputs(
        self, arrays: Mapping[str, Array], rows: Array | None, columns: Array | None
    ) -> tuple[Array, Array, Array]:
        """Query, key and value (B, length, D), zero where padding masks exclude the position.

        An excluded position must not influence anything, and ``0 * NaN`` is NaN: the values
        themselves go, not only their probabilities.
        """
        ops, source = self.ops, self.source
        if rows is None and columns is None and self.axes.plain:
            return arrays[source["query"]], arrays[source["key"]], arrays[source["value"]]
        folded = {name: fold(ops, arrays[name], self.axes) for name in set(source.values())}
        query = _kept(ops, folded[source["query"]], rows)
        value = _kept(ops, folded[source["value"]], columns)
        if source["key"] == source["value"]:
            return query, value, value
        return query, _kept(ops, folded[source["key"]], columns), value

    def padding(self, arrays: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
        """Which queries and which keys count: (B, 1, T, 1) and (B, 1, 1, S) booleans."""
        if not any(name in arrays for name in ("query_mask", "value_mask", "key_mask")):
            return None, None

        def spread(name: str, lengths: Sequence[Dim], place: int) -> Array | None:
            if name not in arrays:
                return None
            return fold_mask(self.ops, arrays[name], (self.batch, lengths), (0, place))

        keys = [spread(name, self.keys, 3) for name in ("value_mask", "key_mask")]
        return spread("query_mask", self.queries, 2), all_of(self.ops, keys)

    def attention_mask(self, arrays: Mapping[str, Array]) -> Array | None:
        """The attention mask spread over (B, H, T, S); its rank tells which axes it has."""
        if "attention_mask" not in arrays:
            return None
        mask = arrays["attention_mask"]
        lengths = (self.queries, self.keys)
        extra = len(mask.shape) - len(self.queries) - len(self.keys)
        if extra == 0:
            return fold_mask(self.ops, mask, lengths, (2, 3))
        if extra == len(self.batch):
            return fold_mask(self.ops, mask, (self.batch, *lengths), (0, 2, 3))
        return fold_mask(self.ops, mask, (self.batch, (self.heads,), *lengths), (0, 1, 2, 3))

    def attention_bias(self, bias: Array | None) -> Array | None:
        """The bias spread over (B, H, T, S)."""
        if bias is None or self.axes.plain:
            return bias
        groups = (self.batch, (self.heads,), self.queries, self.keys)
        lacking = sum(map(len, groups)) - len(bias.shape)
        bias = self.ops.reshape(bias, (*[1] * lacking, *self.ops.shape(bias)))
        return fold_mask(self.ops, bias, groups, (0, 1, 2, 3))

    def scores(self, scores: Array) -> Array:
        """Scores (B, H, T, S) with each axis of the groups on its own."""
        if self.axes.plain:
            return scores
        lengths = (*self.batch, self.heads, *self.queries, *self.keys)
        return self.ops.reshape(scores, lengths)


def _kept(ops: Ops, x: Array, mask: Array | None) -> Array:
    """`x` (B, length, D), zero where a padding mask (B, 1, T, 1) or (B, 1, 1, S) is False."""
    if mask is None:
        return x
    shape = ops.shape(mask)
    return ops.where(ops.reshape(mask, (shape[0], product(shape[2:]), 1)), x, 0.0)
