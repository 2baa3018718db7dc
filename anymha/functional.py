"""The functions that find their backend by the type of the arrays they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anymha.attention import AttentionCall, attend
from anymha.axes import check_broadcast, is_known, show
from anymha.checks import check_arrays, check_offset, check_weights, unpack_inputs
from anymha.config import AttentionConfig
from anymha.dropout import Dropout, rate_threshold
from anymha.dtypes import accumulation_dtype, dtype_name
from anymha.errors import ConfigError, DtypeError, ShapeError
from anymha.layer import multi_head_attention as _multi_head_attention
from anymha.masks import visibility
from anymha.ops import Array, Ops
from anymha.registry import common_ops


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    query_mask: Array | None = None,
    value_mask: Array | None = None,
    is_causal: bool = False,
    query_offset: Any = 0,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    return_scores: bool = False,
) -> Any:
    """Attention of query heads over key and value heads, without projections.

        softmax(mask(softcap(scale * query . key) + bias)) . value

    Args:
        query: (B, T, H, d_k) floating.
        key: (B, S, K, d_k); K divides H, query head h reads key head ``h // (H // K)``.
        value: (B, S, K, d_v).
        mask: Booleans that broadcast to (B, H, T, S), True = may attend.
        bias: Floating, added to the logits; broadcasts to (B, H, T, S).
        query_mask: (B, T) booleans; a query that is False attends to nothing.
        value_mask: (B, S) booleans; a position that is False does not influence anything.
        is_causal: Whether query i sees only keys ``j <= i + query_offset``.
        query_offset: Position of the first query among the keys: an int, or integers (B,).
        window: (left, right), the number of keys visible on each side of the query's own
            position; None in a place leaves that side open.
        scale: Factor of the logits; default ``1/sqrt(d_k)``.
        softcap: ``c > 0``: logits become ``c * tanh(logits / c)`` before bias and mask.
        dropout: Share of the probabilities that is dropped, in [0, 1). It acts wherever it is
            not 0: the function knows of no training mode.
        seed: Seed of the dropout; default one from the framework's own generator.
        return_scores: Whether to return the probabilities too.

    Returns:
        (B, T, H, d_v) in the dtype of the inputs; with `return_scores` also the probabilities
        before dropout, (B, H, T, S).

    Raises:
        ShapeError: shapes do not fit; the message has the expected and the received.
        DtypeError: a mask is not boolean, or inputs are not floating or not of one dtype.
        MixedBackendsError: the arrays are of several frameworks.
        ConfigError: an option has a value that it cannot have.

    Differs from:
        torch's `scaled_dot_product_attention` has heads before length;
        `jax.nn.dot_product_attention` gives a fully masked row the mean of the values, this
        gives it zeros.

    Example:
        >>> import numpy as np, anymha
        >>> x = np.ones((1, 3, 2, 4), dtype="float32")
        >>> anymha.dot_product_attention(x, x, x, is_causal=True).shape
        (1, 3, 2, 4)

    References:
        A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.
    """
    given = {
        "query": query, "key": key, "value": value, "mask": mask, "bias": bias,
        "query_mask": query_mask, "value_mask": value_mask,
    }  # fmt: skip
    arrays = {name: array for name, array in given.items() if array is not None}
    ops = common_ops(arrays.items())
    check_arrays(ops, arrays)
    _check_heads(arrays)
    _check_masks(ops, arrays, query_offset)
    options = _options(scale, softcap, is_causal, window, query_offset, dropout, seed, query, ops)

    def forward(arrays: Mapping[str, Array]) -> Any:
        context, scores = _attend(ops, options, arrays)
        return (context, scores) if return_scores else context

    if dtype_name(query.dtype) == "float64":
        return ops.in_float64(forward, arrays)
    return forward(arrays)


def _attend(ops: Ops, options: AttentionCall, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    dtype = arrays["query"].dtype
    working = ops.dtype(accumulation_dtype(dtype_name(dtype)))
    queries = ops.shape(arrays["query"])[1]
    keys = ops.shape(arrays["key"])[1]
    q, k, v = (ops.astype(arrays[name], working) for name in ("query", "key", "value"))
    rows = columns = None
    if "query_mask" in arrays:
        rows = ops.reshape(arrays["query_mask"], (-1, 1, queries, 1))
        q = ops.where(ops.reshape(rows, (-1, queries, 1, 1)), q, 0.0)
    if "value_mask" in arrays:
        columns = ops.reshape(arrays["value_mask"], (-1, 1, 1, keys))
        seen = ops.reshape(columns, (-1, keys, 1, 1))
        k, v = ops.where(seen, k, 0.0), ops.where(seen, v, 0.0)
    bias = ops.astype(arrays["bias"], working) if "bias" in arrays else None
    context, scores = attend(
        ops, options, q, k, v, masks=[arrays.get("mask"), rows, columns], bias=bias
    )
    return ops.astype(context, dtype), ops.astype(scores, dtype)


def _check_heads(arrays: Mapping[str, Array]) -> None:
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    for name, array in (("query", query), ("key", key), ("value", value)):
        if len(array.shape) != 4:
            raise ShapeError(
                f"`{name}` must have 4 axes, (batch, length, heads, width). "
                f"Received: shape {show(array.shape)}."
            )
        if array.dtype != query.dtype:
            raise DtypeError(
                "`query`, `key` and `value` must have one dtype. Received: query of "
                f"{dtype_name(query.dtype)}, {name} of {dtype_name(array.dtype)}. Cast one."
            )

    def fit(a: Array, b: Array, axis: int) -> bool:
        n, m = a.shape[axis], b.shape[axis]
        return not (is_known(n) and is_known(m)) or n == m

    heads, shared = query.shape[2], key.shape[2]
    grouped = not (is_known(heads) and is_known(shared)) or (shared and heads % shared == 0)
    fits = (
        all(fit(key, value, axis) for axis in (0, 1, 2))
        and all(fit(query, key, axis) for axis in (0, 3))
        and grouped
    )
    if not fits:
        raise ShapeError(
            "`query`, `key` and `value` must have shapes (B, T, H, d_k), (B, S, K, d_k) and "
            "(B, S, K, d_v), H a multiple of K. Received: "
            f"{show(query.shape)}, {show(key.shape)} and {show(value.shape)}."
        )


def _check_masks(ops: Ops, arrays: Mapping[str, Array], offset: Any) -> None:
    batch, queries, heads, _ = arrays["query"].shape
    keys = arrays["key"].shape[1]
    lengths = {
        "mask": (batch, heads, queries, keys),
        "bias": (batch, heads, queries, keys),
        "query_mask": (batch, queries),
        "value_mask": (batch, keys),
    }
    for name in lengths.keys() & arrays.keys():
        check_broadcast(arrays[name], lengths[name], name)
    check_offset(ops, offset, batch)


def _options(
    scale: Any, softcap: Any, is_causal: bool, window: Any, offset: Any, dropout: float,
    seed: Any, query: Array, ops: Ops,
) -> AttentionCall:  # fmt: skip
    if window is not None and not (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(n is None or (isinstance(n, int) and n >= 0) for n in window)
    ):
        raise ConfigError(
            "`window` must be (left, right), each None or an integer of at least 0. "
            f"Received: {window!r}."
        )
    for name, number in (("scale", scale), ("softcap", softcap)):
        positive = name == "softcap"
        if number is not None and not (math.isfinite(number) and (number > 0 or not positive)):
            wanted = "a finite number above 0" if positive else "a finite number"
            raise ConfigError(f"`{name}` must be {wanted}, or None. Received: {number!r}.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"`dropout` must be a number in [0, 1). Received: {dropout!r}.")
    if dropout and seed is None:
        seed = ops.draw_seed()
    return AttentionCall(
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        softcap=softcap,
        visibility=visibility(is_causal, window, offset),
        dropout=Dropout(rate_threshold(dropout), seed) if dropout else None,
    )


def multi_head_attention(
    weights: Mapping[str, Array],
    query: Any,
    value: Array | None = None,
    key: Array | None = None,
    *,
    config: AttentionConfig,
    **call: Any,
) -> Any:
    """The whole layer as a function of its weights, in the framework of its arrays.

    Args:
        weights: Canonical names and arrays, with the shapes of ``config.weight_shapes(...)``.
            A bias that is absent is not added.
        query: (B, T, D_q), or a list ``[query, value]`` or ``[query, value, key]``.
        value: (B, S, D_v); default `query`.
        key: (B, S, D_k); default `value`.
        config: The layer's options.
        **call: The other arguments of a layer's call: `attention_mask`, `attention_bias`,
            `query_mask`, `value_mask`, `key_mask`, `return_attention_scores`, `training`,
            `use_causal_mask`, `query_offset`, `seed`.

    Returns:
        The output (B, T, *O); with ``return_attention_scores=True`` also the probabilities
        (B, H, T, S).

    Raises:
        WeightsError: names or shapes of the weights do not fit the config.
        ShapeError: shapes of the inputs do not fit.
        DtypeError: a mask is not boolean, or an input is not floating.
        MixedBackendsError: the arrays are of several frameworks.
    """
    query, value, key = unpack_inputs(query, value, key)
    named = {"query": query, "value": value, "key": key, **weights}
    ops = common_ops(named.items())
    check_weights(ops, config, weights)
    return _multi_head_attention(ops, config, weights, query, value, key, **call)
