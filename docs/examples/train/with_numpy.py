"""NumPy: gradients by hand around the layer's own pullback."""

import numpy as np
from task import CALL, LEARNING_RATE, Run, Task

from anymha_numpy import MultiHeadAttention


def train(task: Task) -> Run:
    """Train with `MultiHeadAttention.vjp`."""
    attention = MultiHeadAttention(**task.layer)
    weights = task.weights()
    losses = []
    for letters, following, seed in task.batches():
        token, position, kernel, bias = (w.astype(task.dtype) for w in weights.values())
        hidden = token[letters] + position  # (B, T, D)
        attended, pullback = attention.vjp(hidden.astype("float32"), seed=seed, **CALL)
        mixed = hidden + attended
        logits = mixed @ kernel + bias  # (B, T, letters)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        likelihood = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        target = np.eye(len(bias), dtype=task.dtype)[following]
        losses.append(-(likelihood * target).sum(axis=-1).mean())

        to_logits = (np.exp(likelihood) - target) / following.size
        to_mixed = to_logits @ kernel.T
        gradients = pullback(to_mixed.astype("float32"))
        to_hidden = to_mixed + gradients.pop("query")
        to_token = np.zeros_like(token)
        np.add.at(to_token, letters, to_hidden)
        gradients["token"] = to_token
        gradients["position"] = to_hidden.sum(axis=0)
        gradients["kernel"] = np.einsum("btd,btv->dv", mixed, to_logits)
        gradients["bias"] = to_logits.sum(axis=(0, 1))
        for held in (weights, attention.weights):
            for name, weight in held.items():
                weight -= LEARNING_RATE * gradients[name].astype("float32")
    return Run(np.array(losses, "float32"), {**weights, **attention.weights})
