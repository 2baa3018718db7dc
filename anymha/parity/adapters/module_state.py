"""The arrays of a module of one's own in any framework, under the names that torch gives them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anymha.parity.stages.trace import as_numpy

PARTS = ("kernel", "weight", "bias")

DEEP = 2
"""How far a function is followed to the functions that it calls."""


def has_state(module: Any) -> bool:
    """Whether an object is a module of torch that has a state under names of its own.

    A layer of Keras on torch is one, too, and names its variables by numbers there.
    """
    return hasattr(module, "state_dict") and "keras" not in packages_of(module)


def unready(module: Any) -> str:
    """What to do with a module that has no parameters yet, in words; empty where it may have."""
    packages = packages_of(module)
    if "flax" in packages and getattr(module, "scope", module) is None:
        return ("A module of linen holds no parameters. Give `module.bind(variables)`, with "
                "`variables = module.init(jax.random.key(0), x)`.")  # fmt: skip
    if "keras" in packages and not getattr(module, "built", True):
        return "The layer of Keras has no weights yet. Call it once, `layer(x)`, where it is made."
    return ""


def state_of(module: Any) -> dict[str, Any]:
    """The kernels and biases of a module's linear layers, as ``q.weight`` (out, in), ``q.bias``.

    Args:
        module: A module of torch, whose state it is; a layer of Keras, a module of Flax (nnx, or
            linen that is bound), of Equinox, or another object with linear layers as attributes; a
            function that uses one of these, or one mapping of arrays by name.
    """
    if isinstance(module, (types.FunctionType, types.MethodType, functools.partial)):
        return _used(module, DEEP)
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


def _used(function: Any, deep: int) -> dict[str, Any]:
    """The state of the one module or mapping that a function uses; empty where there are more."""
    used: list[Any] = []
    while isinstance(function, functools.partial):
        used += [*function.args, *function.keywords.values()]
        function = function.func
    if isinstance(function, types.MethodType):
        used.append(function.__self__)
        function = function.__func__
    if isinstance(function, types.FunctionType):
        variables = inspect.getclosurevars(function)
        used += [*variables.nonlocals.values(), *variables.globals.values()]
        used += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    elif function is not None:
        used.append(function)
    followed = (types.FunctionType, types.MethodType, functools.partial)
    functions = [one for one in used if isinstance(one, followed)]
    others = {
        id(one): one for one in used if not isinstance(one, (*followed, types.ModuleType, type))
    }
    states = [state for state in map(_state, others.values()) if state]
    if not states and deep:
        states = [state for state in (_used(one, deep - 1) for one in functions) if state]
    return states[0] if len(states) == 1 else {}


def _state(one: Any) -> dict[str, Any]:
    """The arrays of a mapping by name, or the state of a module; empty of anything else."""
    if not isinstance(one, Mapping):
        return state_of(one)
    arrays = {f"{name}": _array(array) for name, array in one.items()}
    held = {name: array for name, array in arrays.items() if array is not None}
    heads = {array.shape[1:] for array in held.values() if array.ndim == 3}
    if "query.kernel" in held:
        return held
    return {
        name: array.reshape(-1) if array.shape in heads else _matrix(array)
        for name, array in held.items()
    }


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
    packages = packages_of(x)
    if "keras" in packages:
        x = x.value
    elif "flax" in packages:
        x = x[...]
    return as_numpy(x) if hasattr(x, "shape") and hasattr(x, "dtype") else None


def packages_of(x: Any) -> set[str]:
    """The packages of an object's classes."""
    return {kind.__module__.partition(".")[0] for kind in type(x).__mro__}
