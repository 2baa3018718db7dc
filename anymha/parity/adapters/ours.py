"""anymha's own layers, which report every stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from anymha.framework.dtypes import multiplies
from anymha.framework.registry import backend_of
from anymha.interchange.layers import get_weights
from anymha.layer.forward import multi_head_attention
from anymha.parity.adapters.foreign import settle_masked_positions
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.layer_call import gradients_of, layer_function, native
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
        self.ops: Any = backend_of(next(iter(arrays.values()))).ops if arrays else None
        package = type(layer).__module__.partition(".")[0]
        self.name = f"anymha in {package.removeprefix('anymha_')}"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        layer = self.layer
        canonical = get_weights(layer)  # raises, with the remedy, where there are none yet
        ops = self.ops
        inputs, others = native(ops, request.inputs), native(ops, request.arguments())
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
        computed = layer.config.compute_dtype or layer.config.dtype
        narrow = multiplies(ops, computed, ops.device(next(iter(weights.values()))))
        recipe = fold(problem_of(layer.config, canonical, request)).recipe
        stages, settled = settle_masked_positions(stages, recipe)
        return Trace(
            self.name,
            result,
            as_numpy(scores),
            stages,
            {} if cotangent is None else self._gradients(inputs, others, cotangent, result.dtype),
            weights=canonical,
            config=layer.config,
            stored=computed if narrow else None,
            random=differs_between_calls(result, as_numpy(again)),
            settled=settled,
        )

    def output(self, request: Request) -> np.ndarray:
        """The output alone."""
        inputs = native(self.ops, request.inputs)
        three = [inputs.get(name) for name in INPUTS]
        return as_numpy(self.layer(*three, **native(self.ops, request.arguments())))

    def _gradients(
        self, inputs: dict[str, Any], others: dict[str, Any], cotangent: np.ndarray, dtype: Any
    ) -> Arrays:
        """Of weights and inputs, through the framework's own autodiff."""
        ops, weights = self.ops, dict(self.layer.canonical_weights())
        bias = {n: others[n] for n in others if n == "attention_bias"}
        rest = {n: others[n] for n in others if n not in bias}
        function = layer_function(self.layer.config, weights, rest)
        to = ops.from_numpy(cotangent.astype(dtype))
        return gradients_of(ops, function, {**weights, **inputs, **bias}, to)
