"""Attention tile after tile by oneDNN's products, where MKL uses half of the processor.

Torch's own kernel on a CPU multiplies by MKL; `anymha_torch.products` says where oneDNN is faster.
A tile has some rows of one head and all keys that they see. With the mask M, which is added:

    P = softmax(scale * Q K^T + M),  C = P V
    dV = P^T dC,  dS = P * (dC V^T - rowsum(C * dC)),  dQ = scale * dS K,  dK = scale * dS^T Q

oneDNN keeps code for each shape. So tiles have a few heights and widths, whatever the lengths of
the calls: keys are filled up with zeros, which nobody sees, and some rows are computed twice.

Each of torch's threads takes key heads of its own, with all rows that read them, and computes them
alone: where threads share the operations of a tile, they wait for each other after each.

References:
    T. Dao et al., "FlashAttention" (2022), appendix B, for the backward pass.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha_torch import products, tiled_dropout
from anymha_torch.sinks import BACKWARD, FORWARD

LEAST = 1 << 29
"""A head is no faster with fewer logits times its squared features, of which no more than"""

WIDTH = 64
"""so many count; nor is one with fewer queries or keys, or with fewer features, than"""

SHORTEST, NARROWEST = 256, 32
"""these."""

LONGEST = 1 << 15
"""A tile has all keys; with more of them it would not be small."""

MOST_THREADS = 8
"""More wait for Python."""

LEAST_OF_THREAD = 1 << 23
"""Logits of each of several threads: those of OpenMP take the cores for some milliseconds after
what they computed last, whether there is more for them or not.
"""

ROWS = 32
"""The rows of the smallest tile, which has the last rows."""

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
    """Whether a softmax written over its argument is the same."""
    logits = torch.linspace(-9.0, 9.0, 60_000, dtype=torch.float32, device="cpu").reshape(3, -1)
    expected = torch.softmax(logits, -1)
    return torch.equal(torch.softmax(logits, -1, out=logits), expected)


def is_shared_well(parts: int, logits: int) -> bool:
    """Whether threads have enough to do, and about as much each, of so many equal parts."""
    threads = torch.get_num_threads()
    if threads == 1:
        return True
    if logits < threads * LEAST_OF_THREAD:
        return False
    fits = threads <= MOST_THREADS and (parts % threads == 0 or parts >= 4 * threads)
    return fits and _can_compute_alone()


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
        wide = min(products.rounded(stop), size) if causal else size
        yield _Tile(stop - height, stop, start, wide, seen)
        start = stop


class _Part(NamedTuple):
    """A key head of a member of the batch, and what both passes compute of its tiles.

    Args:
        key: (S', d_k) in float32, filled up with zeros.
        value: (S', d_v), likewise, in the dtype that it is multiplied in.
        rows: (G, T, d_k), the scaled queries of the heads that read it, in float32.
    """

    key: torch.Tensor
    value: torch.Tensor
    rows: torch.Tensor


class _Call:
    """What tells which queries see which keys.

    Args:
        causal: Whether query i sees the keys up to i alone.
        mask: Added to the logits; broadcasts to (B, H, T, S).
        query: (B, H, T, d_k).
        key: (B, K, S, d_k).
    """

    def __init__(self, causal: bool, mask: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        self.causal, self.mask, self.query, self.key = causal, mask, query, key
        self.tiles = [*_tiles(causal, query.shape[2], key.shape[2])]

    def part(self, scale: float, value: torch.Tensor, dtype: Any, b: int, shared: int) -> _Part:
        """The part of a key head; the value (B, K, S, d_v) is cast to a dtype."""
        group = self.query.shape[1] // self.key.shape[1]
        rows = self.query[b, shared * group : (shared + 1) * group].to(torch.float32) * scale
        return _Part(
            _filled(self.key[b, shared], torch.float32), _filled(value[b, shared], dtype), rows
        )

    def weights(self, rows: torch.Tensor, keys: torch.Tensor, at: int, b: int, h: int) -> Any:
        """The probabilities of tile number `at`, NaN where a row sees nothing: (rows, keys)."""
        tile, part = self.tiles[at], self.mask
        logits = products.product(rows, keys)
        if self.causal:
            logits[:, tile.start : tile.seen].add_(_later(tile.stop - tile.start))
        if tile.keys > tile.seen:
            logits[:, tile.seen :].fill_(-math.inf)
        if part is not None:
            for axis, place in enumerate((b, h)):
                part = part.select(0, place if self.mask.shape[axis] > 1 else 0)
            if part.shape[0] > 1:
                part = part[tile.start : tile.stop]
            logits[:, : tile.seen].add_(part)
        return torch.softmax(logits, -1, out=logits)

    def each(self, compute: Callable[[int, int, range], None]) -> None:
        """Call `compute` with each member of the batch, each key head and the heads reading it."""
        (batch, shared), heads = self.key.shape[:2], self.query.shape[1]
        group = heads // shared
        parts = [(b, k, range(k * group, (k + 1) * group)) for b in range(batch)
                 for k in range(shared)]  # fmt: skip
        inferring, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

        def of_thread(own: Sequence[Any]) -> None:
            with torch.inference_mode(inferring), torch.no_grad():
                for part in own:
                    compute(*part)

        if threads == 1:
            return of_thread(parts)
        pool = _pool(threads, os.getpid())
        for done in [pool.submit(of_thread, parts[at::threads]) for at in range(threads)]:
            done.result()


@cache
def _later(height: int) -> torch.Tensor:
    """What hides from each row of a tile the rows after it, (height, height)."""
    with torch.inference_mode(False):
        hidden = torch.full((height, height), -math.inf, dtype=torch.float32, device="cpu")
        return hidden.triu_(1)


def _filled(array: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Keys or values (S, d) in a dtype, filled up with zeros."""
    made = array.new_empty((products.rounded(array.shape[0]), array.shape[1]), dtype=dtype)
    made[: array.shape[0]] = array
    made[array.shape[0] :] = 0.0
    return made


def _forward(
    scale: float, causal: bool, mask: torch.Tensor | None, *arrays: torch.Tensor
) -> torch.Tensor:
    query, key, value = arrays
    call, whole = _Call(causal, mask, query, key), query.dtype is torch.float32
    context = tiled_dropout.heads_last((*query.shape[:3], value.shape[3]), query)

    def compute(b: int, shared: int, readers: range) -> None:
        part = call.part(scale, value, query.dtype, b, shared)
        for h, rows, made in zip(readers, part.rows, context[b, readers.start :], strict=False):
            for at, tile in enumerate(call.tiles):
                keys, values = part.key[: tile.keys], part.value[: tile.keys]
                weights = call.weights(rows[tile.start : tile.stop], keys, at, b, h)
                if whole:
                    mixed = products.product(weights, values.t())
                else:
                    mixed = torch.mm(weights.to(query.dtype), values)
                made[tile.new : tile.stop] = mixed[tile.new - tile.start :]

    call.each(compute)
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
        if torch.is_grad_enabled():  # somebody differentiates the gradients
            spec = AttentionSpec(scale, (), position_mask(causal, None, 0))
            rest = {} if mask is None else {"bias": mask.to(torch.float32)}
            needed = ctx.needs_input_grad[3:]
            found = tiled_dropout.differentiable_in_float32(spec, rest, arrays, cotangent, needed)
        elif tiled_dropout.is_watched(cotangent):
            options: Any = {"attn_mask": mask, "scale": scale}
            context, lse = FORWARD(*arrays, is_causal=causal, **options)
            found = BACKWARD(cotangent, *arrays, context, lse, 0.0, causal, **options)
        else:
            found = _backward(scale, causal, mask, arrays, context, cotangent)
        return None, None, None, *found


def _backward(
    scale: float, causal: bool, mask: torch.Tensor | None, arrays: Sequence[torch.Tensor],
    context: torch.Tensor, cotangent: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    query, key, value = arrays
    call, keys_own = _Call(causal, mask, query, key), key.shape[2]
    found = [tiled_dropout.heads_last(x.shape, x) for x in arrays]
    seen, empty = _rows_that_see(mask), None
    if seen is not None:
        cotangent = torch.where(seen, cotangent, 0.0)
        empty = ~seen.expand(*query.shape[:3], 1)

    def compute(b: int, shared: int, readers: range) -> None:
        part = call.part(scale, value, torch.float32, b, shared)
        of_key, of_value = torch.zeros_like(part.key), torch.zeros_like(part.value)
        for h, scaled in zip(readers, part.rows, strict=True):
            above = cotangent[b, h].to(torch.float32).contiguous()
            balance = (context[b, h] * above).sum(-1, keepdim=True)
            for at, tile in enumerate(call.tiles):
                rows, twice = slice(tile.start, tile.stop), tile.new - tile.start
                keys, values, own = part.key[: tile.keys], part.value[: tile.keys], scaled[rows]
                weights = call.weights(own, keys, at, b, h)
                if empty is not None:
                    weights.masked_fill_(empty[b, h, rows], 0.0)
                if twice:
                    weights[:twice] = 0.0
                of_value[: tile.keys].add_(products.product(weights.t(), above[rows].t()))
                d_logits = products.product(above[rows], values)
                d_logits.sub_(balance[rows]).mul_(weights)
                of_query = products.product(d_logits, keys.t())[twice:]
                found[0][b, h, tile.new : tile.stop] = of_query
                of_key[: tile.keys].add_(products.product(d_logits.t(), own.t()))
        found[1][b, shared], found[2][b, shared] = of_key[:keys_own], of_value[:keys_own]

    call.each(compute)
    found[0] *= scale
    return found


@lru_cache(1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that compute alone, kept for later calls; a forked process needs its own."""
    return ThreadPoolExecutor(threads, "anymha", _compute_alone)


def _compute_alone() -> None:
    """Let what this thread calls use no further thread of OpenMP; that is the thread's own."""
    torch.get_num_threads()  # which sets it at a thread's first call
    ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


@cache
def _can_compute_alone() -> bool:
    """Whether a thread may do so here."""

    def tried() -> bool:
        try:
            _compute_alone()
        except (AttributeError, OSError):  # another build of torch
            return False
        return torch.get_num_threads() == 1

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(tried).result()
