"""Keras: a subclassed model, here with the torch backend and its training loop."""

from typing import Any

import keras
import numpy as np
import torch
from keras import ops
from task import CALL, LEARNING_RATE, Run, Task

import anymha
from anymha_keras import MultiHeadAttention


class Model(keras.Model):
    """The model, as a Keras model; Keras's own loss and variables."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.real = task.dtype
        self.attention = MultiHeadAttention(**task.layer)
        for name, value in task.weights().items():
            initial = keras.initializers.Constant(value)
            setattr(self, name, self.add_weight(value.shape, initial, name=name))

    def call(self, letters: Any, seed: Any) -> Any:
        """The logits of the next letters."""
        token, position, kernel, bias = (
            ops.cast(w, self.real) for w in (self.token, self.position, self.kernel, self.bias)
        )
        hidden = ops.take(token, letters, axis=0) + position
        attended = self.attention(ops.cast(hidden, "float32"), seed=seed, **CALL)
        mixed = hidden + ops.cast(attended, self.real)
        return mixed @ kernel + bias  # `ops.matmul` computes float64 in float32


def train(task: Task) -> Run:
    """Train with autograd on Keras's variables."""
    model = Model(task)
    losses = []
    for letters, following, seed in task.batches():
        logits = model(letters, seed=seed)
        each = ops.sparse_categorical_crossentropy(following, logits, from_logits=True)
        loss = each.mean()  # as `ops.matmul`, `ops.mean` has no float64
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            # `keras.optimizers.SGD` may fuse the product and the difference, as torch's does.
            for variable in model.trainable_variables:
                variable.assign(variable.value - LEARNING_RATE * variable.value.grad)
        losses.append(loss.item())
    mine = {name: ops.convert_to_numpy(getattr(model, name)) for name in task.weights()}
    weights = {**mine, **anymha.get_weights(model.attention)}
    return Run(np.array(losses, "float32"), weights)
