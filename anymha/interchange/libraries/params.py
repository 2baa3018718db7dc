"""Parameters of Flax's linen and of Haiku: nested dicts, recognised by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import WeightsError
from anymha.framework.registry import get_backend
from anymha.interchange.layouts import get_layout
from anymha.interchange.live_layer import LiveLayer, like
from anymha.options.config import AttentionConfig

LAYOUTS = ("flax.linen.MultiHeadDotProductAttention", "haiku.MultiHeadAttention")
MODULE = "multi_head_attention"


def open_layer(params: Mapping[str, Any]) -> LiveLayer:
    """The one attention layer among parameters.

    Raises:
        WeightsError: there is none, or there are several.
    """
    flat = _flat(params)
    names = ["/".join(path) for path in flat]
    layers = [(layout, start) for layout in LAYOUTS for start in get_layout(layout).prefixes(names)]
    if len(layers) != 1:
        several = ", ".join(repr(start) for _, start in layers)
        remedy = f"There are several, under {several}: pass those of one." if layers else (
            "Name the arrays' layout, one that `anymha.find_layers(arrays)` lists: `weights, config"
            " = anymha.to_canonical(arrays, layout=..., num_heads=...)`; then `anymha.set_weights("
            "anymha.MultiHeadAttention(**config.to_dict(), backend=...), weights)`.")  # fmt: skip
        raise WeightsError(
            f"{remedy} Received: {', '.join(names[:6])}. Without a layout one layer of "
            "Flax's linen (`query`, `key`, `value`, `out` with `kernel`) or of Haiku (`query`, "
            "`key`, `value`, `linear` with `w`) is known."
        )
    ((layout, start),) = layers
    paths = {"/".join(path).removeprefix(start): path for path in flat}
    layer = {name: path for name, path in paths.items() if "/".join(path).startswith(start)}

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        new = {layer[name]: like(flat[layer[name]], value) for name, value in arrays.items()}
        return _replaced(params, new)

    return LiveLayer(layout, {name: flat[path] for name, path in layer.items()}, write)


def make_layer(
    layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig
) -> dict[str, Any]:
    """New parameters, as JAX's arrays: of Haiku under its name for the module."""
    ops = get_backend("jax").ops
    result: dict[str, Any] = {}
    for name, array in arrays.items():
        part, _, leaf = name.partition("/")
        module = f"{MODULE}/{part}" if layout == LAYOUTS[1] else part
        result.setdefault(module, {})[leaf] = ops.from_numpy(array)
    return result


def _flat(params: Mapping[str, Any], start: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    result: dict[tuple[str, ...], Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            result |= _flat(value, (*start, str(name)))
        else:
            result[(*start, str(name))] = value
    return result


def _replaced(
    params: Mapping[str, Any], new: Mapping[tuple[str, ...], Any], start: tuple[str, ...] = ()
) -> Any:
    """The same nesting with some arrays replaced, of the same kinds of dicts."""
    result: dict[str, Any] = {}
    for name, value in params.items():
        path = (*start, str(name))
        if isinstance(value, Mapping):
            result[name] = _replaced(value, new, path)
        else:
            result[name] = new.get(path, value)
    return result if type(params) is dict else type(params)(result)  # pyright: ignore[reportCallIssue]
