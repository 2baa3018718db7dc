"""Attention of all queries: by a kernel of the framework's, tile after tile, or in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymha.attention.features.base import adding_option
from anymha.attention.formula import Observer, formula
from anymha.attention.masks import TileOrigin
from anymha.attention.spec import AttentionSpec
from anymha.execution.loops import all_heads_by_tiles, each_head_by_tiles, fused_by_tiles
from anymha.execution.path import Path
from anymha.framework.protocol import Array, Ops

HEADS_FIRST = (0, 2, 1, 3)
FIRST = TileOrigin()


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
) -> tuple[Array, Array | None]:
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

    Returns:
        The context (B, T, H, d_v) in the dtype of the value, and the probabilities before dropout
        (B, H, T, S) or None.
    """
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
        results = written(ops, spec, path, arrays, observe, with_scores)
    context = ops.permute_dims(results["context"], HEADS_FIRST)  # [B, T, H, d_v]
    if context.dtype != value.dtype:
        context = ops.astype(context, value.dtype)
    return context, results.get("scores")


def _fused(ops: Ops, spec: AttentionSpec, path: Path, arrays: Mapping[str, Array]) -> Array:
    positions = spec.position_mask
    is_open = positions.left is None and positions.right is None
    own = spec.dropout is not None and not spec.dropout.native  # which has its own tiles
    whole = path.causal_kernel or (is_open and not (spec.features and adding_option(spec.features)))
    if not own and (path.tiles or not whole):
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
) -> dict[str, Array]:
    """The context (B, H, T, d_v) and the scores (B, H, T, S), as far as wanted, by the formula."""
    if path is None or not path.tiles:
        return formula(ops, spec, arrays, FIRST, observe, with_scores)

    def of_tile(
        spec: AttentionSpec, arrays: Mapping[str, Array], origin: TileOrigin
    ) -> dict[str, Array]:
        return formula(ops, spec, arrays, origin, observe, with_scores)

    if path.together:
        return all_heads_by_tiles(ops, spec, path.tiles, arrays, of_tile)
    wanted = ["context"] * ("value" in arrays) + ["scores"] * with_scores
    return each_head_by_tiles(ops, spec, path.tiles, arrays, of_tile, wanted)


def _of_rank_4(ops: Ops, x: Array) -> Array:
    """`x`, which broadcasts to (B, H, T, S), with all of its axes."""
    lacking = 4 - len(x.shape)
    return ops.reshape(x, (*(1,) * lacking, *ops.shape(x))) if lacking else x
