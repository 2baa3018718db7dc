"""Scaled dot-product attention, written once for every framework.

    scores  = softmax(mask(softcap(scale * query . key) + bias))
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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.attention.dropout import Place
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionCall
from anymha.framework.dtypes import dtype_name
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known

Observer = Callable[[str, Array], None]
"""Is told the name and the value of each stage of the computation."""


def unobserved(stage: str, value: Array) -> None:
    """The observer that looks away."""
    del stage, value  # TensorFlow's AutoGraph cannot convert a body of a docstring alone


def formula(
    ops: Ops,
    call: AttentionCall,
    arrays: Mapping[str, Array],
    place: Place,
    observe: Observer,
    with_scores: bool,
) -> dict[str, Array]:
    """Attention of all queries that are given over all keys that are given.

    Args:
        ops: The backend.
        call: The options.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), maybe "value" (B, K, S, d_v), "mask"
            and "bias", which broadcast to (B, H, T, S).
        place: Where these stand among all queries and keys.
        observe: Is told each stage.
        with_scores: Whether the scores are wanted.

    Returns:
        "context" (B, H, T, d_v) if there is a value, and "scores" (B, H, T, S) if wanted.
    """
    query, key, value = arrays["query"], arrays["key"], arrays.get("value")
    batch, heads, queries, d_k = ops.shape(query)
    _, shared, keys, _ = ops.shape(key)
    rows = (heads // shared) * queries  # the queries that share a key head, one after another

    if heads != shared:
        query = ops.reshape(query, (batch, shared, rows, d_k))
    key = ops.permute_dims(key, (0, 1, 3, 2))  # [B, K, d_k, S]
    logits = ops.matmul(query * call.scale, key)  # [B, K, (H/K)*T, S]
    logits = ops.reshape(logits, (batch, heads, queries, keys))
    for feature in call.features:
        logits = feature.logits(ops, logits)
    observe("logits", logits)
    if "bias" in arrays:
        logits = logits + arrays["bias"]
    seen = call.visibility.mask(ops, place.row, queries, keys, beside=logits, column=place.column)
    mask = all_of(ops, [arrays.get("mask"), seen])
    weights, total = _softmax(ops, logits, mask, "bias" in arrays, observe)
    found = {}
    if with_scores or observe is not unobserved:
        found["scores"] = _divided(weights, total)
        observe("probabilities", found["scores"])
    if value is None:
        return found
    if call.dropout is not None:
        keep = call.dropout.keep(ops, (batch, heads, queries, keys), place, beside=weights)
        weights = ops.where(keep, weights * call.dropout.factor, 0.0)
        if observe is not unobserved:
            observe("dropped_probabilities", _divided(weights, total))
    if heads != shared:
        weights = ops.reshape(weights, (batch, shared, rows, keys))
    context = ops.matmul(weights, value)  # [B, K, (H/K)*T, d_v]
    context = ops.reshape(context, (batch, heads, queries, ops.shape(value)[3]))
    # Divided last: a row of context is much shorter than a row of weights.
    return {"context": _divided(context, total), **found}


def softmax(ops: Ops, logits: Array) -> Array:
    """``exp(logits) / sum(exp(logits))`` over the last axis; a row of -inf gives zeros."""
    weights, total = _exponentials(ops, logits, maskable=True, may_overwrite=False)
    return _divided(weights, total)


def _softmax(
    ops: Any, logits: Array, mask: Array | None, biased: bool, observe: Observer
) -> tuple[Array, Array | None]:
    """Weights, and by what their rows must be divided to be the masked softmax; None for nothing.

    Args:
        ops: The backend.
        logits: (B, H, T, S); may be overwritten.
        mask: Broadcasts to the logits' shape; None masks nothing.
        biased: Whether a logit may be -inf already.
        observe: Is told the masked logits.
    """
    unseen, exact = observe is unobserved, logits.dtype == ops.float64
    own = getattr(ops, "softmax", None)
    if own is not None and unseen and not (exact or biased) and logits.shape[-1] != 0:
        if mask is None:
            return own(logits), None
        # Not -inf, of which a whole row would give NaN; that row is divided by infinity.
        lowest = float(np.finfo(dtype_name(logits.dtype)).min)
        any_seen = ops.max(ops.astype(mask, logits.dtype), axis=-1, keepdims=True) > 0
        one = ops.asarray(1.0, dtype=logits.dtype, device=ops.device(logits))
        return own(ops.where(mask, logits, lowest)), ops.where(any_seen, one, math.inf)
    if mask is not None:
        logits = ops.where(mask, logits, -math.inf)
    observe("masked_logits", logits)
    maskable = biased or mask is not None
    weights, total = _exponentials(ops, logits, maskable=maskable, may_overwrite=unseen)
    if exact:  # where a query sees one key, its gradient is zero to the last bit only so
        return _divided(weights, total), None
    return weights, total


def _exponentials(
    ops: Any, logits: Array, *, maskable: bool, may_overwrite: bool
) -> tuple[Array, Array | None]:
    """``exp(logits - c)`` and its sums over the last axis, c the greatest of each row.

    Their quotient is the softmax, to which c is indifferent: for differentiation it is a constant.
    If `maskable`, a row of -inf gives zeros and the sum 1: the two `where` keep it from making
    NaN, forward and backward.
    """
    if is_known(logits.shape[-1]) and logits.shape[-1] == 0:
        return logits, None  # no keys: an empty row has no maximum
    peak = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
    if maskable:
        peak = ops.where(peak > -math.inf, peak, 0.0)
    overwriting = getattr(ops, "exp_and_sum", None) if may_overwrite else None
    if overwriting is not None:
        weights, total = overwriting(logits, peak)
    else:
        weights = ops.exp(logits - peak)
        total = ops.sum(weights, axis=-1, keepdims=True)
    return weights, ops.where(total > 0, total, 1.0) if maskable else total


def _divided(x: Array, by: Array | None) -> Array:
    return x if by is None else x / by
