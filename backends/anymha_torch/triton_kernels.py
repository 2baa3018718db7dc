"""Attention with portable dropout, or with none, in one kernel forward and two backward, in Triton.

The tiles, the softmax in one pass over the keys, and the gradients are those of FlashAttention:

    P = softmax(scale * Q K^T + bias),  D = keep * factor * P,  C = D V,  L = log(sum(exp(logits)))
    dV = D^T dC,  dD = keep * factor * dC V^T,  dS = P * (dD - rowsum(C * dC))
    dQ = scale * dS K,  dK = scale * dS^T Q

The keep mask is made where it is needed, bit for bit as `anymha.attention.dropout` says. A word of
its generator decides for an even query and for the odd one after it; so a program has a tile of
even queries and a tile of odd ones, which share a tile of words. Without dropout there are no
words, and what `threshold` decides is left out of the program. Tiles whose queries see none of
the keys are left out. Nothing is added atomically: the results are the same in every run.

References:
    T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism" (2023), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from anymha_torch.tiled_dropout import heads_last

LENGTHS = ["queries", "keys", "offset", "left", "right", "threshold"]
"""Numbers that change from call to call; a kernel is not compiled anew for them."""


@triton.jit
def _mix(x, key):
    """`mix` of `anymha.attention.dropout`, of unsigned words."""
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) * 0xAC4C1B51 ^ key
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _mixed(x):
    return _mix(x, x * 0)


@triton.jit
def _head_words(seed, batch, head):
    """The words `a` and `c` of a head, before the pair of queries goes in."""
    seed = tl.load(seed)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    batch, head = batch.to(tl.uint32), head.to(tl.uint32)
    a = _mixed(_mixed(_mixed(_mixed(low + 0x9E3779B9) ^ high) + batch) + head)
    c = _mixed(_mixed(_mixed(_mixed(high + 0x85EBCA6B) ^ low) ^ batch) ^ head)
    return a, c


@triton.jit
def _words(a, c, pairs, columns):
    """A word for each pair of queries and each key; `pairs` and `columns` broadcast."""
    pairs = pairs.to(tl.uint32)
    return _mix(_mixed(a + pairs) + columns.to(tl.uint32), _mixed(c ^ pairs))


@triton.jit
def _kept(words, threshold, odd: tl.constexpr):
    bits = (words >> 16) if odd else (words & 0xFFFF)
    return bits >= threshold.to(tl.uint32)


@triton.jit
def _dropped(x, words, threshold, odd: tl.constexpr):
    """An array of a tile, zero where it is dropped; itself without dropout."""
    if threshold is not None:
        x = tl.where(_kept(words, threshold, odd), x, 0.0)
    return x


@triton.jit
def _load_rows(array, rows, row_stride, columns, row_count, column_count):
    """Rows of a matrix, zeros after its last row and column; `rows` and `columns` broadcast."""
    inside = (rows < row_count) & (columns < column_count)
    return tl.load(array + rows.to(tl.int64) * row_stride + columns, mask=inside, other=0.0)


@triton.jit
def _logits(
    products, rows, columns, scale, mask, mask_row, mask_column, bias, bias_row, bias_column,
    queries, keys, offset, left, right,
):  # fmt: skip
    """The logits of a tile, -inf where a query does not see a key; `rows`, `columns` broadcast."""
    seen = (rows < queries) & (columns < keys)
    logits = products * scale
    if bias is not None:
        at = rows.to(tl.int64) * bias_row + columns.to(tl.int64) * bias_column
        logits += tl.load(bias + at, mask=seen, other=0.0).to(tl.float32)
    if mask is not None:
        at = rows.to(tl.int64) * mask_row + columns.to(tl.int64) * mask_column
        seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
    distance = columns - (rows + offset)
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _accumulate(
    logits, words, threshold, odd: tl.constexpr, v, peak, total, context, precision: tl.constexpr
):
    """The softmax's running maximum, sum and context, with the keys of one more tile."""
    new = tl.maximum(peak, tl.max(logits, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    weights = tl.exp(logits - finite[:, None])
    fade = tl.exp(peak - finite)
    total = total * fade + tl.sum(weights, 1)
    dropped = _dropped(weights, words, threshold, odd).to(v.dtype)
    context = tl.dot(dropped, v, context * fade[:, None], input_precision=precision)
    return new, total, context


@triton.jit
def _store_rows(array, rows, row_stride, columns, row_count, column_count, values):
    inside = (rows < row_count) & (columns < column_count)
    at = array + rows.to(tl.int64) * row_stride + columns
    tl.store(at, values.to(array.dtype.element_ty), mask=inside)


@triton.jit
def _store_context(
    context, total, peak, factor, rows, features, out, lse, out_row, queries, value_dim
):
    """The context of rows, zero for one that sees nothing, and the log of the softmax's sum."""
    alive = total != 0.0
    total = tl.where(alive, total, 1.0)
    context = context * (factor / total)[:, None]
    _store_rows(out, rows[:, None], out_row, features[None, :], queries, value_dim, context)
    # Infinity for a row that sees nothing: its weights, exp(logit - lse), are zero backward too.
    lse_of_rows = tl.where(alive, peak + tl.log(total), float("inf"))
    tl.store(lse + rows, lse_of_rows, mask=rows < queries)


@triton.jit
def _keys_seen(first, last, offset, left, right, keys, width: tl.constexpr):
    """From which key on, by whole tiles, and up to which the queries first..last see any."""
    low, high = 0, keys
    if left is not None:
        low = tl.minimum(tl.maximum(first.to(tl.int64) + offset - left, 0), keys).to(tl.int32)
        low = low // width * width
    if right is not None:
        high = tl.minimum(tl.maximum(last.to(tl.int64) + offset + right + 1, 0), keys).to(tl.int32)
    return low, high


@triton.jit
def _head_arrays(array, batch, head, batch_stride, head_stride):
    return array + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    query, key, value, mask, bias, offsets, seed, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, m_batch, m_head, m_row, m_column, b_batch, b_head, b_row, b_column,
    offsets_batch, heads, group, queries, keys, offset, left, right, scale, threshold, factor,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_width: tl.constexpr, v_width: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tl.cdiv(queries, 2), height)
    number = tl.program_id(0)
    block = blocks - 1 - number % blocks  # under causality the last queries see the most
    batch, head = number // blocks // heads, number // blocks % heads
    query = _head_arrays(query, batch, head, q_batch, q_head)
    key = _head_arrays(key, batch, head // group, k_batch, k_head)
    value = _head_arrays(value, batch, head // group, v_batch, v_head)
    if mask is not None:
        mask = _head_arrays(mask, batch, head, m_batch, m_head)
    if bias is not None:
        bias = _head_arrays(bias, batch, head, b_batch, b_head)
    if offsets is not None:
        offset = tl.load(offsets + batch * offsets_batch)
    a, c = 0, 0
    if threshold is not None:
        a, c = _head_words(seed, batch, head)
    pairs = block * height + tl.arange(0, height)
    even, odd = 2 * pairs, 2 * pairs + 1
    k_features, v_features = tl.arange(0, k_width), tl.arange(0, v_width)
    q_even = _load_rows(query, even[:, None], q_row, k_features[None, :], queries, key_dim)
    q_odd = _load_rows(query, odd[:, None], q_row, k_features[None, :], queries, key_dim)
    peak_even = tl.full([height], float("-inf"), tl.float32)
    peak_odd = peak_even
    total_even = tl.zeros([height], tl.float32)
    total_odd = total_even
    context_even = tl.zeros([height, v_width], tl.float32)
    context_odd = context_even

    first = block * (2 * height)
    low, high = _keys_seen(first, first + 2 * height - 1, offset, left, right, keys, width)
    for start in range(low, high, width):
        columns = start + tl.arange(0, width)
        k = _load_rows(key, columns[None, :], k_row, k_features[:, None], keys, key_dim)
        v = _load_rows(value, columns[:, None], v_row, v_features[None, :], keys, value_dim)
        words = 0
        if threshold is not None:
            words = _words(a, c, pairs[:, None], columns[None, :])
        logits = _logits(
            tl.dot(q_even, k, input_precision=precision), even[:, None], columns[None, :], scale,
            mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
        )  # fmt: skip
        peak_even, total_even, context_even = _accumulate(
            logits, words, threshold, False, v, peak_even, total_even, context_even, precision
        )  # fmt: skip
        logits = _logits(
            tl.dot(q_odd, k, input_precision=precision), odd[:, None], columns[None, :], scale,
            mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
        )  # fmt: skip
        peak_odd, total_odd, context_odd = _accumulate(
            logits, words, threshold, True, v, peak_odd, total_odd, context_odd, precision
        )

    out = _head_arrays(out, batch, head, o_batch, o_head)
    lse += (batch * heads + head).to(tl.int64) * queries
    _store_context(
        context_even, total_even, peak_even, factor, even, v_features, out, lse, o_row, queries,
        value_dim,
    )  # fmt: skip
    _store_context(
        context_odd, total_odd, peak_odd, factor, odd, v_features, out, lse, o_row, queries,
        value_dim,
    )  # fmt: skip


@triton.jit
def _logit_gradients(logits, lse, balance, d_weights, words, threshold, odd: tl.constexpr, factor):
    """Gradients of logits, and the weights that are kept; `lse` and `balance` broadcast."""
    weights = tl.exp(logits - lse)
    d_logits = weights * (_dropped(d_weights * factor, words, threshold, odd) - balance)
    return d_logits, _dropped(weights, words, threshold, odd)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_queries(
    query, key, value, mask, bias, offsets, seed, out, lse, d_out, balance, d_query,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    m_batch, m_head, m_row, m_column, b_batch, b_head, b_row, b_column,
    offsets_batch, heads, group, queries, keys, offset, left, right, scale, threshold, factor,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_width: tl.constexpr, v_width: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and `balance`, the sums over rows of C * dC."""
    blocks = tl.cdiv(tl.cdiv(queries, 2), height)
    number = tl.program_id(0)
    block = blocks - 1 - number % blocks
    batch, head = number // blocks // heads, number // blocks % heads
    query = _head_arrays(query, batch, head, q_batch, q_head)
    key = _head_arrays(key, batch, head // group, k_batch, k_head)
    value = _head_arrays(value, batch, head // group, v_batch, v_head)
    out = _head_arrays(out, batch, head, o_batch, o_head)
    d_out = _head_arrays(d_out, batch, head, do_batch, do_head)
    if mask is not None:
        mask = _head_arrays(mask, batch, head, m_batch, m_head)
    if bias is not None:
        bias = _head_arrays(bias, batch, head, b_batch, b_head)
    if offsets is not None:
        offset = tl.load(offsets + batch * offsets_batch)
    a, c = 0, 0
    if threshold is not None:
        a, c = _head_words(seed, batch, head)
    pairs = block * height + tl.arange(0, height)
    even, odd = 2 * pairs, 2 * pairs + 1
    k_features, v_features = tl.arange(0, k_width), tl.arange(0, v_width)
    q_even = _load_rows(query, even[:, None], q_row, k_features[None, :], queries, key_dim)
    q_odd = _load_rows(query, odd[:, None], q_row, k_features[None, :], queries, key_dim)
    do_even = _load_rows(d_out, even[:, None], do_row, v_features[None, :], queries, value_dim)
    do_odd = _load_rows(d_out, odd[:, None], do_row, v_features[None, :], queries, value_dim)
    rows_before = (batch * heads + head).to(tl.int64) * queries
    lse += rows_before
    balance += rows_before
    lse_even = tl.load(lse + even, mask=even < queries, other=float("inf"))
    lse_odd = tl.load(lse + odd, mask=odd < queries, other=float("inf"))
    o = _load_rows(out, even[:, None], o_row, v_features[None, :], queries, value_dim)
    balance_even = tl.sum(o.to(tl.float32) * do_even.to(tl.float32), 1)
    o = _load_rows(out, odd[:, None], o_row, v_features[None, :], queries, value_dim)
    balance_odd = tl.sum(o.to(tl.float32) * do_odd.to(tl.float32), 1)
    tl.store(balance + even, balance_even, mask=even < queries)
    tl.store(balance + odd, balance_odd, mask=odd < queries)
    dq_even = tl.zeros([height, k_width], tl.float32)
    dq_odd = dq_even

    first = block * (2 * height)
    low, high = _keys_seen(first, first + 2 * height - 1, offset, left, right, keys, width)
    for start in range(low, high, width):
        columns = start + tl.arange(0, width)
        k = _load_rows(key, columns[None, :], k_row, k_features[:, None], keys, key_dim)
        v = _load_rows(value, columns[None, :], v_row, v_features[:, None], keys, value_dim)
        words = 0
        if threshold is not None:
            words = _words(a, c, pairs[:, None], columns[None, :])
        logits = _logits(
            tl.dot(q_even, k, input_precision=precision), even[:, None], columns[None, :], scale,
            mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
        )  # fmt: skip
        d_logits, _ = _logit_gradients(
            logits, lse_even[:, None], balance_even[:, None],
            tl.dot(do_even, v, input_precision=precision), words, threshold, False, factor,
        )  # fmt: skip
        dq_even = tl.dot(d_logits.to(k.dtype), tl.trans(k), dq_even, input_precision=precision)
        logits = _logits(
            tl.dot(q_odd, k, input_precision=precision), odd[:, None], columns[None, :], scale,
            mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
        )  # fmt: skip
        d_logits, _ = _logit_gradients(
            logits, lse_odd[:, None], balance_odd[:, None],
            tl.dot(do_odd, v, input_precision=precision), words, threshold, True, factor,
        )  # fmt: skip
        dq_odd = tl.dot(d_logits.to(k.dtype), tl.trans(k), dq_odd, input_precision=precision)

    d_query = _head_arrays(d_query, batch, head, dq_batch, dq_head)
    _store_rows(
        d_query, even[:, None], dq_row, k_features[None, :], queries, key_dim, dq_even * scale
    )
    _store_rows(
        d_query, odd[:, None], dq_row, k_features[None, :], queries, key_dim, dq_odd * scale
    )


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, query, q_row, d_out, do_row, lse, balance, rows, columns,
    words, threshold, odd: tl.constexpr, scale, factor,
    mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
    k_features, v_features, key_dim: tl.constexpr, value_dim: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys, with the queries of one more tile; tiles lie key by query."""
    q = _load_rows(query, rows[:, None], q_row, k_features[None, :], queries, key_dim)
    do = _load_rows(d_out, rows[:, None], do_row, v_features[None, :], queries, value_dim)
    logits = _logits(
        tl.dot(k, tl.trans(q), input_precision=precision), rows[None, :], columns[:, None], scale,
        mask, m_row, m_column, bias, b_row, b_column, queries, keys, offset, left, right,
    )  # fmt: skip
    lse_of_rows = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
    balance_of_rows = tl.load(balance + rows, mask=rows < queries, other=0.0)
    d_logits, dropped = _logit_gradients(
        logits, lse_of_rows[None, :], balance_of_rows[None, :],
        tl.dot(v, tl.trans(do), input_precision=precision), words, threshold, odd, factor,
    )  # fmt: skip
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=precision)
    dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision=precision)
    return dk, dv


@triton.jit
def _pairs_seen(first, last, offset, left, right, queries, height: tl.constexpr):
    """From which pair of queries on, by whole tiles, and up to which any sees the keys."""
    low, high = 0, queries
    if right is not None:
        low = tl.minimum(tl.maximum(first.to(tl.int64) - offset - right, 0), queries).to(tl.int32)
    if left is not None:
        high = tl.minimum(tl.maximum(last.to(tl.int64) - offset + left + 1, 0), queries)
        high = high.to(tl.int32)
    return low // 2 // height * height, tl.cdiv(high, 2)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_keys(
    query, key, value, mask, bias, offsets, seed, lse, d_out, balance, d_key, d_value,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    m_batch, m_head, m_row, m_column, b_batch, b_head, b_row, b_column,
    offsets_batch, heads, group, queries, keys, offset, left, right, scale, threshold, factor,
    key_dim: tl.constexpr, value_dim: tl.constexpr, k_width: tl.constexpr, v_width: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys: sums over the queries of all heads that share them."""
    blocks = tl.cdiv(keys, width)
    number = tl.program_id(0)
    block, shared = number % blocks, heads // group
    batch, key_head = number // blocks // shared, number // blocks % shared
    key = _head_arrays(key, batch, key_head, k_batch, k_head)
    value = _head_arrays(value, batch, key_head, v_batch, v_head)
    if offsets is not None:
        offset = tl.load(offsets + batch * offsets_batch)
    columns = block * width + tl.arange(0, width)
    k_features, v_features = tl.arange(0, k_width), tl.arange(0, v_width)
    k = _load_rows(key, columns[:, None], k_row, k_features[None, :], keys, key_dim)
    v = _load_rows(value, columns[:, None], v_row, v_features[None, :], keys, value_dim)
    dk = tl.zeros([width, k_width], tl.float32)
    dv = tl.zeros([width, v_width], tl.float32)
    low, high = _pairs_seen(
        block * width, block * width + width - 1, offset, left, right, queries, height
    )

    for index in range(0, group):
        head = key_head * group + index
        a, c = 0, 0
        if threshold is not None:
            a, c = _head_words(seed, batch, head)
        q = _head_arrays(query, batch, head, q_batch, q_head)
        do = _head_arrays(d_out, batch, head, do_batch, do_head)
        rows_before = (batch * heads + head).to(tl.int64) * queries
        m = mask
        if mask is not None:
            m = _head_arrays(mask, batch, head, m_batch, m_head)
        b = bias
        if bias is not None:
            b = _head_arrays(bias, batch, head, b_batch, b_head)
        for start in range(low, high, height):
            pairs = start + tl.arange(0, height)
            words = 0
            if threshold is not None:
                words = _words(a, c, pairs[None, :], columns[:, None])
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q, q_row, do, do_row, lse + rows_before, balance + rows_before,
                2 * pairs, columns, words, threshold, False, scale, factor,
                m, m_row, m_column, b, b_row, b_column, queries, keys, offset, left, right,
                k_features, v_features, key_dim, value_dim, precision,
            )  # fmt: skip
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q, q_row, do, do_row, lse + rows_before, balance + rows_before,
                2 * pairs + 1, columns, words, threshold, True, scale, factor,
                m, m_row, m_column, b, b_row, b_column, queries, keys, offset, left, right,
                k_features, v_features, key_dim, value_dim, precision,
            )  # fmt: skip

    d_key = _head_arrays(d_key, batch, key_head, dk_batch, dk_head)
    d_value = _head_arrays(d_value, batch, key_head, dv_batch, dv_head)
    at = columns[:, None]
    _store_rows(d_key, at, dk_row, k_features[None, :], keys, key_dim, dk * scale)
    _store_rows(d_value, at, dv_row, v_features[None, :], keys, value_dim, dv * factor)


@triton.jit(do_not_specialize=["threshold"])
def _mask(
    seed, keep, heads, queries, keys, threshold, first_batch, first_head, first_query, first_key,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    blocks, across = tl.cdiv(tl.cdiv(queries, 2), height), tl.cdiv(keys, width)
    number = tl.program_id(0)
    rows, columns = number // across % blocks, number % across
    which = number // across // blocks
    a, c = _head_words(seed, which // heads + first_batch, which % heads + first_head)
    pairs = (rows * height + tl.arange(0, height))[:, None]
    columns = (columns * width + tl.arange(0, width))[None, :]
    words = _words(a, c, pairs + first_query // 2, columns + first_key)
    keep += which.to(tl.int64) * queries * keys
    even = (2 * pairs).to(tl.int64)
    here = columns < keys
    tl.store(keep + even * keys + columns, _kept(words, threshold, False), (even < queries) & here)
    even += 1
    tl.store(keep + even * keys + columns, _kept(words, threshold, True), (even < queries) & here)


def keep_mask(
    seed: torch.Tensor,
    threshold: int,
    shape: Sequence[int],
    origin: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """`anymha.attention.dropout.keep_mask` in one kernel.

    Args:
        seed: An int64 scalar on the device.
        threshold: The share that is dropped, in units of 1/65536.
        shape: (B, H, T, S), with at least one element.
        origin: Where the first element stands on each axis.
        device: Where the mask is made.
    """
    batch, heads, queries, keys = shape
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=device)
    height, width = 8, 128
    blocks = triton.cdiv(triton.cdiv(queries, 2), height) * triton.cdiv(keys, width)
    _start(
        _mask, batch * heads * blocks, seed, keep.view(torch.uint8), heads, queries, keys,
        threshold, *origin, height=height, width=width,
    )  # fmt: skip
    return keep


def forward(
    arrays: Sequence[torch.Tensor],
    rest: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
    options: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The context (B, H, T, d_v), and the log of each softmax's denominator (B, H, T).

    Args:
        arrays: Query (B, H, T, d_k), key (B, K, S, d_k) and value (B, K, S, d_v) of one dtype.
        rest: Mask, bias and query offsets, each None where there is none: booleans and floats that
            broadcast to (B, H, T, S), integers (1,) or (B,).
        seed: An int64 scalar on the device; None without dropout.
        options: "scale", "threshold" (None without dropout), "factor", "offset", "left" and
            "right".
    """
    query, key, value = (_with_near_features(x) for x in arrays)
    precision = _precision(query.device)
    context = heads_last((*query.shape[:3], value.shape[3]), query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    height, width, launch = _tiles("forward", query, value, precision)
    _start(
        _forward, _blocks_of_pairs(query, height),
        query, key, value, *_pointers(rest), seed, context, lse,
        *_strides(query, key, value, context), *_strides_of_rest(rest, query, key),
        *_lengths(query, key, options), **_constants(query, value, precision),
        height=height, width=width, **launch,
    )  # fmt: skip
    return context, lse


def backward(
    arrays: Sequence[torch.Tensor],
    rest: Sequence[torch.Tensor | None],
    seed: torch.Tensor | None,
    options: Mapping[str, Any],
    context: torch.Tensor,
    lse: torch.Tensor,
    cotangent: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; the arguments are those and the results of `forward`.

    Args:
        arrays: As in `forward`.
        rest: As in `forward`.
        seed: As in `forward`.
        options: As in `forward`.
        context: What `forward` gave.
        lse: What `forward` gave.
        cotangent: The gradient of the context.
    """
    query, key, value = (_with_near_features(x) for x in arrays)
    cotangent, context = _with_near_features(cotangent), _with_near_features(context)
    d_query, d_key, d_value = (heads_last(x.shape, x) for x in (query, key, value))
    balance, precision = torch.empty_like(lse), _precision(query.device)
    pointers, rest_strides = _pointers(rest), _strides_of_rest(rest, query, key)
    lengths, constants = _lengths(query, key, options), _constants(query, value, precision)
    height, width, launch = _tiles("queries", query, value, precision)
    _start(
        _backward_queries, _blocks_of_pairs(query, height),
        query, key, value, *pointers, seed, context, lse, cotangent, balance, d_query,
        *_strides(query, key, value, context, cotangent, d_query), *rest_strides,
        *lengths, **constants, height=height, width=width, **launch,
    )  # fmt: skip
    height, width, launch = _tiles("keys", query, value, precision)
    _start(
        _backward_keys, key.shape[0] * key.shape[1] * triton.cdiv(key.shape[2], width),
        query, key, value, *pointers, seed, lse, cotangent, balance, d_key, d_value,
        *_strides(query, key, value, cotangent, d_key, d_value), *rest_strides,
        *lengths, **constants, height=height, width=width, **launch,
    )  # fmt: skip
    return d_query, d_key, d_value


def _start(
    kernel: Any, programs: int, query: torch.Tensor, *arguments: Any, **options: Any
) -> None:
    """Run so many programs of a kernel on the device of the first argument."""
    cuda = query.device.type == "cuda"  # the interpreter's arrays are the CPU's
    with torch.cuda.device(query.device) if cuda else nullcontext():
        kernel[(programs,)](query, *arguments, **options)


def _with_near_features(x: torch.Tensor) -> torch.Tensor:
    """An array whose features lie one after the other."""
    return x if x.stride(3) == 1 else x.contiguous()


def _precision(device: torch.device) -> str:
    """How products of float32 are computed, as torch is told to: "ieee" or "tf32"."""
    switches = torch.backends.cuda.matmul
    own = getattr(switches, "fp32_precision", None)  # of torch 2.9 and later
    fast = switches.allow_tf32 if own is None else own == "tf32"
    return "tf32" if fast and device.type == "cuda" else "ieee"


def _tiles(
    kernel: str, query: torch.Tensor, value: torch.Tensor, precision: str
) -> tuple[int, int, Any]:
    """Pairs of queries and keys of a tile, and how a kernel is launched.

    Args:
        kernel: "forward", "queries" or "keys".
        query: (B, H, T, d_k).
        value: (B, K, S, d_v).
        precision: "ieee" or "tf32", of products of float32.
    """
    widest = max(query.shape[3], value.shape[3])
    sizes = TILES["half" if query.element_size() == 2 else precision]
    height, width, warps = sizes[min(n for n in sizes if n >= widest)][kernel]
    return height, width, {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


TILES: dict[str, dict[int, dict[str, tuple[int, int, int]]]] = {
    "half": {
        64: {"forward": (64, 64, 4), "queries": (32, 64, 4), "keys": (32, 64, 4)},
        128: {"forward": (32, 64, 4), "queries": (32, 32, 4), "keys": (32, 32, 4)},
        256: {"forward": (32, 32, 8), "queries": (16, 32, 8), "keys": (16, 16, 4)},
    },
    "tf32": {
        64: {"forward": (32, 32, 4), "queries": (32, 32, 4), "keys": (16, 64, 4)},
        128: {"forward": (32, 32, 8), "queries": (16, 32, 4), "keys": (16, 32, 8)},
    },
    "ieee": {
        64: {"forward": (16, 32, 8), "queries": (16, 32, 8), "keys": (16, 16, 8)},
        128: {"forward": (16, 16, 8), "queries": (16, 16, 8), "keys": (16, 16, 8)},
    },
}
"""Pairs, keys and warps by precision, by the features of a head up to which they hold, and by
kernel: those with which the compiler needs few registers more than there are, and less than 99 KB
of shared memory, which GPUs of capability 8.6 and 8.9 have."""


def _blocks_of_pairs(query: torch.Tensor, height: int) -> int:
    batch, heads, queries, _ = query.shape
    return batch * heads * triton.cdiv(triton.cdiv(queries, 2), height)


def _pointers(rest: Sequence[torch.Tensor | None]) -> tuple[Any, Any, Any]:
    mask, bias, offsets = rest
    return None if mask is None else mask.view(torch.uint8), bias, offsets


def _strides(*arrays: torch.Tensor) -> list[int]:
    """The strides of batch, head and row of each array."""
    return [stride for x in arrays for stride in x.stride()[:3]]


def _strides_of_rest(
    rest: Sequence[torch.Tensor | None], query: torch.Tensor, key: torch.Tensor
) -> list[int]:
    """The strides of mask and bias over (B, H, T, S), and of the offsets over B; 0 for a copy."""
    mask, bias, offsets = rest
    whole = (*query.shape[:3], key.shape[2])
    found: list[int] = []
    for x in (mask, bias):
        found += (0, 0, 0, 0) if x is None else x.expand(whole).stride()
    return [*found, 0 if offsets is None or offsets.numel() == 1 else offsets.stride(0)]


def _lengths(query: torch.Tensor, key: torch.Tensor, options: Mapping[str, Any]) -> tuple[Any, ...]:
    heads = query.shape[1]
    names = ("offset", "left", "right", "scale", "threshold", "factor")
    lengths = (heads, heads // key.shape[1], query.shape[2], key.shape[2])
    return (*lengths, *(options[name] for name in names))


def _constants(query: torch.Tensor, value: torch.Tensor, precision: str) -> dict[str, Any]:
    """What a kernel is compiled for. A product on tensor cores is at least 16 wide."""
    key_dim, value_dim = query.shape[3], value.shape[3]
    return {
        "key_dim": key_dim,
        "value_dim": value_dim,
        "k_width": max(16, triton.next_power_of_2(key_dim)),
        "v_width": max(16, triton.next_power_of_2(value_dim)),
        "precision": precision,
    }
