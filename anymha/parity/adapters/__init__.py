"""How each kind of implementation is asked: ours, other libraries' live layers, plain functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import ArgumentError
from anymha.interchange.libraries import CLASSES
from anymha.parity.stages.trace import Subject

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
"""The module here for a class, by its package and its name."""


@dataclass(frozen=True)
class Declared:
    """An implementation, and what is known of its weights; made by `declare`."""

    implementation: Any
    layer: Any
    layout: str | None
    sizes: dict[str, Any]


def declare(implementation: Any, weights: Any = None, layout: str | None = None,
            **sizes: Any) -> Declared:  # fmt: skip
    """An implementation whose weights are known beside it, so that causes are found in its stages.

    Args:
        implementation: A function; a `torch.nn.Module` of one's own; or what `haiku.transform`
            made of Haiku's layer, a function of `query`, `key`, `value` and `mask` by name.
        weights: What holds its weights, as `anymha.get_weights` takes it: a live layer, or the
            parameters of linen or Haiku; or the canonical weights with `layout` "anymha". Default:
            the module's own state.
        layout: The layout of a module's own state, by name, see `anymha.layouts`: then also what
            its projections give is listened to, and its weights have gradients.
        **sizes: What the shapes do not tell: `num_heads`, `num_key_value_heads`, `scale`.

    Returns:
        What `compare` takes in its place.

    Raises:
        ArgumentError: neither weights nor a layout are given.

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
    return Declared(implementation, weights, layout, sizes)


def subject(implementation: Any) -> Subject:
    """What can be asked about an implementation.

    Args:
        implementation: A layer of anymha; a live layer of another library; a module of torch; a
            model of ONNX; a function of query, value and key; or what `declare` made.

    Raises:
        ArgumentError: it is none of these.
    """
    if isinstance(implementation, Declared):
        return _declared(implementation)
    if hasattr(implementation, "canonical_weights"):
        return _module("ours").opened(implementation)
    if isinstance(implementation, (Path, str)):
        return _module("onnx_session").opened(implementation)
    for kind in type(implementation).__mro__:
        known = LIBRARIES.get((kind.__module__.partition(".")[0], kind.__name__))
        if known == "flax_layer" and kind.__module__.startswith("flax.linen"):
            known = "linen_layer"
        if known is not None:
            return _module(known).opened(implementation)
    if callable(implementation):
        return _module("function").opened(implementation)
    raise ArgumentError(
        "An implementation is a layer of anymha, a live attention layer of torch, Keras, Flax, "
        "Equinox or transformers, a module of torch, a model of ONNX (.onnx), or a function of "
        "query, value and key. Received: "
        f"{type(implementation).__module__}.{type(implementation).__qualname__}."
    )


def _declared(made: Declared) -> Subject:
    foreign, implementation = _module("foreign"), made.implementation
    bases = [(k.__module__.partition(".")[0], k.__name__) for k in type(implementation).__mro__]
    if made.layer is None:
        told = foreign.by_layout(implementation.state_dict(), made.layout, made.sizes)
        return _module("torch_module").opened(implementation, told, True)
    if made.layout is None:
        told = foreign.known(made.layer, **made.sizes)
    else:
        told = foreign.by_layout(made.layer, made.layout, made.sizes)
    if ("torch", "Module") in bases:
        return _module("torch_module").opened(implementation, told, False)
    if ("haiku", "Transformed") in bases:
        return _module("haiku_layer").opened(implementation, made.layer, told)
    return _module("function").opened(implementation, told)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
