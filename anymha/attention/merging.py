"""Attention over parts of the keys, merged into attention over all of them.

    lse = log(sum_i exp(lse_i)),    context = sum_i exp(lse_i - lse) * context_i

`lse` is the log of the denominator of each row's softmax.

References:
    M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax" (2018).
    H. Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from anymha.framework.protocol import Array, Ops


def merged(ops: Ops, contexts: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """The context (B, T, H, d_v) and the log-sum-exp (B, H, T) over all parts, all of one dtype.

    A row that saw nothing in any part, whose log-sum-exp is -inf, stays zero and -inf, and its
    gradients are zero.
    """
    peak = ops.stop_gradient(lses[0])
    for lse in map(ops.stop_gradient, lses[1:]):
        peak = ops.where(lse > peak, lse, peak)
    peak = ops.where(peak == -math.inf, 0.0, peak)
    weights = [ops.exp(lse - peak) for lse in lses]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    any_seen = total > 0
    total = ops.where(any_seen, total, 1.0)
    whole = None
    for weight, context in zip(weights, contexts, strict=True):
        share = ops.permute_dims(weight / total, (0, 2, 1))  # [B, T, H]
        part = context * ops.reshape(share, (*ops.shape(share), 1))
        whole = part if whole is None else whole + part
    return whole, ops.where(any_seen, ops.log(total) + peak, -math.inf)
