"""The multi-head attention layer, written once for every framework: project, attend, project.

    q, k, v = query . W_q + b_q,  key . W_k + b_k,  value . W_v + b_v       (split into heads)
    output  = attention(q, k, v) . W_o + b_o                                (heads merged)

A call is checked and planned (`anymha.layer.plan`), and then executed; nothing is asked again.

References:
    A. Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from anymha.attention.dropout import draw_seed as draw_seed_for
from anymha.attention.formula import Observer
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionSpec
from anymha.errors import CacheError, ShapeError
from anymha.execution import path as paths
from anymha.execution.attend import attend
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.framework.validation import checked_flag
from anymha.layer.activity import Activity
from anymha.layer.arguments import ARRAYS, OPTIONS, Kind
from anymha.layer.axes import PLAIN, unfold
from anymha.layer.cache import Memory
from anymha.layer.cached import (
    PREFIX,
    HeldCall,
    Holding,
    arranged,
    placed,
    prepare,
    sizes_read,
    traced,
)
from anymha.layer.cached import inputs as inputs_of
from anymha.layer.call_shape import CallShape
from anymha.layer.checks import (
    check_arrays,
    check_inputs,
    check_masks,
    check_offset,
    check_seed,
    unpack_inputs,
)
from anymha.layer.decoding import keep_step, next_step
from anymha.layer.numerics import cast_to, without_gradient
from anymha.layer.other_names import unexpected
from anymha.layer.padding import Group, attention_by_groups, padding_groups, seen_keys
from anymha.layer.plan import (
    Flags,
    Plan,
    PlannedCall,
    Plans,
    WeightsKind,
    activated,
    held_path,
    make_plan,
    path_of,
    plan_call,
    plan_lengths,
    rounded_operand,
    rounded_result,
    weights_of_features,
)
from anymha.layer.varying import lengthened, shortened
from anymha.options.config import AttentionConfig

Weights = Mapping[str, Array]
"""Canonical names (``query.kernel``) and arrays; a bias that is absent is not there."""

_MASKS = frozenset(argument.name for argument in ARRAYS)
_OPTIONS = frozenset(argument.name for argument in OPTIONS)
_FLAGS = frozenset(argument.name for argument in OPTIONS if argument.kind is Kind.FLAG)


class Projections(NamedTuple):
    """Projections that are called, in the place of kernels and biases as arrays.

    Args:
        functions: By "query", "key", "value", "output" and the names of the features' projections
            a function of (B, length, width in) that gives (B, length, width out), heads side by
            side.
        kind: What a plan depends on of their weights.
        key_bias: The key's bias (K, d_k), for the activity penalty; None where there is none.
        of_rows: Whether the functions take and give matrices instead, (B * length, width), in the
            dtype in which the layer computes.
        weights: The features' weights by canonical name, if there are any.
        plain: Whether nobody but the layer sees what the functions are given: no hook, no module
            of a user's.
    """

    functions: Mapping[str, Callable[[Array], Array]]
    kind: WeightsKind
    key_bias: Array | None = None
    of_rows: bool = False
    weights: Weights | None = None
    plain: bool = False


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
    cache = call.get("cache") if call else None
    if (
        cache is not None and len(call) == 1 and value is None is key and observe is None
        and plans is not None and plans.steps and type(weights) is Projections
    ):  # fmt: skip
        found = next_step(ops, plans, config, weights, query, cache)
        if found is not None:
            return found
    given = value, key
    value = query if value is None else value
    inputs = (query, value, value if key is None else key)
    masks: dict[str, Any] = {}
    flags, offset, seed, draw_seed = PLAIN_CALL, 0, None, None
    held = None
    if call or observe is not None:
        if ops.capabilities.constants is not None and "query_offset" in call:
            own = {"query_offset": call["query_offset"]}
            call = {**call, **ops.capabilities.constants(query, own)}
        flags, offset, seed, draw_seed = _read_call(ops, config, call, masks, observe)

    if masks and ops.capabilities.constants is not None:
        masks = ops.capabilities.constants(query, masks)

    projections: Any = weights if type(weights) is Projections else None
    kind = _kind_of(config, weights) if projections is None else projections.kind
    if cache is not None or call.get("memory") is not None:
        computing = config.compute_dtype or kind.dtype_name
        held = prepare(ops, config, computing, query, given, masks, call)
        flags, offset, inputs = flags._replace(held=held.held), held.offset, (query,) * 3
        value = query
    if held is not None and held.held.source != "own":
        kind = kind._replace(widths=(kind.widths[0], None, None))
    planned = plan_call(plans, ops, config, kind, inputs, masks, flags, offset, _compute, held)
    if type(offset) is not int:
        check_offset(ops, offset, planned.shape.folded[0])
    if projections is None and not isinstance(weights, Mapping):
        weights = cast(Any, weights)([array.shape[-1] for array in cast(Any, inputs)])
        projections = weights if type(weights) is Projections else None
        kind = _kind_of(config, weights) if projections is None else projections.kind
        planned = plan_call(plans, ops, config, kind, inputs, masks, flags, offset, _compute, held)
    if not flags.dropping:
        seed = None
    elif draw_seed is not None:
        seed = check_seed(ops, draw_seed())
    elif seed is None:
        seed = draw_seed_for(ops, query, native=config.dropout_rng == "native")

    plan = planned.plan
    if projections is None:
        arrays: dict[str, Array] = dict(cast(Weights, weights))
    else:
        key_bias = projections.key_bias
        arrays = {} if key_bias is None else {"key.bias": key_bias}
        if projections.weights:
            arrays |= projections.weights
    # An array that plays two parts is passed, cast and differentiated once.
    arrays["query"] = query
    if value is not query:
        arrays["value"] = value
    if plan.sources[2] == "key":
        arrays["key"] = inputs[2]
    if masks:
        arrays |= masks
    if held is not None:
        arrays |= held.arrays
        results, stored = _run_held(planned, arrays, projections, held, seed, observe)
        if plans is not None and cache is not None:
            keep_step(plans, planned, projections, query, cache, held)
        return held.finish(results, stored)
    if plan.run is not None and projections is None and not paths.explaining:
        lengths = planned.shape.folded
        if plan.varying is not None and not plan.varying.has_own(lengths):
            causal = flags.causal and type(offset) is int
            reach = offset + lengths[1] if causal else None
            longer = lengthened(ops, inputs, masks, reach)
            if longer is not None:
                inputs, masks = longer
                call = {**call, **masks}
                results = multi_head_attention(ops, config, weights, *inputs, plans=plans, **call)
                return shortened(ops, results, lengths)
        return plan.run(arrays | _as_arrays(ops, offset, seed))
    if type(offset) is not int:
        arrays["query_offset"] = offset
    if seed is not None and ops.is_array(seed):
        arrays["seed"] = seed
    if plan.double and projections is None:
        return ops.in_float64(
            lambda arrays: _execute(planned, arrays, None, offset, seed, observe), arrays
        )
    return _execute(planned, arrays, projections, offset, seed, observe)


PLAIN_CALL = Flags()


def _run_held(
    planned: PlannedCall,
    arrays: dict[str, Array],
    projections: Projections | None,
    held: HeldCall,
    seed: Any,
    observe: Observer | None,
) -> tuple[Any, Mapping[str, Array]]:
    """What a call that has a cache or a memory gives, and the arrays of the new cache."""
    plan, ops = planned.plan, planned.plan.ops
    if plan.run is not None and projections is None and not paths.explaining:
        return plan.run(arrays | _as_arrays(ops, 0, seed))
    if seed is not None and ops.is_array(seed):
        arrays["seed"] = seed
    if plan.double and projections is None:
        return ops.in_float64(
            lambda arrays: _execute(planned, arrays, None, 0, seed, observe, held), arrays
        )
    return _execute(planned, arrays, projections, 0, seed, observe, held)


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
    plain = observe is None
    for name, given in call.items():
        if name in _MASKS:
            if given is not None:
                masks[name] = given
        elif name in _OPTIONS:
            plain = False
            # Without dropout `training` does not matter, and may be traced.
            if name in _FLAGS and not (given is True or given is False or given is None):
                checked_flag(given, name, name != "training" or config.dropout > 0)
        else:
            raise unexpected(name)
    if plain:
        return PLAIN_CALL, 0, None, None
    get = call.get
    dropping = config.dropout > 0 and bool(get("training"))
    flags = Flags(
        bool(get("return_attention_scores")),
        bool(get("return_activity_loss")),
        bool(get("use_causal_mask")),
        dropping,
        observe is not None,
    )
    offset, seed = get("query_offset", 0), get("seed")
    if type(offset) is not int or offset:
        offset = check_offset(ops, offset, None)
    if seed is None:
        return flags, offset, None, None
    if callable(seed):
        return flags, offset, None, seed
    return flags, offset, check_seed(ops, seed), None


def _kind_of(config: AttentionConfig, weights: Any) -> WeightsKind:
    """What a plan depends on of weights, or of what makes them."""
    if not isinstance(weights, Mapping):
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
    if plan.double:
        return plan.ops.in_float64(lambda arrays: _results_of(plan, arrays), arrays)
    return _results_of(plan, arrays)


def _results_of(plan: Plan, arrays: Mapping[str, Array]) -> Any:
    query, value, key = (arrays[name] for name in plan.sources)
    inputs = (query, value, key)
    masks = {name: array for name, array in arrays.items() if name in _MASKS}
    offset, seed = arrays.get("query_offset", 0), arrays.get("seed")
    if plan.flags.held is not None:
        held = traced(plan.flags.held, arrays)
        planned = plan_lengths(plan, inputs, masks, held.offset, held)
        return _execute(planned, arrays, None, 0, seed, None, held)
    planned = plan_lengths(plan, inputs, masks, offset)
    return _execute(planned, arrays, None, offset, seed, None)


def _execute(
    planned: PlannedCall,
    arrays: Mapping[str, Array],
    projections: Projections | None,
    offset: Any,
    seed: Any,
    observe: Observer | None,
    held: HeldCall | None = None,
) -> Any:
    """What the call returns: output, scores, activity penalty, as far as asked for.

    Args:
        planned: The checked call.
        arrays: All arrays by name: inputs, masks, weights, and an offset or a seed that is one.
        projections: The projections, where they are called.
        offset: Position of the first query among the keys, where it is an int.
        seed: Seed of the dropout, where it is an int.
        observe: Receives the name and the value of each stage; None for no observer.
        held: The call's cache or memory: what is returned is that, and the cache's new arrays.
    """
    plan, shape, path = planned
    ops, flags, spec = plan.ops, plan.flags, plan.spec
    stored: dict[str, Array] = {}
    if held is not None and "cache_valid" in arrays:
        arrays = arranged(ops, arrays, shape.folded[1])
    offset, seed = arrays.get("query_offset", offset), arrays.get("seed", seed)
    if flags.dropping or type(offset) is not int or offset:
        spec = _completed(ops, spec, offset, seed)
    groups = None
    if shape.only_mask is not None and held is None and (projections is None or projections.plain):
        groups = padding_groups(planned, arrays, offset)
        if groups is not None:
            shape = shape._replace(is_plain=True)
            batch, _, keys = shape.folded
            if groups[0] == (0, batch, 0, keys):  # nothing is hidden
                groups, path = None, path_of(plan, shape.folded, {}, False, offset)
    if paths.explaining and groups is None:
        paths.report(path)
    activity = Activity(plan.config, ops, shape) if flags.activity else None
    within: Any = None
    of_rows = False
    if projections is None:
        project, functions = _computed, arrays
    else:
        project = _called
        functions, of_rows = projections.functions, projections.of_rows
        if plan.double:  # a projection that is called has a dtype and a state of its own
            within = ops.in_float64

    read_inputs = _inputs if held is None else _held_inputs
    if within is None:
        query, key, value, mask, bias = read_inputs(plan, shape, arrays)
    else:
        query, key, value, mask, bias = within(partial(read_inputs, plan, shape), arrays)
    if groups is not None:
        heads = _heads_by_groups(
            plan, shape, groups, functions, (query, key, value), project, of_rows
        )
        query = _rows(ops, query, query, query)[0] if of_rows else query
    elif held is not None and held.held.source != "own":
        heads = _queries_alone(plan, shape, functions, query, project, of_rows)
        query = _rows(ops, query, query, query)[0] if of_rows else query
    elif of_rows:
        query, key, value = _rows(ops, query, key, value)
        heads = {
            "query": ops.reshape(functions["query"](query), shape.query_heads),
            "key": ops.reshape(functions["key"](key), shape.key_heads),
            "value": ops.reshape(functions["value"](value), shape.value_heads),
        }
    else:
        heads = {
            "query": project(plan, functions, "query", query, shape.query_heads),
            "key": project(plan, functions, "key", key, shape.key_heads),
            "value": project(plan, functions, "value", value, shape.value_heads),
        }
    if plan.config.further_projections:
        heads |= _further(plan, shape, projections, functions, query, of_rows)
    del query, key, value
    if activity is not None:
        for name, y in heads.items():
            activity.see(name, ops.astype(y, plan.working) if plan.narrow else y)
    if spec.features:
        own = plan.config.feature_weights
        heads |= {name: arrays[name] for name in own if name in arrays}
    if held is not None:
        heads |= {name: x for name, x in arrays.items() if name in _HELD or _is_held(name)}
    elif plan.config.counts_positions:
        heads |= shape.positions(ops, arrays, spec.position_mask.offset, arrays["query"])
    if "segment_ids" in arrays and held is None:
        heads["segment_ids"], heads["key_segment_ids"] = shape.segments(ops, arrays)
    if mask is not None:
        heads["mask"] = mask
    if bias is not None:
        heads["bias"] = bias
    if held is not None:
        attention: Any = partial(_held_attention, planned, spec, held, observe)
        context, scores, stored = attention(heads) if within is None else within(attention, heads)
    elif groups is not None:
        context, scores = attention_by_groups(
            planned, groups, offset,
            lambda path, heads: _attention(plan, spec, path, flags.scores, None, heads), heads,
        )  # fmt: skip
    elif within is None:
        context, scores = _attention(plan, spec, path, flags.scores, observe, heads)
    else:
        attention = partial(_attention, plan, spec, path, flags.scores, observe)
        context, scores = within(attention, heads)
    del heads
    if of_rows:
        output = functions["output"](ops.reshape(context, (-1, plan.context_width)))
        output = ops.reshape(output, _with_width(shape.output, output))  # [B, T, *O]
    else:
        output = project(plan, functions, "output", context, shape.output)  # [B, T, *O]
    if observe is not None or activity is not None:
        seen = ops.astype(output, plan.working) if plan.narrow else output
        if observe is not None:
            observe("output", seen)
        if activity is not None:
            activity.see("output", seen)
    if held is not None:
        lost, back = stored.pop("lost", None), arrays.get("cache_back")
        output, scores = placed(ops, output, scores, lost, back)
    elif activity is None and plan.axes is PLAIN and output.dtype == plan.result:
        if scores is None:
            return output
        if not plan.narrow:  # where it is, scores are wider
            return output, scores
    results = {"output": output} if scores is None else {"output": output, "scores": scores}
    if within is None:
        results = _results(plan, shape, activity, arrays, results)
    else:
        results = within(partial(_results, plan, shape, activity, arrays), results)
    return results if held is None else (results, stored)


_HELD = frozenset({"positions", "key_positions", "segment_ids", "memory_mask"})
"""Arrays of a call that mean something else where there is a cache or a memory."""


def _is_held(name: str) -> bool:
    return name.startswith(PREFIX)


def _held_inputs(
    plan: Plan, shape: CallShape, arrays: Mapping[str, Array]
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """As `_inputs`, for a call that has a cache or a memory; mask and bias are as it has them."""
    ops = plan.ops
    query = arrays["query"] if plan.as_given else rounded_operand(plan, arrays["query"])
    query, source, mask = inputs_of(ops, arrays, query)
    bias = arrays.get("attention_bias")
    if "attention_mask" in arrays:
        own = shape.fold_mask(ops, "attention_mask", arrays["attention_mask"])
        mask = all_of(ops, [mask, own])
    if bias is not None:
        bias = cast_to(ops, bias, plan.working)
    return query, source, source, mask, bias


def _queries_alone(
    plan: Plan, shape: CallShape, functions: Any, query: Array, project: Any, of_rows: bool
) -> dict[str, Array]:
    """The projected queries (B, T, H, d_k) of a call whose keys are there already."""
    if not of_rows:
        return {"query": project(plan, functions, "query", query, shape.query_heads)}
    rows = plan.ops.reshape(query, (-1, query.shape[-1]))
    return {"query": plan.ops.reshape(functions["query"](rows), shape.query_heads)}


def _heads_by_groups(
    plan: Plan,
    shape: CallShape,
    groups: list[Group],
    functions: Any,
    inputs: tuple[Array, Array, Array],
    project: Any,
    of_rows: bool,
) -> dict[str, Array]:
    """The projected queries (B, T, H, d_k), and keys and values (1, N, K, d) that are seen."""
    query, key, value = inputs
    ops = plan.ops
    seen_key = seen_keys(ops, groups, key)
    seen_value = seen_key if key is value else seen_keys(ops, groups, value)
    count = seen_key.shape[1]
    of_key, of_value = ((1, count, *s[2:]) for s in (shape.key_heads, shape.value_heads))
    parts = (
        ("query", query, shape.query_heads), ("key", seen_key, of_key),
        ("value", seen_value, of_value),
    )  # fmt: skip
    if not of_rows:
        return {name: project(plan, functions, name, x, heads) for name, x, heads in parts}
    return {
        name: ops.reshape(functions[name](ops.reshape(x, (-1, x.shape[-1]))), heads)
        for name, x, heads in parts
    }


def make_memory(
    ops: Ops,
    config: AttentionConfig,
    weights: Weights | Projections,
    value: Array,
    key: Array | None,
    key_positions: Array | None,
) -> Memory:
    """Keys and values of another sequence, projected once.

    Args:
        ops: The backend of the arrays.
        config: The layer's options.
        weights: Canonical weights, or projections that are called.
        value: (B, S, D_v) floating.
        key: (B, S, D_k) floating; default `value`.
        key_positions: (S,) or (B, S) integers, the keys' positions; default their index.

    Raises:
        AnymhaError: as `multi_head_attention` says.
    """
    key = value if key is None else key
    positions = {} if key_positions is None else {"key_positions": key_positions}
    check_arrays(ops, {"value": value, "key": key, **positions})
    projections = weights if type(weights) is Projections else None
    kind = _kind_of(config, weights) if projections is None else projections.kind
    _, of_value, of_key = kind.widths
    axes = check_inputs(config, key, value, key, (of_key, of_value, of_key))
    if axes is not PLAIN:
        raise CacheError(
            "A memory needs inputs (B, S, D) and a layer that attends over one axis. Received: "
            f"`value` of shape {tuple(value.shape)}, attention_axes={config.attention_axes}."
        )
    batch, length = ops.shape(value)[:2]
    check_masks(positions, (batch,), config.num_heads, (length,), (length,))
    plan = make_plan(ops, config, kind, (value, value, key), PLAIN_CALL, axes)
    functions: Any = cast(Weights, weights)
    project: Any = _computed
    of_rows = False
    arrays: dict[str, Array] = {"value": value, "key": key, **positions}
    if projections is None:
        arrays |= cast(Weights, weights)
    else:
        project, functions, of_rows = _called, projections.functions, projections.of_rows
        arrays |= projections.weights or {}

    def projected(arrays: Mapping[str, Array], name: str) -> Array:
        shape = (batch, length, *plan.heads[name])
        x = rounded_operand(plan, arrays[name])
        if of_rows:
            rows = ops.reshape(x, (-1, x.shape[-1]))
            return ops.reshape(functions[name](rows), shape)
        return project(plan, arrays if projections is None else functions, name, x, shape)

    def turned(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        own = weights_of_features(plan, arrays)
        key, features = arrays["key"], plan.spec.features
        if features and not any(feature.depends_on_length for feature in features):
            places = own.get("key_positions")
            if places is None:
                places = ops.arange(0, length, dtype=ops.int32, device=ops.device(key))
            places = places if len(places.shape) == 2 else ops.reshape(places, (1, -1))
            own |= {"positions": places, "key_positions": places}
            shape = (batch, length, config.num_heads, config.key_dim)
            unused = ops.broadcast_to(key[..., :1, :], shape)
            for feature in features:
                unused, key = feature.heads(ops, unused, key, own)
        heads_first = (0, 2, 1, 3)
        return ops.permute_dims(key, heads_first), ops.permute_dims(arrays["value"], heads_first)

    def both(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        heads = {name: projected(arrays, name) for name in ("key", "value")}
        return turned({**arrays, **heads})

    if not plan.double:
        keys, values = both(arrays)
    elif projections is None:
        keys, values = ops.in_float64(both, arrays)
    else:
        heads = {name: projected(arrays, name) for name in ("key", "value")}
        keys, values = ops.in_float64(turned, {**arrays, **heads})
    if key_positions is not None and len(key_positions.shape) == 1:
        key_positions = ops.reshape(key_positions, (1, -1))
    return Memory(keys, values, key_positions)


def _of_the_size(
    planned: PlannedCall, call: HeldCall, holding: Holding, sizes: Any, masks: Any, attended: Any
) -> Array:
    """The context, of as few slots as hold what is seen, in a program for all lengths."""
    plan, shape, _ = planned
    ops = plan.ops
    if not isinstance(sizes, tuple):  # a length that the program finds
        return attended(sizes, held_path(plan, shape, masks, call, sizes))[0]
    index, counts = 0, sizes[:-1]
    reached = ops.max(holding.new_lengths, axis=0, keepdims=False)
    for count in counts:
        index = ops.astype(reached > count, ops.int32) + index
    functions = [
        lambda _, size=size: attended(size, held_path(plan, shape, masks, call, size))[0]
        for size in sizes
    ]
    choose: Any = ops.capabilities.choose
    return choose(index, functions, {})


def _held_attention(
    planned: PlannedCall,
    spec: AttentionSpec,
    call: HeldCall,
    observe: Observer | None,
    heads: Mapping[str, Array],
) -> tuple[Array, Array | None, dict[str, Array]]:
    """As `_attention`, for a call that has a cache or a memory; and the cache's new arrays."""
    plan, _, path = planned
    ops, with_scores = plan.ops, plan.flags.scores
    own = weights_of_features(plan, heads) if spec.features else dict(heads)
    names = ("query", "key", "value")
    query, key, value = (heads.get(name) for name in names)
    # A cache holds what is projected in its own dtype; what is seen of it is computed in this.
    holding = Holding(ops, call.held, spec, own, cast(Any, query), key, value, call.start)
    if call.note is not None:
        call.note(holding.stored)
    masks = {n: own[n] for n in ("segment_ids",) if n in own}
    masks |= {n: own[n] for n in ("mask",) if n in own}

    def attended(read: Any, path: paths.Path) -> tuple[Array, Array | None]:
        view = holding.view(read)
        query, key, value = view.query, view.key, view.value
        if plan.narrow and not path.narrow:
            query, key, value = (ops.astype(x, plan.working) for x in (query, key, value))
        mask = all_of(ops, [view.mask, own.get("mask")])
        bias = own.get("bias") if view.bias is None else view.bias
        if view.bias is not None:
            bias = cast_to(ops, bias, plan.working)
        tiled = None
        if spec.features:
            arrays = {**holding.arrays, "key_positions": view.key_positions}
            tiled = {}
            for feature in spec.features:
                tiled |= feature.tiled(ops, arrays, query)
        if observe is not None:
            for name, x in {"query": query, "key": key, "value": value}.items():
                observe(name, x)
        context, scores, _ = attend(
            ops, view.spec, path, query, key, value, mask, bias, observe, with_scores, tiled,
            view.segments,
        )  # fmt: skip
        return context, None if scores is None else holding.scores(scores)

    sizes = sizes_read(ops, call, holding, with_scores or observe is not None)
    if sizes is None:
        context, scores = attended(call.read, path)
    else:
        context, scores = _of_the_size(planned, call, holding, sizes, masks, attended), None
    for feature in spec.features:
        context = feature.context(ops, context, own)
    if observe is not None:
        observe("context", context)
    if plan.narrow and context.dtype != plan.carried:
        context = ops.astype(context, plan.carried)
    stored = dict(holding.stored)
    if holding.lost is not None:
        stored["lost"] = holding.lost
    return context, scores, stored


def _inputs(
    plan: Plan, shape: CallShape, arrays: Mapping[str, Array]
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Query, key and value (B, length, D), mask and bias over (B, H, T, S), ready to compute with.

    Args:
        plan: The plan.
        shape: The call's lengths.
        arrays: The call's arrays by name.
    """
    _, value_source, key_source = plan.sources
    if plan.as_given:
        query, value, key = arrays["query"], arrays[value_source], arrays[key_source]
    else:  # an array of two parts is cast once
        real = {name: rounded_operand(plan, arrays[name]) for name in dict.fromkeys(plan.sources)}
        query, value, key = real["query"], real[value_source], real[key_source]
    if shape.is_plain:
        return query, key, value, None, None
    ops = plan.ops
    if shape.only_mask is not None:
        return (*shape.inputs_by_only_mask(ops, (query, key, value), arrays), None)
    query_mask, key_mask = shape.padding(ops, arrays)
    excluded = query_mask, key_mask
    if "segment_ids" in arrays:
        excluded = shape.of_segments(ops, arrays, *excluded)
    query, key, value = shape.inputs(ops, (query, key, value), *excluded)
    mask, bias = arrays.get("attention_mask"), arrays.get("attention_bias")
    mask = None if mask is None else shape.fold_mask(ops, "attention_mask", mask)
    if mask is None and query_mask is None:
        mask = key_mask
    elif query_mask is not None or key_mask is not None:
        mask = all_of(ops, [mask, query_mask, key_mask])
    if bias is not None:
        bias = cast_to(ops, bias, plan.working)
        bias = shape.fold_mask(ops, "attention_bias", bias)
    return query, key, value, mask, bias


def _rows(ops: Ops, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Query, key and value (B, length, D) as matrices (B * length, D); one array as one."""
    rows = ops.reshape(query, (-1, query.shape[-1]))
    value_rows = rows if value is query else ops.reshape(value, (-1, value.shape[-1]))
    if key is query:
        return rows, rows, value_rows
    if key is value:
        return rows, value_rows, value_rows
    return rows, ops.reshape(key, (-1, key.shape[-1])), value_rows


def _computed(
    plan: Plan, arrays: Mapping[str, Array], name: str, x: Array, shape: tuple[Any, ...]
) -> Array:
    """What a projection gives, by its kernel and its bias.

    Args:
        plan: The plan.
        arrays: The weights by canonical name, among others.
        name: The projection's name.
        x: (B, length, D), or the context (B, T, H, d_v).
        shape: The shape of what it gives, which the kernel tells as well.
    """
    bias = arrays.get(f"{name}.bias")
    if bias is not None:
        bias = rounded_operand(plan, bias)
        if name == "key":
            bias = without_gradient(plan.ops, bias, plan.config.free_columns)
    kernel = rounded_operand(plan, arrays[f"{name}.kernel"])
    return project(plan.ops, x, kernel, bias, 2 if name == "output" else 1)


def _called(
    plan: Plan,
    functions: Mapping[str, Callable[[Array], Array]],
    name: str,
    x: Array,
    shape: tuple[Any, ...],
) -> Array:
    """What a projection gives that is called.

    Args:
        plan: The plan.
        functions: The projections by name.
        name: The projection's name.
        x: (B, length, D), or the context (B, T, H, d_v).
        shape: The shape of what it gives; of the output without O where that is not known.
    """
    ops = plan.ops
    if name == "output":
        x = ops.reshape(x, (shape[0], shape[1], plan.context_width))
    y = functions[name](x)
    width, wanted = y.shape[-1], math.prod(shape[2:])
    if len(shape) > 2 and isinstance(width, int) and width != wanted:
        raise ShapeError(
            f"The projection `{name}` must give {wanted} features, as the layer's options say. "
            f"Received: {width}. Put a projection of that width there, or make the layer anew."
        )
    y = ops.reshape(y, _with_width(shape, y))
    if y.dtype == plan.carried:
        return y
    if plan.double:
        return ops.in_float64(lambda arrays: ops.astype(arrays["y"], plan.carried), {"y": y})
    return ops.astype(y, plan.carried)


def _further(
    plan: Plan,
    shape: CallShape,
    projections: Projections | None,
    functions: Any,
    query: Array,
    of_rows: bool,
) -> dict[str, Array]:
    """What the features' own projections of the query input give, (B, T, *axes), by name.

    Args:
        plan: The plan.
        shape: The call's lengths.
        projections: The projections, where they are called.
        functions: Those by name, or the arrays.
        query: (B, T, D_q), or (B * T, D_q) where it is `of_rows`.
        of_rows: Whether projections take and give matrices.
    """
    project, found = _computed if projections is None else _called, {}
    for name, axes in plan.config.further_projections.items():
        full = (*shape.folded[:2], *axes)
        if of_rows:
            found[name] = plan.ops.reshape(functions[name](query), full)
        else:
            found[name] = project(plan, functions, name, query, full)
    within = projections is not None and plan.double
    of_plan = partial(activated, plan)
    return plan.ops.in_float64(of_plan, found) if within else of_plan(found)


def _with_width(shape: tuple[Any, ...], y: Array) -> tuple[Any, ...]:
    """The shape of what a projection gives, with its own width where that was not known."""
    return shape if len(shape) > 2 else (*shape, y.shape[-1])


def _attention(
    plan: Plan,
    spec: AttentionSpec,
    path: paths.Path,
    with_scores: bool,
    observe: Observer | None,
    heads: Mapping[str, Array],
) -> tuple[Array, Array | None]:
    """The context (B, T, H, d_v), and the probabilities (B, H, T, S) if they are wanted.

    Args:
        plan: The plan.
        spec: What attention computes.
        path: The way that it takes.
        with_scores: Whether the probabilities are wanted.
        observe: Receives the name and the value of each stage; None for no observer.
        heads: "query" (B, T, H, d_k), "key" (B, S, K, d_k), "value" (B, S, K, d_v), maybe "mask"
            and "bias", "segment_ids" and "key_segment_ids", and what the features need.
    """
    ops, query, key, value = plan.ops, heads["query"], heads["key"], heads["value"]
    if plan.narrow and not path.narrow:
        query, key, value = (ops.astype(x, plan.working) for x in (query, key, value))
    features, own, tiled, segments = spec.features, heads, None, None
    if features:
        own, tiled = weights_of_features(plan, heads), {}
        for feature in features:
            query, key = feature.heads(ops, query, key, own)
        for feature in features:
            tiled |= feature.tiled(ops, own, query)
    if observe is not None:
        for name, x in {"query": query, "key": key, "value": value}.items():
            observe(name, x)
    if "segment_ids" in heads:
        segments = heads["segment_ids"], heads["key_segment_ids"]
    context, scores, _ = attend(
        ops, spec, path, query, key, value, heads.get("mask"), heads.get("bias"),
        observe, with_scores, tiled, segments,
    )  # fmt: skip
    if features:
        for feature in features:
            context = feature.context(ops, context, own)
    if observe is not None:
        observe("context", context)
    if plan.narrow and not path.narrow:
        context = ops.astype(context, plan.carried)
    return context, scores


def _results(
    plan: Plan,
    shape: CallShape,
    activity: Activity | None,
    arrays: Mapping[str, Array],
    results: Mapping[str, Array],
) -> Any:
    """What the call returns: output, scores, activity penalty, as far as asked for.

    Args:
        plan: The plan.
        shape: The call's lengths.
        activity: Has seen what the projections gave; None where no penalty is asked for.
        arrays: The call's arrays by name.
        results: "output" (B, T, *O), and "scores" (B, H, T, S) if they are asked for.
    """
    output, scores = results["output"], results.get("scores")
    if plan.axes is not PLAIN:
        output = unfold(plan.ops, output, plan.axes, (*shape.batch, *shape.queries))
        scores = None if scores is None else shape.unfolded_scores(plan.ops, scores)
    output = rounded_result(plan, output)
    if scores is None and activity is None:
        return output
    found = [output]
    if scores is not None:
        found.append(rounded_result(plan, scores))
    if activity is not None:
        dtype = plan.ops.float64 if output.dtype == plan.ops.float64 else plan.ops.float32
        found.append(activity.loss(arrays, dtype))
    return tuple(found)


def _completed(ops: Ops, spec: AttentionSpec, offset: Any, seed: Any) -> AttentionSpec:
    """The spec with the call's own offset and seed."""
    dropout = None if spec.dropout is None else replace(spec.dropout, seed=seed)
    positions = spec.position_mask.at(ops, offset)
    return replace(spec, position_mask=positions, dropout=dropout)


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
    if linear is not None:
        if bias is not None and len(outer) != 1:
            bias = reshape(bias, (width,))
        y = linear(reshape(x, (lengths[0] * lengths[1], inner)), kernel, bias)
    else:
        if contracted != 1:
            x = reshape(x, (*lengths, inner))
        y = ops.tensordot(x, kernel, axes=1)
        y = y if bias is None else y + reshape(bias, (1, 1, width))
    return reshape(y, (*lengths, *outer))
