"""Any `torch.nn.Module`, called as a function of the inputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import LayerDescription, make_trace
from anymha.parity.adapters.function import named_stages
from anymha.parity.adapters.torch_tools import (
    gradients_through,
    parameters_of,
    recorded_projections,
    restored,
    tensors,
)
from anymha.parity.stages.trace import INPUTS, Arrays, Request, Trace, as_numpy


def make_adapter(
    module: Any, description: LayerDescription | None = None, own: bool = False
) -> TorchModule:
    """The adapter of a module.

    Args:
        module: The module.
        description: Its weights and options, where they are known.
        own: Whether the module's own state has these weights.
    """
    return TorchModule(module, description, own)


class TorchModule:
    """A module of the user's own, in the mode in which it is, unless the call says `training`.

    It gets the inputs of the call as tensors of its device and dtype, and the call's other
    arguments by name. It may return the same as a plain function.
    """

    def __init__(self, module: Any, description: LayerDescription | None, own: bool) -> None:
        self.module, self.description = module, description
        self.state = description if own else None
        self.name = type(module).__qualname__

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        torch: Any = importlib.import_module("torch")
        module = self.module
        arguments = request.arguments()
        training = arguments.pop("training", None)
        arrays = {n: a for n, a in arguments.items() if isinstance(a, np.ndarray)}
        arguments |= tensors(module, arrays)
        inputs = tensors(module, request.inputs)

        def results(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            present = [inputs[name] for name in INPUTS if name in inputs]
            return named_stages(module(*present, **arguments), self.name)

        def call() -> Arrays:
            with torch.no_grad(), _recorder(module, self.state) as recorded:
                reported = results(inputs)
            return {**recorded, **{name: _array(x) for name, x in reported.items()}}

        with restored(module, training):
            gradients: Arrays = {}
            if cotangent is not None:
                gradients = gradients_through(
                    parameters_of(module), lambda inputs: results(inputs)["output"], inputs,
                    cotangent,
                    self.state,
                )  # fmt: skip
            return make_trace(self.name, request, call, self.description, gradients)


def _recorder(module: Any, description: LayerDescription | None) -> Any:
    return nullcontext({}) if description is None else recorded_projections(module, description)


def _array(value: Any) -> np.ndarray:
    return as_numpy(value.detach() if hasattr(value, "detach") else value)
