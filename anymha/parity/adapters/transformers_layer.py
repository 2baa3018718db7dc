"""Attention modules of transformers, which attend to hidden states of one kind.

They have no separate key, and their masks are added to the logits, or boolean for torch's own
function. Rotary positions come from the model's own class for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.parity.adapters.foreign import Known, dense_mask, finished, known, refuse
from anymha.parity.adapters.torch_tools import array, hooked, kept, parameters_of, pulled, tensors
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import Arrays, Request, Trace

SELF = ("vit", "clip", "opt")
CROSS = {"bart": "key_value_states", "whisper": "key_value_states", "t5": "key_value_states",
         "gpt2": "encoder_hidden_states", "gpt_bigcode": "encoder_hidden_states"}  # fmt: skip
"""Families without positions of their own, and what the value's states are called there."""
TURNED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt_oss")
"""Families that get the cosines and sines of their positions."""
COUNTED = ("gptj", "codegen")
"""Families that get the positions."""


def opened(layer: Any) -> Transformers:
    """An attention module."""
    return Transformers(layer)


class Transformers:
    """A module of a family of transformers, called as its model calls it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.name = f"{type(layer).__name__} of transformers"

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        torch: Any = importlib.import_module("torch")
        layer, told = self.layer, known(self.layer)
        family = told.layout.partition(".")[2]
        cross = family in CROSS or bool(getattr(layer, "is_cross_attention", False))
        refuse(request, self.name, key="key" in request.inputs,
               value="value" in request.inputs and not cross)  # fmt: skip
        given = tensors(layer, request.inputs)
        mask = _mask(layer, told.recipe(request))

        def found(given: Mapping[str, Any]) -> Any:
            result = _call(layer, family, given["query"], given.get("value"), mask)
            return result if isinstance(result, tuple) else (result,)

        def call() -> Arrays:
            with torch.no_grad(), hooked(layer, told) as heard:
                output, *rest = found(given)
            if rest and getattr(rest[-1], "ndim", 0) == 4:
                heard["scores"] = array(rest[-1])
            return {**heard, "output": array(output)}

        with kept(layer, request.training):
            gradients: Arrays = {}
            if cotangent is not None:
                gradients = pulled(
                    parameters_of(layer), lambda given: found(given)[0], given, cotangent, told
                )
            return finished(self.name, request, call, told, gradients, _notes(told))


def _notes(told: Known) -> tuple[str, ...]:
    if told.layout != "transformers.bert":
        return ()
    return ("the residual and the norm after its attention are left out",)


def _mask(layer: Any, recipe: Recipe) -> Any:
    """As its model makes it: the least number added, or for torch's own function booleans.

    It is there also where everything may be seen: without one, decoders see the past alone.
    """
    torch: Any = importlib.import_module("torch")
    batch, queries, keys = recipe.lengths
    shape = (batch, recipe.heads[0], queries, keys)
    seen = dense_mask(recipe)
    seen = np.ones((batch, 1, queries, keys), bool) if seen is None else seen
    configs = [getattr(part, "config", None) for part in layer.modules()]
    kinds = {getattr(config, "_attn_implementation", None) for config in configs if config}
    mask = tensors(layer, {"seen": seen})["seen"]
    if recipe.bias is None and "sdpa" in kinds:
        return mask
    dtype = next(layer.parameters()).dtype
    added = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
    if recipe.bias is not None:
        bias = np.ascontiguousarray(np.broadcast_to(recipe.bias, shape))
        added = tensors(layer, {"bias": bias})["bias"]
    return added.masked_fill(~mask, torch.finfo(dtype).min)


def _call(layer: Any, family: str, query: Any, value: Any, mask: Any) -> Any:
    """What the module returns, or its parts where more than attention comes after."""
    torch: Any = importlib.import_module("torch")
    if family == "bert":
        memory = {} if value is None else {"encoder_hidden_states": value}
        context, *rest = layer.self(query, attention_mask=mask, **memory)
        return (layer.output.dense(context), *rest)
    if family in CROSS:
        named = {} if value is None else {CROSS[family]: value}
        name = "encoder_attention_mask" if "encoder" in CROSS[family] and named else (
            "mask" if family == "t5" else "attention_mask")  # fmt: skip
        return layer(query, **{name: mask}, **named)
    if family in SELF:
        return layer(query, attention_mask=mask)
    positions = torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])
    if family in COUNTED:
        return layer(query, attention_mask=mask, position_ids=positions)
    if family in TURNED:
        turns = _rotary(layer)(query, positions)
        return layer(query, attention_mask=mask, position_embeddings=turns)
    raise LayoutError(
        f"The {type(layer).__name__} ({family}) needs more of its model at "
        "its call than inputs and masks. Compare it as a function, `lambda query, ...: layer(...)`."
    )


def _rotary(layer: Any) -> Any:
    """The family's rotary positions, made for the layer's configuration."""
    for kind in type(layer).__mro__:
        module = sys.modules[kind.__module__]
        for name in dir(module):
            if name.endswith("RotaryEmbedding"):
                return getattr(module, name)(layer.config).to(next(layer.parameters()).device)
    raise LayoutError(f"The module of {type(layer).__name__} has no rotary positions.")
