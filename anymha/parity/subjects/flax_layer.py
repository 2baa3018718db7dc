"""`flax.nnx.MultiHeadAttention`: its attention function is a part that can be listened to."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.subjects.foreign import dense_mask, described, finished, recipe_of, refuse
from anymha.parity.trace import Arrays, Request, Trace


def opened(layer: Any) -> FlaxLayer:
    """A layer of `flax.nnx`."""
    return FlaxLayer(layer)


class FlaxLayer:
    """nnx's own layer."""

    name = "flax.nnx.MultiHeadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.trace.Subject`."""
        jnp: Any = importlib.import_module("jax.numpy")
        weights, config = described(self.layer)
        refuse(request, "Flax", attention_bias=request.bias is not None)
        seen = dense_mask(recipe_of(weights, config, request))
        mask = None if seen is None else jnp.asarray(seen)
        query, value, key = (jnp.asarray(x) for x in request.three)
        layer, heard = self.layer, {}
        own = layer.attention_fn

        def listening(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
            context = own(q, k, v, *args, **options)
            heard.update(query=q, key=k, value=v, context=context)
            return context

        def call() -> Arrays:
            output = layer(query, key, value, mask=mask, deterministic=not request.training)
            return {name: np.asarray(x) for name, x in {**heard, "output": output}.items()}

        layer.attention_fn = listening
        try:
            return finished(self.name, call, weights, config)
        finally:
            layer.attention_fn = own
