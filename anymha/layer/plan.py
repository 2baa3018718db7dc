"""What is found out about a call once, for all calls with arrays of the same kinds.

All that is checked of a call, and how its axes fold, follows from shapes, dtypes and flags, and not
from values: it is kept with the config, so that a small call does not cost more than its products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from anymha.attention.dropout import Dropout, rate_threshold
from anymha.attention.masks import visibility
from anymha.attention.spec import AttentionCall
from anymha.execution.path import are_told
from anymha.framework.dtypes import accumulation_dtype, dtype_name, output_dtype
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.call_shape import Frame
from anymha.layer.checks import check_arrays, check_inputs, check_masks
from anymha.layer.recorded import Replayed
from anymha.options.config import AttentionConfig

INPUTS = ("query", "value", "key")
OPTIONAL = ("attention_mask", "attention_bias", "query_mask", "value_mask", "key_mask")
MOST = 256
"""How many plans a config keeps; lengths that always differ must not fill the memory."""


class Flags(NamedTuple):
    """What a call is asked for.

    Args:
        scores: Whether to return the probabilities.
        activity: Whether to return the activity penalty.
        causal: Whether a query sees no later keys.
        dropping: Whether dropout acts.
    """

    scores: bool
    activity: bool
    causal: bool
    dropping: bool


@dataclass(frozen=True)
class Plan:
    """A checked call, but for the values of its arrays.

    Args:
        frame: Lengths and axes.
        flags: What is asked for.
        inputs: For query, value and key the name of the array that it is.
        size: The product of the batch axes.
        simple: What attention is asked for where there is no offset and no dropout.
        exact: The dtype to which weights and inputs are rounded.
        working: The dtype in which is computed.
        lossless: Whether the first of these is the second.
        result: The dtype of the results.
        double: Whether all is computed in float64.
        run: Computes the call from its arrays by name, compiled.
        replayed: Computes a simple call from its arrays by name, after a while by a program.
    """

    frame: Frame
    flags: Flags
    inputs: tuple[str, ...]
    size: Dim
    simple: AttentionCall
    exact: Any
    working: Any
    lossless: bool
    result: Any
    double: bool
    run: Callable[[Mapping[str, Array]], Any] | None = None
    replayed: Callable[[Mapping[str, Array]], Any] | None = None


def plan_call(
    ops: Any,
    config: AttentionConfig,
    weights: Any,
    inputs: Sequence[Any],
    optional: Sequence[Any],
    flags: Flags,
    compute: Callable[[Plan, Mapping[str, Array]], Any],
) -> Plan:
    """The plan of a call, made where there is none yet.

    Args:
        ops: The backend.
        config: The layer's options.
        weights: The canonical weights; a function that makes them where there are none yet.
        inputs: Query, value and key.
        optional: The arrays of the names `OPTIONAL`, or None.
        flags: What is asked for.
        compute: Computes a planned call.

    Raises:
        AnymhaError: as `anymha.multi_head_attention` says.
    """
    kind = getattr(ops, "kind", None)
    if kind is None or ops.is_tracing() or callable(weights) or are_told():
        return _checked(ops, config, weights, inputs, optional, flags)
    plans = config.plans
    try:
        situation = getattr(ops, "situation", None)
        state = None if situation is None else (situation(), *_held(weights))
        signature = (ops, *_kinds(kind, weights, inputs, optional), flags, state)
        plan = plans.get(signature)
    except (AttributeError, TypeError):  # not arrays: the checks tell what is wrong
        return _checked(ops, config, weights, inputs, optional, flags)
    if plan is None:
        if len(plans) >= MOST:
            plans.clear()
        plan = _checked(ops, config, weights, inputs, optional, flags)
        compiled = getattr(ops, "compiled", None)
        if compiled is not None and not plan.double:
            plan = replace(plan, run=compiled(_once(compute, plan)))
        if situation is not None and not (flags.dropping or flags.activity):
            plan = replace(plan, replayed=Replayed(ops, _with_ops(compute, plan)))
        plans[signature] = plan
    return plan


def _held(weights: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which weights there are, and what a program that was recorded with them knows of them."""
    return (tuple(weights), *[array.dtype for array in weights.values()])


def _once(compute: Callable[..., Any], plan: Plan) -> Callable[[Mapping[str, Array]], Any]:
    return lambda arrays: compute(plan, arrays)


def _with_ops(compute: Callable[..., Any], plan: Plan) -> Callable[[Any, Mapping[str, Array]], Any]:
    def function(ops: Any, arrays: Mapping[str, Array]) -> Any:
        return compute(replace(plan, frame=replace(plan.frame, ops=ops)), arrays)

    return function


def _kinds(
    kind: Callable[[Any], Any],
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
    optional: Sequence[Any],
) -> tuple[Any, ...]:
    """All that a plan may depend on of a call's arrays."""
    query, value, key = inputs
    return (
        kind(query),
        None if value is query else kind(value),
        None if key is value else 0 if key is query else kind(key),
        *[None if x is None else kind(x) for x in optional],
        kind(weights["query.kernel"]),
        weights["value.kernel"].shape,
        weights["key.kernel"].shape,
        kind(weights["key.bias"]) if "key.bias" in weights else None,
    )


def _checked(
    ops: Ops,
    config: AttentionConfig,
    weights: Any,
    inputs: Sequence[Any],
    optional: Sequence[Any],
    flags: Flags,
) -> Plan:
    named = dict(zip(INPUTS, inputs, strict=True))
    extra = {n: x for n, x in zip(OPTIONAL, optional, strict=True) if x is not None}
    check_arrays(ops, {**named, **extra})
    built = isinstance(weights, Mapping)
    widths = [weights[f"{name}.kernel"].shape[0] if built else None for name in named]
    query, value, key = inputs
    axes = check_inputs(config, query, value, key, widths)
    batch, queries = axes.split(ops.shape(inputs[0]))
    keys = axes.split(ops.shape(inputs[1]))[1]
    check_masks(extra, batch, config.num_heads, queries, keys)
    source = {name: next(n for n in named if named[n] is named[name]) for name in named}
    dtype = dtype_name(weights["query.kernel"].dtype) if built else config.dtype
    compute = config.compute_dtype or dtype
    working = accumulation_dtype(compute)
    return Plan(
        Frame(ops, axes, batch, config.num_heads, queries, keys, source),
        flags,
        tuple(source.values()),
        product(batch),
        attention_call(config, flags.causal, 0, None),
        ops.dtype(compute),
        ops.dtype(working),
        compute == working,
        ops.dtype(output_dtype(dtype, compute)),
        compute == "float64",
    )


def attention_call(config: AttentionConfig, causal: bool, offset: Any, seed: Any) -> AttentionCall:
    """What `attend` is asked for; dropout acts where there is a seed."""
    side = None if config.sliding_window is None else config.sliding_window - 1
    dropout = None
    if seed is not None:
        native = config.dropout_rng == "native"
        dropout = Dropout(rate_threshold(config.dropout), seed, native)
    visible = visibility(causal, (side, side), offset)
    return AttentionCall(
        config.scale_value, config.features, visible, dropout, config.memory_budget
    )


def as_arrays(ops: Any, offset: Any, seed: Any) -> dict[str, Array]:
    """An offset and a seed as arrays, so that a compiled call serves all of them.

    Args:
        ops: A backend that compiles.
        offset: An int, of which 0 is known to the compiled call, or an array.
        seed: An int, an array, or None.
    """
    found = {}
    if ops.is_array(offset):
        found["query_offset"] = offset
    elif offset:
        found["query_offset"] = ops.asarray(offset, dtype=ops.int32)
    if seed is not None:
        found["seed"] = seed if ops.is_array(seed) else ops.seed_array(seed)
    return found
