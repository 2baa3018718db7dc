"""`equinox.nn.MultiheadAttention`, which takes one element of a batch at a time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import describe_layer, make_trace, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def make_adapter(layer: Any) -> EquinoxLayer:
    """A layer of Equinox."""
    return EquinoxLayer(layer)


class EquinoxLayer:
    """Equinox's own layer, mapped over the batch by `jax.vmap`."""

    name = "equinox.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        description = describe_layer(self.layer)
        refuse(request, "Equinox", attention_bias=request.bias is not None)
        with precise(description.weights):
            jax: Any = importlib.import_module("jax")
            equinox: Any = importlib.import_module("equinox")
            mask, inputs = mask_of(description.recipe(request)), arrays_of(request.inputs)
            drawn = iter(range(8))

            def output(layer: Any, inputs: Any, heads: bool = False) -> Any:
                query, value, key = trio(inputs)
                keys = None
                if request.training:
                    keys = jax.random.split(jax.random.key(next(drawn)), query.shape[0])

                def one(query: Any, key: Any, value: Any, mask: Any, random: Any) -> Any:
                    recorded: dict[str, Any] = {}

                    def record(q: Any, k: Any, v: Any) -> Any:
                        recorded.update(query=q, key=k, value=v)
                        return q, k, v

                    result = layer(
                        query, key, value, mask, key=random, inference=not request.training,
                        process_heads=record if heads else None,
                    )  # fmt: skip
                    return {**recorded, "output": result} if heads else result

                return jax.vmap(one)(query, key, value, mask, keys)

            # Without its last projection the layer gives the context.
            bare = equinox.tree_at(lambda layer: layer.output_proj, self.layer, lambda x: x)
            width = (
                description.config.key_dim
                if description.config.value_dim is None
                else description.config.value_dim
            )

            def call() -> Arrays:
                stages = numpy_of(output(self.layer, inputs, True))
                if request.training:
                    return {"output": stages["output"]}
                context = np.asarray(output(bare, inputs))
                shape = (*context.shape[:2], description.config.num_heads, width)
                return {**stages, "context": context.reshape(shape)}

            parameters, rest = equinox.partition(self.layer, equinox.is_inexact_array)

            def whole(parameters: Any) -> Any:
                return equinox.combine(parameters, rest)

            gradients = gradients_of(
                description,
                lambda parameters, inputs: output(whole(parameters), inputs),
                parameters,
                inputs,
                cotangent,
                whole,
            )
            return make_trace(self.name, request, call, description, gradients)
