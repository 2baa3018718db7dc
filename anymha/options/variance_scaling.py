"""Initialisers whose variance follows the fans, and the base of all initialisers.

References:
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
    networks" (2010), for `GlorotUniform` and `GlorotNormal`.
    K. He et al., "Delving Deep into Rectifiers" (2015), for `HeUniform` and `HeNormal`.
    Y. LeCun et al., "Efficient BackProp" (1998), for `LecunUniform` and `LecunNormal`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from anymha.errors import ConfigError
from anymha.framework.validation import checked_seed
from anymha.options.serialization import ConfigObject, checked_places

Shape = tuple[int, ...]

Fans = tuple[int, int]
"""Inputs and outputs of a weight."""

TRUNCATED_STD = 0.87962566103423978
"""The standard deviation of a standard normal distribution cut off at -2 and 2."""


@dataclass(frozen=True)
class Initializer(ConfigObject):
    """The base of the initialisers.

    Attributes:
        as_matrix: Whether it makes a kernel as the projection's matrix, (fan in, fan out).
    """

    as_matrix: ClassVar[bool] = False

    def values(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        """Float64 values of that shape.

        Args:
            rng: Where they are drawn from.
            shape: The weight's shape.
            fans: The weight's inputs and outputs.
        """
        if self.as_matrix:
            return np.reshape(self._drawn(rng, fans, fans), shape)
        return self._drawn(rng, shape, fans)

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        raise NotImplementedError


def truncated_normal(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Standard normal numbers, drawn again where further than 2 from zero."""
    drawn = np.asarray(rng.standard_normal(shape))
    while np.any(far := np.abs(drawn) > 2):
        drawn[far] = rng.standard_normal(np.count_nonzero(far))
    return drawn


@dataclass(frozen=True)
class VarianceScaling(Initializer):
    """Of variance ``scale / n``, n being the fan in, the fan out or their mean.

    `input_axes` and `output_axes` of the weight give the fans where both are set; without them
    they are those of the projection as a matrix.
    """

    scale: float = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    seed: int | None = None
    input_axes: tuple[int, ...] | None = None
    output_axes: tuple[int, ...] | None = None
    name = "variance_scaling"

    def __post_init__(self) -> None:
        self._check_number("scale", low=0)
        if self.scale == 0:
            raise ConfigError("`scale` must be above 0. Received: 0.")
        self._check_choice("mode", "fan_in", "fan_out", "fan_avg")
        if self.distribution == "normal":
            object.__setattr__(self, "distribution", "truncated_normal")
        self._check_choice("distribution", "uniform", "truncated_normal", "untruncated_normal")
        _check_seed_and_axes(self)

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        if self.input_axes is not None and self.output_axes is not None:
            fans = (_product(shape, self.input_axes), _product(shape, self.output_axes))
        n = {"fan_in": fans[0], "fan_out": fans[1], "fan_avg": sum(fans) / 2}[self.mode]
        variance = self.scale / max(1.0, n)
        if self.distribution == "uniform":
            limit = math.sqrt(3 * variance)
            return rng.uniform(-limit, limit, shape)
        std = math.sqrt(variance)
        if self.distribution == "untruncated_normal":
            return std * rng.standard_normal(shape)
        return std / TRUNCATED_STD * truncated_normal(rng, shape)


@dataclass(frozen=True)
class _Scaled(Initializer):
    """A `VarianceScaling` of fixed scale, mode and distribution."""

    seed: int | None = None
    input_axes: tuple[int, ...] | None = None
    output_axes: tuple[int, ...] | None = None
    fixed: ClassVar[tuple[float, str, str]]

    def __post_init__(self) -> None:
        _check_seed_and_axes(self)

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        axes = (self.input_axes, self.output_axes)
        return VarianceScaling(*self.fixed, None, *axes).values(rng, shape, fans)


class GlorotUniform(_Scaled):
    """Uniform in ``[-l, l]``, ``l = sqrt(6 / (fan_in + fan_out))``."""

    name, fixed = "glorot_uniform", (1.0, "fan_avg", "uniform")


class GlorotNormal(_Scaled):
    """Truncated normal of variance ``2 / (fan_in + fan_out)``."""

    name, fixed = "glorot_normal", (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Scaled):
    """Uniform in ``[-l, l]``, ``l = sqrt(6 / fan_in)``."""

    name, fixed = "he_uniform", (2.0, "fan_in", "uniform")


class HeNormal(_Scaled):
    """Truncated normal of variance ``2 / fan_in``."""

    name, fixed = "he_normal", (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Scaled):
    """Uniform in ``[-l, l]``, ``l = sqrt(3 / fan_in)``."""

    name, fixed = "lecun_uniform", (1.0, "fan_in", "uniform")


class LecunNormal(_Scaled):
    """Truncated normal of variance ``1 / fan_in``."""

    name, fixed = "lecun_normal", (1.0, "fan_in", "truncated_normal")


def _check_seed_and_axes(initializer: Any) -> None:
    checked_seed(initializer.seed, "seed")
    for name in ("input_axes", "output_axes"):
        axes = checked_places(getattr(initializer, name), name)
        object.__setattr__(initializer, name, axes)


def _product(shape: Shape, axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)
