"""Scaled dot-product attention, written once for every framework.

    scores  = softmax(mask(softcap(scale * query . key) + bias))
    context = dropout(scores) . value

`_formula` is that. `attend` gives it all queries at once, or block after block (`anymha.blocked`),
or leaves the work to a kernel of the framework's that means the same; `anymha.paths` says which.

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    J. Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023), for
    fewer key and value heads than query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anymha.axes import is_known
from anymha.blocked import by_blocks, by_fused_kernel, by_rows
from anymha.dropout import Place
from anymha.dtypes import dtype_name
from anymha.masks import all_of
from anymha.ops import Array, Ops
from anymha.paths import AttentionCall, Path, choose_path

Observer = Callable[[str, Array], None]
"""Is told the name and the value of each stage of the computation."""


def unobserved(stage: str, value: Array) -> None:
    """The observer that looks away."""
    del stage, value  # TensorFlow's AutoGraph cannot convert a body of a docstring alone


def attend(
    ops: Ops,
    call: AttentionCall,
    query: Array,
    key: Array,
    value: Array,
    *,
    masks: Sequence[Array | None] = (),
    bias: Array | None = None,
    observe: Observer = unobserved,
    with_scores: bool = True,
) -> tuple[Array, Array | None]:
    """The context of each query head, and the probabilities.

    Args:
        ops: The backend.
        call: The options.
        query: (B, T, H, d_k) in the accumulation dtype.
        key: (B, S, K, d_k); K divides H, and query head h reads key head ``h // (H // K)``.
        value: (B, S, K, d_v).
        masks: Booleans that broadcast to (B, H, T, S), True = may attend; their AND holds.
        bias: Added to the logits; broadcasts to (B, H, T, S).
        observe: Is told each stage.
        with_scores: Whether the probabilities are wanted; the context has the same bits without.

    Returns:
        The context (B, T, H, d_v), and the probabilities before dropout (B, H, T, S) or None.
    """
    heads_first = (0, 2, 1, 3)
    arrays = {
        "query": ops.permute_dims(query, heads_first),  # [B, H, T, d_k]
        "key": ops.permute_dims(key, heads_first),  # [B, K, S, d_k]
        "value": ops.permute_dims(value, heads_first),  # [B, K, S, d_v]
    }
    mask = all_of(ops, masks)
    if mask is not None:
        arrays["mask"] = _of_rank_4(ops, mask)
    if bias is not None:
        arrays["bias"] = _of_rank_4(ops, bias)
    path = choose_path(ops, call, arrays, observed=observe is not unobserved)
    if path.kernel == "fused":
        found = {"context": by_fused_kernel(ops, call, path.runs, arrays)}
        if with_scores:  # in a second pass, so that the context has the same bits
            del arrays["value"]
            path = choose_path(ops, call, arrays, fused=False)
            found |= written(ops, call, path, arrays, observe, True)
    else:
        found = written(ops, call, path, arrays, observe, with_scores)
    context = ops.permute_dims(found["context"], heads_first)  # [B, T, H, d_v]
    observe("context", context)
    return context, found.get("scores")


def written(
    ops: Ops,
    call: AttentionCall,
    path: Path | None,
    arrays: Mapping[str, Array],
    observe: Observer = unobserved,
    with_scores: bool = False,
) -> dict[str, Array]:
    """The context (B, H, T, d_v) and the scores (B, H, T, S), as far as wanted, by the formula."""

    def formula(call: AttentionCall, arrays: Mapping[str, Array], place: Place) -> dict[str, Array]:
        return _formula(ops, call, arrays, place, observe, with_scores)

    if path is not None and path.together:
        return by_rows(ops, call, path.runs, arrays, formula)
    if path is not None and path.runs:
        wanted = ["context"] * ("value" in arrays) + ["scores"] * with_scores
        return by_blocks(ops, call, path.runs, arrays, formula, wanted)
    return formula(call, arrays, Place())


def _formula(
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
    if call.softcap is not None:
        logits = ops.tanh(logits / call.softcap) * call.softcap
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


def _of_rank_4(ops: Ops, x: Array) -> Array:
    """`x`, which broadcasts to (B, H, T, S), with all of its axes."""
    lacking = 4 - len(x.shape)
    return ops.reshape(x, (*(1,) * lacking, *ops.shape(x))) if lacking else x
