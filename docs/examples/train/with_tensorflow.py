"""TensorFlow: a `tf.Module`, a gradient tape, and `tf.function`."""

import numpy as np
import tensorflow as tf
from task import CALL, LEARNING_RATE, Run, Task

import anymha
from anymha_tensorflow import MultiHeadAttention


class Model(tf.Module):
    """The model, as a module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.dtype = task.dtype
        self.attention = MultiHeadAttention(**task.layer)
        values = task.weights()
        self.token, self.position, self.kernel, self.bias = map(tf.Variable, values.values())

    def __call__(self, letters: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The logits of the next letters."""
        rows = tf.one_hot(letters, self.token.shape[0], dtype=self.dtype)
        token, position, kernel, bias = (
            tf.cast(w, self.dtype) for w in (self.token, self.position, self.kernel, self.bias)
        )
        hidden = tf.tensordot(rows, token, 1) + position
        attended = self.attention(tf.cast(hidden, tf.float32), seed=seed, **CALL)
        return tf.tensordot(hidden + tf.cast(attended, self.dtype), kernel, 1) + bias


def train(task: Task) -> Run:
    """Train with a `tf.GradientTape` inside `tf.function`."""
    model = Model(task)

    @tf.function
    def step(letters: tf.Tensor, following: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(following, model(letters, seed))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(LEARNING_RATE * gradient)
        return loss

    losses = [step(*map(tf.constant, batch)).numpy() for batch in task.batches()]
    mine = {name: getattr(model, name).numpy() for name in task.weights()}
    weights = {**mine, **anymha.get_weights(model.attention)}
    return Run(np.array(losses, "float32"), weights)
