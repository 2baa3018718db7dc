"""Dropout by PyTorch's own generator, seeded anew for each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def seed_tensor(seed: Any) -> torch.Tensor:
    """A seed, an int of any size or a tensor, as an int64 tensor."""
    if isinstance(seed, torch.Tensor):
        return seed.to(torch.int64)
    if not -(2**63) <= seed < 2**63:
        seed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((), seed, dtype=torch.int64)


def native_keep_mask(seed: Any, shape: Sequence[int], keep: float, device: Any, /) -> torch.Tensor:
    """Booleans, True with probability `keep`; see `anymha.framework.protocol.Ops`."""
    if torch.compiler.is_compiling():
        return _seeded_uniform(seed_tensor(seed), shape, device) < keep
    return _uniform(int(seed), shape, device) < keep


def _uniform(seed: int, shape: Sequence[int], device: Any) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed % 2**63)
    return torch.rand(shape, generator=generator, device=device)


@torch.library.custom_op("anymha::seeded_uniform", mutates_args=())
def _seeded_uniform(seed: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """`_uniform` as one operation, since a compiled program cannot make a generator."""
    return _uniform(int(seed), shape, device)


@_seeded_uniform.register_fake
def _(seed, shape, device):
    return torch.empty(shape, device=device)
