"""`equinox.nn.MultiheadAttention`, which takes one element of a batch at a time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import finished, known, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def opened(layer: Any) -> EquinoxLayer:
    """A layer of Equinox."""
    return EquinoxLayer(layer)


class EquinoxLayer:
    """Equinox's own layer, over the batch by `jax.vmap`; the layer itself is frozen."""

    name = "equinox.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        told = known(self.layer)
        refuse(request, "Equinox", attention_bias=request.bias is not None)
        with precise(told.weights):
            jax: Any = importlib.import_module("jax")
            equinox: Any = importlib.import_module("equinox")
            mask, given = mask_of(told.recipe(request)), arrays_of(request.inputs)
            drawn = iter(range(8))

            def output(layer: Any, given: Any, heads: bool = False) -> Any:
                query, value, key = trio(given)
                keys = None
                if request.training:
                    keys = jax.random.split(jax.random.key(next(drawn)), query.shape[0])

                def one(query: Any, key: Any, value: Any, mask: Any, random: Any) -> Any:
                    heard: dict[str, Any] = {}

                    def listen(q: Any, k: Any, v: Any) -> Any:
                        heard.update(query=q, key=k, value=v)
                        return q, k, v

                    found = layer(
                        query, key, value, mask, key=random, inference=not request.training,
                        process_heads=listen if heads else None,
                    )  # fmt: skip
                    return {**heard, "output": found} if heads else found

                return jax.vmap(one)(query, key, value, mask, keys)

            # Without its last projection the layer gives the context.
            bare = equinox.tree_at(lambda layer: layer.output_proj, self.layer, lambda x: x)
            width = told.config.key_dim if told.config.value_dim is None else told.config.value_dim

            def call() -> Arrays:
                found = numpy_of(output(self.layer, given, True))
                if request.training:
                    return {"output": found["output"]}
                context = np.asarray(output(bare, given))
                shape = (*context.shape[:2], told.config.num_heads, width)
                return {**found, "context": context.reshape(shape)}

            held, rest = equinox.partition(self.layer, equinox.is_inexact_array)

            def whole(held: Any) -> Any:
                return equinox.combine(held, rest)

            gradients = gradients_of(
                told, lambda held, given: output(whole(held), given), held, given, cotangent, whole
            )
            return finished(self.name, request, call, told, gradients)
