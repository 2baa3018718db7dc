"""Weights in and out of live layers, through the canonical form in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.config import AttentionConfig
from anymha.errors import ArgumentError, WeightsError
from anymha.registry import backend_of, get_layer


def new_layer(*args: Any, backend: str, **options: Any) -> Any:
    """The native layer of a backend.

    Args:
        *args: The constructor's positional arguments, `num_heads` and `key_dim` first.
        backend: "numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox", or the name of
            a backend of others.
        **options: The constructor's keyword arguments; see `anymha.AttentionConfig`.

    Raises:
        UnknownBackendError: no backend has this name.
        BackendNotInstalledError: its framework is not installed.
        ConfigError: an option has a value that it cannot have.
    """
    return get_layer(backend)(*args, **options)


def get_weights(layer: Any) -> dict[str, np.ndarray]:
    """The layer's weights as NumPy arrays by canonical name, in the layer's dtype.

    Raises:
        ArgumentError: `layer` is not a layer of anymha.
        WeightsError: the layer has no weights yet.
    """
    arrays = _checked(layer).canonical_weights()
    if not arrays:
        raise WeightsError(
            "The layer has no weights yet. Call it once, or pass `query_features` to its "
            "constructor."
        )
    return {name: np.array(backend_of(array).ops.to_numpy(array)) for name, array in arrays.items()}


def set_weights(layer: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """The layer with these weights: itself, or a new one where layers are frozen (JAX).

    Args:
        layer: A layer of anymha.
        weights: NumPy arrays by canonical name, one for each weight of the layer.

    Raises:
        ArgumentError: `layer` is not a layer of anymha.
        WeightsError: names or shapes do not fit; the layer is left as it was.
    """
    return _checked(layer).with_canonical_weights(weights)


def convert(layer: Any, to: str) -> Any:
    """The native layer of another backend, with the same configuration and the same weights.

    Args:
        layer: A layer of anymha.
        to: The name of the backend.

    Raises:
        ArgumentError: `layer` is not a layer of anymha.
        WeightsError: the layer has no weights yet.
        BackendNotInstalledError: the backend's framework is not installed.
    """
    weights = get_weights(layer)
    options = layer.config.to_dict()
    names = {"query_features": "query", "value_features": "value", "key_features": "key"}
    options |= {option: weights[f"{name}.kernel"].shape[0] for option, name in names.items()}
    options["dtype"] = weights["query.kernel"].dtype.name
    options = AttentionConfig.from_dict(options).to_dict()
    return set_weights(get_layer(to)(**options), weights)


def _checked(layer: Any) -> Any:
    if not hasattr(layer, "canonical_weights"):
        raise ArgumentError(
            f"`layer` must be a layer of anymha. Received: {type(layer).__module__}."
            f"{type(layer).__qualname__}."
        )
    return layer
