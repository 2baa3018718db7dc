"""`AttentionConfig`: every option of the layer, validated once."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from anymha.dtypes import checked_dtype_name
from anymha.errors import ConfigError

PROJECTIONS = ("query", "key", "value", "output")
DROPOUT_RNGS = ("portable", "native")


@dataclass(frozen=True)
class AttentionConfig:
    """The options of a multi-head attention layer; frozen, hashable, and valid once it exists.

    Args:
        num_heads: Query heads H, at least 1.
        key_dim: Width d_k of each query and key head.
        value_dim: Width d_v of each value head; default `key_dim`.
        dropout: Share of the probabilities that training drops, in [0, 1).
        use_bias: Whether the four projections add a bias; or the names of those that do, e.g.
            ``("query", "value", "output")`` for Whisper, whose keys have none.
        output_shape: Shape O of each output vector, an int or a tuple; default the query's width.
        attention_axes: Axes of the inputs over which attention runs, an int or a tuple; negative
            ones count from the end. Default: all but the first and the last.
        kernel_initializer: How kernels start.
        bias_initializer: How biases start.
        query_features: Width D_q of the query input. Given, the weights exist at once; otherwise
            they are made at the first call.
        value_features: Width D_v of the value input; default `query_features`.
        key_features: Width D_k of the key input; default `value_features`.
        num_key_value_heads: Key and value heads K, a divisor of H; default H.
        sliding_window: Keys to a side that a query sees, its own counted; default all.
        scale: Factor of the logits; default ``1/sqrt(key_dim)``.
        dropout_rng: "portable" (the same elements in every framework) or "native" (the
            framework's own generator).
        dtype: Dtype of the weights.
        compute_dtype: Dtype in which the layer computes; default the weights' dtype.
        seed: Seed of the initial weights; default one from the framework's own generator.
        name: A name for the layer.

    Raises:
        ConfigError: an option has a value that it cannot have.

    Example:
        >>> config = AttentionConfig(num_heads=2, key_dim=3, query_features=8)
        >>> config.weight_shapes()["query.kernel"]
        (8, 2, 3)
    """

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    dropout: float = 0.0
    use_bias: bool | tuple[str, ...] = True
    output_shape: int | tuple[int, ...] | None = None
    attention_axes: int | tuple[int, ...] | None = None
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None
    _: KW_ONLY
    query_features: int | None = None
    value_features: int | None = None
    key_features: int | None = None
    num_key_value_heads: int | None = None
    sliding_window: int | None = None
    scale: float | None = None
    dropout_rng: str = "portable"
    dtype: Any = "float32"
    compute_dtype: Any = None
    seed: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("num_heads", "key_dim"):
            store(name, _size(getattr(self, name), name))
        store("value_dim", _size(_default(self.value_dim, self.key_dim), "value_dim"))
        store(
            "num_key_value_heads",
            _size(_default(self.num_key_value_heads, self.num_heads), "num_key_value_heads"),
        )
        for name in ("query_features", "value_features", "key_features", "sliding_window"):
            if getattr(self, name) is not None:
                store(name, _size(getattr(self, name), name))
        store("output_shape", _sizes(self.output_shape, "output_shape"))
        store("attention_axes", _axes(self.attention_axes))
        store("use_bias", _biased(self.use_bias))
        store("dropout", _rate(self.dropout))
        store("scale", _scale(self.scale))
        store("dtype", checked_dtype_name(self.dtype, "dtype"))
        if self.compute_dtype is not None:
            store("compute_dtype", checked_dtype_name(self.compute_dtype, "compute_dtype"))
        self._check_together()

    def _check_together(self) -> None:
        if self.num_heads % self.key_value_heads:
            raise ConfigError(
                "`num_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}."
            )
        if self.dropout_rng not in DROPOUT_RNGS:
            raise ConfigError(
                f"`dropout_rng` must be 'portable' or 'native'. Received: {self.dropout_rng!r}."
            )
        if self.query_features is None and (self.value_features or self.key_features):
            raise ConfigError(
                "`value_features` and `key_features` need `query_features` beside them. Received: "
                f"query_features=None, value_features={self.value_features}, "
                f"key_features={self.key_features}."
            )

    # --- derived ---------------------------------------------------------------------------------
    @property
    def key_value_heads(self) -> int:
        """K, the number of key and value heads."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def biased(self) -> tuple[str, ...]:
        """The names of the projections that have a bias."""
        if isinstance(self.use_bias, tuple):
            return self.use_bias
        return PROJECTIONS if self.use_bias else ()

    @property
    def scale_value(self) -> float:
        """The factor of the logits."""
        return 1.0 / math.sqrt(self.key_dim) if self.scale is None else self.scale

    def weight_shapes(
        self,
        query_features: int | None = None,
        value_features: int | None = None,
        key_features: int | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """The canonical names of the weights and their shapes, in the canonical order.

        Args:
            query_features: Width D_q of the query input; default the config's own.
            value_features: Width D_v; default the config's own, else `query_features`.
            key_features: Width D_k; default the config's own, else `value_features`.

        Raises:
            ConfigError: no width of the query is known.
        """
        d_q = _default(query_features, self.query_features)
        if d_q is None:
            raise ConfigError(
                "`query_features`, the width of the query input, is needed to know the shapes of "
                "the weights. Received: None. Pass it here or to the constructor."
            )
        d_v = _default(_default(value_features, self.value_features), d_q)
        d_k = _default(_default(key_features, self.key_features), d_v)
        heads, shared = self.num_heads, self.key_value_heads
        out = (d_q,) if self.output_shape is None else self.output_shape
        kernels = {
            "query": (d_q, heads, self.key_dim),
            "key": (d_k, shared, self.key_dim),
            "value": (d_v, shared, self.value_dim),
            "output": (heads, self.value_dim, *out),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, kernel in kernels.items():
            shapes[f"{name}.kernel"] = kernel
            if name in self.biased:
                shapes[f"{name}.bias"] = out if name == "output" else kernel[1:]
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The options by name, for JSON; `from_dict` gives the config back."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AttentionConfig:
        """The config with these options.

        Raises:
            ConfigError: an option is unknown, or has a value that it cannot have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"Unknown options: {', '.join(unknown)}. Known are: {', '.join(sorted(known))}."
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _size(value: Any, name: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ConfigError(f"`{name}` must be an integer of at least 1. Received: {value!r}.")
    return size


def _sizes(value: Any, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return tuple(_size(item, name) for item in value)
    return (_size(value, name),)


def _axes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    axes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        axes = tuple(operator.index(axis) for axis in axes)
    except TypeError:
        axes = ()
    if not axes or len(set(axes)) != len(axes):
        raise ConfigError(
            f"`attention_axes` must be an integer or integers, each once. Received: {value!r}."
        )
    return axes


def _biased(value: Any) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if isinstance(value, (tuple, list)) and set(value) <= set(PROJECTIONS):
        names = tuple(name for name in PROJECTIONS if name in value)
        return True if names == PROJECTIONS else names or False
    raise ConfigError(
        "`use_bias` must be True, False, or names out of 'query', 'key', 'value', 'output'. "
        f"Received: {value!r}."
    )


def _rate(value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ConfigError(f"`dropout` must be a number in [0, 1). Received: {value!r}.")


def _scale(value: Any) -> float | None:
    if value is None:
        return None
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not math.isfinite(scale):
        raise ConfigError(f"`scale` must be a finite number, or None. Received: {value!r}.")
    return scale
