"""The training of the model, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from model import ATTENTION, WINDOWS, forward, initial
from text import LETTERS, batches

from anymha_torch import MultiHeadAttention


def train(
    steps: int, batch: int, length: int, tell: Callable[[str], None]
) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Train by Adam with a rate that falls to zero: the weights, and the attention layers."""
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(value))
        for name, value in initial(len(LETTERS)).items()
    }
    layers = [
        MultiHeadAttention(**ATTENTION, sliding_window=window, seed=number)
        for number, window in enumerate(WINDOWS)
    ]
    parameters = [*weights.values(), *(p for layer in layers for p in layer.parameters())]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for step, rows in enumerate(map(torch.from_numpy, batches(steps, batch, length)), 1):
        logits, _ = forward(torch, layers, weights, weights["token"][rows[:, :-1]])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (1, steps) or step % 100 == 0:
            tell(f"step {step}: {loss.item():.3f} nats a letter")
    return {name: value.detach().numpy() for name, value in weights.items()}, layers
