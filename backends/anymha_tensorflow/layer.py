"""The layer for TensorFlow: a `tf.Module` that holds the variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import numpy as np
import tensorflow as tf

from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    NativeLayer,
    as_stored,
    check_name,
    first_weights,
    held_together,
    takes_call,
    takes_options,
    weights_of_projections,
)
from anymha.layer.plan import Plans
from anymha.options.config import PROJECTIONS, AttentionConfig, shown_options
from anymha_tensorflow import ops

F = TypeVar("F", bound=Callable[..., Any])


def _not_converted(function: F) -> F:
    """The function as one that AutoGraph calls as it is."""
    return tf.autograph.experimental.do_not_convert(function)


class _Holder(tf.Module):
    """Holds the weights of a projection or a feature, so that they get their canonical names."""

    kernel: tf.Variable | None = None
    bias: tf.Variable | None = None


class MultiHeadAttention(NativeLayer, tf.Module):
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

    ops = ops

    @takes_options(AttentionConfig)
    def __init__(self, config: AttentionConfig) -> None:
        check_name(
            type(self),
            config.name,
            "letters, digits and underscores, a letter first, as names of TensorFlow's scopes are",
        )
        super().__init__(name=config.name)
        self.config = config
        self.plans = Plans()
        self.query, self.key, self.value, self.output = (_Holder(n) for n in PROJECTIONS)
        for name in config.further_projections:
            setattr(self, name, _Holder(name))
        for name, parts in held_together(config.feature_weights).items():
            setattr(self, name, _Holder(name) if parts else None)
        if config.query_features is not None:
            self._build()

    @classmethod
    def valid_name(cls, name: str) -> str:
        """The name as an identifier, as a `tf.Module` has it."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
        return plain if re.match("[A-Za-z]", plain) else f"layer_{plain}"

    def __repr__(self) -> str:
        options = shown_options(dataclasses.replace(self.config, name=None))
        return f"<MultiHeadAttention {self.name!r} {options}>"

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.query.kernel is not None

    def _build(self, widths: Sequence[int] = ()) -> dict[str, tf.Variable]:
        with tf.init_scope():  # also at a first call inside tf.function
            self._make_variables(first_weights(self.config, widths, ops.draw_seed, ops))
        return self.canonical_weights()

    def _make_variables(self, values: Mapping[str, np.ndarray]) -> None:
        dtype = ops.dtype(self.config.dtype).as_numpy_dtype
        tensors = {name: value.astype(dtype) for name, value in values.items()}
        for name, tensor in tensors.items():
            path = f"{self.name}/{name.replace('.', '/')}"
            first, _, part = name.partition(".")
            holder = getattr(self, first) if part else self
            setattr(holder, part or first, tf.Variable(tf.constant(tensor), name=path))

    # AutoGraph has nothing to convert here, and would keep `int` from giving Python's integers.
    @_not_converted
    @takes_call
    def __call__(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions[Any]]
    ) -> Any:
        weights = self.canonical_weights() or self._build
        plans = self.plans if tf.executing_eagerly() else None
        return multi_head_attention(
            ops, self.config, weights, query, value, key, plans=plans, **call
        )

    def canonical_weights(self) -> dict[str, tf.Variable]:
        """The variables by canonical name."""
        return weights_of_projections(self)

    def _places(self) -> dict[str, Any]:
        return {name: id(variable) for name, variable in self.canonical_weights().items()}

    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        mine = self.canonical_weights()
        if not mine:
            self._make_variables(values)
        for name in mine.keys() & values.keys():
            dtype = mine[name].dtype.as_numpy_dtype
            mine[name].assign(as_stored(ops, values[name], dtype))
        return self
