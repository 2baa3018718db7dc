"""The layer for JAX: a frozen pytree whose leaves are the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from anymha.errors import ConfigError
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import CallOptions, checked_values, takes_call, takes_options
from anymha.layer.weights import constrained_weights, regularization_loss
from anymha.options.config import AttentionConfig
from anymha_jax import float64, ops
from anymha_jax.initial import first_values


@jax.tree_util.register_pytree_with_keys_class
class MultiHeadAttention:
    """Multi-head attention as a frozen pytree; its leaves are the weights, in `weights`.

    The constructor takes the options of `anymha.AttentionConfig`, of which `query_features` is
    needed: a pytree cannot grow weights at a call; and a JAX `key`, which gives the initial values
    where `seed` is not given, traced or not: ``key=jax.random.key(7)`` gives those of ``seed=7``.
    The call takes the arguments of `anymha.multi_head_attention`; there `key` is the
    attention's, and dropout needs its `seed`, an int or a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from anymha_jax import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> jax.jit(lambda layer, x: layer(x))(layer, jnp.ones((1, 3, 8))).shape
        (1, 3, 8)
    """

    config: AttentionConfig
    weights: dict[str, jax.Array]
    _static: AttentionConfig

    @takes_options
    def __init__(self, config: AttentionConfig, *, key: jax.Array | None = None) -> None:
        if config.query_features is None:
            raise ConfigError(
                "`query_features`, the width of the query input, is needed: a pytree cannot grow "
                "weights at a call. Received: None. Pass it to the constructor."
            )
        self._set(config, _arrays(config, first_values(config, key)))

    def _set(self, config: AttentionConfig, weights: Mapping[str, Any]) -> Self:
        # Layers that differ in nothing but their first values have one tree structure.
        static = config if config.seed is None else dataclasses.replace(config, seed=None)
        vars(self).update(config=config, weights=weights, _static=static)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"`{name}` cannot be set: the layer is frozen. "
            "Make another with `layer.with_canonical_weights(weights)` or `jax.tree.map`."
        )

    @takes_call
    def __call__(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> Any:
        return multi_head_attention(ops, self.config, self.weights, query, value, key, **call)

    def regularization_loss(self) -> jax.Array:
        """The sum of the penalties of all weights; 0 where there are no regularisers."""
        return regularization_loss(ops, self.config, self.weights)

    def apply_constraints(self) -> MultiHeadAttention:
        """A new layer of the same options, its weights what the constraints want."""
        changed = constrained_weights(ops, self.config, self.weights)
        return object.__new__(type(self))._set(self.config, self.weights | changed)

    def canonical_weights(self) -> dict[str, jax.Array]:
        """The weights by canonical name."""
        return dict(self.weights)

    def with_canonical_weights(self, weights: Mapping[str, np.ndarray]) -> MultiHeadAttention:
        """A new layer of the same options with these weights.

        Raises:
            WeightsError: names or shapes do not fit.
        """
        values = checked_values(self.config, self.weights, weights)
        new = object.__new__(type(self))
        return new._set(self.config, _arrays(self.config, values))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = tuple(self.weights)
        leaves = [(jax.tree_util.DictKey(name), self.weights[name]) for name in names]
        return leaves, (self._static, names)

    def tree_flatten(self) -> tuple[Any, Any]:  # JAX would make the keys, and drop them
        return tuple(self.weights.values()), (self._static, tuple(self.weights))

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, leaves: Any) -> MultiHeadAttention:
        config, names = auxiliary
        return object.__new__(cls)._set(config, dict(zip(names, leaves, strict=True)))

    def __repr__(self) -> str:
        shapes = {name: jnp.shape(leaf) for name, leaf in self.weights.items()}
        return f"MultiHeadAttention({self.config}, weights={shapes})"


def _arrays(config: AttentionConfig, values: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values as JAX arrays of the config's dtype, float64 too in a float32 program."""
    with jax.enable_x64(config.dtype == "float64" or float64.exists()):
        dtype = ops.dtype(config.dtype)
        return {name: jnp.asarray(value.astype(dtype)) for name, value in values.items()}
