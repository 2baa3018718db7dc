"""Norms of queries and keys, before their products.

    rms:   x / sqrt(mean(x^2) + eps)
    layer: the same of x - mean(x)
    l2:    x / max(|x|, eps)

times a weight w, 1 + w, or nothing; then plus a bias, if there is one.

References:
    A. Henry et al., "Query-Key Normalization for Transformers" (2020).
    B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization" (2019).
    M. Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from anymha.attention.features.base import Feature, FeatureOptions, Weight
from anymha.errors import ConfigError
from anymha.framework.dtypes import working_dtype
from anymha.framework.names import answers
from anymha.framework.protocol import Array, Ops
from anymha.framework.validation import checked_choice

KINDS = ("rms", "layer", "l2")
OVER = ("head", "heads", "width")
SCALES = ("weight", "one_plus_weight", "none")


@answers(
    eps="epsilon norm_eps rms_norm_eps layer_norm_eps variance_epsilon",
    kind="norm norm_type type", over="axis dim per_head", use_bias="bias",
    scale="use_scale elementwise_affine weight affine",
)  # fmt: skip
@dataclass(frozen=True)
class QueryKeyNorm(FeatureOptions):
    """The norm of queries and keys, the option `query_key_norm`.

    Args:
        kind: "rms" ``x / sqrt(mean(x^2) + eps)``; "layer", which takes the mean off first; or "l2"
            ``x / max(|x|, eps)``.
        over: "head", over the d_k numbers of each head, with one weight (d_k) for all heads;
            "heads", the same with weights (H, d_k) and (K, d_k); or "width", over all heads
            together, with weights (H * d_k) and (K * d_k).
        scale: What the normalised numbers are multiplied with: "weight" w, which starts as ones;
            "one_plus_weight" 1 + w, which starts as zeros; or "none".
        use_bias: Whether a bias of the weight's shape is added, which starts as zeros.
        eps: Above 0.
        after_rotary: Whether it acts after rotary positions in place of before.

    Raises:
        ConfigError: a field has a value that it cannot have.

    Example:
        >>> from anymha import AttentionConfig, QueryKeyNorm
        >>> config = AttentionConfig(8, 16, query_features=32, query_key_norm=QueryKeyNorm("layer"))
        >>> config.weight_shapes()["key_norm.scale"]
        (16,)
    """

    kind: Literal["rms", "layer", "l2"] = "rms"
    over: Literal["head", "heads", "width"] = "head"
    scale: Literal["weight", "one_plus_weight", "none"] = "weight"
    use_bias: bool = False
    eps: float = 1e-6
    after_rotary: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("over", OVER), ("scale", SCALES)):
            checked_choice(getattr(self, name), choices, name)
        for name in ("use_bias", "after_rotary"):
            if not isinstance(getattr(self, name), bool):
                received = getattr(self, name)
                raise ConfigError(f"`{name}` must be True or False. Received: {received!r}.")
        eps = math.nan
        if not isinstance(self.eps, (bool, str)):
            with suppress(TypeError, ValueError):
                eps = float(self.eps)
        if not 1e-30 <= eps < math.inf:
            raise ConfigError(
                f"`eps` must be a finite number of at least 1e-30. Received: {self.eps!r}."
            )
        object.__setattr__(self, "eps", eps)


@dataclass(frozen=True)
class HeadNorm(Feature):
    """The norm of queries and keys.

    Args:
        norm: Which.
    """

    option = "query_key_norm"

    norm: QueryKeyNorm

    @property
    def after(self) -> str:
        """Rotary positions, where it acts after these."""
        return "rotary" if self.norm.after_rotary else ""

    @classmethod
    def checked(cls, value: Any) -> QueryKeyNorm | None:
        """`value` as a `QueryKeyNorm`, which may be a kind's name or a dict; None stays None.

        Raises:
            ConfigError: it is none of these, or a field has a value that it cannot have.
        """
        if value is None or isinstance(value, QueryKeyNorm):
            return value
        if isinstance(value, str) and value in KINDS:
            return QueryKeyNorm(value)  # pyright: ignore[reportArgumentType]
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ConfigError(
                f"`query_key_norm` must be None, an anymha.QueryKeyNorm, the dict of its fields, "
                f"or one of {', '.join(map(repr, KINDS))}. Received: {value!r}."
            )
        try:
            return QueryKeyNorm(**value)
        except ConfigError as error:
            raise ConfigError(f"`query_key_norm`: {error}") from None

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has a norm."""
        return None if config.query_key_norm is None else cls(config.query_key_norm)

    def weights(self, config: Any, query_features: int) -> dict[str, Weight]:
        """Scales and biases of queries and keys, as far as the norm has them."""
        norm, found = self.norm, {}
        for name, count in (("query", config.num_heads), ("key", config.key_value_heads)):
            shape = {
                "head": (config.key_dim,),
                "heads": (count, config.key_dim),
                "width": (count * config.key_dim,),
            }[norm.over]
            if norm.scale != "none":
                initial = "ones" if norm.scale == "weight" else "zeros"
                found[f"{name}_norm.scale"] = Weight(shape, initial=initial)
            if norm.use_bias:
                found[f"{name}_norm.bias"] = Weight(shape, shifts_keys=name == "key")
        return found

    def heads(
        self, ops: Ops, query: Array, key: Array, arrays: Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """Queries and keys normalised, in their dtypes, statistics in float32 at least."""
        return self._normed(ops, query, "query_norm", arrays), self._normed(
            ops, key, "key_norm", arrays
        )

    def _normed(self, ops: Ops, x: Array, name: str, arrays: Mapping[str, Array]) -> Array:
        norm, dtype, working = self.norm, x.dtype, working_dtype(ops, x)
        shape = ops.shape(x)  # (B, length, heads, d_k)
        if dtype != working:
            x = ops.astype(x, working)
        if norm.over == "width":
            x = ops.reshape(x, (*shape[:2], x.shape[2] * x.shape[3]))
        width = x.shape[-1]
        if norm.kind == "layer":
            x = x - ops.sum(x, axis=-1, keepdims=True) / width
        squares = ops.sum(x * x, axis=-1, keepdims=True)
        if norm.kind == "l2":
            positive = squares > 0  # the root of zero has no slope
            size = ops.where(positive, ops.sqrt(ops.where(positive, squares, 1.0)), 0.0)
            x = x / ops.where(size > norm.eps, size, norm.eps)
        else:
            x = x / ops.sqrt(squares / width + norm.eps)
        scale, bias = (arrays.get(f"{name}.{part}") for part in ("scale", "bias"))
        if scale is not None:
            scale = ops.reshape(scale, _aligned(scale, x))
            x = x * (scale + 1.0 if norm.scale == "one_plus_weight" else scale)
        if bias is not None:
            x = x + ops.reshape(bias, _aligned(bias, x))
        x = ops.reshape(x, shape) if norm.over == "width" else x
        return x if dtype == working else ops.astype(x, dtype)

    def why_not_fused(self, capabilities: Any) -> None:
        """A kernel takes queries and keys as they are then."""


def _aligned(weight: Array, x: Array) -> tuple[int, ...]:
    """The shape of a weight with as many axes as `x` has, its own last."""
    own = tuple(weight.shape)
    return (*(1,) * (len(x.shape) - len(own)), *own)
