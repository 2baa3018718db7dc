"""`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from anymha.parity.adapters.foreign import dense_mask, finished, known, refuse, trio
from anymha.parity.adapters.torch_tools import array, kept, parameters_of, pulled, tensors
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import Arrays, Request, Trace


def opened(layer: Any) -> TorchLayer:
    """A `torch.nn.MultiheadAttention`."""
    return TorchLayer(layer)


class TorchLayer:
    """torch's own layer, called as its users do: without its scores, and without gradients.

    One input is passed as one tensor three times, for which torch has another kernel.
    """

    name = "torch.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.stages.trace.Subject`."""
        torch: Any = importlib.import_module("torch")
        layer, told = self.layer, known(self.layer)
        refuse(request, "torch")
        mask = _mask(layer, told.recipe(request))
        given = tensors(layer, request.inputs)
        first = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))

        def output(given: Mapping[str, Any], **options: Any) -> Any:
            query, value, key = trio({name: first(x) for name, x in given.items()})
            return layer(query, key, value, attn_mask=mask, **options)

        def call() -> Arrays:
            with torch.no_grad():
                with _listening(torch) as heard:
                    found = first(output(given, need_weights=False)[0])
                scores = output(given, need_weights=True, average_attn_weights=False)[1]
            return {**_heads(heard), "output": array(found), "scores": array(scores)}

        with kept(layer, request.training):
            gradients: Arrays = {}
            if cotangent is not None:
                gradients = pulled(
                    parameters_of(layer),
                    lambda given: first(output(given, need_weights=False)[0]),
                    given, cotangent, told,
                )  # fmt: skip
            return finished(
                self.name, request, call, told, gradients,
                ("by default it returns the scores averaged over the heads; they are compared "
                 "head by head, with `average_attn_weights=False`",),
            )  # fmt: skip


def _mask(layer: Any, recipe: Recipe) -> Any:
    """Masks and bias as torch takes them: (B * H, T, S), True = not to be seen, or added."""
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
def _listening(torch: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Query, key, value and context of each call of torch's own function for attention.

    The layer does not call it where it has a kernel of its own, and then nothing is heard. A mode
    that hears all functions would keep the layer from that kernel.
    """
    functional: Any = importlib.import_module("torch.nn.functional")
    own = functional.scaled_dot_product_attention
    heard: list[tuple[Any, ...]] = []

    def listening(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        context = own(query, key, value, *args, **options)
        heard.append((query, key, value, context))
        return context

    functional.scaled_dot_product_attention = listening
    try:
        yield heard
    finally:
        functional.scaled_dot_product_attention = own


def _heads(heard: list[tuple[Any, ...]]) -> Arrays:
    """What was heard once, (B, H, T, d), by stage, (B, T, H, d)."""
    if len(heard) != 1 or any(x.ndim != 4 for x in heard[0]):
        return {}
    names = ("query", "key", "value", "context")
    return {name: array(x.transpose(1, 2)) for name, x in zip(names, heard[0], strict=True)}
