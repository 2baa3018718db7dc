"""`flax.nnx.MultiHeadAttention`, whose attention function is wrapped to record its arguments."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import describe_layer, make_trace, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def make_adapter(layer: Any) -> FlaxLayer:
    """A layer of `flax.nnx`."""
    return FlaxLayer(layer)


class _Sown:
    """Receives the sown attention weights in place of the layer, whose state stays as it is."""

    weights: Any = None

    def sow(self, kind: Any, name: str, value: Any, **options: Any) -> bool:
        """Keep a value, as `nnx.Module.sow`."""
        del kind, name, options
        self.weights = value
        return True


class FlaxLayer:
    """nnx's own layer; a copy of it is called, so that its state and random numbers stay."""

    name = "flax.nnx.MultiHeadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        description = describe_layer(self.layer)
        refuse(request, "Flax", attention_bias=request.bias is not None)
        with precise(description.weights):
            nnx: Any = importlib.import_module("flax.nnx")
            jax: Any = importlib.import_module("jax")
            mask, inputs = mask_of(description.recipe(request)), arrays_of(request.inputs)
            graph, params, rest = nnx.split(self.layer, nnx.Param, ...)
            copied = jax.tree.map(lambda leaf: leaf, rest)
            running = nnx.merge(graph, params, copied)

            def output(layer: Any, inputs: Any, **options: Any) -> Any:
                query, value, key = trio(inputs)
                # In decoding the layer caches keys and values, and takes other inputs.
                return layer(
                    query, key, value, mask=mask, deterministic=not request.training,
                    decode=False, **options,
                )  # fmt: skip

            def call() -> Arrays:
                recorded: dict[str, Any] = {}
                layer, sown = running, _Sown()
                own = layer.attention_fn

                def recording(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
                    if options.get("module") is not None:
                        options["module"] = sown
                    context = own(q, k, v, *args, **options)
                    recorded.update(query=q, key=k, value=v, context=context)
                    return context

                layer.attention_fn = recording
                try:
                    output(layer, inputs, sow_weights=True)
                    recorded["output"] = output(layer, inputs)
                finally:
                    layer.attention_fn = own
                recorded["scores"] = sown.weights
                return numpy_of(recorded)

            def merged(parameters: Any) -> Any:
                return nnx.merge(graph, parameters, copied)

            gradients = gradients_of(
                description, lambda parameters, inputs: output(merged(parameters), inputs), params,
                inputs, cotangent,
                merged,
            )  # fmt: skip
            return make_trace(self.name, request, call, description, gradients)
