"""Initialisers, with Keras's names, fields, defaults and distributions.

Values are drawn in NumPy, in float64, and so are the same in every framework; they are not the
numbers that Keras draws for the same seed, which differ between its own backends.

References:
    A. Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks" (2014), for `Orthogonal`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anymha.framework.validation import checked_seed
from anymha.options.serialization import table
from anymha.options.variance_scaling import (
    Fans,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Initializer,
    LecunNormal,
    LecunUniform,
    Shape,
    VarianceScaling,
    truncated_normal,
)


@dataclass(frozen=True)
class Zeros(Initializer):
    """All zero."""

    name, aliases = "zeros", ("zero",)

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return np.zeros(shape)


@dataclass(frozen=True)
class Ones(Initializer):
    """All one."""

    name, aliases = "ones", ("one",)

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return np.ones(shape)


@dataclass(frozen=True)
class Constant(Initializer):
    """All `value`."""

    value: float = 0.0
    name = "constant"

    def __post_init__(self) -> None:
        self._check_number("value")

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return np.full(shape, self.value)


@dataclass(frozen=True)
class Identity(Initializer):
    """`gain` on the diagonal, else zero; of a kernel as the projection's matrix.

    Differs from:
        Keras refuses kernels of more than two axes, and so every kernel of an attention layer.
    """

    gain: float = 1.0
    name, aliases, as_matrix = "identity", ("IdentityInitializer",), True

    def __post_init__(self) -> None:
        self._check_number("gain")

    def refusal(self, rank: int) -> str:
        """Only matrices have a diagonal."""
        return "" if rank == 2 else "it makes matrices only"

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        rows, columns = shape
        return self.gain * np.eye(rows, columns)


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """`gain` times orthonormal columns, or rows where these are fewer, uniform among all such.

    As in Keras the last axis is the columns and all others together are the rows.
    """

    gain: float = 1.0
    seed: int | None = None
    name, aliases = "orthogonal", ("OrthogonalInitializer",)

    def __post_init__(self) -> None:
        self._check_number("gain")
        checked_seed(self.seed, "seed")

    def refusal(self, rank: int) -> str:
        """There must be rows and columns."""
        return "" if rank >= 2 else "it makes arrays of two or more axes only"

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        normal = rng.standard_normal((max(rows, columns), min(rows, columns)))
        q, r = np.linalg.qr(normal)
        q = q * np.where(np.diag(r) < 0, -1.0, 1.0)  # else the signs are those of the algorithm
        return self.gain * np.reshape(q if rows >= columns else q.T, shape)


@dataclass(frozen=True)
class RandomNormal(Initializer):
    """Normal."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None
    name, aliases = "random_normal", ("normal",)

    def __post_init__(self) -> None:
        self._check_number("mean")
        self._check_number("stddev", low=0)
        checked_seed(self.seed, "seed")

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return self.mean + self.stddev * rng.standard_normal(shape)


@dataclass(frozen=True)
class TruncatedNormal(RandomNormal):
    """Normal, and drawn again where further than two `stddev` from the mean."""

    name, aliases = "truncated_normal", ()

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return self.mean + self.stddev * truncated_normal(rng, shape)


@dataclass(frozen=True)
class RandomUniform(Initializer):
    """Uniform in [minval, maxval)."""

    minval: float = -0.05
    maxval: float = 0.05
    seed: int | None = None
    name, aliases = "random_uniform", ("uniform",)

    def __post_init__(self) -> None:
        self._check_number("minval")
        self._check_number("maxval", low=self.minval)
        checked_seed(self.seed, "seed")

    def _drawn(self, rng: np.random.Generator, shape: Shape, fans: Fans) -> np.ndarray:
        return rng.uniform(self.minval, self.maxval, shape)


INITIALIZERS = table(
    Zeros, Ones, Constant, Identity, Orthogonal, RandomNormal, TruncatedNormal, RandomUniform,
    VarianceScaling, GlorotUniform, GlorotNormal, HeUniform, HeNormal, LecunUniform, LecunNormal,
)  # fmt: skip
"""The classes by all of their names."""
