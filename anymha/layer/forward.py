"""The multi-head attention layer, written once for every framework: project, attend, project.

    q, k, v = query . W_q + b_q,  key . W_k + b_k,  value . W_v + b_v       (split into heads)
    output  = attention(q, k, v) . W_o + b_o                                (heads merged)

A call is checked and planned (`anymha.layer.plan`), and then executed; nothing is asked again.

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from anymha.attention.formula import Observer
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha.execution.attend import attend
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.activity import Activity
from anymha.layer.arguments import ARRAYS, OPTIONS, unexpected
from anymha.layer.axes import PLAIN, unfold
from anymha.layer.checks import check_offset, check_seed, unpack_inputs
from anymha.layer.numerics import cast_to, without_gradient, without_subnormals
from anymha.layer.plan import (
    Flags,
    Plan,
    PlannedCall,
    Plans,
    WeightsKind,
    plan_call,
    plan_lengths,
)
from anymha.options.config import AttentionConfig

Weights = Mapping[str, Array]
"""Canonical names (``query.kernel``) and arrays; a bias that is absent is not there."""

_MASKS = frozenset(argument.name for argument in ARRAYS)
_OPTIONS = frozenset(argument.name for argument in OPTIONS)


class Projections(NamedTuple):
    """Projections that are called, in the place of kernels and biases as arrays.

    Args:
        functions: By "query", "key", "value" and "output" a function of (B, length, width in) that
            gives (B, length, width out), heads side by side.
        kind: What a plan depends on of their weights.
        key_bias: The key's bias (K, d_k), for the activity penalty; None where there is none.
        on_rows: Whether the functions take and give (B * length, width) instead.
    """

    functions: Mapping[str, Callable[[Array], Array]]
    kind: WeightsKind
    key_bias: Array | None = None
    on_rows: bool = False


def multi_head_attention(
    ops: Ops,
    config: AttentionConfig,
    weights: Weights | Projections | Callable[[list[Dim]], Weights | Projections],
    query: Any,
    value: Array | None = None,
    key: Array | None = None,
    *,
    plans: Plans | None = None,
    observe: Observer | None = None,
    **call: Any,
) -> Any:
    """Multi-head attention of `query` over `key` and `value`.

    Args:
        ops: The backend of all the arrays.
        config: The layer's options.
        weights: Canonical weights, as `config.weight_shapes` has them; or projections that are
            called; or what makes either from the widths of query, value and key, and is called
            only if the call is good.
        query: (B, T, D_q) floating; or a list ``[query, value]`` or ``[query, value, key]``. With
            `attention_axes`, any axes, features last.
        value: (B, S, D_v) floating; default `query`.
        key: (B, S, D_k) floating; default `value`.
        plans: Where the plan is kept for other calls of the layer.
        observe: Receives the name and the value of each stage; None for no observer.
        **call: The call's other arguments; `anymha.layer.arguments` declares them.

    Returns:
        The output (B, T, *O); with `return_attention_scores` also the probabilities before
        dropout (B, H, T, S); with `return_activity_loss` also a scalar, 0 without a regulariser.

    Raises:
        ArgumentError: the call has no such argument, or an argument is of no kind that it may be.
        ShapeError: shapes do not fit; the message has the expected and the received.
        DtypeError: a mask is not boolean, or an input is not floating.
        MixedBackendsError: an array is of another framework.
    """
    if isinstance(query, (list, tuple)):
        query, value, key = unpack_inputs(query, value, key)
    value = query if value is None else value
    inputs = (query, value, value if key is None else key)
    masks: dict[str, Any] = {}
    flags, offset, seed, draw_seed = PLAIN_CALL, 0, None, None
    if call or observe is not None:
        flags, offset, seed, draw_seed = _read_call(ops, config, call, masks, observe)

    kind = _kind_of(config, weights)
    planned = plan_call(plans, ops, config, kind, inputs, masks, flags, offset, _compute)
    if type(offset) is not int:
        check_offset(ops, offset, planned.shape.folded[0])
    if type(weights) not in (dict, Projections) and not isinstance(weights, Mapping):
        weights = cast(Any, weights)([array.shape[-1] for array in cast(Any, inputs)])
        kind = _kind_of(config, weights)
        planned = plan_call(plans, ops, config, kind, inputs, masks, flags, offset, _compute)
    if not flags.dropping:
        seed = None
    elif seed is None or draw_seed is not None:
        seed = (draw_seed or ops.draw_seed)()

    plan = planned.plan
    projections = cast(Projections, weights) if type(weights) is Projections else None
    if projections is None:
        arrays: dict[str, Array] = dict(cast(Weights, weights))
    else:
        key_bias = projections.key_bias
        arrays = {} if key_bias is None else {"key.bias": key_bias}
    # An array that plays two parts is passed, cast and differentiated once.
    for name, array in zip(plan.sources, inputs, strict=True):
        arrays[name] = array
    if masks:
        arrays |= masks
    if plan.run is not None and projections is None and not paths.explaining:
        return plan.run(arrays | _as_arrays(ops, offset, seed))
    if type(offset) is not int:
        arrays["query_offset"] = offset
    if seed is not None and ops.is_array(seed):
        arrays["seed"] = seed
    if plan.double:
        return ops.in_float64(
            lambda arrays: _execute(planned, arrays, projections, offset, seed, observe), arrays
        )
    return _execute(planned, arrays, projections, offset, seed, observe)


PLAIN_CALL = Flags()


def _read_call(
    ops: Ops,
    config: AttentionConfig,
    call: Mapping[str, Any],
    masks: dict[str, Any],
    observe: Observer | None,
) -> tuple[Flags, Any, Any, Callable[[], Any] | None]:
    """Flags, offset, seed, and what draws a seed, of a call's keyword arguments.

    Args:
        ops: The backend.
        config: The layer's options.
        call: The keyword arguments.
        masks: Gets the masks and the bias.
        observe: The call's observer.
    """
    for name, given in call.items():
        if name not in _OPTIONS:
            if name not in _MASKS:
                raise unexpected(name)
            if given is not None:
                masks[name] = given
    get = call.get
    flags = Flags(
        bool(get("return_attention_scores", False)),
        bool(get("return_activity_loss", False)),
        bool(get("use_causal_mask", False)),
        config.dropout > 0 and bool(get("training")),
        observe is not None,
    )
    offset, seed = get("query_offset", 0), get("seed")
    if type(offset) is not int:
        offset = check_offset(ops, offset, None)
    if seed is None:
        return flags, offset, None, None
    if callable(seed):
        return flags, offset, None, seed
    return flags, offset, check_seed(ops, seed), None


def _kind_of(config: AttentionConfig, weights: Any) -> WeightsKind:
    """What a plan depends on of the weights."""
    if type(weights) is Projections:
        return weights.kind
    if type(weights) is not dict and not isinstance(weights, Mapping):
        return WeightsKind(config.dtype, (None, None, None))
    kernel = weights["query.kernel"]
    widths = (kernel.shape[0], weights["value.kernel"].shape[0], weights["key.kernel"].shape[0])
    return WeightsKind(kernel.dtype, widths)


def _as_arrays(ops: Ops, offset: Any, seed: Any) -> dict[str, Array]:
    """An offset and a seed as arrays, so that a compiled call serves all of them.

    Args:
        ops: A backend that compiles.
        offset: An int, of which 0 is known to the compiled call, or an array.
        seed: An int, an array, or None.
    """
    arrays = {}
    if type(offset) is not int:
        arrays["query_offset"] = offset
    elif offset:
        arrays["query_offset"] = ops.asarray(offset, dtype=ops.int32)
    if seed is not None:
        arrays["seed"] = seed if ops.is_array(seed) else ops.capabilities.seed_array(seed)
    return arrays


def _compute(plan: Plan, arrays: Mapping[str, Array]) -> Any:
    """The results of a planned call from its arrays by name, for a compiler."""
    query, value, key = (arrays[name] for name in plan.sources)
    inputs = (query, value, key)
    masks = {name: array for name, array in arrays.items() if name in _MASKS}
    offset, seed = arrays.get("query_offset", 0), arrays.get("seed")
    planned = plan_lengths(plan, inputs, masks, offset)
    return _execute(planned, arrays, None, offset, seed, None)


def _execute(
    planned: PlannedCall,
    arrays: Mapping[str, Array],
    projections: Projections | None,
    offset: Any,
    seed: Any,
    observe: Observer | None,
) -> Any:
    """What the call returns: output, scores, activity penalty, as far as asked for.

    Args:
        planned: The checked call.
        arrays: All arrays by name: inputs, masks, weights, and an offset or a seed that is one.
        projections: The projections, where they are called.
        offset: Position of the first query among the keys, where it is an int.
        seed: Seed of the dropout, where it is an int.
        observe: Receives the name and the value of each stage; None for no observer.
    """
    plan, shape, path = planned
    ops, flags, spec, config = plan.ops, plan.flags, plan.spec, plan.config
    offset, seed = arrays.get("query_offset", offset), arrays.get("seed", seed)
    if flags.dropping or type(offset) is not int or offset:
        spec = _completed(spec, offset, seed)
    if paths.explaining:
        paths.report(path)
    activity = Activity(config, ops, shape, observe) if flags.activity else None
    observe_projections = activity or observe

    working, rounds = plan.working, plan.rounds

    def real(name: str) -> Array | None:
        x = arrays.get(name)
        if x is None or (x.dtype == working and not rounds):
            return x
        return cast_to(ops, cast_to(ops, x, plan.compute_dtype), working)

    def projected(name: str, x: Array, contracted: int = 1) -> Array:
        if projections is None:
            bias = real(f"{name}.bias")
            if name == "key" and plan.free_key_bias:
                bias = without_gradient(ops, bias)
            y = project(ops, x, real(f"{name}.kernel"), bias, contracted)
        else:
            y = _called(plan, projections, name, x, shape.folded)
        if observe_projections is not None:
            observe_projections(name, y)
        return y

    _, value_source, key_source = plan.sources  # an array of two parts is cast once
    query = real("query")
    value = query if value_source == "query" else real(value_source)
    key = query if key_source == "query" else value
    if key_source == "key":
        key = real("key")
    mask = bias = query_mask = key_mask = None
    if not shape.is_plain:
        query_mask, key_mask = shape.padding(ops, arrays)
        folded = {"query": query, "value": value, "key": key}
        query, key, value = shape.inputs(ops, folded, query_mask, key_mask)
        mask, bias = arrays.get("attention_mask"), real("attention_bias")
        mask = None if mask is None else shape.fold_mask(ops, "attention_mask", mask)
        if query_mask is not None or key_mask is not None:
            mask = all_of(ops, [mask, query_mask, key_mask])
        bias = None if bias is None else shape.fold_mask(ops, "attention_bias", bias)
    if projections is not None and projections.on_rows:
        query, key, value = _as_rows(ops, query, key, value, shape.folded)
    q, k = projected("query", query), projected("key", key)  # [B, T, H, d_k], [B, S, K, d_k]
    for feature in spec.features:
        q, k = feature.heads(ops, q, k)
    context, scores = attend(  # [B, T, H, d_v], [B, H, T, S]
        ops, spec, path, q, k, projected("value", value),
        mask=mask, bias=bias, observe=observe, with_scores=flags.scores,
    )  # fmt: skip
    del q, k
    for feature in spec.features:
        context = feature.context(ops, context)
    output = projected("output", context, contracted=2)  # [B, T, *O]
    if plan.axes is not PLAIN:
        output = unfold(ops, output, plan.axes, (*shape.batch, *shape.queries))
        scores = None if scores is None else shape.unfolded_scores(ops, scores)
    results = [_rounded(plan, output)]
    if flags.scores:
        results.append(_rounded(plan, scores))
    if activity is not None:
        dtype = ops.float64 if results[0].dtype == ops.float64 else ops.float32
        results.append(activity.loss(arrays, dtype))
    return tuple(results) if len(results) > 1 else results[0]


def _completed(spec: AttentionSpec, offset: Any, seed: Any) -> AttentionSpec:
    """The spec with the call's own offset and seed."""
    dropout = None if spec.dropout is None else replace(spec.dropout, seed=seed)
    positions = replace(spec.position_mask, offset=offset)
    return replace(spec, position_mask=positions, dropout=dropout)


def _rounded(plan: Plan, x: Array) -> Array:
    """A result in the dtype of the results."""
    if x.dtype == plan.result:
        return x
    if plan.double and plan.result == plan.ops.float32:
        x = without_subnormals(plan.ops, x)
    return plan.ops.astype(x, plan.result)


def _as_rows(
    ops: Ops, query: Array, key: Array, value: Array, lengths: tuple[Dim, Dim, Dim]
) -> tuple[Array, Array, Array]:
    """Query, key and value as (B * length, D); an array of several parts once."""
    batch, queries, keys = lengths
    rows = ops.reshape(query, (batch * queries, query.shape[2]))
    values = rows if value is query else ops.reshape(value, (batch * keys, value.shape[2]))
    if key is query or key is value:
        return rows, rows if key is query else values, values
    return rows, ops.reshape(key, (batch * keys, key.shape[2])), values


def _called(
    plan: Plan, projections: Projections, name: str, x: Array, lengths: tuple[Dim, Dim, Dim]
) -> Array:
    """What a projection gives for (B, length, D) or its rows, or for the context (B, T, H, d_v)."""
    ops, function = plan.ops, projections.functions[name]
    batch, queries, keys = lengths
    if name == "output":
        width = plan.context_width
        x = ops.reshape(
            x, (batch * queries, width) if projections.on_rows else (batch, queries, width)
        )
        y = function(x)
        shape = y.shape[-1:] if plan.output_shape is None else plan.output_shape
        y = ops.reshape(y, (batch, queries, *shape))
    else:
        length = queries if name == "query" else keys
        y = ops.reshape(function(x), (batch, length, *plan.heads[name]))
    return y if y.dtype == plan.working else ops.astype(y, plan.working)


def project(ops: Ops, x: Array, kernel: Array, bias: Array | None, contracted: int) -> Array:
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
    shape, reshape = kernel.shape, ops.reshape
    outer = shape[contracted:]
    inner = shape[0] if contracted == 1 else shape[0] * shape[1]
    width = outer[0] if len(outer) == 1 else product(outer)
    lengths = ops.shape(x)[:2]
    linear = ops.capabilities.linear
    if len(shape) != 2 or contracted != 1:
        kernel = reshape(kernel, (inner, width))
    if bias is not None and len(outer) != 1:
        bias = reshape(bias, (width,))
    if linear is not None:
        y = linear(reshape(x, (lengths[0] * lengths[1], inner)), kernel, bias)
    else:
        if contracted != 1:
            x = reshape(x, (*lengths, inner))
        y = ops.tensordot(x, kernel, axes=1)
        y = y if bias is None else y + bias
    return reshape(y, (*lengths, *outer))
