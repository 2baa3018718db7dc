"""Flax's linen: `MultiHeadDotProductAttention` bound to its variables, ``module.bind(...)``."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.framework.dtypes import FLOATING, dtype_name
from anymha.parity.adapters.foreign import (
    LayerDescription,
    describe_layer,
    make_trace,
    refuse,
    trio,
)
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def make_adapter(module: Any) -> LinenLayer:
    """A bound module of linen.

    Raises:
        ArgumentError: it is not bound to variables.
    """
    if module.scope is None:
        raise ArgumentError(
            f"A {type(module).__name__} of linen holds no weights. Pass it with its variables, "
            "`module.bind(variables)`."
        )
    return LinenLayer(module)


class LinenLayer:
    """linen's own layer; an interceptor records the calls of its parts."""

    def __init__(self, module: Any) -> None:
        self.module, self.variables = module.unbind()
        self.name = f"flax.linen.{type(module).__name__}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        description = self._description()
        refuse(request, "linen", attention_bias=request.bias is not None)
        with precise(description.weights):
            jax: Any = importlib.import_module("jax")
            linen: Any = importlib.import_module("flax.linen")
            mask, inputs = mask_of(description.recipe(request)), arrays_of(request.inputs)
            module = self.module
            drawn = iter(range(8))

            def output(variables: Any, inputs: Any, **options: Any) -> Any:
                query, value, key = trio(inputs)
                rngs = {"dropout": jax.random.key(next(drawn))} if request.training else None
                return module.apply(
                    variables, query, key, value, mask=mask,
                    deterministic=not request.training, rngs=rngs, **options,
                )  # fmt: skip

            def call() -> Arrays:
                recorded: dict[str, Any] = {}

                def record(following: Any, args: Any, options: Any, context: Any) -> Any:
                    result = following(*args, **options)
                    part = context.module.name
                    if part in ("query", "key", "value"):
                        recorded[part] = result
                    elif part == "out":
                        recorded["context"] = args[0]
                    return result

                with linen.intercept_methods(record):
                    recorded["output"] = output(self.variables, inputs)
                sown = output(self.variables, inputs, sow_weights=True, mutable=["intermediates"])
                recorded["scores"] = sown[1]["intermediates"]["attention_weights"][0]
                return numpy_of(recorded)

            gradients = gradients_of(
                description,
                lambda params, inputs: output({**self.variables, "params": params}, inputs),
                self.variables["params"], inputs, cotangent,
            )  # fmt: skip
            return make_trace(self.name, request, call, description, gradients)

    def _description(self) -> LayerDescription:
        description = describe_layer(self.variables["params"])
        options: dict[str, Any] = {"dropout": float(self.module.dropout_rate)}
        if self.module.dtype is not None and dtype_name(self.module.dtype) in FLOATING:
            options["compute_dtype"] = dtype_name(self.module.dtype)
        return dataclasses.replace(
            description, config=dataclasses.replace(description.config, **options)
        )
