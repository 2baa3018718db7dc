"""The multi-head attention layer, written once for every framework: project, attend, project.

    q, k, v = query . W_q + b_q,  key . W_k + b_k,  value . W_v + b_v       (split into heads)
    output  = attention(q, k, v) . W_o + b_o                                (heads merged)

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anymha.activity import Activity
from anymha.attention import AttentionCall, Observer, attend, unobserved
from anymha.axes import product, unfold
from anymha.checks import (
    check_arrays,
    check_inputs,
    check_masks,
    check_offset,
    check_seed,
    unpack_inputs,
)
from anymha.config import AttentionConfig
from anymha.dropout import Dropout, rate_threshold
from anymha.dtypes import accumulation_dtype, dtype_name, is_floating, output_dtype
from anymha.exact import without_gradient, without_subnormals
from anymha.frame import Frame
from anymha.masks import visibility
from anymha.ops import Array, Dim, Ops

Weights = Mapping[str, Array]
"""Canonical names (``query.kernel``) and arrays; a bias that is absent is not there."""


def multi_head_attention(
    ops: Ops,
    config: AttentionConfig,
    weights: Weights | Callable[[list[Dim]], Weights],
    query: Any,
    value: Array | None = None,
    key: Array | None = None,
    *,
    attention_mask: Array | None = None,
    attention_bias: Array | None = None,
    query_mask: Array | None = None,
    value_mask: Array | None = None,
    key_mask: Array | None = None,
    return_attention_scores: bool = False,
    return_activity_loss: bool = False,
    training: bool | None = None,
    use_causal_mask: bool = False,
    query_offset: Any = 0,
    seed: Any = None,
    observe: Observer = unobserved,
) -> Any:
    """Multi-head attention of `query` over `key` and `value`.

    Args:
        ops: The backend of all the arrays.
        config: The layer's options.
        weights: Canonical weights, as `config.weight_shapes` has them; or what makes them from the
            widths of query, value and key, and is called only if the call is good.
        query: (B, T, D_q) floating; or a list ``[query, value]`` or ``[query, value, key]``. With
            `attention_axes`, any axes, features last.
        value: (B, S, D_v) floating; default `query`.
        key: (B, S, D_k) floating; default `value`.
        attention_mask: (T, S), (B, T, S) or (B, H, T, S) booleans, True = may attend.
        attention_bias: Floating, added to the logits; broadcasts to (B, H, T, S).
        query_mask: (B, T) booleans; a query that is False attends to nothing.
        value_mask: (B, S) booleans; a position that is False does not influence anything.
        key_mask: (B, S) booleans, as `value_mask`.
        return_attention_scores: Whether to return the probabilities too.
        return_activity_loss: Whether to return, last, the penalty of the activity regulariser.
        training: Whether dropout acts; default False.
        use_causal_mask: Whether query i sees only keys ``j <= i + query_offset``.
        query_offset: Position of the first query among the keys: an int, or integers (B,).
        seed: Seed of the dropout; or what draws one, and is called only if the call is good and
            drops; default the framework's own generator.
        observe: Is told each stage.

    Returns:
        The output (B, T, *O); with `return_attention_scores` also the probabilities before
        dropout (B, H, T, S); with `return_activity_loss` also a scalar, 0 without a regulariser.

    Raises:
        ShapeError: shapes do not fit; the message has the expected and the received.
        DtypeError: a mask is not boolean, or an input is not floating.
        MixedBackendsError: an array is of another framework.
    """
    query, value, key = unpack_inputs(query, value, key)
    inputs = {"query": query, "value": value, "key": key}
    optional = {
        "attention_mask": attention_mask,
        "attention_bias": attention_bias,
        "query_mask": query_mask,
        "value_mask": value_mask,
        "key_mask": key_mask,
    }
    extra = {name: array for name, array in optional.items() if array is not None}
    check_arrays(ops, {**inputs, **extra})
    widths = [
        weights[f"{name}.kernel"].shape[0] if isinstance(weights, Mapping) else None
        for name in inputs
    ]
    axes = check_inputs(config, query, value, key, widths)
    batch, queries = axes.split(ops.shape(query))
    keys = axes.split(ops.shape(value))[1]
    check_masks(extra, batch, config.num_heads, queries, keys)
    query_offset = check_offset(ops, query_offset, product(batch))
    seed, draw = (None, seed) if callable(seed) else (check_seed(ops, seed), ops.draw_seed)
    if not isinstance(weights, Mapping):
        weights = weights([array.shape[-1] for array in inputs.values()])
    dropping = bool(training) and config.dropout > 0
    if dropping and seed is None:
        seed = draw()
    traced = {"query_offset": query_offset, "seed": seed if dropping else None}
    extra |= {name: value for name, value in traced.items() if ops.is_array(value)}

    # An array that plays two parts is passed, cast and differentiated once.
    source = {name: next(n for n in inputs if inputs[n] is inputs[name]) for name in inputs}
    arrays = {name: inputs[name] for name in source.values()} | extra | dict(weights)
    frame = Frame(ops, axes, batch, config.num_heads, queries, keys, source)

    def forward(arrays: Mapping[str, Array]) -> Any:
        options = _options(
            config,
            use_causal_mask,
            arrays.get("query_offset", query_offset),
            arrays.get("seed", seed) if dropping else None,
        )
        activity = Activity(config, frame, observe)
        watch = activity if return_activity_loss else observe
        output, scores = _forward(config, frame, arrays, options, watch)
        results = (output, scores) if return_attention_scores else (output,)
        if return_activity_loss:
            dtype = accumulation_dtype(dtype_name(output.dtype))
            results += (activity.loss(arrays, ops.dtype(dtype)),)
        return results if len(results) > 1 else output

    if _compute_dtype(config, weights) == "float64":
        return ops.in_float64(forward, arrays)
    return forward(arrays)


def _options(config: AttentionConfig, causal: bool, offset: Any, seed: Any) -> AttentionCall:
    """What `attend` is asked for; dropout acts where there is a seed."""
    side = None if config.sliding_window is None else config.sliding_window - 1
    dropout = None
    if seed is not None:
        native = config.dropout_rng == "native"
        dropout = Dropout(rate_threshold(config.dropout), seed, native)
    return AttentionCall(
        config.scale_value, None, visibility(causal, (side, side), offset), dropout
    )


def _forward(
    config: AttentionConfig,
    frame: Frame,
    arrays: Mapping[str, Array],
    options: AttentionCall,
    observe: Observer,
) -> tuple[Array, Array]:
    """Output and scores, in the caller's shapes and dtype."""
    ops = frame.ops
    compute = _compute_dtype(config, arrays)
    exact, working = ops.dtype(compute), ops.dtype(accumulation_dtype(compute))
    real = {
        name: ops.astype(ops.astype(array, exact), working)
        for name, array in arrays.items()
        if is_floating(dtype_name(array.dtype))
    }

    def weights(name: str) -> tuple[Array, Array | None]:
        return real[f"{name}.kernel"], real.get(f"{name}.bias")

    rows, columns = frame.padding(arrays)
    query, key, value = frame.inputs(real, rows, columns)
    q = project(ops, query, *weights("query"), contracted=1)  # [B, T, H, d_k]
    real |= without_gradient(ops, real, "key.bias")
    k = project(ops, key, *weights("key"), contracted=1)  # [B, S, K, d_k]
    v = project(ops, value, *weights("value"), contracted=1)  # [B, S, K, d_v]
    for stage, projected in (("query", q), ("key", k), ("value", v)):
        observe(stage, projected)

    context, scores = attend(  # [B, T, H, d_v], [B, H, T, S]
        ops,
        options,
        q,
        k,
        v,
        masks=[frame.attention_mask(arrays), rows, columns],
        bias=frame.attention_bias(real.get("attention_bias")),
        observe=observe,
    )
    output = project(ops, context, *weights("output"), contracted=2)  # [B, T, *O]
    observe("output", output)

    result = ops.dtype(output_dtype(dtype_name(arrays["query.kernel"].dtype), compute))
    output = unfold(ops, output, frame.axes, (*frame.batch, *frame.queries))
    if compute == "float64" and result == ops.float32:
        output, scores = without_subnormals(ops, output), without_subnormals(ops, scores)
    return ops.astype(output, result), ops.astype(frame.scores(scores), result)


def project(ops: Ops, x: Array, kernel: Array, bias: Array | None, *, contracted: int) -> Array:
    """``x . kernel + bias`` over the last `contracted` axes of `x`, as one matrix product.

    Args:
        ops: The backend.
        x: (B, T, *I), I being the `contracted` first axes of the kernel.
        kernel: (*I, *O).
        bias: (*O), or None.
        contracted: Number of axes that are summed over.

    Returns:
        (B, T, *O).
    """
    shape = tuple(kernel.shape)
    inner, outer = shape[:contracted], shape[contracted:]
    batch, length = ops.shape(x)[:2]
    if len(inner) > 1:
        x = ops.reshape(x, (batch, length, product(inner)))
    y = ops.tensordot(x, ops.reshape(kernel, (product(inner), product(outer))), axes=1)
    if bias is not None:
        y = y + ops.reshape(bias, (product(outer),))
    return y if len(outer) == 1 else ops.reshape(y, (batch, length, *outer))


def _compute_dtype(config: AttentionConfig, weights: Mapping[str, Array]) -> str:
    """The dtype the layer computes in: as configured, else that of the weights."""
    return config.compute_dtype or dtype_name(weights["query.kernel"].dtype)
