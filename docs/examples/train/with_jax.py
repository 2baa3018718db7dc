"""JAX: a pytree of weights, and `jax.value_and_grad` under `jax.jit`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task import CALL, LEARNING_RATE, Run, Task

import anymha
from anymha_jax import MultiHeadAttention


def loss(
    weights: dict[str, Any], attention: Any, letters: Any, following: Any, seed: Any, dtype: Any
) -> Any:
    """The mean cross-entropy; the attention is any layer on JAX's arrays."""
    token, position, kernel, bias = (
        weights[name].astype(dtype) for name in ("token", "position", "kernel", "bias")
    )
    hidden = token[letters] + position
    mixed = hidden + attention(hidden.astype(jnp.float32), seed=seed, **CALL)
    likelihood = jax.nn.log_softmax(mixed @ kernel + bias)
    return -jnp.take_along_axis(likelihood, following[..., None], axis=-1).mean()


def train(task: Task) -> Run:
    """Train with `jax.value_and_grad`."""
    # Whether JAX has float64 is fixed for the whole model, or it would compute it in float32.
    with jax.enable_x64(task.reproducible):
        model = (jax.tree.map(jnp.asarray, task.weights()), MultiHeadAttention(**task.layer))

        @jax.jit
        def gradients(model: Any, letters: Any, following: Any, seed: Any) -> Any:
            return jax.value_and_grad(lambda m: loss(*m, letters, following, seed, task.dtype))(
                model
            )

        losses = []
        for batch in task.batches():
            value, gradient = gradients(model, *batch)
            # Outside of `jit`, in which XLA fuses product and difference and rounds once less.
            model = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, model, gradient)
            losses.append(value)
        weights, attention = model
    weights = {name: np.asarray(w) for name, w in weights.items()}
    return Run(np.array(losses, "float32"), {**weights, **anymha.get_weights(attention)})
