"""The layer for Flax: an `nnx.Module` whose `nnx.Param`s are the weights."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, overload

import jax
from flax import nnx

from anymha.errors import ArgumentError
from anymha.framework.registry import get_backend
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    NativeLayer,
    PlainCall,
    as_stored,
    held_together,
    mode_of_training,
    takes_call,
    takes_options,
    weights_of_projections,
)
from anymha.layer.plan import Plans
from anymha.layer.weights import part_of
from anymha.options.config import AttentionConfig

_jax = get_backend("jax")


class _Projection(nnx.Module):
    """Holds one kernel and, maybe, one bias, so that they get their canonical names."""

    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None

    def __init__(self, kernel: Any, bias: Any) -> None:
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))


class _Weights(nnx.Module):
    """Holds the weights of a feature, so that they get their canonical names."""

    def __init__(self, **weights: Any) -> None:
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight))


@dataclass(frozen=True, kw_only=True)
class FlaxOptions(AttentionConfig):
    """What the constructor takes.

    Args:
        rngs: An `nnx.Rngs` or one of its streams, for the initial values where `seed` is not
            given, and for dropout.
        deterministic: Whether dropout is off; `layer.eval()` and `layer.train()` set it.
    """

    rngs: nnx.Rngs | nnx.RngStream | None = None
    deterministic: bool = False


class _Signature:
    """The signature of the constructor, which Flax's metaclass hides; of a layer that of a call."""

    def __get__(self, layer: Any, kind: type) -> inspect.Signature:
        signature = inspect.signature(kind.__init__ if layer is None else kind.__call__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class MultiHeadAttention(NativeLayer, nnx.Module):
    """Multi-head attention as an `nnx.Module`.

    The constructor takes the options of `anymha.AttentionConfig`, of which `query_features` is
    needed, and of Flax

    * `rngs`: an `nnx.Rngs` or one of its streams. Where `seed` is not given, the stream "params"
      gives the initial values; where there is dropout, a fork of the stream "dropout" is kept as
      `layer.rngs` and gives the seed of each call. An `nnx.Rngs` without such a stream gives its
      "default".
    * `deterministic`: whether dropout is off; `layer.eval()` and `layer.train()` set it.

    The call takes the arguments of `anymha.multi_head_attention`, where ``training=None``
    means ``not layer.deterministic``, and Flax's `deterministic` and `rngs` (or one key), which
    go before the layer's own. The weights are `nnx.Param`s at their canonical names
    (``layer.query.kernel``).

    Differs from:
        `flax.nnx.MultiHeadAttention`: the call is ``(query, value, key)``; dropout draws for each
        element where Flax by default draws one mask for the whole batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from anymha_flax import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 3, 8)), use_causal_mask=True).shape
        (1, 3, 8)
    """

    query: _Projection
    key: _Projection
    value: _Projection
    output: _Projection
    config: AttentionConfig
    deterministic: bool
    rngs: nnx.RngStream | None
    ops = _jax.ops
    __signature__ = _Signature()

    @takes_options(FlaxOptions)
    def __init__(
        self,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        deterministic: bool = False,
    ) -> None:
        draws = rngs is not None and config.seed is None
        key = _stream(rngs, "params")() if draws else None
        boxes: dict[str, nnx.VariableMetadata[Any]] = {}
        options = config.to_dict()
        for part in ("kernel", "bias"):
            initializer = options[f"{part}_initializer"]
            if callable(initializer):
                options[f"{part}_initializer"] = _unboxed(initializer, part, boxes)
        weights = _jax.layer(**options, key=key).weights
        for name, value in weights.items():
            box = boxes.get(part_of(config, name))
            weights[name] = value if box is None else dataclasses.replace(box, raw_value=value)
        self.config = config
        self.plans = Plans()
        self.deterministic = deterministic
        for name in config.projections:
            projection = _Projection(weights[f"{name}.kernel"], weights.get(f"{name}.bias"))
            setattr(self, name, projection)
        for name, parts in held_together(config.feature_weights).items():
            own = {part: weights[f"{name}.{part}"] for part in parts}
            setattr(self, name, _Weights(**own) if parts else nnx.Param(weights[name]))
        keeps = rngs is not None and config.dropout > 0
        self.rngs = nnx.data(_stream(rngs, "dropout").fork() if keeps else None)

    @overload
    def __call__(
        self, query: jax.Array | Sequence[jax.Array], value: jax.Array | None = None,
        key: jax.Array | None = None, *, deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **call: Unpack[PlainCall[jax.Array]],
    ) -> jax.Array: ...  # fmt: skip

    @overload
    def __call__(
        self, query: jax.Array | Sequence[jax.Array], value: jax.Array | None = None,
        key: jax.Array | None = None, *, deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **call: Unpack[CallOptions[jax.Array]],
    ) -> Any: ...  # fmt: skip

    @takes_call
    def __call__(
        self,
        query: jax.Array | Sequence[jax.Array],
        value: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **call: Unpack[CallOptions[jax.Array]],
    ) -> Any:
        """Attend.

        Args:
            deterministic: Whether dropout is off; default the layer's own. It is ``not training``.
            rngs: An `nnx.Rngs`, a stream or a key for dropout; default the layer's own.
        """
        given: Any = call
        given["training"] = mode_of_training(
            "deterministic", deterministic, self.deterministic, given.get("training")
        )
        if given.get("seed") is None:
            rngs = self.rngs if rngs is None else rngs
            given["seed"] = rngs if isinstance(rngs, jax.Array) else lambda: _dropout_key(rngs)
        return multi_head_attention(
            _jax.ops, self.config, self.canonical_weights(), query, value, key,
            plans=self.plans, **given,
        )  # fmt: skip

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if deterministic is not None:
            self.deterministic = deterministic

    def canonical_weights(self) -> dict[str, jax.Array]:
        """The weights by canonical name."""
        return {name: param[...] for name, param in weights_of_projections(self).items()}

    def _places(self) -> dict[str, Any]:
        return {name: id(param) for name, param in weights_of_projections(self).items()}

    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        params = weights_of_projections(self)
        for name, value in values.items():
            params[name][...] = as_stored(_jax.ops, value, params[name].dtype)
        return self


def _unboxed(function: Any, part: str, boxes: dict[str, Any]) -> Any:
    """An initialiser that gives arrays; what `nnx.with_partitioning` adds to them is kept."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, nnx.VariableMetadata):
            boxes[part], found = found, found.raw_value
        return found

    return wrapper


def _stream(rngs: Any, name: str) -> nnx.RngStream:
    """The stream of that name; a stream is itself.

    Raises:
        ArgumentError: `rngs` is neither an `nnx.Rngs` nor a stream.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs[name]
    if isinstance(rngs, nnx.RngStream):
        return rngs
    raise ArgumentError(
        "`rngs` must be an nnx.Rngs or one of its streams. Received: "
        f"{type(rngs).__module__}.{type(rngs).__qualname__}. Pass e.g. rngs=nnx.Rngs(0)."
    )


def _dropout_key(rngs: Any) -> jax.Array:
    """The next key for dropout.

    Raises:
        ArgumentError: there is nothing to draw it from.
    """
    if rngs is None:
        raise ArgumentError(
            "`rngs` are needed for dropout in training. Received: None. Pass rngs=nnx.Rngs(...) to "
            "the constructor or to the call, or an int or a key as `seed`; or switch dropout off "
            "with `layer.eval()`."
        )
    return _stream(rngs, "dropout")()
