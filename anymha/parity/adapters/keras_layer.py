"""Keras's `MultiHeadAttention` and `GroupQueryAttention`, on any of its backends."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from anymha.parity.adapters import jax_layers, torch_layers
from anymha.parity.adapters.foreign import (
    LayerDescription,
    describe_layer,
    make_trace,
    refuse,
)
from anymha.parity.oracle.cases import trio
from anymha.parity.stages.trace import Arrays, Request, Trace, as_numpy

PARTS = {"_query_dense": "query", "_key_dense": "key", "_value_dense": "value"}


class KerasLayer:
    """Keras's own layer, called with the arguments that it knows."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = f"keras.layers.{type(layer).__name__}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        keras: Any = importlib.import_module("keras")
        description, layer = describe_layer(self.layer), self.layer
        framework = keras.backend.backend()
        wide = jax_layers.precise(description.weights) if framework == "jax" else nullcontext()
        with wide, _restored(layer):
            arguments = _arguments(keras, layer, request)
            inputs = {name: _tensor(keras, x) for name, x in request.inputs.items()}

            def output(inputs: Mapping[str, Any], **options: Any) -> Any:
                return layer(*trio(inputs), **arguments, **options)

            def call() -> Arrays:
                with _recording(layer) as recorded:
                    result = output(inputs)
                scores = output(inputs, return_attention_scores=True)[1]
                stages = {name: x for name, x in recorded.items() if len(x.shape) == 4}
                stages |= {"output": result, "scores": scores}
                return {name: torch_layers.array(x) for name, x in stages.items()}

            gradients: Arrays | str = {}
            if cotangent is not None:
                gradients = _gradients(keras, layer, output, inputs, cotangent, description)
            return make_trace(self.name, request, call, description, gradients, framework=framework)


def _arguments(keras: Any, layer: Any, request: Request) -> dict[str, Any]:
    """The call's arguments as Keras takes them; an error where it has no such argument."""
    known_there = inspect.signature(type(layer).call).parameters
    masks = dict(request.masks)
    whole = masks.get("attention_mask")
    query = request.inputs["query"]
    if whole is not None and whole.ndim == 2 and query.ndim == 3:  # it takes (B, T, S)
        masks["attention_mask"] = np.broadcast_to(whole, (query.shape[0], *whole.shape))
    arguments: dict[str, Any] = {
        name: keras.ops.convert_to_tensor(np.ascontiguousarray(mask))
        for name, mask in masks.items()
    }
    arguments["use_causal_mask"] = bool(request.call.get("use_causal_mask"))
    lacking = {name: name not in known_there for name in arguments}
    lacking["segment_ids"] = "segment_ids" in request.call
    lacking["attention_bias"] = request.bias is not None
    lacking["query_offset"] = bool(np.any(np.asarray(request.call.get("query_offset", 0))))
    if query.ndim == 3 or type(layer).__name__ != "MultiHeadAttention" or any(lacking.values()):
        refuse(request, "Keras", **lacking)
    return {**arguments, "training": request.training}


def _tensor(keras: Any, array: np.ndarray) -> Any:
    """An array as Keras's; Keras on torch does not read NumPy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return keras.ops.cast(keras.ops.convert_to_tensor(array.astype(np.float32)), "bfloat16")
    return keras.ops.convert_to_tensor(array)


@contextmanager
def _restored(layer: Any) -> Iterator[None]:
    """Restore the layer at the end: its seeds, its losses, and the state of a call."""
    weights = {id(variable) for variable in layer.weights}
    others = [
        (v, np.array(torch_layers.array(v.value))) for v in layer.variables if id(v) not in weights
    ]
    parts = [(part, dict(part.__dict__)) for part in layer._flatten_layers()]
    lost = [(part, list(part._losses)) for part, _ in parts if hasattr(part, "_losses")]
    try:
        yield
    finally:
        for variable, value in others:
            variable.assign(value)
        for part, state in parts:
            if "_return_attention_scores" in state:
                part.__dict__["_return_attention_scores"] = state["_return_attention_scores"]
        for part, losses in lost:
            part._losses[:] = losses


@contextmanager
def _recording(layer: Any) -> Iterator[dict[str, Any]]:
    """Record the results of the layer's projections, and the input of the last, by stage.

    The wrapped calls stand in the parts' own dict meanwhile, past Keras's tracker.
    """
    recorded: dict[str, Any] = {}
    parts = {name: getattr(layer, name, None) for name in (*PARTS, "_output_dense")}

    def record(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Any, *args: Any, **options: Any) -> Any:
            result = own(inputs, *args, **options)
            recorded[PARTS.get(name, "context")] = result if name in PARTS else inputs
            return result

        return call

    try:
        for name, part in parts.items():
            if part is not None:
                part.__dict__["call"] = record(name, part.call)
        yield recorded
    finally:
        for part in parts.values():
            if part is not None:
                part.__dict__.pop("call", None)


def _gradients(
    keras: Any, layer: Any, output: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any],
    cotangent: np.ndarray, description: LayerDescription,
) -> Arrays | str:  # fmt: skip
    """Gradients by the autodiff of Keras's backend; or why there are none."""
    variables = dict(zip(description.arrays, layer.weights, strict=True))
    backend = keras.backend.backend()
    parameters = {name: variable.value for name, variable in variables.items()}
    if backend == "torch":
        arguments = (parameters, output, inputs, cotangent, description)
        return torch_layers.gradients_through(*arguments)
    if backend == "jax":

        def function(parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
            pairs = [(variables[name], value) for name, value in parameters.items()]
            with keras.StatelessScope(state_mapping=pairs):
                return output(inputs)

        ours, theirs = jax_layers.gradients_through(function, parameters, inputs, cotangent)
        return {**description.canonical(ours), **theirs}
    if backend == "tensorflow":
        tensorflow: Any = importlib.import_module("tensorflow")
        with tensorflow.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([*parameters.values(), *inputs.values()])
            result = output(inputs)
        to = tensorflow.cast(cotangent, result.dtype)
        ours, theirs = tape.gradient(
            result, (parameters, dict(inputs)), to, tensorflow.UnconnectedGradients.ZERO
        )
        return {**description.canonical(ours), **{name: as_numpy(x) for name, x in theirs.items()}}
    return f"Keras on {backend} has no gradients"
