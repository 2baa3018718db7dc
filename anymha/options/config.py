"""`AttentionConfig`: every option of the layer, validated once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, cast

from anymha.attention.features import FEATURES, Feature, features_of
from anymha.attention.features.base import Weight
from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.attention.features.rotary import Rotary
from anymha.errors import ConfigError
from anymha.framework.dtypes import DtypeLike, checked_dtype_name
from anymha.framework.names import answers
from anymha.framework.validation import (
    PROJECTIONS,
    checked_axes,
    checked_biases,
    checked_choice,
    checked_name,
    checked_rate,
    checked_scale,
    checked_seed,
    checked_shape,
    checked_size,
)
from anymha.options.option import Option, shows_taken
from anymha.options.other_names import PEERS, answered_names
from anymha.options.serialization import described
from anymha.options.training import OBJECTS, ObjectLike, check_ranks, checked_object

DROPOUT_RNGS = ("portable", "native")


@answered_names
@shows_taken
@dataclass(frozen=True)
class AttentionConfig:
    """The options of a multi-head attention layer; frozen, hashable, and valid once it exists.

    Args:
        num_heads: Query heads H, at least 1.
        key_dim: Width d_k of each query and key head.
        value_dim: Width d_v of each value head; default `key_dim`.
        dropout: Share of the probabilities that training drops, in [0, 1).
        use_bias: Whether the projections, the gate's too, add a bias; or the names of those that
            do, e.g. ``("query", "value", "output")`` for Whisper, whose keys have none.
        output_shape: Shape O of each output vector, an int or a tuple; default the query's width.
        attention_axes: Axes of the inputs over which attention runs, an int or a tuple; negative
            ones count from the end. Default: all but the first and the last.
        kernel_initializer: How kernels start: a name, a config dict, an object of
            `anymha.options.initializers` or of Keras, or a callable.
        bias_initializer: How biases start.
        kernel_regularizer: Penalty of the kernels, in `layer.regularization_loss()`; default none.
        bias_regularizer: Penalty of the biases.
        activity_regularizer: Penalty of the outputs of the four projections, and of the gate, in
            the call's `return_activity_loss`.
        kernel_constraint: What `layer.apply_constraints()` makes of kernels; default nothing.
        bias_constraint: What it makes of biases.
        query_features: Width D_q of the query input. Given, the weights exist at once; otherwise
            they are made at the first call.
        value_features: Width D_v of the value input; default `query_features`.
        key_features: Width D_k of the key input; default `value_features`.
        num_key_value_heads: Key and value heads K, a divisor of H; default H.
        sliding_window: Keys to a side that a query sees, its own counted; default all.
        scale: Factor of the logits; default ``1/sqrt(key_dim)``.
        softcap: ``c > 0``: logits become ``c * tanh(logits / c)`` before biases and masks; default
            no cap.
        rotary: Rotary positions of queries and keys, an `anymha.Rotary`, the dict of its fields, or
            True for its defaults; default none.
        query_key_norm: Norm of queries and keys, an `anymha.QueryKeyNorm`, the dict of its fields,
            or "rms", "layer" or "l2" for its defaults; default none.
        alibi: Whether each logit falls with the distance of query and key, by the slopes of the
            ALiBi paper; or a slope for each query head.
        sinks: Whether a learned logit for each head, the weight "sinks", joins each row's softmax.
        gate: "elementwise" for a gate on the context, ``sigmoid(query . W + b)``, with a number for
            each of its (H, d_v); "head" for one with a number for each head; default none.
        dropout_rng: "portable" (the same elements in every framework) or "native" (the
            framework's own generator).
        dtype: Dtype of the weights.
        compute_dtype: Dtype in which the layer computes; default the weights' dtype.
        seed: Seed of the initial weights; default one from the framework's own generator.
        name: A name for the layer.
        memory_budget: Bytes that the logits of one tile of queries may take, for long sequences;
            default what the backend is fastest with. The results mean the same for any.

    Raises:
        ConfigError: an option has a value that it cannot have.
        UnknownOptionError: there is no such option; the message has the right one.

    Example:
        >>> config = AttentionConfig(num_heads=2, key_dim=3, query_features=8)
        >>> config.weight_shapes()["query.kernel"]
        (8, 2, 3)
    """

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    dropout: float = 0.0
    use_bias: bool | Sequence[Literal["query", "key", "value", "output", "gate"]] = True
    output_shape: int | Sequence[int] | None = None
    attention_axes: int | Sequence[int] | None = None
    kernel_initializer: Option[ObjectLike, Any] = cast(Any, "glorot_uniform")
    bias_initializer: Option[ObjectLike, Any] = cast(Any, "zeros")
    kernel_regularizer: Option[ObjectLike | None, Any] = cast(Any, None)
    bias_regularizer: Option[ObjectLike | None, Any] = cast(Any, None)
    activity_regularizer: Option[ObjectLike | None, Any] = cast(Any, None)
    kernel_constraint: Option[ObjectLike | None, Any] = cast(Any, None)
    bias_constraint: Option[ObjectLike | None, Any] = cast(Any, None)
    _: KW_ONLY
    query_features: int | None = None
    value_features: int | None = None
    key_features: int | None = None
    num_key_value_heads: int | None = None
    sliding_window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    rotary: Rotary | Mapping[str, Any] | bool | None = None
    query_key_norm: QueryKeyNorm | Mapping[str, Any] | Literal["rms", "layer", "l2"] | None = None
    alibi: bool | Iterable[float] = False
    sinks: bool = False
    gate: Literal["elementwise", "head"] | None = None
    dropout_rng: Literal["portable", "native"] = "portable"
    dtype: Option[DtypeLike, str] = cast(Any, "float32")
    compute_dtype: Option[DtypeLike | None, str | None] = cast(Any, None)
    seed: int | None = None
    name: str | None = None
    memory_budget: int | None = None

    # What follows from the options, worked out once; no fields of their own.
    key_value_heads: ClassVar[int]
    """K, the number of key and value heads."""
    further_projections: ClassVar[Mapping[str, tuple[int, ...]]]
    """The projections of the query input that the features have: the axes of what each gives."""
    projections: ClassVar[tuple[str, ...]]
    """The names of all projections, in the canonical order: the four, and those of features."""
    biased: ClassVar[tuple[str, ...]]
    """The names of the projections that have a bias."""
    scale_value: ClassVar[float]
    """The factor of the logits."""
    features: ClassVar[tuple[Feature, ...]]
    """The features that are switched on, in the order in which a call meets them."""
    feature_weights: ClassVar[Mapping[str, Weight]]
    """The weights of the features by name; where the query's width is not known, of any width."""
    counts_positions: ClassVar[bool]
    """Whether a feature counts with the positions of queries and keys."""
    free_columns: ClassVar[tuple[bool, ...]]
    """Of the d_k columns those in which the key's bias adds one number to all logits of a row, and
    that changes no probability: there its gradient is exactly zero."""
    without_gradient: ClassVar[Mapping[str, tuple[bool, ...]]]
    """The same for the weights of the features that add one vector to all keys, by name."""

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("num_heads", "key_dim"):
            store(name, checked_size(getattr(self, name), name))
        store("value_dim", checked_size(_or(self.value_dim, self.key_dim), "value_dim"))
        groups = _or(self.num_key_value_heads, self.num_heads)
        store("num_key_value_heads", checked_size(groups, "num_key_value_heads"))
        for name in (
            "query_features",
            "value_features",
            "key_features",
            "sliding_window",
            "memory_budget",
        ):
            if getattr(self, name) is not None:
                store(name, checked_size(getattr(self, name), name))
        store("output_shape", checked_shape(self.output_shape, "output_shape"))
        remedy = " Pass None for all axes but the first and the last."
        store("attention_axes", checked_axes(self.attention_axes, "attention_axes", remedy))
        store("dropout", checked_rate(self.dropout, "dropout"))
        store("dropout_rng", checked_choice(self.dropout_rng, DROPOUT_RNGS, "dropout_rng"))
        store("scale", checked_scale(self.scale, "scale"))
        store("seed", checked_seed(self.seed, "seed"))
        store("name", checked_name(self.name, "name"))
        store("dtype", checked_dtype_name(self.dtype, "dtype"))
        for name in OBJECTS:
            store(name, checked_object(getattr(self, name), name))
        for kind in FEATURES:
            store(kind.option, kind.checked(getattr(self, kind.option)))
        if self.compute_dtype is not None:
            store("compute_dtype", checked_dtype_name(self.compute_dtype, "compute_dtype"))
        store("key_value_heads", self.num_key_value_heads)
        features = features_of(self)
        store("features", features)
        further: dict[str, tuple[int, ...]] = {}
        for feature in features:
            further |= feature.projections(self)
        store("further_projections", further)
        store("projections", (*PROJECTIONS, *further))
        store("use_bias", checked_biases(self.use_bias, "use_bias", self.projections))
        names = self.use_bias if isinstance(self.use_bias, tuple) else self.projections
        store("biased", names if self.use_bias else ())
        self._check_together()
        store("scale_value", 1.0 / math.sqrt(self.key_dim) if self.scale is None else self.scale)
        store("counts_positions", any(f.counts_positions for f in features))
        store("feature_weights", self._weights_of_features(self.query_features or 1))
        columns, held = (True,) * self.key_dim, {}
        for feature in reversed(features):
            own = feature.weights(self, 1).items()
            if any(columns):
                held |= {name: columns for name, weight in own if weight.shifts_keys}
            free = feature.free_columns(self.key_dim)
            columns = tuple([one and other for one, other in zip(columns, free, strict=True)])
        store("free_columns", columns)
        store("without_gradient", held)

    def _check_together(self) -> None:
        if self.num_heads % self.key_value_heads:
            raise ConfigError(
                "`num_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}. "
                "Pass a divisor of `num_heads`."
            )
        if self.query_features is None and (self.value_features or self.key_features):
            raise ConfigError(
                "`value_features` and `key_features` need `query_features` beside them. Received: "
                f"query_features=None, value_features={self.value_features}, "
                f"key_features={self.key_features}. Pass `query_features` too, or none of them."
            )

        output: Any = self.output_shape
        objects = {name: getattr(self, name) for name in OBJECTS}
        further = self.further_projections
        ranks = {name: len(axes) for name, axes in further.items()}
        ranks["output"] = 1 if output is None else len(output)
        check_ranks(objects, ranks, self.biased)

    @answers(query_features="query_size embed_dim hidden_size")
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
        d_q = _or(query_features, self.query_features)
        if d_q is None:
            raise ConfigError(
                "`query_features`, the width of the query input, is needed to know the shapes of "
                "the weights. Received: None. Pass it here or to the constructor."
            )
        d_v = _or(_or(value_features, self.value_features), d_q)
        d_k = _or(_or(key_features, self.key_features), d_v)
        heads, shared = self.num_heads, self.key_value_heads
        out: Any = (d_q,) if self.output_shape is None else self.output_shape
        kernels = {
            "query": (d_q, heads, self.key_dim),
            "key": (d_k, shared, self.key_dim),
            "value": (d_v, shared, self.value_dim),
            "output": (heads, self.value_dim, *out),
            **{name: (d_q, *axes) for name, axes in self.further_projections.items()},
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, kernel in kernels.items():
            shapes[f"{name}.kernel"] = kernel
            if name in self.biased:
                shapes[f"{name}.bias"] = out if name == "output" else kernel[1:]
        own = self._weights_of_features(d_q).items()
        return shapes | {name: weight.shape for name, weight in own}

    def _weights_of_features(self, query_features: int) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        for feature in self.features:
            weights |= feature.weights(self, query_features)
        return weights

    def computing_in(self, dtype: str) -> AttentionConfig:
        """The options within a region of mixed precision, which leaves float64 as it is."""
        if "float64" in (self.compute_dtype or self.dtype, self.dtype):
            return self
        return dataclasses.replace(self, compute_dtype=dtype)

    def changed_options(self) -> dict[str, Any]:
        """`num_heads`, `key_dim`, and the options that are not at their defaults, by name."""
        default = type(self)(self.num_heads, self.key_dim)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name in ("num_heads", "key_dim") or value != getattr(default, name)
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_options(self)})"

    def to_dict(self) -> dict[str, Any]:
        """The options by name, for JSON (but for callables); `from_dict` gives the config back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else described(value)
            for name, value in values.items()
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
            told = "".join(f" `{name}`: {PEERS[name]}" for name in unknown if name in PEERS)
            raise ConfigError(
                f"Unknown options: {', '.join(unknown)}. Known are: {', '.join(sorted(known))}."
                f"{told}"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        }
        return cls(**values)


def shown_options(config: AttentionConfig) -> str:
    """The options as arguments, those at their defaults left out: ``num_heads=2, key_dim=4``."""
    return ", ".join(f"{name}={value!r}" for name, value in config.changed_options().items())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
