"""Parameters of Flax's linen and of Haiku: nested dicts, known by their names alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import WeightsError
from anymha.framework.registry import get_backend
from anymha.interchange.layouts import get_layout
from anymha.interchange.live_layer import Opened, like
from anymha.options.config import AttentionConfig

LAYOUTS = ("flax.linen.MultiHeadDotProductAttention", "haiku.MultiHeadAttention")
MODULE = "multi_head_attention"


def opened(params: Mapping[str, Any]) -> Opened:
    """The one attention layer among parameters.

    Raises:
        WeightsError: there is none, or there are several.
    """
    flat = _flat(params)
    names = ["/".join(path) for path in flat]
    found = [(layout, start) for layout in LAYOUTS for start in get_layout(layout).prefixes(names)]
    if len(found) != 1:
        several = ", ".join(repr(start) for _, start in found)
        told = (
            f"there are several, under {several}: pass those of one" if found else "there is none"
        )
        raise WeightsError(
            "Parameters must hold one attention layer, of Flax's linen (`query`, `key`, `value`, "
            "`out` with `kernel`) or of Haiku (`query`, `key`, `value`, `linear` with `w`); "
            f"{told}. Received: {', '.join(names[:6])}."
        )
    ((layout, start),) = found
    paths = {"/".join(path).removeprefix(start): path for path in flat}
    held = {name: path for name, path in paths.items() if "/".join(path).startswith(start)}

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        new = {held[name]: like(flat[held[name]], value) for name, value in arrays.items()}
        return _replaced(params, new)

    return Opened(layout, {name: flat[path] for name, path in held.items()}, write)


def made(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> dict[str, Any]:
    """New parameters, as JAX's arrays: of Haiku under its name for the module."""
    ops = get_backend("jax").ops
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        part, _, leaf = name.partition("/")
        module = f"{MODULE}/{part}" if layout == LAYOUTS[1] else part
        found.setdefault(module, {})[leaf] = ops.from_numpy(array)
    return found


def _flat(params: Mapping[str, Any], start: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= _flat(value, (*start, str(name)))
        else:
            found[(*start, str(name))] = value
    return found


def _replaced(
    params: Mapping[str, Any], new: Mapping[tuple[str, ...], Any], start: tuple[str, ...] = ()
) -> Any:
    """The same nesting with some arrays replaced, of the same kinds of dicts."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        path = (*start, str(name))
        if isinstance(value, Mapping):
            found[name] = _replaced(value, new, path)
        else:
            found[name] = new.get(path, value)
    return found if type(params) is dict else type(params)(found)  # pyright: ignore[reportCallIssue]
