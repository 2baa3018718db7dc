"""Functions for layers of JAX's libraries: float64 where their weights have it, and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from anymha.interchange.libraries import open_layer
from anymha.parity.adapters.foreign import LayerDescription, dense_mask
from anymha.parity.oracle.recipe import Arrays, Recipe


def precise(*groups: Mapping[str, np.ndarray]) -> AbstractContextManager[Any]:
    """A context in which float64 exists, if an array has it or JAX's option says so."""
    jax: Any = importlib.import_module("jax")
    wide = any(array.dtype == np.float64 for group in groups for array in group.values())
    return jax.enable_x64(wide or jax.config.jax_enable_x64)


def arrays_of(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inputs as arrays of JAX, by name."""
    jnp: Any = importlib.import_module("jax.numpy")
    return {name: jnp.asarray(array) for name, array in inputs.items()}


def numpy_of(recorded: Mapping[str, Any]) -> Arrays:
    """The recorded arrays in NumPy."""
    return {name: np.asarray(x) for name, x in recorded.items() if x is not None}


def mask_of(recipe: Recipe) -> Any:
    """The mask (B, H, T, S), True = may attend; None where everything may be attended to."""
    jnp: Any = importlib.import_module("jax.numpy")
    seen = dense_mask(recipe)
    return None if seen is None else jnp.asarray(seen)


def gradients_of(
    description: LayerDescription,
    function: Callable[[Any, Any], Any],
    parameters: Any,
    inputs: Mapping[str, Any],
    cotangent: np.ndarray | None,
    whole: Callable[[Any], Any] = lambda parameters: parameters,
) -> Arrays:
    """Gradients of a layer's weights and inputs by canonical name; none without a cotangent.

    Args:
        description: The layer's weights and layout.
        function: ``function(parameters, inputs)`` returns its output.
        parameters: Its weights, nested.
        inputs: Its inputs.
        cotangent: Of its output.
        whole: Makes the layer with such weights, whose arrays have the names of its layout.
    """
    if cotangent is None:
        return {}
    ours, theirs = gradients_through(function, parameters, inputs, cotangent)
    return {**description.canonical(open_layer(whole(ours)).arrays), **theirs}


def gradients_through(
    function: Callable[[Any, Any], Any],
    parameters: Any,
    inputs: Mapping[str, Any],
    cotangent: np.ndarray,
) -> tuple[Any, Arrays]:
    """Gradients of the sum of ``function(parameters, inputs)`` times a cotangent.

    Returns:
        Those of the parameters, nested as they are, and those of the inputs in NumPy.
    """
    jax: Any = importlib.import_module("jax")
    output, pull = jax.vjp(function, parameters, dict(inputs))
    ours, theirs = pull(jax.numpy.asarray(cotangent, output.dtype))
    return ours, {name: np.asarray(array) for name, array in theirs.items()}
