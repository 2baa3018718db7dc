"""Flax: an `nnx.Module`, `nnx.value_and_grad` under `nnx.jit`, and an `nnx.Optimizer`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from task import LEARNING_RATE, Run, Task
from with_jax import loss

import anymha
from anymha_flax import MultiHeadAttention


class Model(nnx.Module):
    """The model, as a module."""

    def __init__(self, task: Task) -> None:
        values = task.weights()
        self.token, self.position, self.kernel, self.bias = (
            nnx.Param(jnp.asarray(value)) for value in values.values()
        )
        self.attention = MultiHeadAttention(**task.layer, rngs=nnx.Rngs(0))

    def weights(self) -> dict[str, Any]:
        """The arrays around the layer."""
        names = ("token", "position", "kernel", "bias")
        return {name: getattr(self, name)[...] for name in names}


def train(task: Task) -> Run:
    """Train with an `nnx.Optimizer`."""
    with jax.enable_x64(task.reproducible):
        model = Model(task)
        optimizer = nnx.Optimizer(model, optax.sgd(LEARNING_RATE), wrt=nnx.Param)

        @nnx.jit
        def gradients(model: Model, letters: Any, following: Any, seed: Any) -> Any:
            def of_model(m: Model) -> Any:
                return loss(m.weights(), m.attention, letters, following, seed, task.dtype)

            return nnx.value_and_grad(of_model)(model)

        losses = []
        for batch in task.batches():
            value, gradient = gradients(model, *batch)
            optimizer.update(model, gradient)  # outside of `jit`, as in JAX
            losses.append(value)
        weights = {name: np.asarray(w) for name, w in model.weights().items()}
        weights |= anymha.get_weights(model.attention)
    return Run(np.array(losses, "float32"), weights)
