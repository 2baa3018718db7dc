"""Functions ``f(query, value, key, **call)``, of which only what they return is known, or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.framework.registry import backend_of
from anymha.parity.adapters.foreign import Known, finished
from anymha.parity.stages.trace import INPUTS, STAGES, Arrays, Request, Trace, as_numpy


def opened(function: Callable[..., Any], told: Known | None = None) -> Function:
    """A function of query, value and key; `told`: what is known of its weights."""
    return Function(function, told)


class Function:
    """A function, in the framework of the arrays that the user gave.

    It gets the arrays as they were given, as many as were given, and the call's other arguments by
    name. It returns the output; or the output and the scores; or a dict with "output" and any of
    "scores" and the stages. Its gradients are its own affair.
    """

    def __init__(self, function: Callable[..., Any], told: Known | None) -> None:
        self.function, self.told = function, told
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        given = [request.given[name] for name in INPUTS if name in request.given]
        ops = backend_of(given[0]).ops
        arguments = {
            name: ops.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in request.arguments().items()
        }

        def call() -> Arrays:
            copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in given]
            found = named(self.function(*copies, **arguments), self.name)
            return {name: as_numpy(array) for name, array in found.items()}

        return finished(self.name, request, call, self.told, framework=ops.name)


def named(result: Any, name: str) -> dict[str, Any]:
    """What a function returned, by stage, "output" and "scores".

    Args:
        result: What it returned.
        name: Its name.

    Raises:
        ArgumentError: it is none of what a function may return.
    """
    if isinstance(result, Mapping):
        found = dict(result)
    elif isinstance(result, (tuple, list)):
        found = dict(zip(("output", "scores"), result, strict=False))
    else:
        found = {"output": result}
    unknown = sorted(set(found) - {*STAGES, "scores"})
    many = isinstance(result, (tuple, list)) and len(result) > 2
    if found.get("output") is None or unknown or many:
        raise ArgumentError(
            f"`{name}` must return the output, or the output and the scores, or a dict of 'output' "
            f"and any of {', '.join((*STAGES[:-1], 'scores'))}. Received: "
            + (f"{len(result)} values." if many else f"{', '.join(found)}." if unknown else "None.")
        )
    return {key: value for key, value in found.items() if value is not None}
