"""PyTorch: a module and autograd."""

import numpy as np
import torch
from task import CALL, LEARNING_RATE, Run, Task
from torch import nn
from torch.nn import functional

import anymha
from anymha_torch import MultiHeadAttention


class Model(nn.Module):
    """The model, as a module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.dtype = getattr(torch, task.dtype)
        self.attention = MultiHeadAttention(**task.layer)
        for name, value in task.weights().items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def forward(self, letters: torch.Tensor, seed: int) -> torch.Tensor:
        """The logits of the next letters."""
        hidden = self.token.to(self.dtype)[letters] + self.position.to(self.dtype)
        mixed = hidden + self.attention(hidden.float(), seed=seed, **CALL)
        return mixed @ self.kernel.to(self.dtype) + self.bias.to(self.dtype)


def train(task: Task) -> Run:
    """Train with autograd."""
    model = Model(task).train()
    losses = []
    for letters, following, seed in task.batches():
        logits = model(torch.tensor(letters).long(), seed)
        loss = functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(following).long().flatten()
        )
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            # `torch.optim.SGD` may fuse the product and the difference, and round once less.
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        losses.append(loss.item())
    mine = {name: getattr(model, name).detach().numpy() for name in task.weights()}
    weights = {**mine, **anymha.get_weights(model.attention)}
    return Run(np.array(losses, "float32"), weights)
