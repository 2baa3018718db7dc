"""`flax.nnx.MultiHeadAttention`: its attention function is a part that can be listened to."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import finished, known, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def opened(layer: Any) -> FlaxLayer:
    """A layer of `flax.nnx`."""
    return FlaxLayer(layer)


class _Sown:
    """Takes the attention's weights in place of the layer, which would keep them."""

    weights: Any = None

    def sow(self, kind: Any, name: str, value: Any, **options: Any) -> bool:
        """Keep a value, as `nnx.Module.sow`."""
        del kind, name, options
        self.weights = value
        return True


class FlaxLayer:
    """nnx's own layer; copies of it are run, so that it keeps its state and random numbers."""

    name = "flax.nnx.MultiHeadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        told = known(self.layer)
        refuse(request, "Flax", attention_bias=request.bias is not None)
        with precise(told.weights):
            nnx: Any = importlib.import_module("flax.nnx")
            jax: Any = importlib.import_module("jax")
            mask, given = mask_of(told.recipe(request)), arrays_of(request.inputs)
            graph, params, rest = nnx.split(self.layer, nnx.Param, ...)
            copied = jax.tree.map(lambda leaf: leaf, rest)
            running = nnx.merge(graph, params, copied)

            def output(layer: Any, given: Any, **options: Any) -> Any:
                query, value, key = trio(given)
                # In decoding the layer keeps what it saw, and has other inputs.
                return layer(
                    query, key, value, mask=mask, deterministic=not request.training,
                    decode=False, **options,
                )  # fmt: skip

            def call() -> Arrays:
                heard: dict[str, Any] = {}
                layer, sown = running, _Sown()
                own = layer.attention_fn

                def listening(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
                    if options.get("module") is not None:
                        options["module"] = sown
                    context = own(q, k, v, *args, **options)
                    heard.update(query=q, key=k, value=v, context=context)
                    return context

                layer.attention_fn = listening
                try:
                    output(layer, given, sow_weights=True)
                    heard["output"] = output(layer, given)
                finally:
                    layer.attention_fn = own
                heard["scores"] = sown.weights
                return numpy_of(heard)

            def merged(held: Any) -> Any:
                return nnx.merge(graph, held, copied)

            gradients = gradients_of(
                told, lambda held, given: output(merged(held), given), params, given, cotangent,
                merged,
            )  # fmt: skip
            return finished(self.name, request, call, told, gradients)
