"""Dropout by PyTorch's own generator: the default one, or seeded anew for a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from anymha_torch.seeds import seed_tensor


def native_keep_mask(seed: Any, shape: Sequence[int], keep: float, device: Any, /) -> torch.Tensor:
    """Booleans, True with probability `keep`; see `anymha.framework.protocol.Ops`.

    Without a seed the default generator of the device decides.
    """
    if seed is None:
        return torch.rand(shape, device=device) < keep
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


@contextmanager
def seeded(seed: Any, device: torch.device) -> Iterator[None]:
    """While it lasts, the default generator of the CPU or of a GPU gives the numbers of a seed."""
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(int(seed) % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)
