"""The arrays of a module of one's own in any framework, under the names that torch gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anymha.parity.stages.trace import as_numpy

PARTS = ("kernel", "weight", "bias")


def has_state(module: Any) -> bool:
    """Whether an object is a module of torch that has a state under names of its own.

    A layer of Keras on torch is one, too, and names its variables by numbers there.
    """
    return hasattr(module, "state_dict") and "keras" not in _packages(module)


def state_of(module: Any) -> dict[str, Any]:
    """The kernels and biases of a module's linear layers, as ``q.weight`` (out, in), ``q.bias``.

    Args:
        module: A module of torch, whose state it is; a layer of Keras, a module of Flax (nnx, or
            linen that is bound), of Equinox, or another object with linear layers as attributes.
    """
    if has_state(module):
        return dict(module.state_dict())
    state: dict[str, Any] = {}
    for name, parts in _linear_layers(module):
        for part, array in parts.items():
            if part == "kernel":
                state[f"{name}.weight"] = _matrix(array).T
            else:
                state[f"{name}.{part}"] = array.reshape(-1) if part == "bias" else array
    return state


def _matrix(kernel: np.ndarray) -> np.ndarray:
    """A kernel (in, out) of one with an axis of heads, (D, H, d), or the output's, (H, d, D)."""
    if kernel.ndim != 3:
        return kernel
    last = kernel.shape[-1]
    return kernel.reshape(-1, last) if last > kernel.shape[0] else kernel.reshape(len(kernel), -1)


def _linear_layers(module: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The name of each linear layer, and its arrays by "kernel" (in, out) or "weight" (out, in)."""
    variables = getattr(module, "variables", None)
    if isinstance(variables, Mapping) and isinstance(variables.get("params"), Mapping):
        held = {name: part for name, part in variables["params"].items()
                if isinstance(part, Mapping)}  # fmt: skip
    else:
        attributes: dict[str, Any] = getattr(module, "__dict__", {})
        attributes = {**attributes, **attributes.get("_modules", {})}  # of Keras on torch
        held = {
            name: {part: getattr(layer, part, None) for part in PARTS}
            for name, layer in attributes.items()
        }
    for name, layer in held.items():
        parts = {part: _array(layer.get(part)) for part in PARTS}
        found = {part: array for part, array in parts.items() if array is not None}
        if len(found.keys() & {"kernel", "weight"}) == 1:
            yield name, found


def _array(x: Any) -> np.ndarray | None:
    """The values of an array, or of a variable of Keras or nnx; None of what is none."""
    packages = _packages(x)
    if "keras" in packages:
        x = x.value
    elif "flax" in packages:
        x = x[...]
    return as_numpy(x) if hasattr(x, "shape") and hasattr(x, "dtype") else None


def _packages(x: Any) -> set[str]:
    """The packages of an object's classes."""
    return {kind.__module__.partition(".")[0] for kind in type(x).__mro__}
