"""The layer for JAX: a frozen pytree whose leaves are the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, Unpack

import jax
import jax.export
import jax.numpy as jnp

from anymha.errors import ConfigError
from anymha.layer.cache import Cache, Memory
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    Call,
    CallOptions,
    NativeLayer,
    StaticOptions,
    takes_call,
    takes_options,
    typed_as,
)
from anymha.options.config import AttentionConfig, shown_options
from anymha_jax import float64, ops
from anymha_jax.initial import first_values


@dataclass(frozen=True, kw_only=True)
class JaxOptions(AttentionConfig):
    """What the constructor takes.

    Args:
        key: A JAX key that gives the initial values where `seed` is not given, traced or not.
    """

    key: jax.Array | None = None


@jax.tree_util.register_pytree_with_keys_class
class MultiHeadAttention(NativeLayer):
    """Multi-head attention as a frozen pytree; its leaves are the weights, in `weights`.

    The constructor takes the options of `anymha.AttentionConfig`, of which `query_features` is
    needed: a pytree cannot grow weights at a call; and a JAX `key`, which gives the initial values
    where `seed` is not given, traced or not: ``key=jax.random.key(7)`` gives those of ``seed=7``.
    The call takes the arguments of `anymha.multi_head_attention`; there `key` is the attention's,
    and dropout needs its `seed`, an int or a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from anymha_jax import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> jax.jit(lambda layer, x: layer(x))(layer, jnp.ones((1, 3, 8))).shape
        (1, 3, 8)
    """

    ops = ops
    weights: dict[str, jax.Array]
    _static: StaticOptions

    @takes_options(JaxOptions)
    def __init__(self, config: AttentionConfig, *, key: jax.Array | None = None) -> None:
        if config.query_features is None:
            raise ConfigError(
                "`query_features`, the width of the query input, is needed: a pytree cannot grow "
                "weights at a call. Received: None. Pass it to the constructor."
            )
        self._set(config, StaticOptions(config), _arrays(config, first_values(config, key)))

    def _set(
        self, config: AttentionConfig, static: StaticOptions, weights: Mapping[str, Any]
    ) -> Self:
        vars(self).update(config=config, weights=weights, plans=static.plans, _static=static)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"`{name}` cannot be set: the layer is frozen. "
            "Make another with `layer.with_canonical_weights(weights)` or `jax.tree.map`."
        )

    @typed_as[Call[jax.Array]]()
    @takes_call
    def __call__(
        self,
        query: jax.Array | Sequence[jax.Array],
        value: jax.Array | None = None,
        key: jax.Array | None = None,
        **call: Unpack[CallOptions[jax.Array]],
    ) -> Any:
        return multi_head_attention(
            ops, self._static.config, self.weights, query, value, key, plans=self.plans, **call
        )

    def canonical_weights(self) -> dict[str, jax.Array]:
        """The weights by canonical name."""
        return dict(self.weights)

    def _assigned(self, values: Mapping[str, Any]) -> Self:
        arrays = self.weights | _arrays(self.config, values)
        return object.__new__(type(self))._set(self.config, self._static, arrays)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = tuple(self.weights)
        leaves = [(jax.tree_util.DictKey(name), self.weights[name]) for name in names]
        return leaves, (self._static, names)

    def tree_flatten(self) -> tuple[Any, Any]:  # JAX would make the keys, and drop them
        return tuple(self.weights.values()), (self._static, tuple(self.weights))

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, leaves: Any) -> MultiHeadAttention:
        static, names = auxiliary
        weights = dict(zip(names, leaves, strict=True))
        return object.__new__(cls)._set(static.config, static, weights)

    def __repr__(self) -> str:
        shapes = {name: jnp.shape(leaf) for name, leaf in self.weights.items()}
        return f"MultiHeadAttention({shown_options(self.config)}, weights={shapes})"


for _kind in (Cache, Memory):
    # Arrays that are not there are None: Equinox and others put None for arrays, and back.
    _names = {field.name for field in dataclasses.fields(_kind)}
    _others = [*_names.difference(_kind.ARRAYS, _kind.STATIC)]  # no part of the value
    jax.tree_util.register_dataclass(_kind, _kind.ARRAYS, _kind.STATIC, _others)
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"anymha.{_kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )


def _arrays(config: AttentionConfig, values: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The values as JAX arrays of the config's dtype, float64 too in a float32 program."""
    with jax.enable_x64(config.dtype == "float64" or float64.exists()):
        dtype = ops.dtype(config.dtype)
        cast = {name: value.astype(dtype) for name, value in values.items()}
        return {n: x if ops.is_array(x) else ops.from_numpy(x) for n, x in cast.items()}
