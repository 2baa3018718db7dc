"""The layer for TensorFlow: a `tf.Module` that holds the variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import tensorflow as tf

from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    checked_values,
    first_weights,
    takes_call,
    takes_options,
)
from anymha.layer.weights import constrained_weights, regularization_loss
from anymha.options.config import PROJECTIONS, AttentionConfig
from anymha_tensorflow import ops


class _Projection(tf.Module):
    """Holds one kernel and, maybe, one bias, so that they get their canonical names."""

    kernel: tf.Variable | None = None
    bias: tf.Variable | None = None


class MultiHeadAttention(tf.Module):
    """Multi-head attention as a `tf.Module`.

    The constructor takes the options of `anymha.AttentionConfig`, the call the arguments of
    `anymha.multi_head_attention`. Without `query_features` the variables are made at the
    first call.

    Example:
        >>> import tensorflow as tf
        >>> from anymha_tensorflow import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> tuple(layer(tf.ones((1, 3, 8))).shape)
        (1, 3, 8)
    """

    @takes_options
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(name=config.name)
        self.config = config
        self.query, self.key, self.value, self.output = (_Projection(n) for n in PROJECTIONS)
        if config.query_features is not None:
            self._build()

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.query.kernel is not None

    def _build(self, widths: Sequence[int] = ()) -> dict[str, tf.Variable]:
        with tf.init_scope():  # also at a first call inside tf.function
            self._hold(first_weights(self.config, widths, ops.draw_seed, ops))
        return self.canonical_weights()

    def _hold(self, values: Mapping[str, np.ndarray]) -> None:
        dtype = ops.dtype(self.config.dtype).as_numpy_dtype
        tensors = {name: value.astype(dtype) for name, value in values.items()}
        for name, tensor in tensors.items():
            projection, _, part = name.partition(".")
            variable = tf.Variable(tf.constant(tensor), name=f"{self.name}/{projection}/{part}")
            setattr(getattr(self, projection), part, variable)

    # AutoGraph has nothing to convert here, and would keep `int` from giving Python's integers.
    @takes_call
    @tf.autograph.experimental.do_not_convert
    def __call__(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> Any:
        weights = self.canonical_weights() or self._build
        return multi_head_attention(ops, self.config, weights, query, value, key, **call)

    def regularization_loss(self) -> tf.Tensor:
        """The sum of the penalties of all weights; 0 where there are no regularisers."""
        return regularization_loss(ops, self.config, self.canonical_weights())

    def apply_constraints(self) -> MultiHeadAttention:
        """This layer, its weights changed to what the constraints want."""
        mine = self.canonical_weights()
        for name, value in constrained_weights(ops, self.config, mine).items():
            mine[name].assign(value)
        return self

    def canonical_weights(self) -> dict[str, tf.Variable]:
        """The variables by canonical name."""
        named = {
            f"{name}.{part}": getattr(getattr(self, name), part)
            for name in PROJECTIONS
            for part in ("kernel", "bias")
        }
        return {name: variable for name, variable in named.items() if variable is not None}

    def with_canonical_weights(self, weights: Mapping[str, np.ndarray]) -> MultiHeadAttention:
        """This layer, now with these weights, in its own dtype.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        mine = self.canonical_weights()
        values = checked_values(self.config, mine, weights)
        if not mine:
            self._hold(values)
        for name, variable in mine.items():
            variable.assign(values[name].astype(variable.dtype.as_numpy_dtype))
        return self
