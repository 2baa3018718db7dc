"""Keras's `MultiHeadAttention` and `GroupQueryAttention`, on any of its backends."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np

from anymha.parity.subjects.foreign import described, finished, refuse
from anymha.parity.trace import Arrays, Request, Trace


def opened(layer: Any) -> KerasLayer:
    """A layer of Keras."""
    return KerasLayer(layer)


class KerasLayer:
    """Keras's own layer, called with the arguments that it knows."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = f"keras.layers.{type(layer).__name__}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.trace.Subject`."""
        keras: Any = importlib.import_module("keras")
        weights, config = described(self.layer)
        call_of = inspect.signature(type(self.layer).call).parameters
        arguments: dict[str, Any] = {
            name: keras.ops.convert_to_tensor(mask) for name, mask in request.masks.items()
        }
        arguments["use_causal_mask"] = bool(request.call.get("use_causal_mask"))
        lacking = {name: name not in call_of for name in arguments}
        offset = np.any(np.asarray(request.call.get("query_offset", 0)))
        axes = request.inputs["query"].ndim != 3
        if not axes or type(self.layer).__name__ != "MultiHeadAttention":
            refuse(
                request, "Keras", attention_bias=request.bias is not None,
                query_offset=bool(offset), **lacking,
            )  # fmt: skip
        query, value, key = (keras.ops.convert_to_tensor(x) for x in request.three)
        arguments["training"] = request.training

        def call() -> Arrays:
            output = self.layer(query, value, key, **arguments)
            scores = self.layer(query, value, key, return_attention_scores=True, **arguments)[1]
            numpy = keras.ops.convert_to_numpy
            return {"output": np.asarray(numpy(output)), "scores": np.asarray(numpy(scores))}

        return finished(self.name, call, weights, config)
