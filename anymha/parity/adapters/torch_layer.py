"""`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import dense_mask, describe_layer, make_trace, refuse, trio
from anymha.parity.adapters.torch_tools import (
    array,
    gradients_through,
    parameters_of,
    restored,
    tensors,
)
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import Arrays, Request, Trace


def make_adapter(layer: Any) -> TorchLayer:
    """A `torch.nn.MultiheadAttention`."""
    return TorchLayer(layer)


class TorchLayer:
    """torch's own layer, called as its users call it: without scores and gradients.

    One input is passed as one tensor three times, for which torch has another kernel.
    """

    name = "torch.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Adapter`."""
        torch: Any = importlib.import_module("torch")
        layer, description = self.layer, describe_layer(self.layer)
        refuse(request, "torch")
        mask = _mask(layer, description.recipe(request))
        inputs = tensors(layer, request.inputs)
        first = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))

        def output(inputs: Mapping[str, Any], **options: Any) -> Any:
            query, value, key = trio({name: first(x) for name, x in inputs.items()})
            return layer(query, key, value, attn_mask=mask, **options)

        def call() -> Arrays:
            with torch.no_grad():
                with _recording(torch) as recorded:
                    result = first(output(inputs, need_weights=False)[0])
                scores = output(inputs, need_weights=True, average_attn_weights=False)[1]
            return {**_heads(recorded), "output": array(result), "scores": array(scores)}

        with restored(layer, request.training):
            gradients: Arrays = {}
            if cotangent is not None:
                gradients = gradients_through(
                    parameters_of(layer),
                    lambda inputs: first(output(inputs, need_weights=False)[0]),
                    inputs, cotangent, description,
                )  # fmt: skip
            return make_trace(
                self.name, request, call, description, gradients,
                ("by default it returns the scores averaged over the heads; they are compared "
                 "head by head, with `average_attn_weights=False`",),
            )  # fmt: skip


def _mask(layer: Any, recipe: Recipe) -> Any:
    """Masks and bias as torch takes them: (B * H, T, S), True = may not attend; or added."""
    torch: Any = importlib.import_module("torch")
    seen = dense_mask(recipe)
    like = layer.out_proj.weight
    mask = None
    if seen is not None:
        mask = torch.from_numpy(~seen.reshape(-1, *seen.shape[2:])).to(like.device)
    if recipe.bias is None:
        return mask
    batch, queries, keys = recipe.lengths
    whole = np.broadcast_to(recipe.bias, (batch, recipe.heads[0], queries, keys))
    bias = tensors(layer, {"bias": whole.reshape(-1, queries, keys)})["bias"]
    return bias if mask is None else bias.masked_fill(mask, -torch.inf)


@contextmanager
def _recording(torch: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Record query, key, value and context of each call of torch's own attention function.

    Where the layer has a kernel of its own, it does not call the function, and nothing is recorded.
    A `TorchFunctionMode` would keep the layer from that kernel.
    """
    functional: Any = importlib.import_module("torch.nn.functional")
    own = functional.scaled_dot_product_attention
    recorded: list[tuple[Any, ...]] = []

    def recording(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        context = own(query, key, value, *args, **options)
        recorded.append((query, key, value, context))
        return context

    functional.scaled_dot_product_attention = recording
    try:
        yield recorded
    finally:
        functional.scaled_dot_product_attention = own


def _heads(recorded: list[tuple[Any, ...]]) -> Arrays:
    """The one recorded call, (B, H, T, d), by stage, (B, T, H, d)."""
    if len(recorded) != 1 or any(x.ndim != 4 for x in recorded[0]):
        return {}
    names = ("query", "key", "value", "context")
    return {name: array(x.transpose(1, 2)) for name, x in zip(names, recorded[0], strict=True)}
