"""Equinox: an `eqx.Module`, and `eqx.filter_value_and_grad` under `eqx.filter_jit`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from task import LEARNING_RATE, Run, Task
from with_jax import loss

import anymha
from anymha_equinox import MultiHeadAttention


class Model(eqx.Module):
    """The model, as a module."""

    weights: dict[str, jax.Array]
    attention: MultiHeadAttention

    def __init__(self, task: Task) -> None:
        self.weights = jax.tree.map(jnp.asarray, task.weights())
        self.attention = MultiHeadAttention(**task.layer)


def train(task: Task) -> Run:
    """Train with `eqx.filter_value_and_grad` and `eqx.apply_updates`."""
    with jax.enable_x64(task.reproducible):
        model = Model(task)

        @eqx.filter_jit
        @eqx.filter_value_and_grad
        def gradients(model: Model, letters: Any, following: Any, seed: Any) -> Any:
            return loss(model.weights, model.attention, letters, following, seed, task.dtype)

        losses = []
        for batch in task.batches():
            # As an array the step's seed is traced; `filter_jit` compiles anew for each int.
            value, gradient = gradients(model, *map(jnp.asarray, batch))
            updates = jax.tree.map(lambda g: -LEARNING_RATE * g, gradient)
            model = eqx.apply_updates(model, updates)  # outside of `jit`, as in JAX
            losses.append(value)
        weights = {name: np.asarray(w) for name, w in model.weights.items()}
        weights |= anymha.get_weights(model.attention)
    return Run(np.array(losses, "float32"), weights)
