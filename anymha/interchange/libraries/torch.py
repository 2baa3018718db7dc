"""`torch.nn.MultiheadAttention`, and the arrays of any module of torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import WeightsError
from anymha.interchange.live_layer import LiveLayer, like
from anymha.options.config import AttentionConfig


def open_layer(layer: Any, layout: str) -> LiveLayer:
    """A `torch.nn.MultiheadAttention`."""
    needs = ("a key and a value of zeros after those of the inputs (`add_zero_attn`)",)
    return LiveLayer(
        layout,
        arrays_of(layer),
        writer(layer),
        {"num_heads": layer.num_heads},
        {"dropout": layer.dropout},
        needs if layer.add_zero_attn else (),
    )


def arrays_of(module: Any) -> dict[str, Any]:
    """A module's tensors by name.

    Raises:
        WeightsError: they have no values yet.
    """
    tensors = dict(module.state_dict())
    if any(tensor.is_meta for tensor in tensors.values()):
        raise WeightsError(
            f"The {type(module).__name__} has no values yet: it is on the device 'meta'. Load its "
            "weights, or move it with `to_empty`."
        )
    return tensors


def writer(module: Any) -> Any:
    """A function that writes values into a module; it makes all tensors before it writes one."""

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        tensors = arrays_of(module)
        new = {name: like(tensors[name], value) for name, value in arrays.items()}
        for name, value in new.items():
            tensors[name].copy_(value)
        return module

    return write


def make_layer(layout: str, arrays: Mapping[str, np.ndarray], config: AttentionConfig) -> Any:
    """A new `torch.nn.MultiheadAttention`, batch first as anymha's layer."""
    torch: Any = importlib.import_module("torch")
    layer = torch.nn.MultiheadAttention(
        config.query_features,
        config.num_heads,
        dropout=config.dropout,
        bias="in_proj_bias" in arrays,
        kdim=config.key_features,
        vdim=config.value_features,
        batch_first=True,
        dtype=getattr(torch, config.dtype),
    )
    return writer(layer)(arrays)
