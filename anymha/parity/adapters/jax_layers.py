"""Layers of JAX's libraries: flax.nnx, linen, Equinox and Haiku.

Each reports its projections and its context as its library lets it. Their common part: float64
where the weights have it, one dense mask, and gradients by `jax.vjp`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.framework.dtypes import FLOATING, dtype_name
from anymha.interchange.libraries import open_layer
from anymha.parity.adapters.foreign import (
    LayerDescription,
    dense_mask,
    describe_layer,
    make_trace,
    refuse,
)
from anymha.parity.oracle.cases import trio
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.stages.trace import Request, Trace


@dataclasses.dataclass
class Calls:
    """How one layer is called in one comparison."""

    parameters: Any  # its weights, nested
    output: Callable[[Any, Any], Any]  # of parameters and inputs
    report: Callable[[], Mapping[str, Any]]  # calls it; returns "output", stages and scores
    # Makes the layer with such weights, whose arrays have the names of its layout.
    whole: Callable[[Any], Any] = lambda parameters: parameters


class JaxLayer:
    """A layer that a library of JAX calls; the base of those below."""

    name: str
    library: str

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def describe(self) -> LayerDescription:
        """Its weights and options."""
        return describe_layer(self.layer)

    def calls(self, request: Request, inputs: Any, mask: Any, config: Any) -> Calls:
        """How it is called; arrays of JAX, the mask (B, H, T, S), True = may attend, or None."""
        raise NotImplementedError

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        description = self.describe()
        refuse(request, self.library, attention_bias=request.bias is not None)
        with precise(description.weights):
            jnp: Any = importlib.import_module("jax.numpy")
            seen = dense_mask(description.recipe(request))
            mask = None if seen is None else jnp.asarray(seen)
            inputs = {name: jnp.asarray(array) for name, array in request.inputs.items()}
            calls = self.calls(request, inputs, mask, description.config)

            def call() -> Arrays:
                stages = calls.report().items()
                return {name: np.asarray(x) for name, x in stages if x is not None}

            gradients: Arrays = {}
            if cotangent is not None:
                arguments = (calls.output, calls.parameters, inputs, cotangent)
                ours, theirs = gradients_through(*arguments)
                own = open_layer(calls.whole(ours)).arrays
                gradients = {**description.canonical(own), **theirs}
            return make_trace(self.name, request, call, description, gradients)


class NnxLayer(JaxLayer):
    """`flax.nnx.MultiHeadAttention`: its attention function is wrapped to record its arguments.

    A copy of the layer is called, so that its state and random numbers stay.
    """

    name = "flax.nnx.MultiHeadAttention"
    library = "Flax"

    def calls(self, request: Request, inputs: Any, mask: Any, config: Any) -> Calls:
        """See `JaxLayer.calls`."""
        nnx: Any = importlib.import_module("flax.nnx")
        jax: Any = importlib.import_module("jax")
        graph, params, rest = nnx.split(self.layer, nnx.Param, ...)
        copied = jax.tree.map(lambda leaf: leaf, rest)
        running = nnx.merge(graph, params, copied)

        def whole(parameters: Any) -> Any:
            return nnx.merge(graph, parameters, copied)

        def output(layer: Any, inputs: Any, **options: Any) -> Any:
            query, value, key = trio(inputs)
            # In decoding the layer caches keys and values, and takes other inputs.
            options |= {"mask": mask, "deterministic": not request.training, "decode": False}
            return layer(query, key, value, **options)

        def report() -> dict[str, Any]:
            recorded: dict[str, Any] = {}
            sown, own = _Sown(), running.attention_fn

            def recording(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
                if options.get("module") is not None:
                    options["module"] = sown
                context = own(q, k, v, *args, **options)
                recorded.update(query=q, key=k, value=v, context=context)
                return context

            running.attention_fn = recording
            try:
                output(running, inputs, sow_weights=True)
                return {**recorded, "output": output(running, inputs), "scores": sown.weights}
            finally:
                running.attention_fn = own

        return Calls(params, lambda own, inputs: output(whole(own), inputs), report, whole)


class _Sown:
    """Receives the sown attention weights in place of the layer, whose state stays as it is."""

    weights: Any = None

    def sow(self, kind: Any, name: str, value: Any, **options: Any) -> bool:
        del kind, name, options
        self.weights = value
        return True


class LinenLayer(JaxLayer):
    """linen's `MultiHeadDotProductAttention`, bound to its variables: ``module.bind(...)``."""

    library = "linen"

    def __init__(self, module: Any) -> None:
        if module.scope is None:
            raise ArgumentError(
                f"A {type(module).__name__} of linen holds no weights. Pass it with its variables, "
                "`module.bind(variables)`."
            )
        self.module, self.variables = module.unbind()
        self.name = f"flax.linen.{type(module).__name__}"

    def describe(self) -> LayerDescription:
        """Its weights, and the options that its fields have."""
        description = describe_layer(self.variables["params"])
        options: dict[str, Any] = {"dropout": float(self.module.dropout_rate)}
        if self.module.dtype is not None and dtype_name(self.module.dtype) in FLOATING:
            options["compute_dtype"] = dtype_name(self.module.dtype)
        config = dataclasses.replace(description.config, **options)
        return dataclasses.replace(description, config=config)

    def calls(self, request: Request, inputs: Any, mask: Any, config: Any) -> Calls:
        """See `JaxLayer.calls`."""
        jax: Any = importlib.import_module("jax")
        linen: Any = importlib.import_module("flax.linen")
        variables, drawn = self.variables, iter(range(8))

        def output(params: Any, inputs: Any, **options: Any) -> Any:
            query, value, key = trio(inputs)
            rngs = {"dropout": jax.random.key(next(drawn))} if request.training else None
            options |= {"mask": mask, "deterministic": not request.training, "rngs": rngs}
            return self.module.apply({**variables, "params": params}, query, key, value, **options)

        def report() -> dict[str, Any]:
            params, recorded = variables["params"], {}
            with linen.intercept_methods(_recorder(recorded, "out", config.num_heads)):
                recorded["output"] = output(params, inputs)
            sown = output(params, inputs, sow_weights=True, mutable=["intermediates"])[1]
            return {**recorded, "scores": sown["intermediates"]["attention_weights"][0]}

        return Calls(variables["params"], output, report)


class HaikuLayer(JaxLayer):
    """Haiku's layer: a function of `query`, `key`, `value`, `mask`, transformed, and parameters."""

    name = "haiku.MultiHeadAttention"
    library = "Haiku"

    def __init__(self, transformed: Any, params: Any, description: LayerDescription) -> None:
        self.transformed, self.params, self.description = transformed, params, description

    def describe(self) -> LayerDescription:
        """As it was given."""
        return self.description

    def calls(self, request: Request, inputs: Any, mask: Any, config: Any) -> Calls:
        """See `JaxLayer.calls`."""
        haiku: Any = importlib.import_module("haiku")

        def output(params: Any, inputs: Any) -> Any:
            query, value, key = trio(inputs)
            named = {"query": query, "key": key, "value": value, "mask": mask}
            return self.transformed.apply(params, None, **named)

        def report() -> dict[str, Any]:
            recorded: dict[str, Any] = {}
            with haiku.intercept_methods(_recorder(recorded, "linear", config.num_heads)):
                recorded["output"] = output(self.params, inputs)
            return recorded

        return Calls(self.params, output, report)


def _recorder(recorded: dict[str, Any], last: str, heads: int) -> Callable[..., Any]:
    """An interceptor of linen and Haiku, which records the projections and the last one's input."""

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1)

    def record(following: Any, args: Any, options: Any, context: Any) -> Any:
        result = following(*args, **options)
        part = context.module.name if context.method_name == "__call__" else ""
        if part in ("query", "key", "value"):
            recorded[part] = split(result)
        elif part == last:
            recorded["context"] = split(args[0])
        return result

    return record


class EquinoxLayer(JaxLayer):
    """`equinox.nn.MultiheadAttention`, which takes one element of a batch: `jax.vmap` maps it."""

    name = "equinox.nn.MultiheadAttention"
    library = "Equinox"

    def calls(self, request: Request, inputs: Any, mask: Any, config: Any) -> Calls:
        """See `JaxLayer.calls`."""
        jax: Any = importlib.import_module("jax")
        equinox: Any = importlib.import_module("equinox")
        parameters, rest = equinox.partition(self.layer, equinox.is_inexact_array)
        drawn = iter(range(8))

        def whole(parameters: Any) -> Any:
            return equinox.combine(parameters, rest)

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

                options: dict[str, Any] = {"key": random, "inference": not request.training}
                options["process_heads"] = record if heads else None
                result = layer(query, key, value, mask, **options)
                return {**recorded, "output": result} if heads else result

            return jax.vmap(one)(query, key, value, mask, keys)

        # Without its last projection the layer gives the context.
        bare = equinox.tree_at(lambda layer: layer.output_proj, self.layer, lambda x: x)

        def report() -> dict[str, Any]:
            stages = output(self.layer, inputs, heads=True)
            if request.training:
                return {"output": stages["output"]}
            context = output(bare, inputs)
            shape = (*context.shape[:2], config.num_heads, -1)
            return {**stages, "context": context.reshape(shape)}

        return Calls(parameters, lambda own, inputs: output(whole(own), inputs), report, whole)


def precise(weights: Mapping[str, np.ndarray]) -> AbstractContextManager[Any]:
    """A context in which float64 exists, if a weight has it or JAX's option says so."""
    jax: Any = importlib.import_module("jax")
    wide = any(array.dtype == np.float64 for array in weights.values())
    return jax.enable_x64(wide or jax.config.jax_enable_x64)


def gradients_through(
    function: Callable[[Any, Any], Any],
    parameters: Any,
    inputs: Mapping[str, Any],
    cotangent: np.ndarray,
) -> tuple[Any, Arrays]:
    """Gradients of the sum of an output times a cotangent: of parameters, of inputs by name."""
    jax: Any = importlib.import_module("jax")
    output, pull = jax.vjp(function, parameters, dict(inputs))
    ours, theirs = pull(jax.numpy.asarray(cotangent, output.dtype))
    return ours, {name: np.asarray(array) for name, array in theirs.items()}
