"""Flax's `nnx.MultiHeadAttention`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.framework.dtypes import FLOATING, dtype_name
from anymha.interchange.live_layer import LiveLayer, like
from anymha.options.config import AttentionConfig

PARTS = ("query", "key", "value", "out", "query_ln", "key_ln")


def open_layer(layer: Any, layout: str) -> LiveLayer:
    """An `nnx.MultiHeadAttention`."""
    params = _params(layer)
    options = {"dropout": layer.dropout_rate}
    if layer.dtype is not None and dtype_name(layer.dtype) in FLOATING:
        options["compute_dtype"] = dtype_name(layer.dtype)

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        new = {name: like(params[name][...], value) for name, value in arrays.items()}
        for name, value in new.items():
            params[name][...] = value
        return layer

    return LiveLayer(layout, {n: param[...] for n, param in params.items()}, write, {}, options)


def make_layer(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> Any:
    """A new `nnx.MultiHeadAttention`."""
    nnx: Any = importlib.import_module("flax.nnx")
    jax: Any = importlib.import_module("jax")
    grouped = config.key_value_heads != config.num_heads
    if grouped and "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention).parameters:
        raise LayoutError(
            "This version of Flax has no grouped heads: its `nnx.MultiHeadAttention` takes no "
            f"`num_kv_heads`. Received: {config.num_heads} query heads, {config.key_value_heads} "
            "key and value heads. Install a newer Flax."
        )
    with jax.enable_x64(config.dtype == "float64" or jax.config.jax_enable_x64):
        layer = nnx.MultiHeadAttention(
            config.num_heads,
            config.query_features,
            config.num_heads * config.key_dim,
            arrays["out/kernel"].shape[-1],
            in_kv_features=config.key_features,
            dtype=config.compute_dtype,
            param_dtype=config.dtype,
            dropout_rate=config.dropout,
            use_bias=bool(config.biased),
            normalize_qk=config.query_key_norm is not None,
            decode=False,
            rngs=nnx.Rngs(0),
            **({"num_kv_heads": config.key_value_heads} if grouped else {}),
        )
    return open_layer(layer, layout).write(arrays)


def _params(layer: Any) -> dict[str, Any]:
    """The layer's parameters by name."""
    params = {}
    for part in PARTS:
        for name in ("kernel", "bias", "scale"):
            param = getattr(getattr(layer, part, None), name, None)
            if hasattr(param, "get_metadata"):
                params[f"{part}/{name}"] = param
    return params
