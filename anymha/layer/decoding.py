"""A step of decoding, one position for all rows of one length, planned once for all lengths.

The arithmetic is that of every call, by the same functions; what is left out is what the steps
before have found already: that arrays fit, and which way they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha.execution.attend import context_of
from anymha.framework.protocol import Array, Ops
from anymha.layer.cache import Cache, most_of, ring_positions, slots
from anymha.layer.cached import PREFIX, HeldCall, of_one, seen_in_ring
from anymha.layer.plan import PlannedCall, Plans


class Step(NamedTuple):
    """What steps have in common.

    Args:
        query: Shape and kind of the queries.
        weights: The kind of the projections.
        cache: Shapes and dtypes of the cache.
        planned: The planned call of one of them.
        spec: The options of the attention, all that is read being seen.
        has_positions: Whether options count positions.
    """

    query: tuple[Any, Any]
    weights: Any
    cache: tuple[Any, ...]
    planned: PlannedCall
    spec: AttentionSpec
    has_positions: bool


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
        and plan.as_given and plan.run is None and not (plan.narrow or plan.double)
        and not any(plan.flags[:-1])
        and cache.segment_ids is None and cache.key_positions is None
        and cache.keys.dtype == cache.values.dtype == plan.carried == plan.result
        and not plan.config.further_projections and not plan.config.without_gradient
        and not any(feature.depends_on_length for feature in features)
        and not (cache.window is not None and any(f.adds_by_position for f in features))
        and path.most_logits
    ):  # fmt: skip
        return
    plans.steps[held.start is not None] = Step(
        (query.shape, array_key(query)), projections.kind, _kind(cache), planned,
        replace(plan.spec, position_mask=PositionMask()), plan.config.counts_positions,
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
    start, known = cache._start, cache._known
    step = plans.steps.get(start is not None)
    if step is None or known is None or plans.config is not config:
        return None
    array_key: Any = ops.capabilities.array_key
    longest = most_of(known) if start is None else start
    if (
        paths.explaining or longest >= cache.max_length or cache._top()
        or (query.shape, array_key(query)) != step.query or projections.kind != step.weights
        or not projections.of_rows
        or _kind(cache) != step.cache or cache.segment_ids is not None
        or cache.key_positions is not None or cache._sharing is None
    ):  # fmt: skip
        return None
    (plan, shape, path), spec = step.planned, step.spec
    batch, _, heads, d_k = shape.query_heads
    _, shared, size, _ = cache.keys.shape
    window, starts, lengths = cache.window, cache.starts, cache.lengths
    read = min(longest + 1, size)
    if window is not None and start is not None and size != window:
        return None
    if not (path.most_queries >= 1 and batch * heads * read <= path.most_logits):
        return None
    claim = cache._claim(known) if ops.capabilities.writes_in_place else None
    in_place = claim is not None
    functions, reshape = projections.functions, ops.reshape
    rows = reshape(query, (batch, query.shape[2]))
    q, k = functions["query"](rows), functions["key"](rows)
    v = reshape(functions["value"](rows), (batch, shared, 1, -1))
    arrays: dict[str, Array] = {}
    if spec.features:
        own: dict[str, Array] = dict(projections.weights or {})
        if step.has_positions:
            if start is None:
                place = reshape(lengths, (batch, 1))
            else:
                place = ops.asarray(np.array([[start]], np.int32), device=plan.device)
            own |= {"positions": place, "key_positions": place}
        q, k = reshape(q, (batch, 1, heads, d_k)), reshape(k, (batch, 1, shared, d_k))
        for feature in spec.features:
            q, k = feature.heads(ops, q, k, own)
        if any(feature.adds_by_position for feature in spec.features):
            own["key_positions"] = slots(ops, read, q)
        for feature in spec.features:
            arrays |= feature.tiled(ops, own, q)
    write: Any = ops.capabilities.write_slots
    slot: Any = lengths if start is None else start % size
    if start is None and window is not None:
        slot = ops.remainder(lengths, size)
    reached = known + 1
    differentiated = ops.capabilities.is_differentiated
    if in_place and differentiated is not None and differentiated(q):
        in_place = False
    keys = write(cache.keys, reshape(k, (batch, shared, 1, d_k)), slot, in_place)
    values = write(cache.values, v, slot, in_place)
    if in_place:
        cache._written({"keys": keys, "values": values}, reached)
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
    context = reshape(context_of(ops, spec, path, arrays), (batch, plan.context_width))
    output = functions["output"](context)
    output = reshape(output, (batch, 1, *(shape.output[2:] or (output.shape[-1],))))
    new = Cache(
        keys, values, after, lengths, cache.overflowed, starts, None, None, cache.max_length,
        window, donate=cache.donate,
    )  # fmt: skip
    new._after(cache, reached, None if start is None else start + 1, claim)
    new._note_output(ops, output)
    return output, new
