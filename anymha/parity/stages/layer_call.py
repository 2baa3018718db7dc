"""anymha's layer on a module of functions: as a function of arrays, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from anymha.framework.autodiff import vjp
from anymha.framework.protocol import Ops
from anymha.layer.forward import multi_head_attention
from anymha.layer.plan import Plans
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.stages.trace import INPUTS

Function = Callable[[Any, Mapping[str, Any]], Any]
"""``function(ops, arrays)``."""


def native(ops: Ops, values: Mapping[str, Any]) -> dict[str, Any]:
    """The NumPy arrays among values as arrays of a backend."""
    return {
        name: ops.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def layer_function(config: Any, weights: Collection[str], others: Mapping[str, Any]) -> Function:
    """The layer as a function of the arrays of weights, inputs and bias by name.

    `weights` are the weights' names, `others` the call's other arguments.
    """

    def function(ops: Any, arrays: Mapping[str, Any]) -> Any:
        named = {name: array for name, array in arrays.items() if name not in weights}
        three = [named.pop(name, None) for name in INPUTS]
        own = {name: arrays[name] for name in weights}
        return multi_head_attention(ops, config, own, *three, **named, **others, plans=Plans())

    return function


def gradients_of(ops: Any, function: Function, arrays: Mapping[str, Any], to: Any) -> Arrays:
    """The gradients for these cotangents, by the backend's `vjp`, else by the tape; in NumPy."""
    if ops.capabilities.vjp is not None:
        pulled = ops.capabilities.vjp(partial(function, ops), arrays, to)[1]
    else:
        pulled = vjp(ops, function, arrays)[1](to)
    return {name: ops.to_numpy(array) for name, array in pulled.items()}
