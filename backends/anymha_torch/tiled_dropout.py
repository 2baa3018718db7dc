"""Attention with dropout, tile after tile, forward and backward: what torch's kernels leave out.

Torch's own attention leaves its fused kernels as soon as probabilities are dropped, and keeps
several matrices of all pairs of positions. Here one tile of rows of one head is computed at a
time, and once more for the gradients:

    P = softmax(scale * Q K^T),  D = keep * factor * P,  C = D V
    dV = D^T dC,  dD = keep * factor * dC V^T,  dS = P * (dD - rowsum(C * dC))
    dQ = scale * dS K,  dK = scale * dS^T Q

References:
    T. Dao et al., "FlashAttention" (2022), appendix B, for the backward pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._C._functorch import (  # pyright: ignore
    is_batchedtensor,
    is_legacy_batchedtensor,
)

from anymha.attention.masks import TileOrigin, all_of
from anymha.attention.spec import AttentionSpec
from anymha.execution.attend import written
from anymha.execution.path import AttentionShape, fits
from anymha.execution.tiling import Tiles, plan_tiles
from anymha_torch import products

TILE = 1 << 18
"""Logits in a tile: so many stay in the cache."""

REMEMBERED = 1 << 25
"""Up to so many decisions what is kept are remembered for a backward pass, a byte for each."""


def why_whole(spec: AttentionSpec, shape: AttentionShape, /) -> str | None:
    """Why no tiles are wanted, or None where they are."""
    few = fits(backend(), spec, shape)
    return "the probabilities are few enough to be kept" if few else None


@cache
def backend() -> Any:
    """The functions of the backend."""
    return importlib.import_module("anymha_torch.ops")  # which imports this module


def heads_last(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A new array (B, H, length, width) that lies in memory as (B, length, H, width)."""
    batch, heads, length, width = shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def attention(spec: AttentionSpec, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The context (B, H, T, d_v), differentiable in query, key and value.

    Args:
        spec: The options, with portable dropout and without features.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), "value" (B, K, S, d_v), maybe "mask"
            and "bias", which broadcast to (B, H, T, S); the bias gets no gradient.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    rest = {name: arrays[name] for name in ("mask", "bias") if name in arrays}
    return _Attention.apply(backend(), spec, rest, query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: Any, spec: AttentionSpec, rest: Any, *arrays: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = arrays
        tiles, multiplied = _Tiles(ops, spec, rest, query, key), multiplied_by(spec, key)
        context = heads_last((*query.shape[:3], value.shape[3]), query)
        remember = query[..., 0].numel() * key.shape[2] <= REMEMBERED
        ctx.kept = {}
        for number, tile in enumerate(tiles):
            weights, keep = tiles.weights(tile, multiplied), tiles.keep(tile)
            if remember:
                ctx.kept[number] = keep
            multiplied(weights.mul_(keep), value[tile.columns].t(), into=context[tile.rows])
        ctx.spec, ctx.rest, ctx.tiles = spec, rest, tiles
        context.mul_(spec.dropout.factor)  # pyright: ignore[reportOptionalMemberAccess]
        ctx.save_for_backward(*arrays, context)
        return context

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        *arrays, context = ctx.saved_tensors
        (cotangent,) = cotangents
        if torch.is_grad_enabled():  # somebody differentiates the gradients
            return (
                None,
                None,
                None,
                *differentiable(ctx.spec, ctx.rest, arrays, cotangent, ctx.needs_input_grad[3:]),
            )
        with torch.autocast(cotangent.device.type, enabled=False):
            return None, None, None, *_gradients(ctx, arrays, context, cotangent)


def _gradients(
    ctx: Any, arrays: Sequence[torch.Tensor], context: torch.Tensor, cotangent: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value."""
    query, key, value = arrays
    spec, tiles = ctx.spec, ctx.tiles
    factor, multiplied = spec.dropout.factor, multiplied_by(spec, key)
    d_query, d_key, d_value = map(torch.zeros_like, arrays)
    if is_watched(cotangent):  # of several cotangents there are several gradients of each
        multiplied, zero = _by_copies, torch.zeros_like(cotangent).sum()
        d_query, d_key, d_value = d_query + zero, d_key + zero, d_value + zero
    balance = (context * cotangent).sum(-1, keepdim=True)
    for number, tile in enumerate(tiles):
        rows, columns = tile.rows, tile.columns
        weights = tiles.weights(tile, multiplied)
        keep = ctx.kept.pop(number, None)  # a second pass back makes it again
        keep = tiles.keep(tile) if keep is None else keep
        scaled = cotangent[rows] * factor
        multiplied((weights * keep).t(), scaled.t(), added_to=d_value[columns])
        d_weights = multiplied(scaled, value[columns]).mul_(keep)
        d_logits = d_weights.sub_(balance[rows]).mul_(weights)
        multiplied(d_logits, key[columns].t(), into=d_query[rows])
        multiplied(d_logits.t(), query[rows].t(), added_to=d_key[columns])
    return d_query.mul_(spec.scale), d_key.mul_(spec.scale), d_value


def is_watched(cotangent: torch.Tensor) -> bool:
    """Whether a pass back is transformed, autocast or watched, or several are computed at once."""
    several = is_batchedtensor(cotangent) or is_legacy_batchedtensor(cotangent)
    return several or not products.is_plain()


def multiplied_by(spec: AttentionSpec, key: torch.Tensor) -> Callable[..., Any]:
    """What gives ``x . y^T`` for tiles over keys (B, K, S, d), or puts it into or adds it to some.

    oneDNN where it is faster, for lengths of which there are few, since it keeps code for each. In
    the narrow tiles of causality it is not.
    """
    if spec.position_mask.is_open and products.is_right_for(key):
        return _by_onednn
    return _by_torch


def _by_torch(x: torch.Tensor, y: torch.Tensor, into: Any = None, added_to: Any = None) -> Any:
    if added_to is not None:
        return added_to.addmm_(x, y.t())
    return torch.mm(x, y.t(), out=into)


def _by_onednn(x: torch.Tensor, y: torch.Tensor, into: Any = None, added_to: Any = None) -> Any:
    made = products.product(x.contiguous() if not x.t().is_contiguous() else x, y)
    return _kept(made, into, added_to)


def _by_copies(x: torch.Tensor, y: torch.Tensor, into: Any = None, added_to: Any = None) -> Any:
    """Without what several at once do not have."""
    return _kept(torch.mm(x, y.t()), into, added_to)


def _kept(made: torch.Tensor, into: Any, added_to: Any) -> Any:
    if added_to is not None:
        return added_to.add_(made)
    return made if into is None else into.copy_(made)


@dataclass(frozen=True)
class _Tile:
    """Rows of one head, and the keys that they see.

    Args:
        rows: Where the rows are in (B, H, T, ..).
        columns: Where the keys are in (B, K, S, ..).
        at: Where both begin.
        tiles: The tiles among which it is.
    """

    rows: tuple[Any, ...]
    columns: tuple[Any, ...]
    at: TileOrigin
    tiles: Tiles


class _Tiles:
    """The tiles of a call, and what both passes compute of them."""

    def __init__(self, ops: Any, spec: AttentionSpec, rest: Any, query: Any, key: Any) -> None:
        self.ops, self.spec, self.rest = ops, spec, rest
        self.query, self.key = query.detach(), key.detach()
        visible, (_, _, queries, _), keys = spec.position_mask, query.shape, key.shape[2]
        most = TILE if spec.memory_budget is None else min(TILE, spec.memory_budget // 4)
        self.tiles = plan_tiles(visible, queries, keys, max(most, 1), eager_loop=True)

    def __iter__(self) -> Iterator[_Tile]:
        batch, heads = self.query.shape[:2]
        group = heads // self.key.shape[1]
        for b in range(batch):
            for h in range(heads):
                for tiles in self.tiles:
                    columns = (b, h // group, slice(tiles.key_start, tiles.key_stop))
                    for start in range(tiles.start, tiles.stop, tiles.height):
                        rows = (b, h, slice(start, start + tiles.height))
                        origin = TileOrigin(b, h, start, tiles.key_start)
                        yield _Tile(rows, columns, origin, tiles)

    def weights(self, tile: _Tile, multiplied: Callable[..., Any]) -> torch.Tensor:
        """The probabilities before dropout, [rows, keys]; `multiplied` as `multiplied_by` gives."""
        query, key = self.query[tile.rows], self.key[tile.columns]
        at, tiles = tile.at, tile.tiles
        logits = multiplied(query * self.spec.scale, key)
        bias, mask = self._part("bias", tile), self._part("mask", tile)
        if bias is not None:
            logits += bias
        seen = self.spec.position_mask.of_batch(self.ops, at.batch).mask(
            self.ops, at, tiles.height, tiles.key_stop - tiles.key_start, like=logits
        )
        mask = all_of(self.ops, [mask, None if seen is None else seen[0, 0]])
        if mask is None and bias is None:
            return torch.softmax(logits, -1)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        hidden = logits.amax(-1, keepdim=True) == -torch.inf
        return torch.softmax(logits, -1).masked_fill_(hidden, 0.0)

    def keep(self, tile: _Tile) -> torch.Tensor:
        """What is kept, [rows, keys] booleans."""
        shape = (1, 1, tile.tiles.height, tile.tiles.key_stop - tile.tiles.key_start)
        return self.spec.dropout.keep(self.ops, shape, tile.at, like=self.query)[0, 0]  # pyright: ignore

    def _part(self, name: str, tile: _Tile) -> torch.Tensor | None:
        """What of a mask or bias concerns a tile: [rows or 1, keys or 1]."""
        if name not in self.rest:
            return None
        whole, tiles, at = self.rest[name], tile.tiles, tile.at
        keys = (tiles.key_start, tiles.key_stop - tiles.key_start)
        spans = [(at.batch, 1), (at.head, 1), (at.query, tiles.height), keys]
        for axis, (start, length) in enumerate(spans):
            if whole.shape[axis] != 1:
                whole = whole.narrow(axis, start, length)
        return whole[0, 0]


def in_one_piece(spec: AttentionSpec, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The context (B, H, T, d_v) by the written formula in float32, rounded once."""
    heads = ("query", "key", "value")
    wide = {name: x.to(torch.float32) if name in heads else x for name, x in arrays.items()}
    return written(backend(), spec, None, wide)["context"].to(arrays["query"].dtype)


def differentiable_in_float32(
    spec: AttentionSpec, rest: Any, arrays: Any, cotangent: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """`differentiable` of half-precision arrays too, whose gradients are rounded once."""
    wide = [x.to(torch.float32) for x in arrays]
    gradients = differentiable(spec, rest, wide, cotangent.to(torch.float32), needed)
    return [None if g is None else g.to(x.dtype) for g, x in zip(gradients, arrays, strict=True)]


def differentiable(
    spec: AttentionSpec, rest: Any, arrays: Any, cotangent: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradients by the written formula, in one piece, which can be differentiated again.

    `arrays` are query, key and value, and the sinks where there are such.
    """
    named = dict(zip(("query", "key", "value", "sinks"), arrays, strict=False))
    context = written(backend(), spec, None, {**named, **rest})["context"]
    wanted = [x for x, need in zip(arrays, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(context, wanted, cotangent, create_graph=True))
    return [next(gradients) if need else None for need in needed]
