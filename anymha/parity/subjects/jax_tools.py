"""Layers of JAX's libraries: float64 where their weights are, and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from anymha.parity.recipe import Arrays


def precise(*groups: Mapping[str, np.ndarray]) -> AbstractContextManager[Any]:
    """Where float64 exists, if an array has it or JAX's option says so."""
    jax: Any = importlib.import_module("jax")
    wide = any(array.dtype == np.float64 for group in groups for array in group.values())
    return jax.enable_x64(wide or jax.config.jax_enable_x64)


def arrays_of(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inputs as they are, by name."""
    jnp: Any = importlib.import_module("jax.numpy")
    return {name: jnp.asarray(array) for name, array in inputs.items()}


def pulled(
    function: Callable[[Any, Any], Any], held: Any, given: Mapping[str, Any], cotangent: np.ndarray
) -> tuple[Any, Arrays]:
    """Gradients of the sum of ``function(held, given)`` times a cotangent.

    Returns:
        Those of `held`, nested as it is, and those of the inputs in NumPy.
    """
    jax: Any = importlib.import_module("jax")
    output, pull = jax.vjp(function, held, dict(given))
    ours, theirs = pull(jax.numpy.asarray(cotangent, output.dtype))
    return ours, {name: np.asarray(array) for name, array in theirs.items()}
