"""Plain functions: ``f(query, value, key, **call)``, of which only what they return is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.parity.trace import INPUTS, STAGES, Arrays, Request, Trace, as_numpy
from anymha.registry import backend_of


def opened(function: Callable[..., Any]) -> Function:
    """A function of query, value and key."""
    return Function(function)


class Function:
    """A function, in the framework of the arrays that the user gave.

    It gets the arrays as they were given, as many as were given, and the call's other arguments by
    name. It returns the output; or the output and the scores; or a dict with "output" and any of
    "scores" and the stages.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.trace.Subject`."""
        del cotangent  # a function's gradients are its own affair
        given = [request.given[name] for name in INPUTS if name in request.given]
        ops = backend_of(given[0]).ops
        arguments = {
            name: ops.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in request.arguments().items()
        }
        first, second = (self.function(*given, **arguments) for _ in range(2))
        found, again = _named(first, self.name), _named(second, self.name)
        return Trace(
            self.name,
            found["output"],
            found.get("scores"),
            {n: a.astype(np.float64) for n, a in found.items() if n in STAGES and n != "output"},
            random=not np.array_equal(found["output"], again["output"], equal_nan=True),
        )


def _named(result: Any, name: str) -> Arrays:
    """What a function returned, by name, in NumPy."""
    if isinstance(result, Mapping):
        named = dict(result)
    elif isinstance(result, (tuple, list)):
        named = dict(zip(("output", "scores"), result, strict=False))
    else:
        named = {"output": result}
    unknown = sorted(set(named) - {*STAGES, "scores"})
    if "output" not in named or unknown:
        raise ArgumentError(
            f"`{name}` must return the output, or the output and the scores, or a dict of 'output' "
            f"and any of {', '.join((*STAGES[:-1], 'scores'))}. Received: {', '.join(named)}."
        )
    return {key: as_numpy(value) for key, value in named.items() if value is not None}
