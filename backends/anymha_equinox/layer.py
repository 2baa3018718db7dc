"""The layer for Equinox: an `eqx.Module` whose array leaves are the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack, overload

import equinox as eqx
import jax

from anymha.framework.registry import get_backend
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    NativeLayer,
    PlainCall,
    StaticOptions,
    as_stored,
    held_together,
    mode_of_training,
    takes_call,
    takes_options,
    weights_of_projections,
)
from anymha.layer.plan import Plans
from anymha.options.config import PROJECTIONS, AttentionConfig

_jax = get_backend("jax")


class _Projection(eqx.Module):
    """Holds one kernel and, maybe, one bias, so that they get their canonical names."""

    kernel: jax.Array
    bias: jax.Array | None


class _Weights(eqx.Module):
    """Holds the weights of features, as attributes at their canonical names."""

    arrays: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name != "arrays" and name in self.arrays:
            return self.arrays[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class EquinoxOptions(AttentionConfig):
    """What the constructor takes.

    Args:
        key: A JAX key that gives the initial values where `seed` is not given.
        inference: Whether dropout is off; `eqx.nn.inference_mode` sets it.
    """

    key: jax.Array | None = None
    inference: bool = False


class MultiHeadAttention(NativeLayer, eqx.Module):
    """Multi-head attention as an `eqx.Module`.

    The constructor takes the options of `anymha.AttentionConfig`, of which `query_features` is
    needed, and of Equinox

    * `key`: gives the initial values where `seed` is not given; ``key=jax.random.key(7)`` gives
      those of ``seed=7``.
    * `inference`: whether dropout is off; `eqx.nn.inference_mode` sets it.

    The call takes the arguments of `anymha.multi_head_attention`, where ``training=None``
    means ``not layer.inference``, and Equinox's `inference`, which goes before the layer's own.
    There `key` is the attention's; dropout takes its key as `seed`, or as `key`, where
    Equinox's layers have it. The weights are leaves at
    their canonical names (``layer.query.kernel``). ``layer.config`` holds no `seed`, so that
    layers of different first values are of one tree structure.

    Differs from:
        `equinox.nn.MultiheadAttention`: inputs have a batch axis, where Equinox has one example
        under `jax.vmap`; the call is ``(query, value, key)``; scores may be asked for; biases
        are there by default.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from anymha_equinox import MultiHeadAttention
        >>> layer = MultiHeadAttention(2, 4, query_features=8, key=jax.random.key(0))
        >>> eqx.filter_jit(layer)(jnp.ones((1, 3, 8)), use_causal_mask=True).shape
        (1, 3, 8)
    """

    query: _Projection
    key: _Projection
    value: _Projection
    output: _Projection
    of_features: _Weights
    inference: bool  # a leaf, so that `eqx.tree_at` can set it
    options: StaticOptions = eqx.field(static=True)
    ops: ClassVar[Any] = _jax.ops

    @takes_options(EquinoxOptions)
    def __init__(
        self, config: AttentionConfig, *, key: jax.Array | None = None, inference: bool = False
    ) -> None:
        weights = _jax.layer(**config.to_dict(), key=key).weights
        projections = {
            name: _Projection(weights[f"{name}.kernel"], weights.get(f"{name}.bias"))
            for name in config.projections
        }
        for name in PROJECTIONS:
            setattr(self, name, projections.pop(name))
        own: dict[str, Any] = {**projections}
        for name, parts in held_together(config.feature_weights).items():
            held = {part: weights[f"{name}.{part}"] for part in parts}
            own[name] = _Weights(held) if parts else weights[name]
        self.of_features = _Weights(own)
        self.inference = inference
        self.options = StaticOptions(config)

    def __getattr__(self, name: str) -> Any:
        """A feature's weights, ``layer.query_norm.scale``."""
        if name == "of_features":  # not there yet
            raise AttributeError(name)
        return getattr(self.of_features, name)

    @property
    def config(self) -> AttentionConfig:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The options, without the seed."""
        return self.options.config

    @property
    def plans(self) -> Plans:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The plans of the calls."""
        return self.options.plans

    @overload
    def __call__(
        self, query: jax.Array | Sequence[jax.Array], value: jax.Array | None = None,
        key: jax.Array | None = None, *, inference: bool | None = None,
        **call: Unpack[PlainCall[jax.Array]],
    ) -> jax.Array: ...  # fmt: skip

    @overload
    def __call__(
        self, query: jax.Array | Sequence[jax.Array], value: jax.Array | None = None,
        key: jax.Array | None = None, *, inference: bool | None = None,
        **call: Unpack[CallOptions[jax.Array]],
    ) -> Any: ...  # fmt: skip

    @takes_call
    def __call__(
        self,
        query: jax.Array | Sequence[jax.Array],
        value: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        inference: bool | None = None,
        **call: Unpack[CallOptions[jax.Array]],
    ) -> Any:
        """Attend.

        Args:
            inference: Whether dropout is off; default the layer's own. It is ``not training``.
        """
        given: Any = call
        if _is_random(key):  # what `eqx.nn.Sequential` passes by that name
            given["seed"], key = key if given.get("seed") is None else given["seed"], None
        training = given.get("training")
        # Without dropout the flag does not matter, and may be traced.
        may_be_traced = inference is None or isinstance(inference, jax.Array)
        if training is not None or self.config.dropout > 0 or not may_be_traced:
            given["training"] = mode_of_training("inference", inference, self.inference, training)
        return multi_head_attention(
            _jax.ops, self.config, self.canonical_weights(), query, value, key,
            plans=self.plans, **given,
        )  # fmt: skip

    def canonical_weights(self) -> dict[str, jax.Array]:
        """The weights by canonical name."""
        return weights_of_projections(self)

    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        mine = self.canonical_weights()
        order = [as_stored(_jax.ops, values.get(n, old), old.dtype) for n, old in mine.items()]
        return eqx.tree_at(lambda layer: [*layer.canonical_weights().values()], self, order)


def _is_random(key: Any) -> bool:
    """Whether an argument `key` is a JAX key, typed or raw, and no input of the attention."""
    if not isinstance(key, jax.Array):
        return False
    raw = key.dtype == jax.numpy.uint32 and key.ndim == 1
    return raw or jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
