"""Attention tile after tile: the loops around the written formula and around fused kernels.

References:
    M. Rabe, C. Staats, "Self-attention Does Not Need O(n^2) Memory" (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anymha.attention.features.base import adding_option, bias_of
from anymha.attention.masks import TileOrigin, all_of
from anymha.attention.segments import same_segment
from anymha.attention.spec import AttentionSpec
from anymha.execution.tiling import Tiles
from anymha.framework.dtypes import working_dtype
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known

Arrays = dict[str, Array]
OWN = ("query", "key", "value")
"""The arrays with a width; all others broadcast to (B, H, T, S)."""

Formula = Callable[[AttentionSpec, Mapping[str, Array], TileOrigin], Arrays]
"""Gives the results of a tile that begins at an origin."""


def made_by_tiles(spec: AttentionSpec, arrays: Mapping[str, Array]) -> bool:
    """Whether a kernel needs a mask or a bias of all pairs that only a tile at a time may have."""
    return "segments" in arrays or bool(spec.features and adding_option(spec.features))


def fused_by_tiles(
    ops: Ops, spec: AttentionSpec, tiles: Sequence[Tiles], arrays: Mapping[str, Array]
) -> Array:
    """The context (B, H, T, d_v) by the framework's kernel, masks made tile by tile.

    Without tiles it is made in one piece. `arrays` are those of the formula, with a value. The
    kernel keeps a tile's mask for differentiation: what is `made_by_tiles`, which has all pairs of
    queries and keys together, is made again instead.
    """
    kernel: Any = ops.capabilities.fused_attention
    keys = ops.shape(arrays["key"])[2]
    tiles = tiles or [Tiles(0, 1, ops.shape(arrays["query"])[2], 0, keys)]

    def of_tile(each: Tiles, part: Arrays) -> Array:
        length = ops.shape(part["query"])[2]
        origin = TileOrigin(query=each.start, key=each.key_start)
        seen = spec.position_mask.mask(
            ops, origin, length, each.key_stop - each.key_start, like=part["query"]
        )
        mask = all_of(ops, [part.get("mask"), seen, same_segment(part)])
        part |= {} if mask is None else {"mask": mask}
        own = bias_of(spec.features, ops, part, part["query"]) if spec.features else None
        if own is not None:
            part["bias"] = own + part["bias"] if "bias" in part else own
        return kernel(spec, part, causal=False)

    def again(each: Tiles, part: Arrays) -> Array:
        mapped = {n: ops.reshape(part[n], (1, *ops.shape(part[n]))) for n in OWN}
        constant = {n: x for n, x in part.items() if n not in OWN}
        loop: Any = ops.capabilities.loop
        whole = loop(
            lambda index, own: {"context": of_tile(each, own)},
            1, mapped, constant, {"context": part["value"].dtype},
        )["context"]  # fmt: skip
        return ops.reshape(whole, ops.shape(whole)[1:])

    tiles = [one for each in tiles for one in each.single()]
    keeping = len(tiles) == 1 or not ops.capabilities.loop or not made_by_tiles(spec, arrays)
    make = of_tile if keeping else again
    parts = [make(each, _of_tiles(arrays, each, keys)) for each in tiles]
    return parts[0] if len(parts) == 1 else ops.concat(parts, axis=2)


def all_heads_by_tiles(
    ops: Ops,
    spec: AttentionSpec,
    tiles: Sequence[Tiles],
    arrays: Mapping[str, Array],
    formula: Formula,
) -> Arrays:
    """The results of the formula, one tile of the queries of all heads at a time."""
    keys = arrays["key"].shape[2]
    parts = [
        _with_all_keys(
            ops,
            formula(
                spec,
                _of_tiles(arrays, each, keys),
                TileOrigin(query=each.start, key=each.key_start),
            ),
            each,
            keys,
        )
        for each in tiles
    ]
    return {name: ops.concat([part[name] for part in parts], axis=2) for name in parts[0]}


def each_head_by_tiles(
    ops: Ops,
    spec: AttentionSpec,
    tiles: Sequence[Tiles],
    arrays: Mapping[str, Array],
    formula: Formula,
    results: Sequence[str],
) -> Arrays:
    """The results of the formula, one key head and one tile of its queries at a time.

    Args:
        ops: The backend, one with `loop` and `narrow`.
        spec: The options.
        tiles: The tiles.
        arrays: As the formula has them.
        formula: What is done with a tile.
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
        mine = replace(spec, position_mask=spec.position_mask.of_batch(ops, at))
        origin = TileOrigin(at, head)
        parts = [_one_group(ops, mine, each, own, origin, formula, dtypes) for each in tiles]
        if len(parts) == 1:
            return parts[0]
        return {name: ops.concat([part[name] for part in parts], axis=2) for name in results}

    dtypes = dict.fromkeys(results, working_dtype(ops, arrays["query"]))
    loop: Any = ops.capabilities.loop
    whole = loop(one_head, count, mapped, constant, dtypes)
    return {name: ops.reshape(x, (batch, heads, queries, x.shape[4])) for name, x in whole.items()}


def _one_group(
    ops: Ops,
    spec: AttentionSpec,
    tiles: Tiles,
    arrays: Arrays,
    origin: TileOrigin,
    formula: Formula,
    dtypes: Mapping[str, Any],
) -> Arrays:
    """The results (1, H/K, queries of the tiles, ..) of one key head."""
    keys = arrays["key"].shape[2]
    own = _of_tiles(arrays, tiles, keys)
    if tiles.count == 1:
        first = replace(origin, query=tiles.start, key=tiles.key_start)
        return _with_all_keys(ops, formula(spec, own, first), tiles, keys)
    query = own.pop("query")
    _, group, length, width = query.shape
    query = ops.reshape(query, (1, group, tiles.count, tiles.height, width))
    mapped = {"query": ops.permute_dims(query, (2, 0, 1, 3, 4))}

    def one_tile(index: Any, part: Arrays) -> Arrays:
        first = index * tiles.height
        for name in part.keys() - {*OWN}:
            part[name] = _narrowed(ops, part[name], 2, first, tiles.height)
        start = replace(origin, query=first + tiles.start, key=tiles.key_start)
        return _with_all_keys(ops, formula(spec, part, start), tiles, keys)

    loop: Any = ops.capabilities.loop
    whole = loop(one_tile, tiles.count, mapped, own, dtypes)
    return {
        name: ops.reshape(ops.permute_dims(x, (1, 2, 0, 3, 4)), (1, group, length, x.shape[4]))
        for name, x in whole.items()
    }


def _of_tiles(arrays: Mapping[str, Array], tiles: Tiles, keys: int) -> Arrays:
    """The part of each array that belongs to the queries and the keys of some tiles."""
    part = dict(arrays)
    queries = part["query"].shape[2]
    if (tiles.start, tiles.stop) != (0, queries):
        for name in part.keys() - {"key", "value"}:
            if name == "query" or not _is_one(part[name].shape[2]):
                part[name] = part[name][..., tiles.start : tiles.stop, :]
    if (tiles.key_start, tiles.key_stop) != (0, keys):
        for name in ("key", "value"):
            if name in part:
                part[name] = part[name][..., tiles.key_start : tiles.key_stop, :]
        for name in part.keys() - {*OWN}:
            if not _is_one(part[name].shape[3]):
                part[name] = part[name][..., tiles.key_start : tiles.key_stop]
    return part


def _with_all_keys(ops: Ops, results: Arrays, tiles: Tiles, keys: int) -> Arrays:
    """`results`, the scores being zero for the keys that the tiles leave out."""
    scores = results.get("scores")
    if scores is None or (tiles.key_start, tiles.key_stop) == (0, keys):
        return results
    *lengths, _ = ops.shape(scores)
    device = ops.device(scores)
    zero = ops.asarray(0.0, dtype=scores.dtype, device=device)
    before, after = (
        [ops.broadcast_to(zero, (*lengths, n))] if n else []
        for n in (tiles.key_start, keys - tiles.key_stop)
    )
    return results | {"scores": ops.concat([*before, scores, *after], axis=3)}


def _narrowed(ops: Ops, x: Array, axis: int, start: Any, length: int) -> Array:
    """`x` from `start` on, along an axis that is not there to be broadcast."""
    if _is_one(x.shape[axis]):
        return x
    return ops.capabilities.narrow(x, start, length, axis=axis)


def _is_one(length: Any) -> bool:
    return is_known(length) and length == 1
