"""Attention block after block: the loops around the written formula and around fused kernels.

References:
    M. Rabe, C. Staats, "Self-attention Does Not Need O(n^2) Memory" (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anymha.attention.dropout import Place
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionCall
from anymha.execution.path import is_plain_causal
from anymha.execution.tiling import Run
from anymha.framework.protocol import Array
from anymha.framework.shapes import is_known

Arrays = dict[str, Array]
Formula = Callable[[AttentionCall, Mapping[str, Array], Place], Arrays]
"""Gives the results of some queries over some keys, which stand at a place among all."""


def by_fused_kernel(
    ops: Any, call: AttentionCall, runs: Sequence[Run], arrays: Mapping[str, Array]
) -> Array:
    """The context (B, H, T, d_v) by the framework's kernel, masks being made run by run.

    Args:
        ops: The backend.
        call: The options.
        runs: The blocks; none for one piece.
        arrays: As the formula has them, with a value.
    """
    visible = call.visibility
    if call.dropout is not None:  # such a kernel has its own blocks
        return ops.fused_attention(call, arrays, causal=False)
    if not runs and (visible.everything or is_plain_causal(call, arrays)):
        return ops.fused_attention(call, arrays, causal=not visible.everything)
    keys = ops.shape(arrays["key"])[2]
    runs = runs or [Run(0, 1, ops.shape(arrays["query"])[2], 0, keys)]
    parts = []
    for run in runs:
        part = _of_run(arrays, run, keys)
        seen = visible.mask(ops, run.start, ops.shape(part["query"])[2], run.high - run.low,
                            beside=part["query"], column=run.low)  # fmt: skip
        mask = all_of(ops, [part.get("mask"), seen])
        part |= {} if mask is None else {"mask": mask}
        parts.append(ops.fused_attention(call, part, causal=False))
    return parts[0] if len(parts) == 1 else ops.concat(parts, axis=2)


def by_rows(
    ops: Any,
    call: AttentionCall,
    runs: Sequence[Run],
    arrays: Mapping[str, Array],
    formula: Formula,
) -> Arrays:
    """The results of the formula, one block of the queries of all heads at a time.

    Args:
        ops: The backend.
        call: The options.
        runs: The blocks.
        arrays: As the formula has them.
        formula: What is done with a block.
    """
    keys = arrays["key"].shape[2]
    parts = [
        _with_all_keys(
            ops,
            formula(call, _of_run(arrays, run, keys), Place(row=run.start, column=run.low)),
            run,
            keys,
        )
        for run in runs
    ]
    return {name: ops.concat([part[name] for part in parts], axis=2) for name in parts[0]}


def by_blocks(
    ops: Any,
    call: AttentionCall,
    runs: Sequence[Run],
    arrays: Mapping[str, Array],
    formula: Formula,
    results: Sequence[str],
) -> Arrays:
    """The results of the formula, one head of keys and one block of queries at a time.

    Args:
        ops: The backend, one with `map` and `narrow`.
        call: The options.
        runs: The blocks.
        arrays: As the formula has them.
        formula: What is done with a block.
        results: The names of what it gives.

    Returns:
        What the formula gives, for all heads and queries.
    """
    batch, heads, queries, _ = ops.shape(arrays["query"])
    _, shared, keys, _ = ops.shape(arrays["key"])
    count, group = batch * shared, heads // shared
    lengths = {"query": (1, group, queries), "key": (1, 1, keys), "value": (1, 1, keys)}
    mapped = {
        name: ops.reshape(arrays[name], (count, *length, arrays[name].shape[3]))
        for name, length in lengths.items()
        if name in arrays
    }
    constant = {name: x for name, x in arrays.items() if name not in lengths}

    def one_head(index: Any, own: Arrays) -> Arrays:
        at = index // shared
        head = (index - at * shared) * group
        for name in constant:
            own[name] = _narrowed(ops, own[name], 0, at, 1)
            own[name] = _narrowed(ops, own[name], 1, head, group)
        mine = replace(call, visibility=call.visibility.of_batch(ops, at))
        parts = [_one_run(ops, mine, run, own, Place(at, head), formula, dtypes) for run in runs]
        return (
            parts[0]
            if len(parts) == 1
            else {name: ops.concat([part[name] for part in parts], axis=2) for name in results}
        )

    dtypes = dict.fromkeys(results, arrays["query"].dtype)
    found = ops.map(one_head, count, mapped, constant, dtypes)
    return {name: ops.reshape(x, (batch, heads, queries, x.shape[4])) for name, x in found.items()}


def _one_run(
    ops: Any,
    call: AttentionCall,
    run: Run,
    arrays: Arrays,
    at: Place,
    formula: Formula,
    dtypes: Mapping[str, Any],
) -> Arrays:
    """The results (1, H/K, rows of the run, ..) of one head."""
    keys = arrays["key"].shape[2]
    own = _of_run(arrays, run, keys)
    if run.count == 1:
        return _with_all_keys(ops, formula(call, own, replace(at, row=run.start, column=run.low)),
                              run, keys)  # fmt: skip
    query = own.pop("query")
    _, group, length, width = query.shape
    query = ops.reshape(query, (1, group, run.count, run.rows, width))
    blocks = {"query": ops.permute_dims(query, (2, 0, 1, 3, 4))}

    def one_block(index: Any, part: Arrays) -> Arrays:
        first = index * run.rows
        for name in ("mask", "bias"):
            if name in part:
                part[name] = _narrowed(ops, part[name], 2, first, run.rows)
        place = replace(at, row=first + run.start, column=run.low)
        return _with_all_keys(ops, formula(call, part, place), run, keys)

    found = ops.map(one_block, run.count, blocks, own, dtypes)
    return {
        name: ops.reshape(ops.permute_dims(x, (1, 2, 0, 3, 4)), (1, group, length, x.shape[4]))
        for name, x in found.items()
    }


def _of_run(arrays: Mapping[str, Array], run: Run, keys: int) -> Arrays:
    """What of each array concerns the queries and the keys of a run."""
    part = dict(arrays)
    queries = part["query"].shape[2]
    if (run.start, run.stop) != (0, queries):
        for name in ("query", "mask", "bias"):
            if name in part and (name == "query" or not _is_one(part[name].shape[2])):
                part[name] = part[name][..., run.start : run.stop, :]
    if (run.low, run.high) != (0, keys):
        for name in ("key", "value"):
            if name in part:
                part[name] = part[name][..., run.low : run.high, :]
        for name in ("mask", "bias"):
            if name in part and not _is_one(part[name].shape[3]):
                part[name] = part[name][..., run.low : run.high]
    return part


def _with_all_keys(ops: Any, found: Arrays, run: Run, keys: int) -> Arrays:
    """`found`, its scores zero for the keys that the run does not see."""
    scores = found.get("scores")
    if scores is None or (run.low, run.high) == (0, keys):
        return found
    *lengths, _ = ops.shape(scores)
    device = ops.device(scores)
    zero = ops.asarray(0.0, dtype=scores.dtype, device=device)
    before, after = (
        [ops.broadcast_to(zero, (*lengths, n))] if n else [] for n in (run.low, keys - run.high)
    )
    return found | {"scores": ops.concat([*before, scores, *after], axis=3)}


def _narrowed(ops: Any, x: Array, axis: int, start: Any, length: int) -> Array:
    """`x` from `start` on, along an axis that is not there to be broadcast."""
    return x if _is_one(x.shape[axis]) else ops.narrow(x, start, length, axis=axis)


def _is_one(length: Any) -> bool:
    return is_known(length) and length == 1
