"""`torch.nn.MultiheadAttention`, and the arrays of any module of torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError, WeightsError
from anymha.interchange.leftovers import changed_modules, refusal
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
    """A module's tensors by name; those that parametrisations and hooks make, as they make them.

    Raises:
        WeightsError: they have no values yet.
        LayoutError: the module is quantised.
    """
    state = dict(module.state_dict())
    for start, inner, part in _made(module):
        sources = {f"{start}{part}_{end}" for end in ("orig", "mask", "g", "v", "u")}
        own = f"{start}parametrizations.{part}."
        state = {n: x for n, x in state.items() if n not in sources and not n.startswith(own)}
        # `nn.MultiheadAttention` takes the weight of its output projection, and never calls that.
        uncalled = type(inner).__name__ == "NonDynamicallyQuantizableLinear"
        made = getattr(inner, part) if uncalled else _projection().made_parts(inner)[part]()
        state[start + part] = made.detach()
    state = {n: x for n, x in state.items() if not n.endswith("_extra_state")}
    others = [name for name, x in state.items() if not hasattr(x, "is_meta")]
    if others:
        words = [*changed_modules(others, {}).values()]
        reason = refusal(words[0]) if words else f"`{others[0]}` is no tensor."
        raise LayoutError(f"The {type(module).__name__} cannot be converted: {reason}")
    if any(tensor.is_meta for tensor in state.values()):
        raise WeightsError(
            f"The {type(module).__name__} has no values yet: it is on the device 'meta'. Load its "
            "weights, or move it with `to_empty`."
        )
    return state


def writer(module: Any) -> Any:
    """A function that writes values into a module: all of them, or none."""

    def write(arrays: Mapping[str, np.ndarray]) -> Any:
        tensors = arrays_of(module)
        new = {name: like(tensors[name], value) for name, value in arrays.items()}
        made = {start + part: (inner, part) for start, inner, part in _made(module)}
        made = {name: place for name, place in made.items() if name in new}
        for name, (inner, part) in made.items():
            _projection().check_writable(name.rpartition(".")[0] or "layer", inner, part)
        before = {n: x.clone() for n, x in module.state_dict().items()} if made else {}
        for name, (inner, part) in made.items():
            try:
                _projection().write(name.rpartition(".")[0] or "layer", inner, part, new.pop(name))
            except WeightsError:
                module.load_state_dict(before)
                raise
        for name, value in new.items():
            tensors[name].copy_(value)
        return module

    return write


def _made(module: Any) -> list[tuple[str, Any, str]]:
    """The prefix, the submodule and the name of each tensor that is made of others."""
    return [
        (f"{path}." if path else "", inner, part)
        for path, inner in module.named_modules()
        for part in _projection().made_parts(inner)
    ]


def _projection() -> Any:
    return importlib.import_module("anymha_torch.projection")


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
