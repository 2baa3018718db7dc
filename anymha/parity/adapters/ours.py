"""anymha's own layers, which report every stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.framework.autodiff import vjp
from anymha.framework.registry import backend_of
from anymha.interchange.layers import get_weights
from anymha.layer.forward import multi_head_attention
from anymha.layer.plan import Plans
from anymha.parity.adapters.foreign import settle_masked_positions
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import (
    INPUTS,
    Arrays,
    Request,
    Trace,
    as_numpy,
    differs_between_calls,
    problem_of,
)


class Ours:
    """A layer of anymha in any framework."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        arrays = layer.canonical_weights()
        self.ops = backend_of(next(iter(arrays.values()))).ops if arrays else None
        package = type(layer).__module__.partition(".")[0]
        self.name = f"anymha in {package.removeprefix('anymha_')}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        layer = self.layer
        describe_layer = get_weights(layer)  # raises, with the remedy, where there are none yet
        ops: Any = self.ops
        inputs = {name: ops.from_numpy(array) for name, array in request.inputs.items()}
        others = {
            name: ops.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in request.arguments().items()
        }
        three = [inputs.get(name) for name in INPUTS]
        output = layer(*three, **others)
        again = layer(*three, **others)
        scores = layer(*three, **others, return_attention_scores=True)[1]
        stages: Arrays = {}

        def observe(stage: str, value: Any) -> None:
            stages[stage] = as_numpy(ops.stop_gradient(value)).astype(np.float64)

        weights = layer.canonical_weights()
        multi_head_attention(
            ops, layer.config, weights, *three, **others, return_attention_scores=True,
            observe=observe,
        )  # fmt: skip
        stages.pop("output", None)  # the output of the layer's own call counts
        result = as_numpy(output)
        recipe = fold(problem_of(layer.config, describe_layer, request)).recipe
        return Trace(
            self.name,
            result,
            as_numpy(scores),
            settle_masked_positions(stages, recipe),
            {} if cotangent is None else self._gradients(inputs, others, cotangent, result.dtype),
            describe_layer,
            layer.config,
            random=differs_between_calls(result, as_numpy(again)),
        )

    def _gradients(
        self, inputs: dict[str, Any], others: dict[str, Any], cotangent: np.ndarray, dtype: Any
    ) -> Arrays:
        """Of weights and inputs, through the framework's own autodiff."""
        ops: Any = self.ops
        config, weights = self.layer.config, dict(self.layer.canonical_weights())
        rest = {n: others[n] for n in others if n != "attention_bias"}
        bias = {n: others[n] for n in others if n == "attention_bias"}

        def function(ops: Any, arrays: Mapping[str, Any]) -> Any:
            own = {name: arrays[name] for name in weights}
            three = [arrays.get(name) for name in INPUTS]
            named_stages = {n: arrays[n] for n in bias}
            return multi_head_attention(
                ops, config, own, *three, **named_stages, **rest, plans=Plans()
            )

        arrays = {**weights, **inputs, **bias}
        to = ops.from_numpy(cotangent.astype(dtype))
        if ops.capabilities.vjp is not None:
            gradients_through = ops.capabilities.vjp(
                lambda arrays: function(ops, arrays), arrays, to
            )[1]
        else:
            gradients_through = vjp(ops, function, arrays)[1](to)
        return {name: as_numpy(array) for name, array in gradients_through.items()}
