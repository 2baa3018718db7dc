"""Equinox's `nn.MultiheadAttention`, which is frozen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.framework.validation import PROJECTIONS
from anymha.interchange.live_layer import LiveLayer, like
from anymha.options.config import AttentionConfig


def open_layer(layer: Any, layout: str) -> LiveLayer:
    """An `eqx.nn.MultiheadAttention`."""
    arrays = {
        f"{projection}_proj.{part}": getattr(getattr(layer, f"{projection}_proj"), part)
        for projection in PROJECTIONS
        for part in ("weight", "bias")
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}

    def write(values: Mapping[str, np.ndarray]) -> Any:
        equinox: Any = importlib.import_module("equinox")
        names = [name.split(".") for name in values]

        def where(module: Any) -> list[Any]:
            return [getattr(getattr(module, linear), part) for linear, part in names]

        new = [like(arrays[name], value) for name, value in values.items()]
        return equinox.tree_at(where, layer, new)

    sizes = {"num_heads": layer.num_heads}
    return LiveLayer(layout, arrays, write, sizes, {"dropout": float(layer.dropout.p)})


def make_layer(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> Any:
    """A new `eqx.nn.MultiheadAttention`."""
    equinox: Any = importlib.import_module("equinox")
    jax: Any = importlib.import_module("jax")
    with jax.enable_x64(config.dtype == "float64" or jax.config.jax_enable_x64):
        layer = equinox.nn.MultiheadAttention(
            config.num_heads,
            config.query_features,
            config.key_features,
            config.value_features,
            arrays["output_proj.weight"].shape[0],
            config.key_dim,
            config.value_dim,
            **{f"use_{name}_bias": name in config.biased for name in PROJECTIONS},
            dropout_p=config.dropout,
            dtype=jax.numpy.dtype(config.dtype),
            key=jax.random.PRNGKey(0),
        )
    return open_layer(layer, layout).write(arrays)
