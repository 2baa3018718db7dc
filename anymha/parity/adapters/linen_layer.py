"""Flax's linen: `MultiHeadDotProductAttention` bound to its variables, ``module.bind(...)``."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np

from anymha.errors import ArgumentError
from anymha.framework.dtypes import FLOATING, dtype_name
from anymha.parity.adapters.foreign import Known, finished, known, refuse, trio
from anymha.parity.adapters.jax_tools import arrays_of, gradients_of, mask_of, numpy_of, precise
from anymha.parity.stages.trace import Arrays, Request, Trace


def opened(module: Any) -> LinenLayer:
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
    """linen's own layer, listened to by an interceptor of its parts' calls."""

    def __init__(self, module: Any) -> None:
        self.module, self.variables = module.unbind()
        self.name = f"flax.linen.{type(module).__name__}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        told = self._told()
        refuse(request, "linen", attention_bias=request.bias is not None)
        with precise(told.weights):
            jax: Any = importlib.import_module("jax")
            linen: Any = importlib.import_module("flax.linen")
            mask, given = mask_of(told.recipe(request)), arrays_of(request.inputs)
            module = self.module
            drawn = iter(range(8))

            def output(variables: Any, given: Any, **options: Any) -> Any:
                query, value, key = trio(given)
                rngs = {"dropout": jax.random.key(next(drawn))} if request.training else None
                return module.apply(
                    variables, query, key, value, mask=mask,
                    deterministic=not request.training, rngs=rngs, **options,
                )  # fmt: skip

            def call() -> Arrays:
                heard: dict[str, Any] = {}

                def listen(following: Any, args: Any, options: Any, context: Any) -> Any:
                    found = following(*args, **options)
                    part = context.module.name
                    if part in ("query", "key", "value"):
                        heard[part] = found
                    elif part == "out":
                        heard["context"] = args[0]
                    return found

                with linen.intercept_methods(listen):
                    heard["output"] = output(self.variables, given)
                sown = output(self.variables, given, sow_weights=True, mutable=["intermediates"])
                heard["scores"] = sown[1]["intermediates"]["attention_weights"][0]
                return numpy_of(heard)

            gradients = gradients_of(
                told, lambda held, given: output({**self.variables, "params": held}, given),
                self.variables["params"], given, cotangent,
            )  # fmt: skip
            return finished(self.name, request, call, told, gradients)

    def _told(self) -> Known:
        told = known(self.variables["params"])
        options: dict[str, Any] = {"dropout": float(self.module.dropout_rate)}
        if self.module.dtype is not None and dtype_name(self.module.dtype) in FLOATING:
            options["compute_dtype"] = dtype_name(self.module.dtype)
        return dataclasses.replace(told, config=dataclasses.replace(told.config, **options))
