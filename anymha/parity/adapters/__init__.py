"""Adapters, which call each kind of implementation: our layers, other libraries', functions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import ArgumentError
from anymha.interchange.libraries import CLASSES
from anymha.parity.stages.trace import Adapter

LIBRARIES = {
    ("torch", "MultiheadAttention"): "torch_layer",
    ("keras", "MultiHeadAttention"): "keras_layer",
    ("keras", "GroupedQueryAttention"): "keras_layer",
    ("flax", "MultiHeadDotProductAttention"): "linen_layer",
    ("flax", "MultiHeadAttention"): "flax_layer",
    ("equinox", "MultiheadAttention"): "equinox_layer",
    ("onnxruntime", "InferenceSession"): "onnx_session",
    **{
        kind: "transformers_layer"
        for kind, (module, layout) in CLASSES.items()
        if module == "modules" and layout.startswith("transformers.")
    },
    ("torch", "Module"): "torch_module",  # last in the order of a class's bases
}
"""The module of this package for a class, by the class's package and name."""


@dataclass(frozen=True)
class Declared:
    """An implementation whose weights are known; made by `declare`."""

    implementation: Any
    layer: Any
    layout: str | None
    sizes: dict[str, Any]


def declare(implementation: Any, weights: Any = None, layout: str | None = None,
            **sizes: Any) -> Declared:  # fmt: skip
    """Name the weights of an implementation, so that causes are searched for in its stages.

    Args:
        implementation: A function; a `torch.nn.Module` of one's own; or the result of
            `haiku.transform` for Haiku's layer, a function of `query`, `key`, `value` and `mask` by
            name.
        weights: Its weights, as `anymha.get_weights` takes them: a live layer, or the
            parameters of linen or Haiku; or the canonical weights with `layout` "anymha". Default:
            the module's own state.
        layout: The layout of a module's own state, by name, see `anymha.layouts`: then the
            results of its projections are recorded too, and its weights have gradients.
        **sizes: Sizes that do not follow from the shapes: `num_heads`, `num_key_value_heads`,
            `scale`.

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

    Args:
        implementation: A layer of anymha; a live layer of another library; a module of torch; a
            model of ONNX; a function of query, value and key; or a result of `declare`.

    Raises:
        ArgumentError: it is none of these.
    """
    if isinstance(implementation, Declared):
        return _declared(implementation)
    if hasattr(implementation, "canonical_weights"):
        return _module("ours").make_adapter(implementation)
    if isinstance(implementation, (Path, str)):
        return _module("onnx_session").make_adapter(implementation)
    for kind in type(implementation).__mro__:
        known = LIBRARIES.get((kind.__module__.partition(".")[0], kind.__name__))
        if known == "flax_layer" and kind.__module__.startswith("flax.linen"):
            known = "linen_layer"
        if known is not None:
            return _module(known).make_adapter(implementation)
    if callable(implementation):
        return _module("function").make_adapter(implementation)
    raise ArgumentError(
        "An implementation is a layer of anymha, a live attention layer of torch, Keras, Flax, "
        "Equinox or transformers, a module of torch, a model of ONNX (.onnx), or a function of "
        "query, value and key. Received: "
        f"{type(implementation).__module__}.{type(implementation).__qualname__}."
    )


def _declared(made: Declared) -> Adapter:
    foreign, implementation = _module("foreign"), made.implementation
    bases = [(k.__module__.partition(".")[0], k.__name__) for k in type(implementation).__mro__]
    if made.layer is None:
        description = foreign.describe_arrays(implementation.state_dict(), made.layout, made.sizes)
        return _module("torch_module").make_adapter(implementation, description, True)
    if made.layout is None:
        description = foreign.describe_layer(made.layer, **made.sizes)
    else:
        description = foreign.describe_arrays(made.layer, made.layout, made.sizes)
    if ("torch", "Module") in bases:
        return _module("torch_module").make_adapter(implementation, description, False)
    if ("haiku", "Transformed") in bases:
        return _module("haiku_layer").make_adapter(implementation, made.layer, description)
    return _module("function").make_adapter(implementation, description)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
