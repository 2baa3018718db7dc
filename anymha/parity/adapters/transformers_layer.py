"""Attention modules of transformers, which attend to hidden states of one kind.

They have no separate key, and their masks are added to the logits, or boolean for torch's own
function. Rotary positions come from the model's own class for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.attention.features.alibi import Alibi
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

CROSS = {"bart": "key_value_states", "whisper": "key_value_states", "t5": "key_value_states",
         "gpt2": "encoder_hidden_states", "gpt_bigcode": "encoder_hidden_states"}  # fmt: skip
"""Families without positions of their own, and their name for the value's states."""


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
        if description.config.alibi and not request.call.get("use_causal_mask"):
            raise LayoutError(
                f"The {self.name} counts positions from the first key, which means the distance in "
                "causal calls alone. Compare it with `use_causal_mask=True`."
            )
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
        return dataclasses.replace(trace, extras={**trace.extras, **_turns(layer, inputs)})


def _turns(layer: Any, inputs: Mapping[str, Any]) -> Arrays:
    """The cosines and sines of its positions, where its model gives them to it."""
    turns = _embeddings(layer, inputs["query"]) if "position_embeddings" in _taken(layer) else None
    if turns is None:
        return {}
    pair = turns if isinstance(turns, tuple) else (turns.real, turns.imag)
    return dict(zip(("cos", "sin"), map(array, pair), strict=True))


def _taken(layer: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of its call."""
    return inspect.signature(layer.forward).parameters


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
    taken, arguments = _taken(layer), {}
    if "position_embeddings" in taken:
        arguments["position_embeddings"] = _embeddings(layer, query)
    elif "position_ids" in taken:
        arguments["position_ids"] = _positions(query)
    if "residual" in taken:  # BLOOM adds it to the output
        arguments["residual"] = query.new_zeros(())
    slopes = _slopes(layer)
    if "alibi" in taken:
        arguments["alibi"] = _alibi(layer, query, slopes).flatten(0, 1) if slopes else None
    if "position_bias" in taken:
        arguments["position_bias"] = _alibi(layer, query[:1], slopes)[0] if slopes else None
    if family == "mpt":  # its masks are True where a key is hidden
        mask = mask < 0
    given = ("hidden_states", "attention_mask", "alibi", "position_bias")
    left = [
        name
        for name, one in taken.items()
        if (one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD)
        or (name == "position_embeddings" and not slopes)
        if name not in given and arguments.get(name) is None
    ]
    if left:
        raise LayoutError(
            f"The {type(layer).__name__} ({family}) needs more from its model than inputs and "
            f"masks: {', '.join(left)}. Compare it as a function, `lambda query, ...: layer(...)`."
        )
    return layer(query, attention_mask=mask, **arguments)


def _slopes(layer: Any) -> tuple[float, ...]:
    """The slopes of its ALiBi as its model has them; empty for none."""
    config = describe_layer(layer).config
    slopes = next((f.slopes for f in config.features if isinstance(f, Alibi)), ())
    scaled = isinstance(config.alibi, tuple) and type(layer).__name__.startswith("Falcon")
    return tuple(slope / config.scale_value for slope in slopes) if scaled else slopes


def _alibi(layer: Any, query: Any, slopes: tuple[float, ...]) -> Any:
    """Slopes times positions of the keys, (B, H, 1, T)."""
    every = query.new_tensor(slopes)[None, :, None, None]
    return every * _positions(query)[:, None, None, :].to(query.dtype)


def _embeddings(layer: Any, query: Any) -> Any:
    """The cosines and sines of the positions, as its model gives them to it; None for none."""
    made = _rotary(layer)
    if made is None:
        return None
    kind = getattr(made, "layer_types", None)
    if not kind:
        return made(query, _positions(query))
    return made(query, _positions(query), layer.config.layer_types[layer.layer_idx])


def _rotary(layer: Any) -> Any:
    """The family's rotary positions, made for the layer's configuration; None where it has none."""
    config, own, end = getattr(layer, "config", None), type(layer), "RotaryEmbedding"
    if not getattr(config, "rope_parameters", None):
        return None
    for kind in own.__mro__:
        module = sys.modules[kind.__module__]
        names = [name for name in dir(module) if name.endswith(end) and "Vision" not in name]
        names.sort(key=lambda name: not own.__name__.startswith(name.removesuffix(end)))
        if names:
            return getattr(module, names[0])(config).to(next(layer.parameters()).device)
    return None
