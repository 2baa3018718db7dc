"""Keras's `MultiHeadAttention` and `GroupQueryAttention`, on any backend of Keras."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError, WeightsError
from anymha.framework.dtypes import FLOATING
from anymha.framework.registry import as_numpy
from anymha.interchange.live_layer import LiveLayer
from anymha.options.config import AttentionConfig
from anymha.options.training import OBJECTS


def open_layer(layer: Any, layout: str) -> LiveLayer:
    """A layer of Keras; without arrays where it is not built."""
    variables = {_name(variable): variable for variable in layer.weights}
    config = layer.get_config()
    options = {name: config[name] for name in OBJECTS if config.get(name) is not None}
    options["dropout"] = config["dropout"]
    options["sliding_window"] = config.get("sliding_window")
    options["attention_axes"] = _axes(layer, config.get("attention_axes"))
    if layer.compute_dtype != layer.variable_dtype and layer.compute_dtype in FLOATING:
        options["compute_dtype"] = layer.compute_dtype

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        if merged:
            raise WeightsError(
                f"The kernels of {', '.join(merged)} cannot be set: LoRA is enabled, and makes "
                "each of three variables. Set the weights before `enable_lora`, or save and load "
                "the layer, which merges them."
            )
        _assign(variables, arrays)
        return layer

    sublayers = layer._flatten_layers(include_self=False)
    lora = [dense for dense in sublayers if getattr(dense, "lora_enabled", False)]
    merged = {dense.path.split("/")[-1]: dense for dense in lora}
    arrays = {name: variable.value for name, variable in variables.items()}
    for name, dense in merged.items():  # its kernel with what LoRA adds
        arrays = {n: x for n, x in arrays.items() if not n.startswith(f"{name}/lora_")}
        arrays[f"{name}/kernel"] = dense.kernel
    return LiveLayer(layout, arrays, write, {}, options)


def make_layer(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> Any:
    """A new layer of Keras, built."""
    keras: Any = importlib.import_module("keras")
    values = config.to_dict()
    options = {name: values[name] for name in OBJECTS if values[name] is not None}
    options |= {"dropout": config.dropout, "use_bias": bool(config.biased)}
    if config.gate is not None:
        options["use_gate"] = True
    if config.sliding_window is not None:
        options["sliding_window"] = config.sliding_window
    options["dtype"] = _policy(keras, config)
    rank = 3
    if layout == "keras.GroupQueryAttention":
        layer = keras.layers.GroupQueryAttention(
            config.key_dim, config.num_heads, config.key_value_heads, **options
        )
    else:
        axes = config.attention_axes
        if isinstance(axes, tuple):
            rank = max(3, *(axis + 2 if axis >= 0 else 1 - axis for axis in axes))
        layer = keras.layers.MultiHeadAttention(
            config.num_heads, config.key_dim, config.value_dim, attention_axes=axes,
            output_shape=config.output_shape, **options,
        )  # fmt: skip
    widths = (config.query_features, config.value_features, config.key_features)
    layer.build(*((None,) * (rank - 1) + (width,) for width in widths))
    variables = {_name(variable): variable for variable in layer.weights}
    dtype = as_numpy(variables["query/kernel"].value).dtype.name
    if dtype != config.dtype:
        raise LayoutError(
            f"Keras on {keras.backend.backend()} holds {config.dtype} as {dtype}. Call "
            "`jax.config.update('jax_enable_x64', True)` first, or convert a layer of "
            f"dtype={dtype!r}."
        )
    _assign(variables, arrays)
    return layer


def _axes(layer: Any, axes: Any) -> Any:
    """The attention axes; None where building the layer for (B, T, D) has read_array them in."""
    if axes is None:
        return None
    rank = len(layer._query_dense.equation.partition(",")[0]) if layer.built else None
    return None if tuple(axes) == (1,) and rank == 3 else tuple(axes)


def _name(variable: Any) -> str:
    """The variable's name in the layer, as ``query/kernel``."""
    return "/".join(variable.path.split("/")[-2:])


def _policy(keras: Any, config: AttentionConfig) -> Any:
    pairs = {("float32", "float16"): "mixed_float16", ("float32", "bfloat16"): "mixed_bfloat16"}
    if config.compute_dtype in (None, config.dtype):
        return config.dtype
    pair = (config.dtype, config.compute_dtype)
    if pair not in pairs:
        raise LayoutError(
            f"Keras has no layer with dtype={config.dtype!r} and compute_dtype="
            f"{config.compute_dtype!r}. Make a layer without, for example with "
            "`dataclasses.replace(config, compute_dtype=None)`."
        )
    return pairs[pair]


def _assign(variables: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Give variables their values, rounded once by NumPy."""
    new = {}
    for name, value in arrays.items():
        rounded = value.astype(as_numpy(variables[name].value).dtype)
        # Keras's torch backend cannot take NumPy's bfloat16; float32 holds each of its values.
        half = rounded.dtype.itemsize == 2
        new[name] = np.array(rounded, np.float32 if half else rounded.dtype)
    for name, value in new.items():
        variables[name].assign(value)
