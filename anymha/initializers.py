"""Initial values, made in NumPy and so the same in every framework.

One generator: the i-th weight in the canonical order draws from
``numpy.random.Generator(PCG64(SeedSequence(seed, spawn_key=(i,))))``, so that query, key and value
kernels are independent of each other. Values are drawn in float64 and rounded once.

References:
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
    networks" (2010), for `glorot_uniform`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.config import AttentionConfig
from anymha.errors import ConfigError

Initializer = Callable[[np.random.Generator, tuple[int, ...], tuple[int, int]], np.ndarray]
"""Values from a generator, the shape, and the fans (in, out) of the projection as a matrix."""


def glorot_uniform(
    rng: np.random.Generator, shape: tuple[int, ...], fans: tuple[int, int]
) -> np.ndarray:
    """Uniform in ``[-l, l]``, ``l = sqrt(6 / (fan_in + fan_out))``."""
    limit = math.sqrt(6 / sum(fans))
    return rng.uniform(-limit, limit, shape)


def zeros(rng: np.random.Generator, shape: tuple[int, ...], fans: tuple[int, int]) -> np.ndarray:
    """All zero."""
    return np.zeros(shape)


_BY_NAME: dict[str, Initializer] = {"glorot_uniform": glorot_uniform, "zeros": zeros}


def get_initializer(initializer: Any, argument: str) -> Initializer:
    """The initialiser of that name.

    Raises:
        ConfigError: none has this name.
    """
    if initializer not in _BY_NAME:
        raise ConfigError(
            f"`{argument}` must be one of {', '.join(map(repr, _BY_NAME))}. "
            f"Received: {initializer!r}."
        )
    return _BY_NAME[initializer]


def initial_weights(
    config: AttentionConfig, shapes: dict[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
    """Initial float64 values of each weight.

    Args:
        config: The layer's options.
        shapes: The weights' shapes, from `config.weight_shapes`.
        seed: A seed of any size; the same seed gives the same values everywhere.
    """
    values = {}
    for index, (name, shape) in enumerate(shapes.items()):
        sequence = np.random.SeedSequence(abs(seed), spawn_key=(index,))
        rng = np.random.Generator(np.random.PCG64(sequence))
        projection, _, part = name.partition(".")
        option = getattr(config, f"{part}_initializer")
        split = 2 if projection == "output" else 1
        fans = (math.prod(shape[:split]), math.prod(shape[split:]))
        values[name] = get_initializer(option, f"{part}_initializer")(rng, shape, fans)
    return values
