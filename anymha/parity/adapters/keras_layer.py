"""Keras's `MultiHeadAttention` and `GroupQueryAttention`, on any of its backends."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import Known, finished, known, refuse, trio
from anymha.parity.adapters.jax_tools import precise
from anymha.parity.adapters.jax_tools import pulled as pulled_in_jax
from anymha.parity.adapters.torch_tools import pulled as pulled_in_torch
from anymha.parity.stages.trace import Arrays, Request, Trace, as_numpy

PARTS = {"_query_dense": "query", "_key_dense": "key", "_value_dense": "value"}


def opened(layer: Any) -> KerasLayer:
    """A layer of Keras."""
    return KerasLayer(layer)


class KerasLayer:
    """Keras's own layer, called with the arguments that it knows."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = f"keras.layers.{type(layer).__name__}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        keras: Any = importlib.import_module("keras")
        told, layer = known(self.layer), self.layer
        on_jax = keras.backend.backend() == "jax"
        with precise(told.weights) if on_jax else nullcontext(), _kept(layer):
            arguments = _arguments(keras, layer, request)
            given = {name: _tensor(keras, x) for name, x in request.inputs.items()}

            def output(given: Mapping[str, Any], **options: Any) -> Any:
                return layer(*trio(given), **arguments, **options)

            def call() -> Arrays:
                with _listening(layer) as heard:
                    found = output(given)
                scores = output(given, return_attention_scores=True)[1]
                told = {name: x for name, x in heard.items() if len(x.shape) == 4}
                told |= {"output": found, "scores": scores}
                return {name: _numpy(x) for name, x in told.items()}

            gradients: Arrays = {}
            if cotangent is not None:
                gradients = _gradients(keras, layer, output, given, cotangent, told)
            framework = keras.backend.backend()
            return finished(self.name, request, call, told, gradients, framework=framework)


def _arguments(keras: Any, layer: Any, request: Request) -> dict[str, Any]:
    """The call's arguments as Keras takes them.

    Raises:
        LayoutError: it has no such argument.
    """
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
    lacking["attention_bias"] = request.bias is not None
    lacking["query_offset"] = bool(np.any(np.asarray(request.call.get("query_offset", 0))))
    if query.ndim == 3 or type(layer).__name__ != "MultiHeadAttention" or any(lacking.values()):
        refuse(request, "Keras", **lacking)
    return {**arguments, "training": request.training}


def _tensor(keras: Any, array: np.ndarray) -> Any:
    """An array as Keras's, whose torch does not read NumPy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return keras.ops.cast(keras.ops.convert_to_tensor(array.astype(np.float32)), "bfloat16")
    return keras.ops.convert_to_tensor(array)


def _numpy(tensor: Any) -> np.ndarray:
    return as_numpy(tensor.detach() if hasattr(tensor, "detach") else tensor)


@contextmanager
def _kept(layer: Any) -> Iterator[None]:
    """The layer as it was after: its seeds, its losses, and what it keeps of a call."""
    weights = {id(variable) for variable in layer.weights}
    others = [(v, np.array(_numpy(v.value))) for v in layer.variables if id(v) not in weights]
    parts = [(part, dict(part.__dict__)) for part in layer._flatten_layers()]
    lost = [(part, list(part._losses)) for part, _ in parts if hasattr(part, "_losses")]
    try:
        yield
    finally:
        for variable, value in others:
            variable.assign(value)
        for part, held in parts:
            if "_return_attention_scores" in held:
                part.__dict__["_return_attention_scores"] = held["_return_attention_scores"]
        for part, losses in lost:
            part._losses[:] = losses


@contextmanager
def _listening(layer: Any) -> Iterator[dict[str, Any]]:
    """What the layer's projections give, and what its last one gets, by stage.

    The calls are held in the parts' own dict for the time, past Keras's tracker.
    """
    heard: dict[str, Any] = {}
    parts = {name: getattr(layer, name, None) for name in (*PARTS, "_output_dense")}

    def listen(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Any, *args: Any, **options: Any) -> Any:
            found = own(inputs, *args, **options)
            heard[PARTS.get(name, "context")] = found if name in PARTS else inputs
            return found

        return call

    try:
        for name, part in parts.items():
            if part is not None:
                part.__dict__["call"] = listen(name, part.call)
        yield heard
    finally:
        for part in parts.values():
            if part is not None:
                part.__dict__.pop("call", None)


def _gradients(
    keras: Any, layer: Any, output: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any],
    cotangent: np.ndarray, told: Known,
) -> Arrays:  # fmt: skip
    """Through the autodiff of Keras's backend; none where that has none."""
    variables = dict(zip(told.arrays, layer.weights, strict=True))
    backend = keras.backend.backend()
    held = {name: variable.value for name, variable in variables.items()}
    if backend == "torch":
        return pulled_in_torch(held, output, given, cotangent, told)
    if backend == "jax":

        def function(held: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
            pairs = [(variables[name], value) for name, value in held.items()]
            with keras.StatelessScope(state_mapping=pairs):
                return output(given)

        ours, theirs = pulled_in_jax(function, held, given, cotangent)
        return {**told.canonical(ours), **theirs}
    if backend == "tensorflow":
        tensorflow: Any = importlib.import_module("tensorflow")
        with tensorflow.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([*held.values(), *given.values()])
            found = output(given)
        to = tensorflow.cast(cotangent, found.dtype)
        ours, theirs = tape.gradient(
            found, (held, dict(given)), to, tensorflow.UnconnectedGradients.ZERO
        )
        return {**told.canonical(ours), **{name: as_numpy(x) for name, x in theirs.items()}}
    return {}
