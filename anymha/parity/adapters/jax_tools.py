"""Layers of JAX's libraries: float64 where their weights are, and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from anymha.interchange.libraries import open_layer
from anymha.parity.adapters.foreign import Known, dense_mask
from anymha.parity.oracle.recipe import Arrays, Recipe


def precise(*groups: Mapping[str, np.ndarray]) -> AbstractContextManager[Any]:
    """Where float64 exists, if an array has it or JAX's option says so."""
    jax: Any = importlib.import_module("jax")
    wide = any(array.dtype == np.float64 for group in groups for array in group.values())
    return jax.enable_x64(wide or jax.config.jax_enable_x64)


def arrays_of(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inputs as they are, by name."""
    jnp: Any = importlib.import_module("jax.numpy")
    return {name: jnp.asarray(array) for name, array in inputs.items()}


def numpy_of(heard: Mapping[str, Any]) -> Arrays:
    """What was heard, in NumPy."""
    return {name: np.asarray(x) for name, x in heard.items() if x is not None}


def mask_of(recipe: Recipe) -> Any:
    """What may be attended to, (B, H, T, S); None where everything may."""
    jnp: Any = importlib.import_module("jax.numpy")
    seen = dense_mask(recipe)
    return None if seen is None else jnp.asarray(seen)


def gradients_of(
    told: Known,
    function: Callable[[Any, Any], Any],
    held: Any,
    given: Mapping[str, Any],
    cotangent: np.ndarray | None,
    whole: Callable[[Any], Any] = lambda held: held,
) -> Arrays:
    """Gradients of a layer's weights and inputs by canonical name; none without a cotangent.

    Args:
        told: What the layer tells of itself.
        function: ``function(held, given)`` gives its output.
        held: Its weights, nested.
        given: Its inputs.
        cotangent: Of its output.
        whole: Makes of such weights what holds its arrays by the names of its layout.
    """
    if cotangent is None:
        return {}
    ours, theirs = pulled(function, held, given, cotangent)
    return {**told.canonical(open_layer(whole(ours)).arrays), **theirs}


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
