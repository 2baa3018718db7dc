"""Scaled dot-product attention, written once for every framework.

    scores  = softmax(mask(features(scale * query . key) + bias))
    context = dropout(scores) . value

`formula` is that. `anymha.execution` gives it all queries at once, or tile after tile, or calls a
kernel of the framework's that means the same.

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    J. Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023), for
    fewer key and value heads than query heads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from anymha.attention.features.base import bias_of, joining_logit
from anymha.attention.masks import TileOrigin, all_of
from anymha.attention.segments import same_segment
from anymha.attention.spec import AttentionSpec
from anymha.framework.dtypes import dtype_name, working_dtype
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known

Observer = Callable[[str, Array], None]
"""Receives the name and the value of each stage of the computation."""


def formula(
    ops: Ops,
    spec: AttentionSpec,
    arrays: Mapping[str, Array],
    origin: TileOrigin,
    observe: Observer | None,
    with_scores: bool,
    with_lse: bool = False,
) -> dict[str, Array]:
    """Attention of a tile: some queries over some keys.

    Args:
        ops: The backend.
        spec: The options.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), maybe "value" (B, K, S, d_v), "mask",
            "bias", "segments" and "key_segments", which broadcast to (B, H, T, S). Where the first
            three are of half precision, the backend has `wide_matmul`, and the rest is computed in
            float32.
        origin: Where the tile begins among all queries and keys.
        observe: Receives the name and the value of each stage; None for no observer.
        with_scores: Whether the scores are wanted.
        with_lse: Whether the logs of the softmax's denominators are wanted.

    Returns:
        "context" (B, H, T, d_v) if there is a value, "scores" (B, H, T, S) and "lse" (B, H, T, 1)
        if wanted.
    """
    query, key, value = arrays["query"], arrays["key"], arrays.get("value")
    batch, heads, queries, d_k = ops.shape(query)
    _, shared, keys, _ = ops.shape(key)
    rows = (heads // shared) * queries  # the queries that share a key head, one after another

    if heads != shared:
        query = ops.reshape(query, (batch, shared, rows, d_k))
    key = ops.permute_dims(key, (0, 1, 3, 2))  # [B, K, d_k, S]
    wide = ops.capabilities.wide_matmul
    if wide is not None and working_dtype(ops, query) == query.dtype:
        wide = None
    if wide is not None and not _is_exact(spec.scale, query):
        logits = wide(query, key) * spec.scale  # the scaled query would be rounded once more
    else:
        logits = (wide or ops.matmul)(query * spec.scale, key)  # [B, K, (H/K)*T, S]
    if heads != shared:
        logits = ops.reshape(logits, (batch, heads, queries, keys))
    for feature in spec.features:
        logits = feature.logits(ops, logits, origin, arrays)
    if spec.features:
        own = bias_of(spec.features, ops, arrays, logits)
        logits = logits if own is None else logits + own
    if observe is not None:
        observe("logits", logits)
    biased = "bias" in arrays
    if biased:
        logits = logits + arrays["bias"]
    mask = _visible(ops, spec, arrays, origin, logits)
    sink = joining_logit(spec.features, arrays) if spec.features else None
    results = {}
    lse = results if with_lse else None
    weights, normalised = _softmax(ops, logits, mask, biased, observe, sink, lse)
    if with_scores or observe is not None:
        results["scores"] = normalised(weights)
        if observe is not None:
            observe("probabilities", results["scores"])
    if value is None:
        return results
    if spec.dropout is not None:
        keep = spec.dropout.keep(ops, (batch, heads, queries, keys), origin, like=weights)
        if wide is None:
            weights = weights * spec.dropout.factor
        weights = ops.where(keep, weights, 0.0)
        if observe is not None:
            observe("dropped_probabilities", normalised(weights))
    if heads != shared:
        weights = ops.reshape(weights, (batch, shared, rows, keys))
    if wide is None:
        context = ops.matmul(weights, value)  # [B, K, (H/K)*T, d_v]
    else:
        context = wide(ops.astype(weights, value.dtype), value)
        if spec.dropout is not None:  # of weights the product might be too large for float16
            context = context * spec.dropout.factor
    if heads != shared:
        context = ops.reshape(context, (batch, heads, queries, ops.shape(value)[3]))
    # Normalised last: a row of context is much shorter than a row of weights.
    results["context"] = normalised(context)
    return results


def _is_exact(scale: float, query: Array) -> bool:
    """Whether a half-precision query times the scale is not rounded: times a power of two.

    Of float16, whose numbers end at 2^-24, that is not so.
    """
    return math.frexp(scale)[0] == 0.5 and dtype_name(query.dtype) == "bfloat16"


def _visible(
    ops: Ops, spec: AttentionSpec, arrays: Mapping[str, Array], origin: TileOrigin, logits: Array
) -> Array | None:
    """The AND of all masks, which broadcasts to the logits' shape; None where all see all."""
    mask, positions = arrays.get("mask"), spec.position_mask
    same = same_segment(arrays) if "segments" in arrays else None
    if positions.left is not None or positions.right is not None or spec.features:
        _, _, queries, keys = ops.shape(logits)
        seen = positions.mask(ops, origin, queries, keys, like=logits)
        if mask is None and same is None and not spec.features:
            return seen
        visible = [f.visible(ops, origin, queries, keys, logits, arrays) for f in spec.features]
        return all_of(ops, [mask, same, seen, *visible])
    return mask if same is None else all_of(ops, [mask, same])


def softmax(ops: Ops, logits: Array) -> Array:
    """``exp(logits) / sum(exp(logits))`` over the last axis; a row of -inf gives zeros."""
    weights, total = _exponentials(ops, logits, maskable=True, may_overwrite=False)
    return _divided(weights, total)


def _softmax(
    ops: Ops,
    logits: Array,
    mask: Array | None,
    biased: bool,
    observe: Observer | None,
    sink: Array | None,
    lse: dict[str, Array] | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    """Weights, and what multiplies their rows each by one number, to be the masked softmax.

    Args:
        ops: The backend.
        logits: (B, H, T, S); may be overwritten.
        mask: Broadcasts to the logits' shape; None masks nothing.
        biased: Whether a logit may be -inf already.
        observe: Receives the masked logits.
        sink: A further logit of each row, of which no weight comes; None for no such.
        lse: Gets the log of each row's sum, (B, H, T, 1), as "lse"; None where it is not wanted.
    """
    unseen, exact = observe is None, logits.dtype == ops.float64
    own = ops.capabilities.softmax if unseen and lse is None else None
    # A framework that has a softmax may have been told to refuse numbers that are not finite.
    finite = own is not None
    if own is not None and (exact or biased or sink is not None or logits.shape[-1] == 0):
        own = None
    if mask is None:
        if own is not None:
            return own(logits), _divided
        lowest = -math.inf
    else:
        lowest = float(np.finfo(dtype_name(logits.dtype)).min) if finite else -math.inf
        masked = ops.where(mask, logits, lowest)
        if own is not None:
            # Not -inf, of which a whole row would give NaN; that row is multiplied by zero.
            any_seen = ops.max(ops.astype(mask, logits.dtype), axis=-1, keepdims=True)
            return own(masked), partial(operator.mul, any_seen)
        logits = masked
    if observe is not None:
        observe("masked_logits", logits)
    maskable = biased or mask is not None
    weights, total = _exponentials(
        ops, logits, lowest, mask if lowest > -math.inf else None, sink, lse,
        maskable=maskable, may_overwrite=unseen,
    )  # fmt: skip
    if exact:  # where a query sees one key, its gradient is zero to the last bit only so
        return _divided(weights, total), _divided
    return weights, partial(_divided, by=total)


def _exponentials(
    ops: Ops,
    logits: Array,
    lowest: float = -math.inf,
    mask: Array | None = None,
    sink: Array | None = None,
    lse: dict[str, Array] | None = None,
    *,
    maskable: bool,
    may_overwrite: bool,
) -> tuple[Array, Array | None]:
    """``exp(logits - c)`` and its sums over the last axis, c the greatest of each row.

    Their quotient is the softmax, to which c is indifferent: for differentiation it is a constant.
    If `maskable`, a row of -inf gives zeros and the sum 1: the two `where` keep it from making
    NaN, forward and backward. With a finite `lowest`, the least number that is finite, logits where
    `mask` is False may be that instead of -inf. A `sink` is one more logit of each row, in the sum
    and in the greatest alone. `lse` gets the log of the sums, each with its c.
    """
    if is_known(logits.shape[-1]) and logits.shape[-1] == 0:
        if lse is not None:
            empty = ops.asarray(-math.inf, dtype=logits.dtype, device=ops.device(logits))
            empty = empty if sink is None else sink
            lse["lse"] = ops.broadcast_to(empty, (*ops.shape(logits)[:3], 1))
        return logits, None  # no keys: an empty row has no maximum
    peak = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
    if maskable:
        any_finite = peak > lowest if lowest == -math.inf else peak >= lowest
        peak = ops.where(any_finite, peak, 0.0)
    if sink is not None:
        held = ops.stop_gradient(sink)
        peak = ops.where(held > peak, held, peak)
    exp_and_sum = ops.capabilities.exp_and_sum
    if exp_and_sum is not None and may_overwrite:
        weights, total = exp_and_sum(logits, peak)
    else:
        weights = ops.exp(logits - peak)
        weights = weights if mask is None else ops.where(mask, weights, 0.0)
        total = ops.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + ops.exp(sink - peak)
    if not maskable and lse is None:
        return weights, total
    any_seen = total > 0
    total = ops.where(any_seen, total, 1.0)
    if lse is not None:
        lse["lse"] = ops.where(any_seen, ops.log(total) + peak, -math.inf)
    return weights, total


def _divided(x: Array, by: Array | None = None) -> Array:
    return x if by is None else x / by
