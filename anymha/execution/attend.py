"""Attention of all queries: by a kernel of the framework's, tile after tile, or in one piece."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anymha.attention.formula import Observer, formula
from anymha.attention.masks import TileOrigin
from anymha.attention.segments import separated
from anymha.attention.spec import AttentionSpec
from anymha.execution.loops import (
    all_heads_by_tiles,
    each_head_by_tiles,
    fused_by_tiles,
    made_by_tiles,
)
from anymha.execution.path import Path
from anymha.framework.protocol import Array, Ops

HEADS_FIRST = (0, 2, 1, 3)
FIRST = TileOrigin()


Attended = tuple[Array, Array | None, Array | None]
"""The context (B, T, H, d_v) in the dtype of the value; the probabilities before dropout
(B, H, T, S), or None; and the logs of the softmax's denominators (B, H, T), or None."""


def attend(
    ops: Ops,
    spec: AttentionSpec,
    path: Path,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    observe: Observer | None = None,
    with_scores: bool = False,
    tiled: Mapping[str, Array] | None = None,
    segments: tuple[Array, Array] | None = None,
    with_lse: bool = False,
) -> Attended:
    """The context of each query head, and the probabilities.

    Args:
        ops: The backend.
        spec: The options.
        path: The way to take, from `anymha.execution.path.choose_path`.
        query: (B, T, H, d_k) in the accumulation dtype; in half precision if the path is `narrow`.
        key: (B, S, K, d_k); K divides H, and query head h reads key head ``h // (H // K)``.
        value: (B, S, K, d_v).
        mask: Booleans that broadcast to (B, H, T, S), True = may attend.
        bias: Added to the logits; broadcasts to (B, H, T, S).
        observe: Receives the name and the value of each stage; None for no observer.
        with_scores: Whether the probabilities are wanted; the context has the same bits without.
        tiled: What the features need in a tile, by name: arrays that broadcast to (B, H, T, S).
        segments: Integers (1 or B, T) and (1 or B, S): queries see keys of their own segment.
        with_lse: Whether the logs of the softmax's denominators are wanted; no kernel gives them.
    """
    lost = None
    if segments is not None:
        own, query, key, value, lost = separated(ops, *segments, query, key, value)
        tiled = {**(tiled or {}), **own}
    arrays = {
        "query": ops.permute_dims(query, HEADS_FIRST),  # [B, H, T, d_k]
        "key": ops.permute_dims(key, HEADS_FIRST),  # [B, K, S, d_k]
        "value": ops.permute_dims(value, HEADS_FIRST),  # [B, K, S, d_v]
    }
    if mask is not None:
        arrays["mask"] = mask if len(mask.shape) == 4 else _of_rank_4(ops, mask)
    if bias is not None:
        arrays["bias"] = _of_rank_4(ops, bias)
    if tiled:
        arrays |= tiled
    if path.kernel == "fused":
        results = {"context": _fused(ops, spec, path, arrays)}
        if with_scores:  # in a second pass, so that the context has the same bits
            del arrays["value"]
            if path.narrow and not (path.for_scores and path.for_scores.narrow):
                for name in ("query", "key"):
                    arrays[name] = ops.astype(arrays[name], ops.float32)
            results |= written(ops, spec, path.for_scores, arrays, observe, True)
    else:
        results = written(ops, spec, path, arrays, observe, with_scores, with_lse)
    context = ops.permute_dims(results["context"], HEADS_FIRST)  # [B, T, H, d_v]
    if context.dtype != value.dtype:
        context = ops.astype(context, value.dtype)
    if lost is None and not with_lse:
        return context, results.get("scores"), None
    return _with_lse(ops, context, results, lost)


def _with_lse(
    ops: Ops, context: Array, results: Mapping[str, Array], lost: Array | None
) -> Attended:
    """What `attend` gives; NaN for the queries (B, T) that are lost, as `separated` tells."""
    scores, lse = results.get("scores"), results.get("lse")
    if lse is not None:
        lse = ops.reshape(lse, ops.shape(lse)[:3])
    if lost is not None:
        batch, queries = ops.shape(lost)
        context = ops.where(ops.reshape(lost, (batch, queries, 1, 1)), math.nan, context)
        rows = ops.reshape(lost, (batch, 1, queries))
        lse = None if lse is None else ops.where(rows, math.nan, lse)
        if scores is not None:
            scores = ops.where(ops.reshape(lost, (batch, 1, queries, 1)), math.nan, scores)
    return context, scores, lse


def context_of(ops: Ops, spec: AttentionSpec, path: Path, arrays: Mapping[str, Array]) -> Array:
    """The context (B, H, T, d_v) of arrays that have their heads first, as `formula` takes them."""
    if path.kernel == "fused":
        return _fused(ops, spec, path, arrays)
    return written(ops, spec, path, arrays)["context"]


def _fused(ops: Ops, spec: AttentionSpec, path: Path, arrays: Mapping[str, Array]) -> Array:
    own = spec.dropout is not None and not spec.dropout.native  # which has its own tiles
    if not own and (path.tiles or not path.causal_kernel):
        positions = spec.position_mask
        special = "segments" in arrays or spec.features
        is_open = positions.left is None and positions.right is None
        if path.tiles or not is_open or (special and made_by_tiles(spec, arrays)):
            return fused_by_tiles(ops, spec, path.tiles, arrays)
    kernel: Any = ops.capabilities.fused_attention
    return kernel(spec, arrays, causal=path.causal_kernel)


def written(
    ops: Ops,
    spec: AttentionSpec,
    path: Path | None,
    arrays: Mapping[str, Array],
    observe: Observer | None = None,
    with_scores: bool = False,
    with_lse: bool = False,
) -> dict[str, Array]:
    """Context (B, H, T, d_v), scores (B, H, T, S), lse (B, H, T, 1), as wanted, by the formula."""
    if path is None or not path.tiles:
        return formula(ops, spec, arrays, FIRST, observe, with_scores, with_lse)

    def of_tile(
        spec: AttentionSpec, arrays: Mapping[str, Array], origin: TileOrigin
    ) -> dict[str, Array]:
        return formula(ops, spec, arrays, origin, observe, with_scores, with_lse)

    if path.together:
        return all_heads_by_tiles(ops, spec, path.tiles, arrays, of_tile)
    wanted = ["context"] * ("value" in arrays) + ["scores"] * with_scores + ["lse"] * with_lse
    return each_head_by_tiles(ops, spec, path.tiles, arrays, of_tile, wanted)


def _of_rank_4(ops: Ops, x: Array) -> Array:
    """`x`, which broadcasts to (B, H, T, S), with all of its axes."""
    lacking = 4 - len(x.shape)
    return ops.reshape(x, (*(1,) * lacking, *ops.shape(x))) if lacking else x
