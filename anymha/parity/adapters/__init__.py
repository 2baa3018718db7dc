"""Adapters, which call each kind of implementation: our layers, other libraries', functions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import ArgumentError
from anymha.framework.names import answers
from anymha.interchange.libraries import known_class
from anymha.parity.adapters.decoding import Decoding
from anymha.parity.stages.trace import Adapter
from anymha.text import listed, quoted

LIBRARIES = {
    ("torch", "MultiheadAttention"): "torch_layers.TorchLayer",
    ("keras", "MultiHeadAttention"): "keras_layer.KerasLayer",
    ("keras", "GroupedQueryAttention"): "keras_layer.KerasLayer",
    ("flax", "MultiHeadDotProductAttention"): "jax_layers.LinenLayer",
    ("flax", "MultiHeadAttention"): "jax_layers.NnxLayer",
    ("equinox", "MultiheadAttention"): "jax_layers.EquinoxLayer",
    ("onnxruntime", "InferenceSession"): "onnx_session.Session",
    ("torch", "Module"): "torch_layers.TorchModule",  # last in the order of a class's bases
}
"""The adapter here for a class, by the class's package and name."""


@dataclass(frozen=True)
class Declared:
    """An implementation whose weights are known; made by `declare`."""

    implementation: Any
    layer: Any
    layout: str | None
    sizes: dict[str, Any]

    def __repr__(self) -> str:
        layer = self.layer
        if isinstance(layer, Mapping):
            layer = listed(
                [f"{name} {getattr(x, 'shape', '')}".strip() for name, x in layer.items()]
            )
        options = "".join(f", {name}={quoted(size)}" for name, size in self.sizes.items())
        return (
            f"Declared({quoted(self.implementation)}, weights: {layer}, "
            f"layout={self.layout!r}{options})"
        )


@answers(weights="layer state_dict params")
def declare(implementation: Any, weights: Any = None, layout: str | None = None,
            **sizes: Any) -> Declared:  # fmt: skip
    """Name the weights of an implementation, so that causes are searched for in its stages.

    Args:
        implementation: A function; a `torch.nn.Module` of one's own; or the result of
            `haiku.transform` for Haiku's layer, a function of `query`, `key`, `value` and `mask` by
            name.
        weights: Its weights, as `anymha.get_weights` takes them: a live layer, or the
            parameters of linen or Haiku; or arrays under the names of a `layout`, "anymha" for
            the canonical ones. A layer of anymha, and what `get_weights` returns of it, tells its
            options too, as rotary positions. Default: the module's own state.
        layout: Whose names the weights have, see `anymha.layouts`. Where it is that of a module's
            own state, the results of its projections are recorded too, and its weights have
            gradients.
        **sizes: Sizes that do not follow from the shapes: `num_heads`, `num_key_value_heads`,
            `scale`; and the options of the layer, as ``rotary=anymha.Rotary()`` and
            `query_key_norm`, which its weights do not tell.

    Returns:
        An object that `compare` takes in its place.

    Raises:
        ArgumentError: both weights and layout are missing, or a layout is given for a live layer.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import compare, declare
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
        >>> mine = declare(lambda query: layer(query), anymha.get_weights(layer), "anymha")
        >>> compare(layer, mine, x).passed
        True
    """
    if weights is None and layout is None:
        raise ArgumentError(
            "`declare` takes the weights of a function, or the name of the layout that a module's "
            "own state has. Received: neither."
        )
    if weights is not None and layout is not None and not isinstance(weights, Mapping):
        raise ArgumentError(
            "`declare` takes a `layout` for weights that are a mapping of names to arrays. "
            f"Received: a {type(weights).__qualname__}, which knows its own. Leave `layout` out."
        )
    return Declared(implementation, weights, layout, sizes)


def adapter_for(implementation: Any) -> Adapter:
    """The adapter of an implementation.

    Raises:
        ArgumentError: it is of no known kind.
    """
    if isinstance(implementation, type):
        name = implementation.__name__
        raise ArgumentError(
            f"An implementation is a layer or a function, not a class. Received: the class {name}. "
            f"Make a layer of it, `{name}(...)`."
        )
    if isinstance(implementation, Declared):
        return _declared(implementation)
    if isinstance(implementation, Decoding):
        return _adapter("decoding.Stepwise", implementation)
    if hasattr(implementation, "canonical_weights"):
        return _adapter("ours.Ours", implementation)
    if isinstance(implementation, (Path, str)):
        return _adapter("onnx_session.Session", implementation)
    for kind in type(implementation).__mro__:
        known = LIBRARIES.get((kind.__module__.partition(".")[0], kind.__name__))
        if (known_class(kind) or ("", ""))[1].startswith("transformers."):
            known = "transformers_layer.Transformers"
        if known == "jax_layers.NnxLayer" and kind.__module__.startswith("flax.linen"):
            known = "jax_layers.LinenLayer"
        if known is not None:
            return _adapter(known, implementation)
    if callable(implementation):
        return _adapter("function.Function", implementation)
    raise ArgumentError(
        "An implementation is a layer of anymha, a live attention layer of torch, Keras, Flax, "
        "Equinox or transformers, a module of torch, a model of ONNX (.onnx), a function of query, "
        "value and key, or the result of `decoding`. Received: "
        f"{type(implementation).__module__}.{type(implementation).__qualname__}."
    )


def _declared(declared: Declared) -> Adapter:
    foreign: Any = importlib.import_module(f"{__name__}.foreign")
    implementation, layer, layout = declared.implementation, declared.layer, declared.layout
    if layer is None:
        state = implementation.state_dict()
        description = foreign.describe_arrays(state, layout, declared.sizes)
        return _adapter("torch_layers.TorchModule", implementation, description, True)
    if layout is None:
        description = foreign.describe_layer(layer, **declared.sizes)
    else:
        description = foreign.describe_arrays(layer, layout, declared.sizes)
    if isinstance(implementation, Decoding):
        return _adapter("decoding.Stepwise", implementation, description)
    bases = [(k.__module__.partition(".")[0], k.__name__) for k in type(implementation).__mro__]
    if ("torch", "Module") in bases:
        return _adapter("torch_layers.TorchModule", implementation, description)
    if ("haiku", "Transformed") in bases:
        return _adapter("jax_layers.HaikuLayer", implementation, layer, description)
    return _adapter("function.Function", implementation, description)


def _adapter(name: str, *arguments: Any) -> Adapter:
    """The adapter of a class here, ``module.Class``, whose module is imported now."""
    module, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(*arguments)
