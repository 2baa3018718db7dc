"""Packed sequences: several sequences in one row; each position has the id of its own.

    query t sees key s  where  segment_ids[t] == key_segment_ids[s] >= 0

The booleans are made tile by tile. What a segment holds changes no bit of another: a hidden key has
the weight zero, but ``0 * NaN`` is NaN, so NaN and infinities become zeros before the products, and
the queries of the segment that holds them become NaN after these.

References:
    M. Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021).
"""

from __future__ import annotations

import math
from typing import Any

from anymha.framework.dtypes import working_dtype
from anymha.framework.protocol import Array, Ops

LARGE = 1 << 20
"""So many pairs of a query and a key are compared at a time."""

SMALL = 2.0**-24
"""A position has fewer than the inverse of this many features."""


def same_segment(arrays: Any) -> Array | None:
    """Booleans (B, 1, T, S) of a tile, True = of one segment; None for a call without segments."""
    ids = arrays.get("segments")
    return None if ids is None else ids == arrays["key_segments"]


def separated(
    ops: Ops, ids: Array, key_ids: Array, query: Array, key: Array, value: Array
) -> tuple[dict[str, Array], Array, Array, Array, Array]:
    """The arrays of a call so that no segment of it changes another.

    Args:
        ops: The backend.
        ids: (1 or B, T) integers, the segments of the queries; negative for padding.
        key_ids: (1 or B, S) integers, likewise of the keys.
        query: (B, T, H, d_k).
        key: (B, S, K, d_k).
        value: (B, S, K, d_v).

    Returns:
        "segments" (1 or B, 1, T, 1) and "key_segments" (1 or B, 1, 1, S), which differ for padding;
        query, key and value, zero where a position has NaN or an infinity; booleans (B, T), True
        for queries of a segment with such a position.
    """
    (rows, queries), (key_rows, keys) = ops.shape(ids), ops.shape(key_ids)
    # No padding is of one segment with other padding.
    ids, key_ids = ops.where(ids < 0, -1, ids), ops.where(key_ids < 0, -2, key_ids)
    query, finite = _finite(ops, query)
    key, finite_key = _finite(ops, key)
    value, finite_value = _finite(ops, value)
    dtype = working_dtype(ops, query)
    marked = ops.astype(ops.logical_and(finite_key, finite_value), dtype) * -1.0 + 1.0
    own = ops.where(finite, 0.0, ops.astype(ids > -1, dtype))
    lost = _of_marked(ops, ids, key_ids, marked) + own > 0.5
    arrays = {
        "segments": ops.reshape(ids, (rows, 1, queries, 1)),
        "key_segments": ops.reshape(key_ids, (key_rows, 1, 1, keys)),
    }
    return arrays, query, key, value, lost


def _finite(ops: Ops, x: Array) -> tuple[Array, Array]:
    """`x` (B, length, heads, width), zero where a position is not finite; where it is finite.

    The sum of sizes finds what is not, made small that no sum of finite numbers overflows.
    """
    batch, length, heads, width = ops.shape(x)
    dtype = working_dtype(ops, x)
    sizes = ops.stop_gradient(x if x.dtype == dtype else ops.astype(x, dtype))
    sizes = ops.reshape(ops.abs(sizes) * SMALL, (batch, length, heads * width))
    finite = ops.sum(sizes, axis=-1, keepdims=False) < math.inf
    return ops.where(ops.reshape(finite, (batch, length, 1, 1)), x, 0.0), finite


def _of_marked(ops: Ops, ids: Array, key_ids: Array, marked: Array) -> Array:
    """Above zero for the queries (B, T) whose segment has a key of which `marked` (B, S) is."""
    (batch, keys), queries = ops.shape(marked), ops.shape(ids)[1]
    dtype, known = marked.dtype, all(isinstance(n, int) for n in (batch, queries, keys))
    if known and not queries * keys:
        return ops.astype(ids, dtype) * 0.0

    def found(index: Any, arrays: Any) -> dict[str, Array]:
        rows = ops.reshape(arrays["ids"], (*ops.shape(arrays["ids"]), 1))
        columns, own = (
            ops.reshape(arrays[n], (ops.shape(arrays[n])[0], 1, keys))
            for n in ("key_ids", "marked")
        )
        return {"found": ops.max(ops.where(rows == columns, own, 0.0), axis=-1, keepdims=False)}

    constant = {"key_ids": key_ids, "marked": marked}
    loop: Any = ops.capabilities.loop
    if loop is None or not known or batch * queries * keys <= LARGE:
        return found(0, {"ids": ids, **constant})["found"]
    height = max(LARGE // (batch * keys), 1)
    count = math.ceil(queries / height)
    ids = ops.broadcast_to(ids, (batch, queries))
    if count * height > queries:
        ids = ops.concat([ids, ids[..., : count * height - queries]], axis=1)
    ids = ops.permute_dims(ops.reshape(ids, (batch, count, height)), (1, 0, 2))
    whole = loop(found, count, {"ids": ids}, constant, {"found": dtype})["found"]
    whole = ops.reshape(ops.permute_dims(whole, (1, 0, 2)), (batch, count * height))
    return whole[..., :queries]
