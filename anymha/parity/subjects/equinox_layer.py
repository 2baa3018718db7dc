"""`equinox.nn.MultiheadAttention`, which takes one element of a batch at a time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.subjects.foreign import dense_mask, described, finished, recipe_of, refuse
from anymha.parity.trace import Arrays, Request, Trace


def opened(layer: Any) -> EquinoxLayer:
    """A layer of Equinox."""
    return EquinoxLayer(layer)


class EquinoxLayer:
    """Equinox's own layer, over the batch by `jax.vmap`."""

    name = "equinox.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.trace.Subject`."""
        jax: Any = importlib.import_module("jax")
        weights, config = described(self.layer)
        refuse(request, "Equinox", attention_bias=request.bias is not None,
               training=request.training)  # fmt: skip
        seen = dense_mask(recipe_of(weights, config, request))
        query, value, key = (jax.numpy.asarray(x) for x in request.three)
        parts = [query, key, value] + ([] if seen is None else [jax.numpy.asarray(seen)])

        def one(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
            return self.layer(query, key, value, mask, inference=True)

        def call() -> Arrays:
            return {"output": np.asarray(jax.vmap(one)(*parts))}

        return finished(self.name, call, weights, config)
