"""Seeds of dropout, an int or a tensor on any device, where they are wanted."""

from __future__ import annotations

from typing import Any

import torch

from anymha.errors import ArgumentError
from anymha_torch.modes import is_traced


def seed_tensor(seed: Any) -> torch.Tensor:
    """A seed, an int of any size or a tensor, as an int64 tensor."""
    return on_device(seed, seed.device if isinstance(seed, torch.Tensor) else torch.device("cpu"))


def on_device(seed: Any, device: torch.device) -> torch.Tensor:
    """A seed, an int of any size or a tensor, as an int64 scalar on a device.

    Raises:
        ArgumentError: a tensor of the meta device, which has no value.
    """
    if isinstance(seed, torch.Tensor):
        if seed.is_meta and device.type != "meta":
            raise ArgumentError(
                "`seed` must have a value. Received: a tensor on the meta device. Pass an int."
            )
        if seed.device == device or not seed.is_cpu or is_traced():
            return seed.to(device, torch.int64)
        seed = int(seed)  # a copy from the CPU would wait
    if not -(2**63) <= seed < 2**63:
        seed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((), seed, dtype=torch.int64, device=device)
