"""Calls that have a cache or a memory: what is appended, and what their queries see.

New positions of a row stand after those that it holds: at ``lengths[b]``, ``lengths[b] + 1``, ...
Those that `value_mask` leaves out are put after the others first, and their outputs back to their
places at the end; so all that follows knows rows whose padding is at the end. A query sees what
stands at or before its own position:

    static cache          all slots up to it
    ring, one position    all slots that hold what its window sees
    ring, several         the window before the call, in order, and then the new ones
    nothing held yet      the new ones alone, as in any causal call
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from anymha.attention.masks import PositionMask, all_of
from anymha.attention.spec import AttentionSpec
from anymha.errors import ArgumentError, CacheError, DtypeError
from anymha.framework.dtypes import dtype_name
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import is_known
from anymha.layer.cache import (
    Cache,
    Memory,
    default_rows,
    is_compiled,
    is_uniform,
    known_lengths,
    known_values,
    most_of,
    ring_positions,
    slots,
)
from anymha.layer.checks import check_arrays, check_broadcast, check_inputs, check_masks
from anymha.options.config import AttentionConfig

PREFIX = "cache_"
"""The names of a cache's arrays among those of a call begin so."""

LEAST_CHOSEN = 128
"""A program for all lengths reads a smaller cache as a whole, of a larger one what is held,"""

MOST_CHOSEN = 5
"""rounded up to one of so many lengths, each twice as long as the one before."""


class Held(NamedTuple):
    """What a plan depends on of a cache or a memory.

    Args:
        source: "own" for a cache that is appended to, "cache" for one of another layer, "memory".
        size: The number C of slots.
        max_length: How many positions a row may have.
        window: The window of a ring; else None.
        is_known: Whether all lengths are known, and fit.
        is_fresh: Whether nothing was held before.
        is_uniform: Whether all rows have the one known length.
        is_full: Whether a single new query sees all that is read.
        in_place: Whether the arrays of the cache may be written.
        is_inside: Whether all new positions, those that are not kept included, have a slot.
    """

    source: str
    size: Dim
    max_length: int = 0
    window: int | None = None
    is_known: bool = False
    is_fresh: bool = False
    is_uniform: bool = False
    is_full: bool = False
    in_place: bool = False
    is_inside: bool = False


class HeldCall(NamedTuple):
    """A call's cache or memory, checked.

    Args:
        held: What a plan depends on.
        arrays: Its arrays, and the masks over its positions, by name.
        start: The position of the first new query, where it is known and that of all rows.
        read: How many slots are read, where that is known.
        offset: The position of the first query among the keys: an int, or int32 (B,).
        finish: Makes of what the call computes what it returns.
        note: Takes the cache's new arrays once they are written; None where they are others.
    """

    held: Held
    arrays: dict[str, Array]
    start: int | None
    read: int | None
    offset: Any
    finish: Callable[[Any, Mapping[str, Array]], Any]
    note: Callable[[Mapping[str, Array]], None] | None = None


def prepare(
    ops: Ops,
    config: AttentionConfig,
    computing: str,
    query: Any,
    others: tuple[Any, Any],
    masks: dict[str, Any],
    call: Mapping[str, Any],
) -> HeldCall:
    """Check a call that has a cache or a memory, and take from `masks` those over its positions.

    Args:
        ops: The backend.
        config: The layer's options.
        computing: The dtype in which the layer computes.
        query: (B, T, D_q).
        others: Value and key, as they were given.
        masks: The masks and the bias.
        call: The keyword arguments.

    Raises:
        ArgumentError: arguments do not go together.
        CacheError: the cache does not fit the layer or the batch, or has no room.
        AnymhaError: as for every call.
    """
    cache, memory = call.get("cache"), call.get("memory")
    _check_arguments(config, query, others, masks, call)
    own = cache is not None
    given: Any = cache if own else memory
    check_arrays(ops, {"query": query, **masks})
    check_inputs(config, query, query, query, (None, None, None))
    check_arrays(ops, {("cache" if own else "memory") + ".keys": given.keys})
    _check_fits(config, computing, query, given, "cache" if own else "memory")
    if isinstance(given, Memory):
        return _prepare_memory(ops, config, query, given, masks)
    return _prepare_cache(ops, config, query, given, masks, "own" if own else "cache")


def check_fits(
    config: AttentionConfig, query: Any, others: tuple[Any, Any], call: Mapping[str, Any]
) -> None:
    """Check a call that has a cache or a memory by its arguments' names and sizes alone.

    Raises:
        ArgumentError: arguments do not go together.
        CacheError: the cache does not fit the layer or the batch.
    """
    masks = {n: call[n] for n in ("segment_ids", "key_segment_ids", "key_positions") if n in call}
    masks = {n: x for n, x in masks.items() if x is not None}
    _check_arguments(config, query, others, masks, call)
    name = "cache" if call.get("memory") is None else "memory"
    computing = config.compute_dtype or config.dtype
    _check_fits(config, computing, query, call[name], name)


def needs_positions(features: Any) -> bool:
    """Whether calls need the positions of keys that a cache holds."""
    return any(feature.depends_on_length or feature.adds_by_position for feature in features)


def _check_arguments(
    config: AttentionConfig, query: Any, others: tuple[Any, Any], masks: Mapping[str, Any],
    call: Mapping[str, Any],
) -> None:  # fmt: skip
    cache, memory = call.get("cache"), call.get("memory")
    name = "cache" if memory is None else "memory"
    if cache is not None and memory is not None:
        raise ArgumentError(
            "`cache` and `memory` are of two kinds of attention: a cache holds the queries' own "
            "sequence, a memory another one. Received: both. Pass one."
        )
    given, kinds = (cache, (Cache,)) if memory is None else (memory, (Cache, Memory))
    if not isinstance(given, kinds):
        made = "a cache of `layer.make_cache(batch_size, max_length)`"
        if memory is not None:
            made = "a memory of `layer.make_memory(value)`, or another layer's cache"
        raise ArgumentError(f"`{name}` must be {made}. Received: {type(given).__name__}.")
    for other, array in zip(("value", "key"), others, strict=True):
        if array is not None and array is not query:
            raise ArgumentError(
                f"A call with `{name}` takes the queries alone: keys and values are those of the "
                f"{name}. Received: also `{other}`. Leave it out."
            )
    offset = call.get("query_offset", 0)
    if not (isinstance(offset, int) and offset == 0):
        raise ArgumentError(
            f"A call with `{name}` has its positions from the {name}. Received: `query_offset`. "
            "Leave it out."
        )
    is_memory = isinstance(memory, Memory)
    if "key_segment_ids" in masks or ("segment_ids" in masks and is_memory):
        wrong = "segment_ids" if "segment_ids" in masks and is_memory else "key_segment_ids"
        raise ArgumentError(
            f"A call with `{name}` takes no `{wrong}`: a cache holds the ids of its positions, a "
            "memory has none. Received: such ids. Leave them out, or mask by `attention_mask`."
        )
    if "key_positions" in masks and memory is not None:
        raise ArgumentError(
            "A memory has the positions of its keys. Received: also `key_positions`. Pass them to "
            "`make_memory`."
        )
    if config.dropout > 0 and call.get("training") and name == "cache":
        raise ArgumentError(
            "Dropout does not act in calls with a cache. Received: training=True, "
            f"dropout={config.dropout}. Train with whole sequences, or pass training=False."
        )


def _check_fits(
    config: AttentionConfig, computing: str, query: Any, given: Cache | Memory, name: str
) -> None:
    """Sizes of a cache or a memory fit the layer and the call."""
    keys, values = given.keys.shape, given.values.shape
    expected = (config.key_value_heads, config.key_dim, config.value_dim)
    received = (keys[1], keys[3], values[3])
    if expected != received:
        raise CacheError(
            f"`{name}` must be of a layer with {expected[0]} key heads, key_dim={expected[1]} and "
            f"value_dim={expected[2]}. Received: {received[0]}, {received[1]} and {received[2]}. "
            "Make it by this layer."
        )
    if dtype_name(given.keys.dtype) == "float64" != computing:
        raise CacheError(
            f"`{name}` must not be wider than the layer computes, in {computing}. Received: "
            "float64. Make it by this layer."
        )
    batch = query.shape[0]
    if is_known(batch) and is_known(keys[0]) and keys[0] != batch:
        raise CacheError(
            f"`{name}` must have the batch of `query`, {batch} rows. Received: {keys[0]} rows. "
            "Make it with that `batch_size`, or `reorder` its rows."
        )
    if isinstance(given, Cache):
        size = keys[2]
        window = config.sliding_window
        limits = window is not None and window < given.max_length
        if limits if given.window is None else given.window != window:
            raise CacheError(
                f"`{name}` must be of a layer with sliding_window={window}. Received: a cache of "
                f"{size} slots, window={given.window}. Make it by this layer."
            )


def _prepare_memory(
    ops: Ops, config: AttentionConfig, query: Any, memory: Memory, masks: dict[str, Any]
) -> HeldCall:
    keys = memory.keys.shape[2]
    check_masks(masks, (query.shape[0],), config.num_heads, (query.shape[1],), (keys,))
    arrays = {f"{PREFIX}keys": memory.keys, f"{PREFIX}values": memory.values}
    if memory.key_positions is not None:
        arrays[f"{PREFIX}key_positions"] = memory.key_positions
    hidden = [masks.pop(name, None) for name in ("value_mask", "key_mask")]
    hidden = all_of(ops, hidden)
    if hidden is not None:
        arrays["memory_mask"] = hidden
    held = Held("memory", keys)
    return HeldCall(held, arrays, None, keys, 0, lambda result, _: result)


def _prepare_cache(
    ops: Ops, config: AttentionConfig, query: Any, cache: Cache, masks: dict[str, Any], source: str
) -> HeldCall:
    batch, queries = query.shape[:2]
    over = {n: masks.pop(n) for n in ("attention_mask", "attention_bias") if n in masks}
    check_masks(over, (batch,), config.num_heads, (queries,), (cache.max_length,))
    check_masks(masks, (batch,), config.num_heads, (queries,), (queries,))
    _check_segments(cache, masks, source)
    valid = all_of(ops, [masks.pop("value_mask", None), masks.pop("key_mask", None)])
    arrays = {
        PREFIX + name: getattr(cache, name) for name in Cache.ARRAYS
        if getattr(cache, name) is not None
    }  # fmt: skip
    arrays |= {PREFIX + name: _of_rank_4(ops, x, name) for name, x in over.items()}
    known, counts = known_lengths(ops, cache), None
    if valid is not None:
        check_broadcast(valid, (batch, queries), "value_mask")
        arrays["cache_valid"] = valid
    if source == "cache":
        return _prepare_shared(ops, query, cache, arrays, known, valid)
    if known is not None:
        counts = np.full(known.shape, queries, np.int64)
        if not is_known(queries):
            known = None
        elif valid is not None:
            counts = _counted(ops, valid)
            known = None if counts is None else known
    size, eager = cache.keys.shape[2], ops.capabilities.compile is None
    if known is None:
        compiled = is_compiled(ops)
        in_place = compiled and cache._hand_over()
        if not in_place:
            cleared = _of_unclean(ops, cache)
            arrays |= cleared
            in_place = compiled and bool(cleared)
        held = Held("own", size, cache.max_length, cache.window, in_place=in_place)
        offset = cache.lengths
        return HeldCall(held, arrays, None, None, offset, _finisher(ops, cache, None))
    if cache._sharing is None and cache._is_newest:  # as a compiled program has made it
        cache._adopt(known)
    lengths = known + counts
    _check_room(cache, known, lengths)
    start = int(known[0]) if eager and known.size and is_uniform(known) else None
    is_ring, one = cache.window is not None, queries == 1
    read = min(max(most_of(lengths), 1), size) if eager else None  # a slot at least
    claim = cache._claim(known) if ops.capabilities.writes_in_place else None
    in_place = claim is not None
    if in_place and not (is_ring and not (one and valid is None)):
        arrays |= _clear(ops, cache, known)
    else:
        cleared = _of_unclean(ops, cache)
        arrays |= cleared
        in_place = in_place or bool(cleared)
    full = bool(
        start is not None and one and valid is None
        and (not is_ring or (size == cache.window and not cache._top()))
    )  # fmt: skip
    held = Held(
        "own", size, cache.max_length, cache.window, True,
        bool(known.size) and not known.any() and queries > 1, start is not None, full,
        in_place, most_of(known) + queries <= size,
    )  # fmt: skip
    offset = cache.lengths if start is None else start
    if held.is_fresh:
        offset = 0
    note = partial(cache._written, known=lengths) if in_place and queries else None
    return HeldCall(held, arrays, start, read, offset, _finisher(ops, cache, lengths, claim), note)


def _prepare_shared(
    ops: Ops, query: Any, cache: Cache, arrays: dict[str, Array], known: Any, valid: Any
) -> HeldCall:
    """Queries of another layer, which stand where the cache's last call appended."""
    size, queries = cache.keys.shape[2], query.shape[1]
    arrays |= _of_unclean(ops, cache)
    before = None if known is None else known_values(ops, cache.previous)
    starts = None if cache.starts is None else known_values(ops, cache.starts)
    if starts is not None and cache._lost is not None:  # a later call has written there
        starts = np.maximum(starts, cache._lost)
    counts: Any = queries
    if valid is not None:
        counts = _counted(ops, valid)
    if before is not None and counts is not None and is_known(queries):
        appended = np.asarray(known) - before
        if (appended != counts).any():
            raise CacheError(
                "Queries over another layer's cache must be the positions that its last call "
                f"appended, {appended.tolist()} in each row. Received: {np.asarray(counts)}. Call "
                "this layer right after that one, with the same `value_mask`."
            )
        window = cache.window
        if starts is not None and window is not None and len(before):
            gone = (starts > 0) & (starts > before - window + 1) & (appended > 0)
            if gone.any():
                raise CacheError(
                    f"The ring of {size} slots no longer holds what the first of {queries} queries "
                    f"sees. Make the cache with `rewind={queries - 1}` or more, or append in "
                    "shorter pieces."
                )
    checked = before is not None and counts is not None and is_known(queries)
    held = Held("cache", size, cache.max_length, cache.window, checked)

    def finish(result: Any, _: Any) -> Any:
        cache._note_output(ops, result[0] if isinstance(result, tuple) else result)
        return result

    return HeldCall(held, arrays, None, None, cache.previous, finish)


def _counted(ops: Ops, valid: Array) -> np.ndarray | None:
    """How many of each row are True, (1 or B,); None where that is traced."""
    values = known_values(ops, valid)
    return None if values is None else np.asarray(values).astype(np.int64).sum(1)


def _check_room(cache: Cache, known: np.ndarray, lengths: np.ndarray) -> None:
    if (lengths > cache.max_length).any():
        rows = np.flatnonzero(lengths > cache.max_length).tolist()
        raise CacheError(
            f"The cache has room for {cache.max_length} positions of a row. Received: a call after "
            f"which rows {rows} would have {lengths[rows].tolist()}. Make a cache with a larger "
            "`max_length`, or `truncate` this one; it is as it was."
        )


def _check_segments(cache: Cache, masks: Mapping[str, Any], source: str) -> None:
    ids = masks.get("segment_ids")
    if cache.segment_ids is not None and ids is None:
        raise ArgumentError(
            "The cache holds the ids of its positions' segments. Received: a call without "
            "`segment_ids`. Pass those of the new positions (B, T)."
        )
    if cache.segment_ids is not None and ids is not None and ids.dtype != cache.segment_ids.dtype:
        raise DtypeError(
            f"`segment_ids` must have the dtype of those before, "
            f"{dtype_name(cache.segment_ids.dtype)}. Received: {dtype_name(ids.dtype)}. Cast them."
        )
    if source == "cache" and ids is not None and cache.segment_ids is None:
        raise ArgumentError(
            "The cache holds no ids of segments. Received: `segment_ids`. Pass them to the layer "
            "that appends."
        )


def _of_unclean(ops: Ops, cache: Cache) -> dict[str, Array]:
    """New arrays of keys and values, zero in slots that hold nothing, where the cache's are not."""
    if cache._is_clean(ops):
        return {}
    keys, values = cache._arrays_cleared(ops)
    return {f"{PREFIX}keys": keys, f"{PREFIX}values": values}


def _clear(ops: Ops, cache: Cache, known: np.ndarray) -> dict[str, Array]:
    """The cache's arrays, zero in slots that `truncate` has given up; its own where it may be."""
    top = cache._top()
    if not top:
        return {}
    begin = 0 if cache.window is not None or not known.size else min(int(known.min()), top)
    positions = slots(ops, cache.keys.shape[2], cache.lengths)
    lengths = ops.reshape(cache.lengths, (-1, 1))
    if cache.window is None:
        there = positions < lengths
    else:
        ring = ring_positions(ops, cache.keys.shape[2], cache.lengths, cache.lengths)
        there = ring >= cache._first(ops)
    part = ops.reshape(there[..., begin:top], (known.size, 1, top - begin, 1))
    found = {}
    for name in ("keys", "values"):
        x = getattr(cache, name)
        zeroed = ops.where(part, x[..., begin:top, :], 0.0)
        found[PREFIX + name] = ops.capabilities.write_slots(x, zeroed, begin, True)
    if all(found[PREFIX + name] is getattr(cache, name) for name in ("keys", "values")):
        cache.__dict__["_stale_to"] = 0
        cache._sharing.reached = cache._known
    return found


def _finisher(
    ops: Ops, cache: Cache, lengths: np.ndarray | None, claim: Any = None
) -> Callable[[Any, Mapping[str, Array]], Any]:
    """What makes the result of a call, with the new cache last."""

    def finish(result: Any, stored: Mapping[str, Array]) -> Any:
        arrays: dict[str, Any] = dict.fromkeys(Cache.ARRAYS) | dict(stored)
        new = Cache(**arrays, max_length=cache.max_length, window=cache.window, donate=cache.donate)
        if lengths is not None:
            start = int(lengths[0]) if lengths.size and is_uniform(lengths) else None
            new._after(cache, lengths, start)
            if claim is not None:
                claim.release()
        elif is_compiled(ops):
            new._alone(ops)
        new._note_output(ops, result[0] if isinstance(result, tuple) else result)
        return (*result, new) if isinstance(result, tuple) else (result, new)

    return finish


def _of_rank_4(ops: Ops, x: Array, name: str) -> Array:
    """A mask or a bias over (B, H, T, max_length) with all four axes."""
    shape = ops.shape(x)
    if len(shape) == 4:
        return x
    if name == "attention_mask" and len(shape) == 3:
        return ops.reshape(x, (shape[0], 1, *shape[1:]))
    return ops.reshape(x, (*(1,) * (4 - len(shape)), *shape))


# --- within the program ----------------------------------------------------------------------
def _is_one(length: Dim) -> bool:
    """Whether a length is known, and one."""
    return is_known(length) and length == 1


def arranged(ops: Ops, arrays: Mapping[str, Array], queries: Dim) -> dict[str, Array]:
    """The call's arrays, the new positions that are kept in front in each row.

    Adds "cache_counts" (B,), how many they are, and "cache_back" (B, T), where each was.
    """
    found = dict(arrays)
    valid = found.pop("cache_valid")
    x = found["query"]
    batch = ops.shape(x)[0]
    valid = ops.broadcast_to(valid, (batch, queries))
    index = slots(ops, queries, x)
    keys = ops.where(valid, index, index + queries)
    order = ops.argsort(keys, axis=1)
    found["cache_counts"] = ops.sum(ops.astype(valid, ops.float32), axis=1, keepdims=False)
    found["cache_counts"] = ops.astype(found["cache_counts"], ops.int32)
    found["cache_back"] = ops.argsort(order, axis=1)

    def moved(x: Array, axis: int) -> Array:
        shape = list(ops.shape(x))
        if _is_one(shape[axis]) and not _is_one(queries):
            return x  # broadcast over the queries
        if not is_known(shape[0]) or shape[0] == 1:
            x = ops.broadcast_to(x, (batch, *shape[1:]))
        return ops.gather(x, order, axis=axis)

    found["query"] = moved(x, 1)
    for name in ("query_mask", "positions", "key_positions", "segment_ids"):
        if name in found:
            x = found[name]
            if len(ops.shape(x)) == 1:
                x = ops.reshape(x, (1, -1))
            found[name] = moved(x, 1)
    for name in (PREFIX + "attention_mask", PREFIX + "attention_bias"):
        if name in found:
            found[name] = moved(found[name], 2)
    kept = slots(ops, queries, x) < ops.reshape(found["cache_counts"], (-1, 1))
    found["query_mask"] = all_of(ops, [found.get("query_mask"), kept])
    found["cache_kept"] = kept
    return found


def inputs(
    ops: Ops, arrays: Mapping[str, Array], query: Array
) -> tuple[Array, Array, Array | None]:
    """What queries, and what keys and values, are projected from; and the mask of the queries.

    Args:
        ops: The backend.
        arrays: The call's arrays by name.
        query: (B, T, D_q), ready to compute with.

    Returns:
        (B, T, D_q) twice, and (B, 1, T, 1) booleans or None.
    """
    kept, mask, source = arrays.get("cache_kept"), arrays.get("query_mask"), query
    if kept is not None:
        source = ops.where(ops.reshape(kept, (*ops.shape(kept), 1)), query, 0.0)
    if mask is not None:
        query = ops.where(ops.reshape(mask, (*ops.shape(mask), 1)), query, 0.0)
        shape = ops.shape(mask)
        mask = ops.reshape(mask, (shape[0], 1, shape[1], 1))
    return query, source, mask


def placed(
    ops: Ops, output: Array, scores: Array | None, lost: Array | None, back: Array | None
) -> tuple[Array, Array | None]:
    """Output (B, T, *O) and scores (B, H, T, S) in the call's order, NaN in rows that are lost.

    Args:
        ops: The backend.
        output: Those positions that are kept in front.
        scores: Likewise; None where they are not asked for.
        lost: (B,) booleans; None for none.
        back: (B, T), where each position of the call is now; None for there.
    """
    if back is not None:
        output = ops.gather(output, back, axis=1)
        scores = None if scores is None else ops.gather(scores, back, axis=2)
    if lost is not None:
        output = ops.where(
            ops.reshape(lost, (-1, *(1,) * (len(output.shape) - 1))), math.nan, output
        )
        if scores is not None:
            scores = ops.where(ops.reshape(lost, (-1, 1, 1, 1)), math.nan, scores)
    return output, scores


def traced(held: Held, arrays: Mapping[str, Array]) -> HeldCall:
    """The call of a program that serves all lengths."""
    own = {name: x for name, x in arrays.items() if name.startswith((PREFIX, "memory_"))}
    offset: Any = 0
    if held.source != "memory" and not held.is_fresh:
        offset = own[PREFIX + ("lengths" if held.source == "own" else "previous")]
    return HeldCall(held, own, None, None, offset, lambda result, _: result)


def sizes_read(ops: Ops, call: HeldCall, holding: Holding, everything: bool) -> Any:
    """How many slots a program for all lengths may read: a tuple to choose from, or a length.

    Args:
        ops: The backend.
        call: The cache.
        holding: The same, within the program.
        everything: Whether all are needed.

    Returns:
        None where `call.read` says it.
    """
    held = call.held
    is_ring = held.window is not None
    if everything or call.read is not None or held.source == "memory" or held.is_fresh or is_ring:
        return None
    if not is_known(held.size) or ops.capabilities.compile is None:
        return None
    if ops.capabilities.choose is None or held.size < LEAST_CHOSEN:
        return None
    sizes, size = [held.size], held.size
    while size > LEAST_CHOSEN // 2 and len(sizes) < MOST_CHOSEN:
        size = -(-size // 2)
        sizes.append(size)
    return tuple(reversed(sizes))


class Seen(NamedTuple):
    """What is known of a view before there is one.

    Args:
        keys: The number S of keys.
        position_mask: What a query sees by its position; None for that of the plan.
        has_mask: Whether there is a mask beside.
        per_query: Whether that differs from query to query.
    """

    keys: Dim
    position_mask: PositionMask | None
    has_mask: bool
    per_query: bool


def seen_by(held: Held, queries: Dim, read: Dim | None, offset: Any, names: Any) -> Seen:
    """What the queries of a call will see.

    Args:
        held: What is known of the cache.
        queries: T.
        read: How many slots are read; None for all.
        offset: The position of the first query: an int, or int32 (B,).
        names: The names of the call's arrays.
    """
    padded, over = "cache_valid" in names, PREFIX + "attention_mask" in names
    one = is_known(queries) and queries == 1
    if held.source == "memory":
        return Seen(held.size, None, "memory_mask" in names, False)
    masked = padded or over
    if held.is_fresh:
        left = None if held.window is None else held.window - 1
        return Seen(queries, PositionMask(left, 0, 0), masked, masked)
    if held.window is not None and not one and held.source == "own":
        before = held.window - 1
        return Seen(before + queries, PositionMask(before, 0, before), True, masked)
    keys = held.size if read is None else read
    if one or held.window is not None:
        return Seen(keys, PositionMask(), masked or not held.is_full, masked or not one)
    return Seen(keys, PositionMask(None, 0, offset), masked, masked)


class View(NamedTuple):
    """What the queries of a call see, and by which rules.

    Args:
        query: (B, T, H, d_k).
        key: (B, S, K, d_k).
        value: (B, S, K, d_v).
        spec: The options of the attention.
        mask: Booleans that broadcast to (B, H, T, S); None for all.
        bias: Added to the logits; None for nothing.
        segments: The segments of queries (B, T) and keys (B, S), or None.
        key_positions: The keys' positions (1 or B, S), where options count them.
    """

    query: Array
    key: Array
    value: Array
    spec: AttentionSpec
    mask: Array | None
    bias: Array | None
    segments: tuple[Array, Array] | None
    key_positions: Array | None


def seen_in_ring(ops: Ops, positions: Array, own: Array, starts: Array, window: int) -> Array:
    """Which of `positions` a query at `own` sees, of those that are held from `starts` (B,) on."""
    within = ops.logical_and(positions <= own, positions > own - window)
    starts = ops.reshape(starts, (-1, *(1,) * (len(positions.shape) - 1)))
    return ops.logical_and(within, positions >= starts)


def of_one(ops: Ops, seen: Array) -> Array:
    """What a single query of each row sees, (B, S), as a mask (B, 1, 1, S)."""
    shape = ops.shape(seen)
    return ops.reshape(seen, (shape[0], 1, 1, shape[1]))


class Holding:
    """A cache within the program of a call.

    Args:
        ops: The backend.
        held: What is known of the cache.
        spec: The options of the attention.
        arrays: The call's arrays by name, those of the cache and the features' among them.
        query: (B, T, H, d_k), projected.
        key: (B, T, K, d_k), projected; None where another layer's cache is read.
        value: (B, T, K, d_v).
        start: The length of all rows, where it is known.
    """

    def __init__(
        self,
        ops: Ops,
        held: Held,
        spec: AttentionSpec,
        arrays: Mapping[str, Array],
        query: Array,
        key: Array | None,
        value: Array | None,
        start: int | None,
    ) -> None:
        self.ops, self.held, self.spec, self.arrays = ops, held, spec, dict(arrays)
        self.query, self.start = query, start
        self.queries = ops.shape(query)[1]
        self.is_one = is_known(self.queries) and self.queries == 1
        self.stored: dict[str, Array] = {}
        self.lost: Array | None = None
        self.raw = any(feature.depends_on_length for feature in spec.features)
        if held.source == "memory":
            self._from_memory()
            return
        self.lengths = self.arrays[PREFIX + ("lengths" if held.source == "own" else "previous")]
        if spec.features:
            self._positions()
        if not self.raw:
            if key is None:
                self._turn_queries(self.arrays[PREFIX + "keys"])
            else:
                for feature in spec.features:
                    self.query, key = feature.heads(ops, self.query, key, self.arrays)
        if held.source == "own":
            self._append(key, value)
        else:
            self.new_lengths = self.arrays[PREFIX + "lengths"]
            starts = self.arrays.get(PREFIX + "starts")
            if not held.is_known:
                self.lost = self.arrays[PREFIX + "overflowed"]
                appended = self.new_lengths - self.lengths
                counts = self.arrays.get("cache_counts", self.queries)
                for others in (appended < counts, appended > counts):
                    self.lost = ops.where(others, others, self.lost)
                if starts is not None and held.window is not None:
                    first = self.lengths - (held.window - 1)
                    gone = starts > ops.where(first > 0, first, 0)
                    self.lost = ops.where(gone, gone, self.lost)
            names = ("keys", "values", "segment_ids", "key_positions", "starts")
            self.held_rows = {n: self.arrays.get(PREFIX + n) for n in names}

    def _turn_queries(self, keys: Array) -> None:
        """What features make of the queries, where `keys` (B, K, C, d_k) are done with already."""
        ops = self.ops
        one = ops.permute_dims(keys[..., :1, :], (0, 2, 1, 3))
        one = one if one.dtype == self.query.dtype else ops.astype(one, self.query.dtype)
        arrays = dict(self.arrays)
        if "positions" in arrays:
            arrays["key_positions"] = slots(ops, 1, one)
        for feature in self.spec.features:
            self.query, one = feature.heads(ops, self.query, one, arrays)

    # --- what comes in -------------------------------------------------------------------------
    def _positions(self) -> None:
        """The positions of the new queries and keys, those of the call or those in the cache."""
        ops, arrays = self.ops, self.arrays
        own = arrays.get("positions")
        if own is None:
            index = slots(ops, self.queries, self.query)
            start = self.start
            own = index + (ops.reshape(self.lengths, (-1, 1)) if start is None else start)
        elif len(ops.shape(own)) == 1:
            own = ops.reshape(own, (1, -1))
        keys = arrays.get("key_positions", own)
        if len(ops.shape(keys)) == 1:
            keys = ops.reshape(keys, (1, -1))
        self.given = "positions" in arrays or "key_positions" in arrays
        arrays["positions"], arrays["key_positions"] = own, keys

    def _append(self, key: Any, value: Any) -> None:
        """Put the new keys and values into the cache, and count."""
        ops, held, arrays = self.ops, self.held, self.arrays
        n, counts = self.lengths, arrays.get("cache_counts")
        after = n + (self.queries if counts is None else counts)
        flags, starts = arrays[PREFIX + "overflowed"], arrays.get(PREFIX + "starts")
        if not held.is_known:
            self.lost = ops.where(flags, flags, after > held.max_length)
            after = ops.where(self.lost, n, after)
        self.new_lengths = after
        if starts is not None:
            first = after - held.size
            starts = ops.where(first > starts, first, starts)
        # A gradient of the queries alone needs the keys and the values as they are now, too.
        differentiated = ops.capabilities.is_differentiated
        self.differentiated = differentiated is not None and differentiated(self.query)
        new = {"keys": key, "values": value}
        dtypes = {name: arrays[PREFIX + name].dtype for name in new}
        rows: dict[str, Array | None] = {}
        self.new: dict[str, Array] = {}
        for name, x in new.items():
            x = ops.permute_dims(x, (0, 2, 1, 3))  # [B, K, T, d]
            wide = x.dtype
            x = x if wide == dtypes[name] else ops.astype(x, dtypes[name])
            self.new[name] = x
            rows[name] = self._written(arrays[PREFIX + name], x)
        for name in ("segment_ids", "key_positions"):
            rows[name] = self._written_rows(name)
        self.held_rows = {**rows, "starts": starts}
        self.stored = {n: x for n, x in self.held_rows.items() if x is not None}
        self.stored |= {"lengths": after, "previous": n}
        self.stored["overflowed"] = flags if self.lost is None else self.lost

    def _written_rows(self, name: str) -> Array | None:
        """The ids or the positions that are held (B, C), the new ones among them."""
        ops, arrays = self.ops, self.arrays
        before, new = arrays.get(PREFIX + name), arrays.get(name)
        if name == "key_positions":
            needed = needs_positions(self.spec.features)
            if not needed or (before is None and not self.given):
                return None
        if new is None:
            return None
        batch, size = ops.shape(self.lengths)[0], self.held.size
        if len(ops.shape(new)) == 1:
            new = ops.reshape(new, (1, -1))
        new = ops.broadcast_to(new, (batch, self.queries))
        if before is None:
            before = default_rows(ops, name, size, self.held.window, self.lengths)
            before = before if before.dtype == new.dtype else ops.astype(before, new.dtype)
        new = new if new.dtype == before.dtype else ops.astype(new, before.dtype)
        self.new[name] = new = ops.reshape(new, (batch, 1, self.queries, 1))
        written = self._written(ops.reshape(before, (batch, 1, size, 1)), new, in_place=False)
        return ops.reshape(written, (batch, size))

    def _written(self, storage: Array, new: Array, in_place: bool = True) -> Array:
        """`storage` (B, K, C, d) with the new positions (B, K, T, d) that are kept."""
        ops, held, n = self.ops, self.held, self.lengths
        size, is_ring = held.size, held.window is not None
        counts = self.arrays.get("cache_counts")
        write: Any = ops.capabilities.write_slots
        in_place = in_place and held.in_place and not self.differentiated
        simple = self.is_one and counts is None if is_ring else held.is_inside
        if write is not None and simple and held.is_known:
            slot: Any = n if self.start is None else self.start
            if is_ring:
                slot = slot % size if self.start is not None else ops.remainder(n, size)
            return write(storage, new, slot, in_place)
        fits = is_known(self.queries) and 0 < self.queries <= size
        if in_place and not is_ring and fits:
            return self._written_around(storage, new)
        if write is not None and self.is_one and counts is None:
            # A row that has no room is lost from now on, whatever lies in its last slot.
            slot = ops.remainder(n, size) if is_ring else ops.where(n < size, n, size - 1)
            return write(storage, new, slot, False)
        # The last new position that falls on each slot.
        index = slots(ops, size, n)
        count = ops.reshape(n * 0 + self.queries if counts is None else counts, (-1, 1))
        first = ops.reshape(n, (-1, 1))
        place = index - first
        if is_ring:
            last = first + count - 1
            place = count - 1 - ops.remainder(last - index, size)
        taken = ops.logical_and(place >= 0, place < count)
        if self.lost is not None:
            fits = ops.reshape(ops.where(self.lost, 0, n * 0 + 1), (-1, 1)) > 0
            taken = ops.logical_and(taken, fits)
        place = ops.where(taken, place, 0)
        if not is_known(self.queries) or self.queries > 0:
            if not is_known(self.queries):  # there may be none, of which nothing can be gathered
                new = ops.concat([new, storage[..., :1, :]], axis=2)
            new = ops.gather(new, place, axis=2)
            return ops.where(ops.reshape(taken, (-1, 1, size, 1)), new, storage)
        return storage

    def _written_around(self, storage: Array, new: Array) -> Array:
        """`storage` itself, with the new positions that are kept in their slots.

        As many slots as there are new positions are written; those whose row keeps no new position
        there, or is lost, get what they have, which a cache before this one may hold too.
        """
        ops, n, queries = self.ops, self.lengths, self.queries
        last = self.held.size - queries
        begin = ops.where(n < last, n, last)
        slot = ops.reshape(begin, (-1, 1)) + slots(ops, queries, n)  # [B, T]
        place = slot - ops.reshape(n, (-1, 1))
        count: Any = ops.reshape(self.new_lengths - n, (-1, 1))  # 0 in rows that are lost
        taken = ops.logical_and(place >= 0, place < count)
        new = ops.gather(new, ops.where(taken, place, 0), axis=2)
        where = ops.reshape(taken, (-1, 1, queries, 1))
        new = ops.where(where, new, ops.gather(storage, slot, axis=2))
        return cast(Any, ops.capabilities.write_slots)(storage, new, begin, True)

    def _from_memory(self) -> None:
        """A memory: all of it is there."""
        ops, arrays = self.ops, self.arrays
        rows = {n: arrays.get(PREFIX + n) for n in ("keys", "values", "key_positions")}
        self.held_rows = rows
        keys = ops.permute_dims(rows["keys"], (0, 2, 1, 3))
        keys = keys if keys.dtype == self.query.dtype else ops.astype(keys, self.query.dtype)
        values = ops.permute_dims(rows["values"], (0, 2, 1, 3))
        values = (
            values if values.dtype == self.query.dtype else ops.astype(values, self.query.dtype)
        )
        hidden = arrays.get("memory_mask")
        if hidden is not None:
            shape = ops.shape(hidden)
            where = ops.reshape(hidden, (*shape, 1, 1))
            keys, values = ops.where(where, keys, 0.0), ops.where(where, values, 0.0)
            self.hidden = ops.reshape(hidden, (shape[0], 1, 1, shape[1]))
        else:
            self.hidden = None
        if self.spec.features:
            own = arrays.get("positions")
            own = slots(ops, self.queries, self.query) if own is None else own
            arrays["positions"] = own if len(ops.shape(own)) == 2 else ops.reshape(own, (1, -1))
            places = rows["key_positions"]
            places = slots(ops, ops.shape(keys)[1], keys) if places is None else places
            arrays["key_positions"] = places
            if self.raw:
                for feature in self.spec.features:
                    self.query, keys = feature.heads(ops, self.query, keys, arrays)
            else:
                self._turn_queries(rows["keys"])
        self.keys, self.values = keys, values

    # --- what is seen --------------------------------------------------------------------------
    def view(self, read: Dim | None) -> View:
        """What the queries see.

        Args:
            read: How many slots are read; None for all.
        """
        if self.held.source == "memory":
            arrays = self.arrays
            positions = arrays["key_positions"] if self.spec.features else None
            return View(
                self.query, self.keys, self.values, self.spec, self.hidden, None, None, positions
            )
        if self.held.is_fresh:
            return self._of_new()
        if self.held.window is not None and not self.is_one and self.held.source == "own":
            return self._of_window()
        return self._of_slots(read)

    def _of_new(self) -> View:
        """Nothing was held: the new positions alone."""
        ops, held = self.ops, self.held
        left = None if held.window is None else held.window - 1
        rows = dict(self.new)
        positions = slots(ops, self.queries, self.query)
        return self._seen(rows, PositionMask(left, 0, 0), None, positions)

    def _of_slots(self, read: Dim | None) -> View:
        """Slots in their order, as many as are read."""
        ops, held = self.ops, self.held
        size = held.size if read is None else read
        rows = {}
        for name, x in self.held_rows.items():
            if x is None or name == "starts":
                continue
            axes = len(x.shape)
            if read is not None and not (is_known(read) and read == held.size):
                x = x[..., :read, :] if axes == 4 else x[..., :read]
            rows[name] = x
        n = ops.reshape(self.lengths, (-1, 1))
        if held.window is None:
            positions, mask = slots(ops, size, self.query), PositionMask(None, 0, self.lengths)
            if self.start is not None:
                mask = PositionMask(None, 0, self.start)
            if not self.is_one:
                return self._seen(rows, mask, None, positions)
            seen = None if held.is_full else positions <= n
        else:
            after = self.new_lengths if held.source == "own" else self.arrays[PREFIX + "lengths"]
            positions = ring_positions(ops, held.size, after, self.query)
            positions = positions if read is None else positions[..., :read]
            seen = None
            if not held.is_full and self.is_one:
                seen = seen_in_ring(ops, positions, n, self.held_rows["starts"], held.window)
            elif not held.is_full:
                batch, count = ops.shape(positions)
                places = ops.reshape(positions, (batch, 1, count))
                own = ops.reshape(n + slots(ops, self.queries, n), (batch, self.queries, 1))
                starts = self.held_rows["starts"]
                seen = seen_in_ring(ops, places, own, starts, held.window)
                seen = ops.reshape(seen, (batch, 1, self.queries, count))
        if seen is not None and len(seen.shape) == 2:
            seen = of_one(ops, seen)
        return self._seen(rows, PositionMask(), seen, positions)

    def _of_window(self) -> View:
        """The window before the call, in order, and then the new positions."""
        ops, held = self.ops, self.held
        window: Any = held.window
        before = window - 1
        arrays, n = self.arrays, ops.reshape(self.lengths, (-1, 1))
        index = slots(ops, before, self.query)
        positions = n - before + index  # [B, W - 1]
        starts = ops.reshape(arrays[PREFIX + "starts"], (-1, 1))
        there = positions >= starts
        places = ops.remainder(positions, held.size)
        rows = {}
        for name, new in self.new.items():
            if before == 0:
                rows[name] = new
                continue
            x = arrays.get(PREFIX + name)
            if x is None:
                x = default_rows(ops, name, held.size, window, self.lengths)
            if name in ("segment_ids", "key_positions"):
                x = ops.reshape(ops.astype(x, new.dtype), (ops.shape(x)[0], 1, held.size, 1))
            rows[name] = ops.concat([ops.gather(x, places, axis=2), new], axis=2)
        later = n + slots(ops, self.queries, self.query)
        if before == 0:
            positions, there = later, later > -1
        else:
            positions = ops.concat([positions, later], axis=1)
            there = ops.concat([there, later > -1], axis=1)
        shape = ops.shape(there)
        seen = ops.reshape(there, (shape[0], 1, 1, shape[1]))
        return self._seen(rows, PositionMask(before, 0, before), seen, positions)

    def _seen(
        self,
        rows: Mapping[str, Array],
        position_mask: PositionMask,
        mask: Array | None,
        positions: Array,
    ) -> View:
        """The view of these rows, (B, K, S, d), ids and places (B, S) or (B, 1, S, 1)."""
        ops, arrays, query = self.ops, self.arrays, self.query
        dtype = query.dtype
        key, value = (ops.permute_dims(rows[n], (0, 2, 1, 3)) for n in ("keys", "values"))
        key = key if key.dtype == dtype else ops.astype(key, dtype)
        value = value if value.dtype == dtype else ops.astype(value, dtype)
        flat = {
            n: ops.reshape(rows[n], (ops.shape(rows[n])[0], -1))
            for n in ("segment_ids", "key_positions") if n in rows
        }  # fmt: skip
        places = flat.get("key_positions", positions) if self.spec.features else None
        if self.raw:
            own = {**arrays, "key_positions": places, "lengths": self.new_lengths}
            for feature in self.spec.features:
                query, key = feature.heads(ops, query, key, own)
        segments = None
        if "segment_ids" in flat and "segment_ids" in arrays:
            ids = arrays["segment_ids"]
            ids = ids if len(ops.shape(ids)) == 2 else ops.reshape(ids, (1, -1))
            segments = ids, flat["segment_ids"]
        over = [arrays.get(PREFIX + n) for n in ("attention_mask", "attention_bias")]
        own_mask, bias = (None if x is None else self._over(x, positions) for x in over)
        mask = all_of(ops, [mask, own_mask])
        spec = replace(self.spec, position_mask=position_mask)
        return View(query, key, value, spec, mask, bias, segments, places)

    def _over(self, x: Array, positions: Array) -> Array:
        """Of a mask or a bias over (B, H, T, max_length) the columns of these positions."""
        ops = self.ops
        shape = ops.shape(x)
        if _is_one(shape[3]):
            return x
        rows = ops.shape(self.lengths)[0]
        columns = ops.shape(positions)[1]
        whole = self.held.window is None and not self.held.is_fresh
        if whole and (not is_known(shape[3]) or self.held.size == shape[3]):
            return x[..., :columns]
        x = ops.broadcast_to(x, (rows, *shape[1:]))
        places = ops.where(positions < 0, 0, positions)
        places = ops.where(places > shape[3] - 1, shape[3] - 1, places)
        return ops.gather(x, ops.broadcast_to(places, (rows, columns)), axis=3)

    def scores(self, scores: Array) -> Array:
        """The probabilities (B, H, T, S) of a view by positions, (B, H, T, max_length)."""
        ops, held = self.ops, self.held
        if held.source == "memory":
            return scores
        batch, _, _, columns = ops.shape(scores)
        index = slots(ops, held.max_length, scores)
        after = ops.reshape(self.new_lengths, (-1, 1))
        if held.window is None or held.is_fresh:
            if is_known(columns) and columns == held.max_length:
                return scores
            places = index
        elif self.is_one:
            places = ops.remainder(index, held.size)
        else:
            places = index - (ops.reshape(self.lengths, (-1, 1)) - (held.window - 1))
        there = ops.logical_and(places >= 0, ops.logical_and(places < columns, index < after))
        if held.window is not None and self.is_one:
            there = ops.logical_and(there, index > after - 1 - held.window)
        places = ops.broadcast_to(ops.where(there, places, 0), (batch, held.max_length))
        found = ops.gather(scores, places, axis=3)
        return ops.where(ops.reshape(ops.broadcast_to(there, (batch, held.max_length)),
                                     (batch, 1, 1, held.max_length)), found, 0.0)  # fmt: skip
