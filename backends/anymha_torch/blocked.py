"""Attention with dropout, block after block, forward and backward: what torch's kernels leave out.

Torch's own attention leaves its fused kernels as soon as probabilities are dropped, and keeps
several matrices of all pairs of positions. Here one block of rows of one head is computed at a
time, and once more for the gradients:

    P = softmax(scale * Q K^T),  D = keep * factor * P,  C = D V
    dV = D^T dC,  dD = keep * factor * dC V^T,  dS = P * (dD - rowsum(C * dC))
    dQ = scale * dS K,  dK = scale * dS^T Q

References:
    T. Dao et al., "FlashAttention" (2022), appendix B, for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from anymha.attention.dropout import Place
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionCall
from anymha.execution.attend import written
from anymha.execution.tiling import Run, plan_runs

BLOCK = 1 << 18
"""Logits in a block: so many stay in the cache."""

REMEMBERED = 1 << 25
"""Up to so many decisions what is kept are remembered for a backward pass, a byte for each."""


def attention(ops: Any, call: AttentionCall, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The context (B, H, T, d_v), differentiable in query, key and value.

    Args:
        ops: The ops of PyTorch.
        call: The options, with portable dropout and without features.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), "value" (B, K, S, d_v), maybe "mask"
            and "bias", which broadcast to (B, H, T, S); the bias gets no gradient.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    rest = {name: arrays[name] for name in ("mask", "bias") if name in arrays}
    return _Attention.apply(ops, call, rest, query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: Any, call: AttentionCall, rest: Any, *arrays: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = arrays
        blocks = _Blocks(ops, call, rest, query, key)
        batch, heads, queries, _ = query.shape
        context = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
        remember = query[..., 0].numel() * key.shape[2] <= REMEMBERED
        ctx.kept = {}
        for number, block in enumerate(blocks):
            weights, keep = blocks.weights(block), blocks.keep(block)
            if remember:
                ctx.kept[number] = keep
            torch.mm(weights.mul_(keep), value[block.columns], out=context[block.rows])
        ctx.call, ctx.rest, ctx.blocks = call, rest, blocks
        context.mul_(call.dropout.factor)  # pyright: ignore[reportOptionalMemberAccess]
        ctx.save_for_backward(*arrays, context)
        return context

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        *arrays, context = ctx.saved_tensors
        (cotangent,) = cotangents
        if torch.is_grad_enabled():  # somebody differentiates the gradients
            ops, call, rest = ctx.blocks.ops, ctx.call, ctx.rest
            return None, None, None, *_differentiable(ops, call, rest, arrays, cotangent)
        query, key, value = arrays
        call, blocks = ctx.call, ctx.blocks
        factor = call.dropout.factor
        balance = (context * cotangent).sum(-1, keepdim=True)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for number, block in enumerate(blocks):
            rows, columns = block.rows, block.columns
            weights = blocks.weights(block)
            keep = ctx.kept.pop(number, None)  # a second pass back makes it again
            keep = blocks.keep(block) if keep is None else keep
            scaled = cotangent[rows] * factor
            d_value[columns].addmm_((weights * keep).t(), scaled)
            d_weights = torch.mm(scaled, value[columns].t()).mul_(keep)
            d_logits = d_weights.sub_(balance[rows]).mul_(weights)
            torch.mm(d_logits, key[columns], out=d_query[rows])
            d_key[columns].addmm_(d_logits.t(), query[rows])
        return None, None, None, d_query.mul_(call.scale), d_key.mul_(call.scale), d_value


@dataclass(frozen=True)
class _Block:
    """Rows of one head, and the keys that they see.

    Args:
        rows: Where the rows are in (B, H, T, ..).
        columns: Where the keys are in (B, K, S, ..).
        at: The place of both.
    """

    rows: tuple[Any, ...]
    columns: tuple[Any, ...]
    at: Place
    run: Run


class _Blocks:
    """The blocks of a call, and what both passes compute of them."""

    def __init__(self, ops: Any, call: AttentionCall, rest: Any, query: Any, key: Any) -> None:
        self.ops, self.call, self.rest = ops, call, rest
        self.query, self.key = query.detach(), key.detach()
        visible, (_, _, queries, _), keys = call.visibility, query.shape, key.shape[2]
        most = BLOCK if call.memory_budget is None else min(BLOCK, call.memory_budget // 4)
        self.runs = plan_runs(visible, queries, keys, max(most, 1), unrolled=True)

    def __iter__(self) -> Iterator[_Block]:
        batch, heads = self.query.shape[:2]
        group = heads // self.key.shape[1]
        for b in range(batch):
            for h in range(heads):
                for run in self.runs:
                    columns = (b, h // group, slice(run.low, run.high))
                    for start in range(run.start, run.stop, run.rows):
                        rows = (b, h, slice(start, start + run.rows))
                        yield _Block(rows, columns, Place(b, h, start, run.low), run)

    def weights(self, block: _Block) -> torch.Tensor:
        """The probabilities before dropout, [rows, keys]."""
        query, key, at, run = self.query[block.rows], self.key[block.columns], block.at, block.run
        logits = torch.mm(query * self.call.scale, key.t())
        bias, mask = self._part("bias", block), self._part("mask", block)
        if bias is not None:
            logits += bias
        seen = self.call.visibility.of_batch(self.ops, at.batch).mask(
            self.ops, at.row, run.rows, run.high - run.low, beside=logits, column=run.low
        )
        mask = all_of(self.ops, [mask, None if seen is None else seen[0, 0]])
        if mask is None and bias is None:
            return torch.softmax(logits, -1)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        hidden = logits.amax(-1, keepdim=True) == -torch.inf
        return torch.softmax(logits, -1).masked_fill_(hidden, 0.0)

    def keep(self, block: _Block) -> torch.Tensor:
        """What is kept, [rows, keys] booleans."""
        shape = (1, 1, block.run.rows, block.run.high - block.run.low)
        return self.call.dropout.keep(self.ops, shape, block.at, beside=self.query)[0, 0]  # pyright: ignore

    def _part(self, name: str, block: _Block) -> torch.Tensor | None:
        """What of a mask or bias concerns a block: [rows or 1, keys or 1]."""
        if name not in self.rest:
            return None
        whole, run, at = self.rest[name], block.run, block.at
        spans = [(at.batch, 1), (at.head, 1), (at.row, run.rows), (run.low, run.high - run.low)]
        for axis, (start, length) in enumerate(spans):
            if whole.shape[axis] != 1:
                whole = whole.narrow(axis, start, length)
        return whole[0, 0]


def _differentiable(
    ops: Any, call: AttentionCall, rest: Any, arrays: Any, cotangent: torch.Tensor
) -> Any:
    """The gradients by the written formula, in one piece, which can be differentiated again."""
    named = dict(zip(("query", "key", "value"), arrays, strict=True))
    context = written(ops, call, None, {**named, **rest})["context"]
    return torch.autograd.grad(context, arrays, cotangent, create_graph=True)
