"""Haiku's `MultiHeadAttention`, as `haiku.transform` gives it, beside its parameters."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import Known, finished, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def opened(transformed: Any, params: Any, told: Known) -> HaikuLayer:
    """A transformed function of `query`, `key`, `value` and `mask`, and its parameters."""
    return HaikuLayer(transformed, params, told)


class HaikuLayer:
    """Haiku's own layer, listened to by an interceptor of its parts' calls."""

    name = "haiku.MultiHeadAttention"

    def __init__(self, transformed: Any, params: Any, told: Known) -> None:
        self.transformed, self.params, self.told = transformed, params, told

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        told, heads = self.told, self.told.config.num_heads
        refuse(request, "Haiku", attention_bias=request.bias is not None)
        with precise(told.weights):
            haiku: Any = importlib.import_module("haiku")
            mask, given = mask_of(told.recipe(request)), arrays_of(request.inputs)

            def output(params: Any, given: Any) -> Any:
                query, value, key = trio(given)
                return self.transformed.apply(
                    params, None, query=query, key=key, value=value, mask=mask
                )

            def call() -> Arrays:
                heard: dict[str, Any] = {}

                def listen(following: Any, args: Any, options: Any, context: Any) -> Any:
                    found = following(*args, **options)
                    part = context.module.name if context.method_name == "__call__" else ""
                    if part in ("query", "key", "value"):
                        heard[part] = found.reshape(*found.shape[:-1], heads, -1)
                    elif part == "linear":
                        heard["context"] = args[0].reshape(*args[0].shape[:-1], heads, -1)
                    return found

                with haiku.intercept_methods(listen):
                    heard["output"] = output(self.params, given)
                return numpy_of(heard)

            gradients = gradients_of(told, output, self.params, given, cotangent)
            return finished(self.name, request, call, told, gradients)
