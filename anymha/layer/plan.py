"""Plans: all of a call that follows from shapes, dtypes and options, found before it is computed.

A call is checked, planned, executed. A `Plan` belongs to calls that differ in their lengths alone;
a `PlannedCall` has the lengths and the path too. A layer keeps both in its `Plans`: calls with the
same shapes are checked once, calls with ever new lengths share a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from anymha.attention.dropout import Dropout, rate_threshold
from anymha.attention.masks import FAR, PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution.path import AttentionShape, Path, choose_path, most_logits
from anymha.framework.dtypes import BITS, dtype_name, multiplies
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import product
from anymha.layer.arguments import ARRAYS, BY_NAME, Kind
from anymha.layer.axes import PLAIN, Axes
from anymha.layer.cached import PREFIX, Held, HeldCall, seen_by
from anymha.layer.call_shape import CallShape, mask_shapes, only_mask
from anymha.layer.checks import Lengths, check_call, check_shapes, lengths_of
from anymha.layer.numerics import cast_to, without_gradient, without_subnormals
from anymha.layer.varying import Varying
from anymha.options.config import AttentionConfig

(BIAS,) = [argument.name for argument in ARRAYS if argument.kind is Kind.BIAS]
HIDING = {argument.name for argument in ARRAYS if argument.kind in (Kind.MASK, Kind.SEGMENTS)}
"""The arrays of a call that hide keys."""

MOST = 128
"""How many calls, and how many plans, a layer keeps; lengths seen once are not kept."""


class Flags(NamedTuple):
    """What a call is asked for.

    Args:
        scores: Whether to return the probabilities.
        activity: Whether to return the activity penalty.
        causal: Whether a query sees no later keys.
        dropping: Whether dropout acts.
        observed: Whether each stage is to be seen.
        held: What is known of the call's cache or memory; None without one.
    """

    scores: bool = False
    activity: bool = False
    causal: bool = False
    dropping: bool = False
    observed: bool = False
    held: Held | None = None


class WeightsKind(NamedTuple):
    """What a plan depends on of the weights.

    Args:
        dtype: Their dtype, or its name.
        widths: The widths D_q, D_v and D_k that the kernels take; None where there is none yet.
        key: What else tells them apart, hashable.
    """

    dtype: Any
    widths: tuple[int | None, ...]
    key: Hashable = None

    @property
    def dtype_name(self) -> str:
        """The name of their dtype."""
        return self.dtype if isinstance(self.dtype, str) else dtype_name(self.dtype)


@dataclass(frozen=True)
class Plan:
    """What calls that differ in their lengths alone have in common.

    Args:
        ops: The backend.
        config: The layer's options.
        flags: What is asked for.
        axes: Which axes of the inputs are batch, and which are attended over.
        sources: For query, value and key the name of the array that it is.
        spec: What attention computes where there is neither offset nor dropout.
        compute_dtype: The dtype to which weights and inputs are rounded.
        working: The dtype in which the layer computes: logits, softmax and sums at least.
        carried: The dtype of what goes from stage to stage: `compute_dtype` where the backend
            multiplies in it, else `working`.
        result: The dtype of the results.
        rounds: Whether `compute_dtype` is narrower than `carried`.
        narrow: Whether `carried` is narrower than `working`.
        as_given: Whether the layer computes with the inputs as they are passed.
        double: Whether all is computed in float64.
        paths: Paths that calls of several lengths take, by what else they depend on.
        heads: The number and the width of the heads of query, key and value.
        context_width: The width of the context, H * d_v.
        output_shape: The shape O of an output vector; None for the query's width.
        run: Computes the call from its arrays by name, compiled; None where it is not.
        varying: The lengths of the calls, where calls may be lengthened; else None.
        device: Where the inputs are, as `Ops.device` says.
    """

    ops: Ops
    config: AttentionConfig
    flags: Flags
    axes: Axes
    sources: tuple[str, str, str]
    spec: AttentionSpec
    compute_dtype: Any
    working: Any
    carried: Any
    result: Any
    rounds: bool
    narrow: bool
    as_given: bool
    double: bool
    paths: dict[Any, Path]
    heads: Mapping[str, tuple[int, int]]
    context_width: int
    output_shape: tuple[int, ...] | None
    run: Callable[[Mapping[str, Array]], Any] | None = None
    varying: Varying | None = None
    device: Any = None


class PlannedCall(NamedTuple):
    """A checked call, but for the values of its arrays.

    Args:
        plan: What it has in common with calls of other lengths.
        shape: Its lengths.
        path: The way that attention takes.
    """

    plan: Plan
    shape: CallShape
    path: Path


class Plans:
    """The plans of a layer, and what else its home has prepared for calls.

    All are equal and hash alike, so that they may be static metadata of a pytree; a copy, pickled
    or deep, is empty.
    """

    def __init__(self) -> None:
        self.config: AttentionConfig | None = None
        self.calls: dict[Any, PlannedCall] = {}
        self.last: tuple[Any, Any] = (None, None)
        self.plans: dict[Any, Plan] = {}
        self.seen_once: set[int] = set()
        self.prepared: Any = None
        self.steps: dict[bool, Any] = {}

    def begin(self, config: AttentionConfig) -> None:
        """Forget the plans of other options."""
        self.__init__()
        self.config = config

    def keep(self, signature: Hashable, call: PlannedCall) -> None:
        """Keep a call, if it is not the first of its shapes."""
        number = hash(signature)
        if number in self.seen_once:
            self.seen_once.discard(number)
            if len(self.calls) >= MOST:
                self.calls.clear()
            self.calls[signature] = call
        else:
            if len(self.seen_once) >= 4 * MOST:
                self.seen_once.clear()
            self.seen_once.add(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plans)

    def __hash__(self) -> int:
        return hash(Plans)

    def __repr__(self) -> str:
        return "Plans()"

    def __reduce__(self) -> Any:
        return Plans, ()

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()


def plans_unless_tracing(ops: Ops, plans: Plans) -> Plans | None:
    """Where plans are kept: nowhere while a compiler runs the call."""
    is_tracing = ops.capabilities.is_tracing
    return None if is_tracing is not None and is_tracing() else plans


def plan_call(
    plans: Plans | None,
    ops: Ops,
    config: AttentionConfig,
    weights: WeightsKind,
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
    flags: Flags,
    offset: Any,
    compute: Callable[[Plan, Mapping[str, Array]], Any] | None,
    held: HeldCall | None = None,
) -> PlannedCall:
    """The checked and planned call.

    Args:
        plans: Where plans are kept; None for nowhere, as while a compiler runs the call.
        ops: The backend.
        config: The layer's options.
        weights: What is known of the weights.
        inputs: Query, value and key.
        masks: The masks and the bias by name.
        flags: What is asked for.
        offset: The query offset: an int, or an array.
        compute: Computes a planned call from its arrays, to be compiled; None for no compiling.
        held: The call's cache or memory; None without one.

    Raises:
        AnymhaError: as `anymha.layer.forward.multi_head_attention` says.
    """
    capabilities = ops.capabilities
    array_key = capabilities.array_key
    if plans is None or array_key is None:
        return _planned_once(ops, config, weights, inputs, masks, flags, offset, held)
    if plans.config is not config:
        plans.begin(config)
    query, value, key = inputs
    offset_kind = _offset_kind(offset)
    try:
        kinds = (
            array_key(query),
            None if value is query else array_key(value),
            None if key is value else 0 if key is query else array_key(key),
        )
        shapes = (
            query.shape,
            None if value is query else value.shape,
            None if key is value or key is query else key.shape,
        )
        others = _mask_kinds(ops, masks) if masks else ()
        if held is not None:
            others = (*others, (("read",), (held.read,)), *_mask_kinds(ops, held.arrays))
    except AttributeError:
        check_call(ops, config, weights.widths, inputs, masks)  # says what is no array
        raise
    signature = (flags, weights, kinds, shapes, offset_kind, others)
    last = plans.last
    if signature == last[0]:
        return last[1]
    try:
        call = plans.calls.get(signature)
    except TypeError:  # lengths that are symbols have no hash
        return _planned_once(ops, config, weights, inputs, masks, flags, offset, held)
    if call is not None:
        plans.last = signature, call
        return call
    checking = masks if held is None else {}  # those of a cache are checked already
    ranks = tuple([None if shape is None else len(shape) for shape in shapes])
    structure = (flags, weights, kinds, ranks, *[(*kind, len(shape)) for kind, shape in others])
    plan = plans.plans.get(structure)
    if plan is None:
        checked = check_call(ops, config, weights.widths, inputs, checking)
        plan = make_plan(ops, config, weights, inputs, flags, checked.axes, compute)
        if len(plans.plans) >= MOST:
            plans.plans.clear()
        plans.plans[structure] = plan
    else:
        checked = check_shapes(ops, config, weights.widths, inputs, checking)
    call = _with_lengths(plan, inputs, masks, checked, offset, held)
    if offset_kind != 1 or call.path.most_queries:
        plans.keep(signature, call)
    return call


def _planned_once(
    ops: Ops,
    config: AttentionConfig,
    weights: WeightsKind,
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
    flags: Flags,
    offset: Any,
    held: HeldCall | None,
) -> PlannedCall:
    checked = check_call(ops, config, weights.widths, inputs, masks if held is None else {})
    plan = make_plan(ops, config, weights, inputs, flags, checked.axes)
    return _with_lengths(plan, inputs, masks, checked, offset, held)


def plan_lengths(
    plan: Plan,
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
    offset: Any,
    held: HeldCall | None = None,
) -> PlannedCall:
    """The call that a plan makes of arrays that are checked, as a compiler shows them."""
    lengths = lengths_of(plan.ops, plan.axes, *inputs[:2])
    return _with_lengths(plan, inputs, masks, lengths, offset, held)


def _offset_kind(offset: Any) -> int:
    """0 for the offset 0, 1 for another int, 2 for an array."""
    if type(offset) is int:
        return 0 if offset == 0 else 1
    return 2


def _mask_kinds(ops: Ops, masks: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on of each mask or bias, and its shape."""
    array_key: Any = ops.capabilities.array_key
    kinds = [
        ((name, array_key(x), name == BIAS and _is_differentiated(ops, x)), x.shape)
        for name, x in masks.items()
    ]
    return tuple(kinds)


def _is_differentiated(ops: Ops, bias: Array) -> bool:
    differentiated = ops.capabilities.is_differentiated
    return differentiated is not None and differentiated(bias)


def make_plan(
    ops: Ops,
    config: AttentionConfig,
    weights: WeightsKind,
    inputs: tuple[Any, Any, Any],
    flags: Flags,
    axes: Axes,
    compute: Callable[[Plan, Mapping[str, Array]], Any] | None = None,
) -> Plan:
    """The plan of calls whose arrays have these dtypes; arguments as in `plan_call`."""
    query, value, key = inputs
    value_source = "query" if value is query else "value"
    key_source = "query" if key is query else value_source if key is value else "key"
    dtype = weights.dtype_name
    compute_dtype = config.compute_dtype or dtype
    working = "float64" if compute_dtype == "float64" else "float32"
    narrow = BITS[compute_dtype] == 16 and multiplies(ops, compute_dtype, ops.device(query))
    carried = compute_dtype if narrow else working
    result = compute_dtype if BITS[compute_dtype] <= BITS[dtype] else dtype
    value_dim: Any = config.value_dim
    plan = Plan(
        ops=ops,
        config=config,
        flags=flags,
        axes=axes,
        sources=("query", value_source, key_source),
        spec=attention_spec(config, flags.causal, 0, 0 if flags.dropping else None),
        compute_dtype=ops.dtype(compute_dtype),
        working=ops.dtype(working),
        carried=ops.dtype(carried),
        result=ops.dtype(result),
        rounds=compute_dtype != carried,
        narrow=narrow,
        as_given=compute_dtype == carried and all(x.dtype == ops.dtype(carried) for x in inputs),
        double=compute_dtype == "float64",
        paths={},
        heads={
            "query": (config.num_heads, config.key_dim),
            "key": (config.key_value_heads, config.key_dim),
            "value": (config.key_value_heads, value_dim),
        },
        context_width=config.num_heads * value_dim,
        output_shape=config.output_shape,  # pyright: ignore[reportArgumentType]
        device=ops.device(query),
    )
    compile = ops.capabilities.compile
    if compute is not None and compile is None:  # kept, and computed eagerly
        positions = replace(plan.spec.position_mask, kept={})
        plan = replace(plan, spec=replace(plan.spec, position_mask=positions))
    if compute is None or compile is None or flags.observed:
        return plan
    logits = most_logits(ops, plan.spec, plan.working, ops.device(query))
    # Dropout and what sums over all positions would see the ones that are added; sums in float64
    # keep their order.
    may_grow = axes is PLAIN and not (
        flags.dropping or flags.activity or config.features or flags.held or plan.double
    )
    return replace(
        plan,
        run=compile(lambda arrays: compute(plan, arrays), logits // config.num_heads),
        varying=Varying() if may_grow and ops.capabilities.resized is not None else None,
    )


def _with_lengths(
    plan: Plan,
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
    lengths: Lengths,
    offset: Any,
    held: HeldCall | None = None,
) -> PlannedCall:
    axes, batch, queries, keys = lengths
    config, ops = plan.config, plan.ops
    if axes is PLAIN:
        b, t, s = batch[0], queries[0], keys[0]
    else:
        b, t, s = product(batch), product(queries), product(keys)
    heads = plan.heads
    spread = mask_shapes(ops, masks) if masks and axes is PLAIN else {}
    shape = CallShape(
        axes, batch, config.num_heads, queries, keys, (b, t, s),
        query_heads=(b, t, *heads["query"]),
        key_heads=(b, s, *heads["key"]),
        value_heads=(b, s, *heads["value"]),
        output=(b, t) if plan.output_shape is None else (b, t, *plan.output_shape),
        masks=spread,
        is_plain=axes is PLAIN and not masks,
        only_mask=only_mask(masks, spread) if spread else None,
    )  # fmt: skip
    if held is not None:
        return PlannedCall(plan, shape, held_path(plan, shape, masks, held, held.read))
    per_query = bool(masks) and _differs_by_query(masks, len(queries), len(keys))
    return PlannedCall(plan, shape, path_of(plan, (b, t, s), masks, per_query, offset))


def path_of(
    plan: Plan,
    lengths: tuple[Dim, Dim, Dim],
    masks: Mapping[str, Any],
    per_query: bool,
    offset: Any,
) -> Path:
    """The path of a call that has neither a cache nor a memory.

    Args:
        plan: What it has in common with calls of other lengths.
        lengths: B, T and S.
        masks: Masks and bias by name.
        per_query: Whether one of them differs from query to query.
        offset: The index of the first query: an int, or an array.
    """
    b, t, s = lengths
    config, ops, flags = plan.config, plan.ops, plan.flags
    place = (_offset_kind(offset), per_query, bool(masks))
    known = plan.paths.get(place)
    if (
        known is not None
        and isinstance(b, int) and isinstance(t, int) and isinstance(s, int)
        and 0 < t <= known.most_queries
        and 0 < b * t * s * config.num_heads <= known.most_logits
    ):  # fmt: skip
        return known
    spec = plan.spec
    if type(offset) is not int or offset:
        spec = replace(spec, position_mask=replace(spec.position_mask, offset=offset))
    bias = masks.get(BIAS)
    path = choose_path(
        ops,
        spec,
        AttentionShape(
            b, config.num_heads, config.key_value_heads, t, s, config.key_dim,
            cast(int, config.value_dim), plan.working, plan.device,
            plan.carried if plan.narrow else None,
            has_mask=any(name in HIDING for name in masks),
            has_bias=bias is not None,
            per_query=per_query,
            bias_differentiated=(
                bias is not None and _is_differentiated(ops, bias)
            ),
            has_segments="segment_ids" in masks,
            wide_bias=bias is not None and plan.narrow and bias.dtype != plan.carried,
        ),
        observed=flags.observed,
        with_scores=flags.scores,
    )  # fmt: skip
    if path.most_queries and not flags.observed:
        plan.paths[place] = path
    return path


def held_path(
    plan: Plan, shape: CallShape, masks: Mapping[str, Any], held: HeldCall, read: Any
) -> Path:
    """The path of a call that has a cache or a memory.

    Args:
        plan: What it has in common with calls of other lengths.
        shape: Its lengths.
        masks: Those masks that are not over the cache's positions, by name.
        held: The cache or the memory.
        read: How many slots are read; None for all.
    """
    config, ops = plan.config, plan.ops
    b, t, _ = shape.folded
    seen = seen_by(held.held, t, read, held.offset, held.arrays)
    over = held.arrays.get(f"{PREFIX}attention_bias")
    bias = masks.get(BIAS) if over is None else over
    per_query = seen.per_query or _differs_by_query(masks, 1, 1)
    per_query |= over is not None and over.shape[2] != 1
    known_key = (held.held, _offset_kind(held.offset), per_query, bias is None, len(masks))
    known = plan.paths.get(known_key)
    if (
        known is not None
        and isinstance(b, int) and isinstance(t, int) and isinstance(seen.keys, int)
        and 0 < t <= known.most_queries
        and 0 < b * t * seen.keys * config.num_heads <= known.most_logits
    ):  # fmt: skip
        return known
    spec = plan.spec
    if seen.position_mask is not None:
        spec = replace(spec, position_mask=seen.position_mask)
    path = choose_path(
        ops,
        spec,
        AttentionShape(
            b, config.num_heads, config.key_value_heads, t, seen.keys, config.key_dim,
            config.value_dim, plan.working, plan.device, plan.carried if plan.narrow else None,
            has_mask=seen.has_mask or any(name in HIDING for name in masks),
            has_bias=bias is not None,
            per_query=per_query,
            bias_differentiated=bias is not None and _is_differentiated(ops, bias),
            has_segments="segment_ids" in masks,
            wide_bias=bias is not None and plan.narrow and bias.dtype != plan.carried,
        ),
        observed=plan.flags.observed,
        with_scores=plan.flags.scores,
    )  # fmt: skip
    if path.most_queries and not plan.flags.observed:
        plan.paths[known_key] = path
    return path


def _differs_by_query(masks: Mapping[str, Any], queries: int, keys: int) -> bool:
    """Whether a mask or the bias has a query axis of more than one place.

    Args:
        masks: Masks and bias by name.
        queries: Number of attention axes of the query.
        keys: Number of those of the key.
    """
    for name, array in masks.items():
        if BY_NAME[name].kind is Kind.POSITIONS:
            continue
        lengths = tuple(array.shape)
        form = BY_NAME[name].axes[-1]
        if "T" in form:
            stop = len(lengths) - (keys if "S" in form else 0)
            if any(n != 1 for n in lengths[max(stop - queries, 0) : stop]):
                return True
    return False


def attention_spec(config: AttentionConfig, causal: bool, offset: Any, seed: Any) -> AttentionSpec:
    """What `attend` computes; dropout acts where there is a seed."""
    width = config.sliding_window
    side = None if width is None or width > FAR else width - 1
    dropout = None
    if seed is not None:
        dropout = Dropout(rate_threshold(config.dropout), seed, config.dropout_rng == "native")
    positions = PositionMask(side, 0 if causal else side, offset)
    return AttentionSpec(
        config.scale_value, config.features, positions, dropout, config.memory_budget
    )


# --- dtypes of a planned call ---------------------------------------------------------------
def rounded_operand(plan: Plan, x: Array) -> Array:
    """An input, a kernel or a bias, rounded to the compute dtype; its own dtype is `carried`."""
    if x.dtype == plan.carried and not plan.rounds:
        return x
    return cast_to(plan.ops, cast_to(plan.ops, x, plan.compute_dtype), plan.carried)


def rounded_result(plan: Plan, x: Array) -> Array:
    """A result, rounded to the dtype of the results."""
    if x.dtype == plan.result:
        return x
    if plan.double and plan.result == plan.ops.float32:
        x = without_subnormals(plan.ops, x)
    return plan.ops.astype(x, plan.result)


def activated(plan: Plan, further: Mapping[str, Array]) -> dict[str, Array]:
    """What the features make of their own projections, by name."""
    found = dict(further)
    for feature in plan.spec.features:
        found = {name: feature.activated(plan.ops, name, y) for name, y in found.items()}
    return found


def weights_of_features(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays by name, the features' weights rounded to the compute dtype, in the working dtype."""
    ops, config, own = plan.ops, plan.config, dict(arrays)
    for name in config.feature_weights:
        if name in own:
            weight = cast_to(ops, cast_to(ops, own[name], plan.compute_dtype), plan.working)
            free = config.without_gradient.get(name)
            if free is not None:
                free *= weight.shape[-1] // len(free)  # of all heads side by side
                weight = without_gradient(ops, weight, free)
            own[name] = weight
    return own
