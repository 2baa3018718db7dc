"""Attention modules of transformers, which attend to hidden states of one kind.

They have no separate key, and their masks are added to the logits, or boolean for torch's own
function. Rotary positions come from the model's own class for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.parity.adapters.foreign import (
    LayerDescription,
    dense_mask,
    describe_layer,
    make_trace,
    refuse,
)
from anymha.parity.adapters.torch_layers import (
    array,
    gradients_through,
    recorded_projections,
    restored,
    tensors,
)
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import Arrays, Request, Trace

SELF = ("vit", "clip", "opt")
CROSS = {"bart": "key_value_states", "whisper": "key_value_states", "t5": "key_value_states",
         "gpt2": "encoder_hidden_states", "gpt_bigcode": "encoder_hidden_states"}  # fmt: skip
"""Families without positions of their own, and their name for the value's states."""
TURNED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt_oss")
"""Families that take the cosines and sines of their positions."""
COUNTED = ("gptj", "codegen")
"""Families that take the positions."""


class Transformers:
    """A module of a family of transformers, called as its model calls it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = f"{type(layer).__name__} of transformers"

    def lacking(self, request: Request) -> str:
        """Why it cannot be given the call, in words; empty where it can."""
        alone = "value" in request.inputs and not self._attends_to_others(
            describe_layer(self.layer)
        )
        return "takes one input alone" if alone else ""

    def _attends_to_others(self, description: LayerDescription) -> bool:
        family = description.layout.partition(".")[2]
        return family in CROSS or bool(getattr(self.layer, "is_cross_attention", False))

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        torch: Any = importlib.import_module("torch")
        layer, description = self.layer, describe_layer(self.layer)
        family = description.layout.partition(".")[2]
        cross = self._attends_to_others(description)
        refuse(request, self.name, key="key" in request.inputs,
               value="value" in request.inputs and not cross)  # fmt: skip
        inputs = tensors(layer, request.inputs)
        mask = _mask(layer, description.recipe(request))

        def results(inputs: Mapping[str, Any]) -> Any:
            result = _call(layer, family, inputs["query"], inputs.get("value"), mask)
            return result if isinstance(result, tuple) else (result,)

        def call() -> Arrays:
            with torch.no_grad(), recorded_projections(layer, description) as recorded:
                output, *rest = results(inputs)
            if rest and getattr(rest[-1], "ndim", 0) == 4:
                recorded["scores"] = array(rest[-1])
            return {**recorded, "output": array(output)}

        with restored(layer, request.training):
            gradients = gradients_through(
                layer, lambda inputs: results(inputs)[0], inputs, cotangent, description
            )
            left_out = ("the residual and the norm after its attention are left out",)
            notes = left_out if family == "bert" else ()
            trace = make_trace(self.name, request, call, description, gradients, notes)
        return dataclasses.replace(trace, extras={**trace.extras, **_turns(layer, family, inputs)})


def _turns(layer: Any, family: str, inputs: Mapping[str, Any]) -> Arrays:
    """The cosines and sines of its positions, where its model gives them to it."""
    if family not in TURNED:
        return {}
    query = inputs["query"]
    positions = _positions(query)
    return dict(zip(("cos", "sin"), map(array, _rotary(layer)(query, positions)), strict=True))


def _positions(query: Any) -> Any:
    """The positions of the query (B, T)."""
    torch: Any = importlib.import_module("torch")
    return torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])


def _mask(layer: Any, recipe: Recipe) -> Any:
    """The mask as its model makes it: the smallest number, added; booleans for torch's function.

    It exists also where everything may be attended to: without one, decoders are causal.
    """
    torch: Any = importlib.import_module("torch")
    batch, queries, keys = recipe.lengths
    seen = dense_mask(recipe)
    seen = np.ones((batch, 1, queries, keys), bool) if seen is None else seen
    configs = [getattr(part, "config", None) for part in layer.modules()]
    kinds = {getattr(config, "_attn_implementation", None) for config in configs if config}
    mask = tensors(layer, {"seen": seen})["seen"]
    if recipe.bias is None and "sdpa" in kinds:
        return mask
    bias = np.zeros(seen.shape) if recipe.bias is None else recipe.bias
    bias = np.broadcast_to(bias, (batch, recipe.heads[0], queries, keys))
    added = tensors(layer, {"bias": bias})["bias"]
    return added.masked_fill(~mask, torch.finfo(added.dtype).min)


def _call(layer: Any, family: str, query: Any, value: Any, mask: Any) -> Any:
    """The result of the module; of its parts where more than attention follows."""
    if family == "bert":
        memory = {} if value is None else {"encoder_hidden_states": value}
        context, *rest = layer.self(query, attention_mask=mask, **memory)
        return (layer.output.dense(context), *rest)
    if family in CROSS:
        states = {} if value is None else {CROSS[family]: value}
        name = "mask" if family == "t5" else "attention_mask"
        name = "encoder_attention_mask" if "encoder_hidden_states" in states else name
        return layer(query, **{name: mask}, **states)
    if family in SELF:
        return layer(query, attention_mask=mask)
    positions = _positions(query)
    if family in COUNTED:
        return layer(query, attention_mask=mask, position_ids=positions)
    if family in TURNED:
        turns = _rotary(layer)(query, positions)
        return layer(query, attention_mask=mask, position_embeddings=turns)
    raise LayoutError(
        f"The {type(layer).__name__} ({family}) needs more from its model "
        "than inputs and masks. Compare it as a function, `lambda query, ...: layer(...)`."
    )


def _rotary(layer: Any) -> Any:
    """The family's rotary positions, made for the layer's configuration."""
    for kind in type(layer).__mro__:
        module = sys.modules[kind.__module__]
        for name in dir(module):
            if name.endswith("RotaryEmbedding"):
                return getattr(module, name)(layer.config).to(next(layer.parameters()).device)
    raise LayoutError(f"The module of {type(layer).__name__} has no rotary positions.")
