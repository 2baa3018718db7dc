"""Any `torch.nn.Module`: called as a function of the inputs that were given."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import Known, finished
from anymha.parity.adapters.function import named
from anymha.parity.adapters.torch_tools import hooked, kept, parameters_of, pulled, tensors
from anymha.parity.stages.trace import INPUTS, Arrays, Request, Trace, as_numpy


def opened(module: Any, told: Known | None = None, own: bool = False) -> TorchModule:
    """A module; `told`: what is known of its weights, `own`: whether its state is these."""
    return TorchModule(module, told, own)


class TorchModule:
    """A module of the user's own, in the mode in which it is, unless the call says `training`.

    It gets the inputs as tensors of its device and dtype, as many as were given, and the call's
    other arguments by name. It returns what a plain function may return.
    """

    def __init__(self, module: Any, told: Known | None, own: bool) -> None:
        self.module, self.told = module, told
        self.state = told if own else None
        self.name = type(module).__qualname__

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        torch: Any = importlib.import_module("torch")
        module = self.module
        arguments = request.arguments()
        training = arguments.pop("training", None)
        arrays = {n: a for n, a in arguments.items() if isinstance(a, np.ndarray)}
        arguments |= tensors(module, arrays)
        given = tensors(module, request.inputs)

        def found(given: Mapping[str, Any]) -> Mapping[str, Any]:
            inputs = [given[name] for name in INPUTS if name in given]
            return named(module(*inputs, **arguments), self.name)

        def call() -> Arrays:
            with torch.no_grad(), _taps(module, self.state) as heard:
                told = found(given)
            return {**heard, **{name: _array(x) for name, x in told.items()}}

        with kept(module, training):
            gradients: Arrays = {}
            if cotangent is not None:
                gradients = pulled(
                    parameters_of(module), lambda given: found(given)["output"], given, cotangent,
                    self.state,
                )  # fmt: skip
            return finished(self.name, request, call, self.told, gradients)


def _taps(module: Any, told: Known | None) -> Any:
    return nullcontext({}) if told is None else hooked(module, told)


def _array(value: Any) -> np.ndarray:
    return as_numpy(value.detach() if hasattr(value, "detach") else value)
