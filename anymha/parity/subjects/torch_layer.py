"""`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from anymha.parity.subjects.foreign import dense_mask, described, finished, recipe_of, refuse
from anymha.parity.trace import Arrays, Request, Trace, as_numpy


def opened(layer: Any) -> TorchLayer:
    """A `torch.nn.MultiheadAttention`."""
    return TorchLayer(layer)


class TorchLayer:
    """torch's own layer, called as its users do: without weights, in its own mode."""

    name = "torch.nn.MultiheadAttention"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """See `anymha.parity.trace.Subject`."""
        torch: Any = importlib.import_module("torch")
        layer, (weights, config) = self.layer, described(self.layer)
        refuse(request, "torch")
        recipe = recipe_of(weights, config, request)
        seen = dense_mask(recipe)
        mask = None
        if seen is not None:
            mask = torch.from_numpy(~seen.reshape(-1, *seen.shape[2:]))  # True: not to be seen
        if recipe.bias is not None:
            shape = (*recipe.lengths[:1], recipe.heads[0], *recipe.lengths[1:])
            bias = np.broadcast_to(recipe.bias, shape).reshape(-1, *shape[2:])
            dtype = layer.out_proj.weight.dtype
            added = torch.from_numpy(np.ascontiguousarray(bias)).to(dtype)
            mask = added if mask is None else added.masked_fill(mask, -torch.inf)
        first = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
        like = layer.out_proj.weight
        arrays = [torch.from_numpy(np.ascontiguousarray(x)) for x in _plain(request.three)]
        query, value, key = (first(x.to(like.device, like.dtype)) for x in arrays)
        was = layer.training
        layer.train(request.training)

        def call() -> Arrays:
            with torch.no_grad():
                output = layer(query, key, value, attn_mask=mask, need_weights=False)[0]
                scores = layer(
                    query, key, value, attn_mask=mask, need_weights=True,
                    average_attn_weights=False,
                )[1]  # fmt: skip
            return {"output": as_numpy(first(output)), "scores": as_numpy(scores)}

        try:
            trace = finished(
                self.name, call, weights, config,
                notes=("by default it returns the scores averaged over the heads; they are "
                       "compared head by head, with `average_attn_weights=False`",),
            )  # fmt: skip
        finally:
            layer.train(was)
        return trace


def _plain(arrays: Any) -> list[np.ndarray]:
    """bfloat16 of NumPy, which torch does not read, as float32; it is rounded again after."""
    return [a.astype(np.float32) if a.dtype.name == "bfloat16" else a for a in arrays]
