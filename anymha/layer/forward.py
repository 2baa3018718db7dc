"""The multi-head attention layer, written once for every framework: project, attend, project.

    q, k, v = query . W_q + b_q,  key . W_k + b_k,  value . W_v + b_v       (split into heads)
    output  = attention(q, k, v) . W_o + b_o                                (heads merged)

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from anymha.attention.formula import Observer, unobserved
from anymha.attention.spec import AttentionCall
from anymha.execution.attend import attend
from anymha.framework.dtypes import accumulation_dtype, dtype_name
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.activity import Activity
from anymha.layer.axes import unfold
from anymha.layer.checks import check_offset, check_seed, unpack_inputs
from anymha.layer.numerics import cast, without_gradient, without_subnormals
from anymha.layer.plan import INPUTS, OPTIONAL, Flags, Plan, as_arrays, attention_call, plan_call
from anymha.options.config import AttentionConfig

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
    inputs = unpack_inputs(query, value, key)
    optional = (attention_mask, attention_bias, query_mask, value_mask, key_mask)
    dropping = bool(training) and config.dropout > 0
    flags = Flags(return_attention_scores, return_activity_loss, use_causal_mask, dropping)

    def compute(plan: Plan, arrays: Mapping[str, Array]) -> Any:
        return _forward(config, plan, arrays, 0, None, unobserved)

    plan = plan_call(ops, config, weights, inputs, optional, flags, compute)
    query_offset = check_offset(ops, query_offset, plan.size)
    seed, draw = (None, seed) if callable(seed) else (check_seed(ops, seed), ops.draw_seed)
    if not isinstance(weights, Mapping):
        weights = weights([array.shape[-1] for array in inputs])
        plan = plan_call(ops, config, weights, inputs, optional, flags, compute)
    if not dropping:
        seed = None
    elif seed is None:
        seed = draw()

    # An array that plays two parts is passed, cast and differentiated once.
    arrays = {**weights, **dict(zip(plan.inputs, inputs, strict=True))}
    for name, array in zip(OPTIONAL, optional, strict=True):
        if array is not None:
            arrays[name] = array
    if plan.run is not None and observe is unobserved:
        return plan.run(arrays | as_arrays(ops, query_offset, seed))
    simple = seed is None and type(query_offset) is int and query_offset == 0
    if plan.replayed is not None and simple and observe is unobserved:
        return plan.replayed(arrays)
    if ops.is_array(query_offset):
        arrays["query_offset"] = query_offset
    if ops.is_array(seed):
        arrays["seed"] = seed
    if plan.double:
        forward = partial(_forward, config, plan, offset=query_offset, seed=seed, observe=observe)
        return ops.in_float64(forward, arrays)
    return _forward(config, plan, arrays, query_offset, seed, observe)


def _forward(
    config: AttentionConfig,
    plan: Plan,
    arrays: Mapping[str, Array],
    offset: Any,
    seed: Any,
    observe: Observer,
) -> Any:
    """What the call returns: output, scores, activity penalty, as far as asked for.

    Args:
        config: The layer's options.
        plan: What is known of the call.
        arrays: All arrays by name: inputs, masks, weights, and an offset or a seed that is one.
        offset: Position of the first query among the keys, where it is an int.
        seed: Seed of the dropout, where it is an int.
        observe: Is told each stage.
    """
    ops, flags = plan.frame.ops, plan.flags
    offset, seed = arrays.get("query_offset", offset), arrays.get("seed", seed)
    simple = seed is None and type(offset) is int and offset == 0
    options = plan.simple if simple else attention_call(config, flags.causal, offset, seed)
    activity = Activity(config, plan.frame, observe) if flags.activity else None
    output, scores = _layer(plan, arrays, options, observe, activity or observe)
    results = [output, scores] if flags.scores else [output]
    if activity is not None:
        dtype = accumulation_dtype(dtype_name(output.dtype))
        results.append(activity.loss(arrays, ops.dtype(dtype)))
    return tuple(results) if len(results) > 1 else output


def _layer(
    plan: Plan,
    arrays: Mapping[str, Array],
    options: AttentionCall,
    observe: Observer,
    observe_projections: Observer,
) -> tuple[Array, Array | None]:
    """Output and scores, in the caller's shapes and dtype."""
    frame, ops = plan.frame, plan.frame.ops

    def real(name: str) -> Array | None:
        x = arrays.get(name)
        if x is None or (x.dtype == plan.working and plan.lossless):
            return x
        return cast(ops, cast(ops, x, plan.exact), plan.working)

    def projected(x: Array, name: str, bias: Array | None, contracted: int = 1) -> Array:
        y = project(ops, x, real(f"{name}.kernel"), bias, contracted=contracted)
        observe_projections(name, y)
        return y

    rows, columns = frame.padding(arrays)
    query, key, value = frame.inputs({name: real(name) for name in INPUTS}, rows, columns)
    context, scores = attend(  # [B, T, H, d_v], [B, H, T, S]; the projections live no longer
        ops,
        options,
        projected(query, "query", real("query.bias")),  # [B, T, H, d_k]
        projected(key, "key", without_gradient(ops, real("key.bias"))),  # [B, S, K, d_k]
        projected(value, "value", real("value.bias")),  # [B, S, K, d_v]
        masks=[frame.attention_mask(arrays), rows, columns],
        bias=frame.attention_bias(real("attention_bias")),
        observe=observe,
        with_scores=plan.flags.scores,
    )
    output = projected(context, "output", real("output.bias"), contracted=2)  # [B, T, *O]
    output = unfold(ops, output, frame.axes, (*frame.batch, *frame.queries))
    if scores is not None:
        scores = frame.scores(scores)
    if plan.double and plan.result == ops.float32:
        output = without_subnormals(ops, output)
        scores = None if scores is None else without_subnormals(ops, scores)
    return cast(ops, output, plan.result), None if scores is None else cast(
        ops, scores, plan.result
    )


def project(ops: Ops, x: Array, kernel: Array, bias: Array | None, *, contracted: int) -> Array:
    """``x . kernel + bias`` over the last `contracted` axes of `x`, as one matrix product.

    Args:
        ops: The backend.
        x: (B, T, *I), I being the `contracted` first axes of the kernel.
        kernel: (*I, *O).
        bias: (*O), or None.
        contracted: Number of axes that are summed over, 1 or 2.

    Returns:
        (B, T, *O).
    """
    shape = kernel.shape
    outer = shape[contracted:]
    inner = shape[0] if contracted == 1 else shape[0] * shape[1]
    width = outer[0] if len(outer) == 1 else product(outer)
    batch, length, *_ = ops.shape(x)
    linear = getattr(ops, "linear", None)
    if linear is not None:
        x = ops.reshape(x, (product((batch, length)), inner))
    elif contracted != 1:
        x = ops.reshape(x, (batch, length, inner))
    if len(shape) != 2 or contracted != 1:
        kernel = ops.reshape(kernel, (inner, width))
    if bias is not None and len(outer) != 1:
        bias = ops.reshape(bias, (width,))
    if linear is not None:
        y = linear(x, kernel, bias)
    else:
        y = ops.tensordot(x, kernel, axes=1)
        y = y if bias is None else y + bias
    return ops.reshape(y, (batch, length, *outer))
