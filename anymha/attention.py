"""Scaled dot-product attention, written once for every framework.

    scores  = softmax(mask(softcap(scale * query . key) + bias))
    context = dropout(scores) . value

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    J. Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023), for
    fewer key and value heads than query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anymha.axes import is_known
from anymha.dropout import Dropout
from anymha.masks import Visibility, all_of
from anymha.ops import Array, Ops

Observer = Callable[[str, Array], None]
"""Is told the name and the value of each stage of the computation."""


def unobserved(stage: str, value: Array) -> None:
    """The observer that looks away."""
    del stage, value  # TensorFlow's AutoGraph cannot convert a body of a docstring alone


@dataclass(frozen=True)
class AttentionCall:
    """What one call of `attend` does beside its arrays.

    Args:
        scale: Factor of the logits.
        softcap: ``c``: logits become ``c * tanh(logits / c)``; None leaves them.
        visibility: What a query sees by its position: causality and window.
        dropout: Dropout of the probabilities, or None.
    """

    scale: float
    softcap: float | None
    visibility: Visibility
    dropout: Dropout | None = None


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
) -> tuple[Array, Array]:
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

    Returns:
        The context (B, T, H, d_v), and the probabilities before dropout (B, H, T, S).
    """
    batch, queries, heads, d_k = ops.shape(query)
    _, keys, shared, d_v = ops.shape(value)
    rows = (heads // shared) * queries  # the queries that share a key head, one after another

    query = ops.permute_dims(query, (0, 2, 1, 3))  # [B, H, T, d_k]
    key = ops.permute_dims(key, (0, 2, 3, 1))  # [B, K, d_k, S]
    value = ops.permute_dims(value, (0, 2, 1, 3))  # [B, K, S, d_v]
    if heads != shared:
        query = ops.reshape(query, (batch, shared, rows, d_k))
    logits = ops.matmul(query * call.scale, key)  # [B, K, (H/K)*T, S]
    logits = ops.reshape(logits, (batch, heads, queries, keys))
    if call.softcap is not None:
        logits = ops.tanh(logits / call.softcap) * call.softcap
    observe("logits", logits)
    if bias is not None:
        logits = logits + bias
    mask = all_of(ops, [*masks, call.visibility.mask(ops, 0, queries, keys, beside=logits)])
    if mask is not None:
        logits = ops.where(mask, logits, -math.inf)
    observe("masked_logits", logits)

    scores = softmax(ops, logits)
    observe("probabilities", scores)
    dropped = scores
    if call.dropout is not None:
        keep = call.dropout.keep(ops, (batch, heads, queries, keys), beside=scores)
        dropped = ops.where(keep, scores * call.dropout.factor, 0.0)
        observe("dropped_probabilities", dropped)

    if heads != shared:
        dropped = ops.reshape(dropped, (batch, shared, rows, keys))
    context = ops.matmul(dropped, value)  # [B, K, (H/K)*T, d_v]
    context = ops.reshape(context, (batch, heads, queries, d_v))
    context = ops.permute_dims(context, (0, 2, 1, 3))  # [B, T, H, d_v]
    observe("context", context)
    return context, scores


def softmax(ops: Ops, logits: Array) -> Array:
    """``exp(logits) / sum(exp(logits))`` over the last axis; a row of -inf gives zeros.

    The row's maximum is a constant for differentiation, to which the result is indifferent. The
    two `where` keep a row of -inf from making NaN, forward and backward.
    """
    if is_known(logits.shape[-1]) and logits.shape[-1] == 0:
        return logits  # no keys: an empty row has no maximum
    peak = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
    peak = ops.where(peak > -math.inf, peak, 0.0)
    weights = ops.exp(logits - peak)
    total = ops.sum(weights, axis=-1, keepdims=True)
    return weights / ops.where(total > 0, total, 1.0)
