"""A step of decoding, one position for all rows of one length, planned once for all lengths.

The arithmetic is that of every call, by the same functions; what is left out is what the steps
before have found already: that arrays fit, and which way they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from anymha.attention.features.base import Feature
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha.execution.attend import HEADS_FIRST, context_of
from anymha.framework.protocol import Array, Ops
from anymha.layer.cache import Cache, Line, most_of, ring_positions, slots
from anymha.layer.cached import PREFIX, HeldCall, of_one, seen_in_ring
from anymha.layer.numerics import cast_to
from anymha.layer.plan import (
    PlannedCall,
    Plans,
    activated,
    rounded_operand,
    rounded_result,
    weights_of_features,
)


class Step(NamedTuple):
    """What steps have in common.

    Args:
        query: Shape and kind of the queries.
        weights: The kind of the projections.
        cache: Shapes and dtypes of the cache.
        planned: The planned call of one of them.
        spec: The options of the attention, all that is read being seen.
        has_positions: Whether options count positions.
        changes_context: Whether options change the context.
        tables: What options make of positions, of the last ones that were made: the number of
            the first, and arrays by name.
    """

    query: tuple[Any, Any]
    weights: Any
    cache: tuple[Any, ...]
    planned: PlannedCall
    spec: AttentionSpec
    has_positions: bool
    changes_context: bool
    tables: list[tuple[int, dict[str, Array]]]


def keep_step(
    plans: Plans, planned: PlannedCall, projections: Any, query: Array, cache: Cache, held: HeldCall
) -> None:
    """Keep for the steps that follow what a call has found, where it is such a step.

    Args:
        plans: The layer's.
        planned: The call.
        projections: Its projections.
        query: (B, 1, D_q).
        cache: The cache before the call.
        held: The same, as the call has it.
    """
    plan, path = planned.plan, planned.path
    features = plan.spec.features
    array_key = plan.ops.capabilities.array_key
    if not (
        held.held.source == "own" and held.held.is_known and query.shape[1] == 1
        and (held.held.is_full or held.start is None) and held.arrays.keys() <= NAMES
        and projections is not None and projections.of_rows and array_key is not None
        and plan.run is None and not plan.double and not any(plan.flags[:-1])
        and cache.segment_ids is None and cache.key_positions is None
        and not any(feature.depends_on_length for feature in features)
        and not (cache.window is not None and any(f.adds_by_position for f in features))
        and path.most_logits
    ):  # fmt: skip
        return
    plans.steps[held.start is not None] = Step(
        (query.shape, array_key(query)), projections.kind, _kind(cache), planned,
        replace(plan.spec, position_mask=PositionMask()), plan.config.counts_positions,
        any(type(feature).context is not Feature.context for feature in features), [],
    )  # fmt: skip


NAMES = {
    PREFIX + name for name in ("keys", "values", "lengths", "previous", "overflowed", "starts")
}
"""The arrays of a cache that such a step has."""


def _kind(cache: Cache) -> tuple[Any, ...]:
    keys = cache.keys
    return keys.shape, keys.dtype, cache.values.dtype, cache.window, cache.max_length


def next_step(
    ops: Ops, plans: Plans, config: Any, projections: Any, query: Array, cache: Cache
) -> tuple[Array, Cache] | None:
    """The output and the new cache of a step like those before; None where it is none.

    Args:
        ops: The backend.
        plans: The layer's.
        config: Its options.
        projections: Its projections.
        query: (B, 1, D_q).
        cache: The cache.
    """
    if type(cache) is not Cache or not ops.is_array(query):
        return None
    start: Any = cache._start
    known: Any = None
    claim, sharing = None, cache._sharing
    step = plans.steps.get(start is not None)
    array_key: Any = ops.capabilities.array_key
    if (
        step is None or sharing is None or plans.config is not config or paths.explaining
        or (query.shape, array_key(query)) != step.query
        or projections.kind != step.weights or not projections.of_rows
    ):  # fmt: skip
        return None
    line = sharing.line
    if line is None or line.step is not step or not line.begin_step(cache, start):
        line, known = None, cache._known
        if known is None or not _continues(step, cache, start, known):
            return None
        claim = cache._claim(known) if ops.capabilities.writes_in_place else None
    (plan, shape, path), spec = step.planned, step.spec
    batch, _, heads, d_k = shape.query_heads
    _, shared, size, _ = cache.keys.shape
    window, starts = cache.window, cache.starts
    longest = most_of(known) if start is None else start
    read = min(longest + 1, size)
    in_place = line is not None or claim is not None
    functions, reshape = projections.functions, ops.reshape
    x = query if plan.as_given else rounded_operand(plan, query)
    rows = reshape(x, (batch, x.shape[2]))
    q, k = functions["query"](rows), functions["key"](rows)
    v = reshape(functions["value"](rows), (batch, shared, 1, -1))
    arrays: dict[str, Array] = {}
    own: dict[str, Array] = {}
    if spec.features:
        if plan.config.further_projections:
            for name, axes in plan.config.further_projections.items():
                own[name] = reshape(functions[name](rows), (batch, 1, *axes))
            own = activated(plan, own)
        if projections.weights:
            own = weights_of_features(plan, {**projections.weights, **own})
        if step.has_positions:
            own |= _positions(ops, step, cache, q)
        q, k = reshape(q, (batch, 1, heads, d_k)), reshape(k, (batch, 1, shared, d_k))
        for feature in spec.features:
            q, k = feature.heads(ops, q, k, own)
        if any(feature.adds_by_position for feature in spec.features):
            own["key_positions"] = slots(ops, read, q)
        for feature in spec.features:
            arrays |= feature.tiled(ops, own, q)
    write: Any = ops.capabilities.write_slots
    slot: Any = cache.lengths if start is None else start % size
    if start is None and window is not None:
        slot = ops.remainder(cache.lengths, size)
    differentiated = ops.capabilities.is_differentiated
    if in_place and differentiated is not None and differentiated(q):
        in_place = False
    reached: Any = None if known is None else known + 1
    if claim is not None and in_place:  # noted first: the writing itself may be interrupted
        cache._written({"keys": cache.keys, "values": cache.values}, reached)
    k = reshape(k, (batch, shared, 1, d_k))
    keys = write(cache.keys, cast_to(ops, k, cache.keys.dtype), slot, in_place)
    values = write(cache.values, cast_to(ops, v, cache.values.dtype), slot, in_place)
    copied = keys is not cache.keys, values is not cache.values
    if line is not None and any(copied):
        if all(copied):
            line.give_back(cache)
        line = None
    lengths = after = None
    if line is None:
        reached = cache._known + 1 if reached is None else reached
        lengths = cache.lengths
        after = lengths + 1
        if starts is not None and longest >= size:
            first = after - size
            starts = ops.where(first > starts, first, starts)
    if start is None:
        here = reshape(lengths, (batch, 1))
        if window is None or starts is None:
            seen = slots(ops, read, lengths) <= here
        else:
            positions = ring_positions(ops, size, after, lengths)[..., :read]
            seen = seen_in_ring(ops, positions, here, starts, window)
        arrays["mask"] = of_one(ops, seen)
    arrays["query"] = reshape(q, (batch, heads, 1, d_k))
    whole = read == size
    narrow = ops.capabilities.narrow
    if whole or narrow is None:
        arrays["key"] = keys if whole else keys[..., :read, :]
        arrays["value"] = values if whole else values[..., :read, :]
    else:  # which takes half the time of a slice
        arrays["key"] = narrow(keys, 0, read, axis=2)
        arrays["value"] = narrow(values, 0, read, axis=2)
    dtype = q.dtype if path.narrow or not plan.narrow else plan.working
    for name in ("query", "key", "value"):  # of a cache, what is seen is computed in the query's
        arrays[name] = cast_to(ops, cast_to(ops, arrays[name], q.dtype), dtype)
    context = cast_to(ops, context_of(ops, spec, path, arrays), dtype)
    if step.changes_context:
        context = ops.permute_dims(context, HEADS_FIRST)
        for feature in spec.features:
            context = feature.context(ops, context, own)
    context = cast_to(ops, reshape(context, (batch, plan.context_width)), plan.carried)
    output = functions["output"](context)
    output = reshape(output, (batch, 1, *(shape.output[2:] or (output.shape[-1],))))
    if output.dtype != plan.result:
        output = rounded_result(plan, output)
    if line is not None:
        new = line.end_step(cache)
        if differentiated is not None and differentiated(output):
            new._keep_arrays()
        return output, new
    new = Cache(
        keys, values, after, lengths, cache.overflowed, starts, None, None, cache.max_length,
        window, donate=cache.donate,
    )  # fmt: skip
    new._after(cache, reached, None if start is None else start + 1)
    if claim is not None:
        if window is None and start is not None and not any(copied):
            end = min(cache.max_length, path.most_logits // (batch * heads))
            sharing.line = Line(step, new, end)
        claim.release()
    new._note_output(ops, output)
    return output, new


BLOCK = 64
"""For so many positions at a time tables are made."""


def _positions(ops: Ops, step: Step, cache: Cache, like: Array) -> dict[str, Array]:
    """The positions after a cache's rows, (1 or B, 1), and what options make of a common one."""
    start = cache._start
    if start is None:
        place = ops.reshape(cache.lengths, (-1, 1))
        return {"positions": place, "key_positions": place}
    first = start - start % BLOCK
    kept = step.tables[-1] if step.tables else None
    if kept is None or kept[0] != first:
        positions = ops.arange(first, first + BLOCK, dtype=ops.int32, device=ops.device(like))
        positions = ops.reshape(positions, (1, BLOCK))
        arrays = {"positions": positions}
        for feature in step.spec.features:
            arrays |= feature.by_position(ops, positions, like)
        kept = first, arrays
        step.tables[:] = [kept]
    narrow = ops.capabilities.narrow
    at = start - first
    found = {
        name: x[:, at : at + 1] if narrow is None else narrow(x, at, 1, axis=1)
        for name, x in kept[1].items()
    }
    found["key_positions"] = found["positions"]
    return found


def _continues(step: Step, cache: Cache, start: int | None, known: np.ndarray) -> bool:
    """Whether a step goes on from a cache of which nothing is known but its lengths."""
    (_, shape, path), window = step.planned, cache.window
    longest = most_of(known) if start is None else start
    size = cache.keys.shape[2]
    if longest >= cache.max_length or cache._top() or _kind(cache) != step.cache:
        return False
    if cache.segment_ids is not None or cache.key_positions is not None:
        return False
    if window is not None and start is not None and size != window:
        return False
    batch, _, heads, _ = shape.query_heads
    logits = batch * heads * min(longest + 1, size)
    return path.most_queries >= 1 and logits <= path.most_logits
