"""Functions ``f(query, value, key, **call)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.framework.registry import backend_of
from anymha.parity.adapters.foreign import LayerDescription, make_trace
from anymha.parity.stages.layer_call import native
from anymha.parity.stages.trace import INPUTS, STAGES, Arrays, Request, Trace, as_numpy


class Function:
    """A function, in the framework of the arrays that the user gave.

    It gets as many of the caller's own arrays as the call has, and the call's other arguments by
    name. It returns the output; or the output and the scores; or a dict with "output" and any of
    "scores" and the stages. Its gradients are not compared.
    """

    def __init__(
        self, function: Callable[..., Any], description: LayerDescription | None = None
    ) -> None:
        self.function, self.description = function, description
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        inputs = [request.originals[name] for name in INPUTS if name in request.originals]
        ops = backend_of(inputs[0]).ops
        arguments = native(ops, request.arguments())

        def call() -> Arrays:
            copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in inputs]
            results = named_stages(self.function(*copies, **arguments), self.name)
            return {name: as_numpy(array) for name, array in results.items()}

        return make_trace(self.name, request, call, self.description, framework=ops.name)


def named_stages(result: Any, name: str) -> dict[str, Any]:
    """The results of a function by name: stages, "output" and "scores"."""
    if isinstance(result, Mapping):
        stages = dict(result)
    elif isinstance(result, (tuple, list)):
        stages = dict(zip(("output", "scores"), result, strict=False))
    else:
        stages = {"output": result}
    unknown = sorted(set(stages) - {*STAGES, "scores"})
    many = isinstance(result, (tuple, list)) and len(result) > 2
    if stages.get("output") is None or unknown or many:
        received = f"{len(result)} values" if many else ", ".join(stages) if unknown else "None"
        raise ArgumentError(
            f"`{name}` must return the output, or the output and the scores, or a dict of 'output' "
            f"and any of {', '.join((*STAGES[:-1], 'scores'))}. Received: {received}."
        )
    return {key: value for key, value in stages.items() if value is not None}
