"""Haiku's `MultiHeadAttention`, as the result of `haiku.transform`, with its parameters."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import LayerDescription, make_trace, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def make_adapter(transformed: Any, params: Any, description: LayerDescription) -> HaikuLayer:
    """A transformed function of `query`, `key`, `value` and `mask`, and its parameters."""
    return HaikuLayer(transformed, params, description)


class HaikuLayer:
    """Haiku's own layer; an interceptor records the calls of its parts."""

    name = "haiku.MultiHeadAttention"

    def __init__(self, transformed: Any, params: Any, description: LayerDescription) -> None:
        self.transformed, self.params, self.description = transformed, params, description

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        description, heads = self.description, self.description.config.num_heads
        refuse(request, "Haiku", attention_bias=request.bias is not None)
        with precise(description.weights):
            haiku: Any = importlib.import_module("haiku")
            mask, inputs = mask_of(description.recipe(request)), arrays_of(request.inputs)

            def output(params: Any, inputs: Any) -> Any:
                query, value, key = trio(inputs)
                return self.transformed.apply(
                    params, None, query=query, key=key, value=value, mask=mask
                )

            def call() -> Arrays:
                recorded: dict[str, Any] = {}

                def record(following: Any, args: Any, options: Any, context: Any) -> Any:
                    result = following(*args, **options)
                    part = context.module.name if context.method_name == "__call__" else ""
                    if part in ("query", "key", "value"):
                        recorded[part] = result.reshape(*result.shape[:-1], heads, -1)
                    elif part == "linear":
                        recorded["context"] = args[0].reshape(*args[0].shape[:-1], heads, -1)
                    return result

                with haiku.intercept_methods(record):
                    recorded["output"] = output(self.params, inputs)
                return numpy_of(recorded)

            gradients = gradients_of(description, output, self.params, inputs, cotangent)
            return make_trace(self.name, request, call, description, gradients)
