"""Attention tile after tile by oneDNN's products, where MKL uses half of the processor.

Torch's own kernel on a CPU multiplies by MKL; `anymha_torch.products` says where oneDNN is faster.
A tile has some rows of one head and all keys that they see. With the mask M, which is added:

    P = softmax(scale * Q K^T + M),  C = P V
    dV = P^T dC,  dS = P * (dC V^T - rowsum(C * dC)),  dQ = scale * dS K,  dK = scale * dS^T Q

oneDNN keeps code for each shape. So tiles have a few heights and widths, whatever the lengths of
the calls: keys are filled up with zeros, which nobody sees, and some rows are computed twice.

References:
    T. Dao et al., "FlashAttention" (2022), appendix B, for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha_torch import products, tiled_dropout

LEAST = 1 << 28
"""A head is no faster with fewer logits times its squared features, of which no more than"""

WIDTH = 64
"""so many count; nor is one with fewer queries or keys than"""

ROWS = 64
"""the rows of the smallest tile, which has the last rows."""

TILE = 1 << 18
"""Logits in a tile, for more would leave the cache; but each has"""

LOWEST, HIGHEST, CAUSAL_HIGHEST = 128, 512, 256
"""so many rows at least, and so many at most: higher ones are wider where there is causality."""

NOTE = "attention: by oneDNN, which has AVX-512 on this processor, and MKL has not"


def is_right() -> bool:
    """Whether torch has the products, and a softmax that may be written over its argument."""
    return products.is_right() and _overwrites()


@cache
def _overwrites() -> bool:
    logits = torch.linspace(-9.0, 9.0, 60_000, dtype=torch.float32, device="cpu").reshape(3, -1)
    expected = torch.softmax(logits, -1)
    return torch.equal(torch.softmax(logits, -1, out=logits), expected)


def attention(
    scale: float, causal: bool, mask: torch.Tensor | None, *arrays: torch.Tensor
) -> torch.Tensor:
    """The context (B, H, T, d_v), differentiable twice in the arrays.

    Args:
        scale: The factor of the logits.
        causal: Whether query i sees the keys up to i alone; then there is no mask.
        mask: Added to the logits; broadcasts to (B, H, T, S).
        *arrays: Query (B, H, T, d_k), key (B, K, S, d_k) and value (B, K, S, d_v), in float32 or
            in bfloat16, whose logits are float32.
    """
    if paths.explaining:
        paths.report_note(NOTE)
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        return _Attention.apply(scale, causal, mask, *arrays)
    return _forward(scale, causal, mask, *arrays)


class _Tile(NamedTuple):
    """Rows of a head, and the keys before a common end.

    Args:
        start: The first row.
        stop: The row after the last.
        new: The first row that no tile before has.
        keys: How many keys there are, those that are filled up included.
        seen: How many of them any row sees.
    """

    start: int
    stop: int
    new: int
    keys: int
    seen: int


class _Head(NamedTuple):
    """A key head of a member of the batch, and the heads that read it.

    Args:
        batch: The member.
        shared: The key head.
        heads: The heads.
        key: (S', d_k) in float32, filled up with zeros.
        value: (S', d_v), likewise.
    """

    batch: int
    shared: int
    heads: range
    key: torch.Tensor
    value: torch.Tensor


def _tiles(causal: bool, queries: int, keys: int) -> Iterator[_Tile]:
    """The tiles of a head."""
    size, start = products.rounded(keys), 0
    highest = min(CAUSAL_HIGHEST if causal else HIGHEST, max(TILE // size, LOWEST))
    highest = 1 << (highest.bit_length() - 1)
    while start < queries:
        left = queries - start
        height = min(1 << (max(left, ROWS).bit_length() - 1), highest)
        stop = min(start + height, queries)
        seen = min(stop, keys) if causal else keys
        yield _Tile(
            stop - height, stop, start, min(products.rounded(stop), size) if causal else size, seen
        )
        start = stop


def _heads(key: torch.Tensor, value: torch.Tensor, heads: int, dtype: Any) -> Iterator[_Head]:
    """Key heads in turn, in arrays that are used again; values in a dtype."""
    batch, shared, keys, width = key.shape
    size, group = products.rounded(keys), heads // shared
    own = key.new_zeros((size, width), dtype=torch.float32)
    other = value.new_zeros((size, value.shape[3]), dtype=dtype)
    for b in range(batch):
        for k in range(shared):
            own[:keys], other[:keys] = key[b, k], value[b, k]
            yield _Head(b, k, range(k * group, (k + 1) * group), own, other)


def _weights(
    scale: float, causal: bool, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
    tile: _Tile, place: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The probabilities of a tile (rows, keys), NaN where a row sees nothing; the scaled queries.

    `key` has the tile's keys, `place` tells the member of the batch and the head.
    """
    rows = query[tile.start : tile.stop].to(torch.float32) * scale
    logits = products.product(rows, key)
    if causal:
        own = logits[:, tile.start : tile.seen]
        own.add_(own.new_full(own.shape, -math.inf).triu_(1))
    elif mask is not None:
        part = mask
        for axis, at in enumerate(place):
            part = part.select(0, at if mask.shape[axis] > 1 else 0)
        if part.shape[0] > 1:
            part = part[tile.start : tile.stop]
        logits[:, : tile.seen] += part
    if tile.keys > tile.seen:
        logits[:, tile.seen :] = -math.inf
    return torch.softmax(logits, -1, out=logits), rows


def _forward(
    scale: float, causal: bool, mask: torch.Tensor | None, *arrays: torch.Tensor
) -> torch.Tensor:
    query, key, value = arrays
    batch, heads, queries, _ = query.shape
    tiles = [*_tiles(causal, queries, key.shape[2])]
    context = tiled_dropout.heads_last((batch, heads, queries, value.shape[3]), query)
    for head in _heads(key, value, heads, query.dtype):
        for h in head.heads:
            place, own = (head.batch, h), query[head.batch, h]
            for tile in tiles:
                keys, values = head.key[: tile.keys], head.value[: tile.keys]
                weights, _ = _weights(scale, causal, mask, own, keys, tile, place)
                if query.dtype is torch.float32:
                    made = products.product(weights, values.t())
                else:
                    made = torch.mm(weights.to(query.dtype), values)
                context[(*place, slice(tile.new, tile.stop))] = made[tile.new - tile.start :]
    seen = _rows_that_see(mask)
    return context if seen is None else torch.where(seen, context, 0.0)


def _rows_that_see(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The rows, (B or 1, H or 1, T or 1, 1), that see anything; None where all do."""
    if mask is None:
        return None
    seen = (mask != -math.inf).any(-1, keepdim=True)
    return None if seen.all() else seen


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scale: float, causal: bool, mask: Any, *arrays: torch.Tensor
    ) -> torch.Tensor:
        context = _forward(scale, causal, mask, *arrays)
        ctx.scale, ctx.causal = scale, causal
        ctx.save_for_backward(mask, *arrays, context)
        return context

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        mask, *arrays, context = ctx.saved_tensors
        scale, causal, (cotangent,) = ctx.scale, ctx.causal, cotangents
        if torch.is_grad_enabled() or not products.is_plain():  # they may be differentiated
            spec = AttentionSpec(scale, (), position_mask(causal, None, 0))
            rest = {} if mask is None else {"bias": mask.to(torch.float32)}
            needed = ctx.needs_input_grad[3:]
            found = tiled_dropout.differentiable_in_float32(spec, rest, arrays, cotangent, needed)
            return None, None, None, *found
        return None, None, None, *_backward(scale, causal, mask, arrays, context, cotangent)


def _backward(
    scale: float, causal: bool, mask: torch.Tensor | None, arrays: Sequence[torch.Tensor],
    context: torch.Tensor, cotangent: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    query, key, value = arrays
    batch, heads, queries, _ = query.shape
    found = [tiled_dropout.heads_last(x.shape, x) for x in arrays]
    tiles = [*_tiles(causal, queries, key.shape[2])]
    seen = _rows_that_see(mask)
    if seen is not None:
        cotangent = torch.where(seen, cotangent, 0.0)
    for head in _heads(key, value, heads, torch.float32):
        of_key, of_value = torch.zeros_like(head.key), torch.zeros_like(head.value)
        for h in head.heads:
            place, own = (head.batch, h), query[head.batch, h]
            empty = None if seen is None else ~seen.expand(batch, heads, queries, 1)[place]
            for tile in tiles:
                rows, twice = slice(tile.start, tile.stop), tile.new - tile.start
                keys, values = head.key[: tile.keys], head.value[: tile.keys]
                weights, scaled = _weights(scale, causal, mask, own, keys, tile, place)
                if empty is not None:
                    weights.masked_fill_(empty[rows], 0.0)
                weights[:twice] = 0.0
                above = cotangent[(*place, rows)].to(torch.float32).contiguous()
                balance = (context[(*place, rows)] * above).sum(-1, keepdim=True)
                of_value[: tile.keys] += products.product(weights.t(), above.t())
                d_logits = products.product(above, values).sub_(balance).mul_(weights)
                of_query = products.product(d_logits, keys.t())[twice:].mul_(scale)
                found[0][(*place, slice(tile.new, tile.stop))] = of_query
                of_key[: tile.keys] += products.product(d_logits.t(), scaled.t())
        for array, of_head in zip(found[1:], (of_key, of_value), strict=True):
            array[head.batch, head.shared] = of_head[: key.shape[2]]
    return found
