"""How each kind of implementation is asked: ours, other libraries' live layers, plain functions."""

from __future__ import annotations

import importlib
from typing import Any

from anymha.errors import ArgumentError
from anymha.parity.trace import Subject

LIBRARIES = {
    ("torch", "MultiheadAttention"): "torch_layer",
    ("keras", "MultiHeadAttention"): "keras_layer",
    ("keras", "GroupedQueryAttention"): "keras_layer",
    ("flax", "MultiHeadAttention"): "flax_layer",
    ("equinox", "MultiheadAttention"): "equinox_layer",
}
"""The module here for a class, by its package and its name."""


def subject(implementation: Any) -> Subject:
    """What can be asked about an implementation.

    Args:
        implementation: A layer of anymha, a live layer of another library, or a function of query,
            value and key.

    Raises:
        ArgumentError: it is none of these.
    """
    if hasattr(implementation, "canonical_weights"):
        return _module("ours").opened(implementation)
    kinds = [(k.__module__.partition(".")[0], k.__name__) for k in type(implementation).__mro__]
    for kind in kinds:
        if kind in LIBRARIES:
            return _module(LIBRARIES[kind]).opened(implementation)
    if callable(implementation):
        return _module("function").opened(implementation)
    raise ArgumentError(
        "An implementation is a layer of anymha, a live attention layer of torch, Keras, Flax or "
        "Equinox, or a function of query, value and key. Received: "
        f"{type(implementation).__module__}.{type(implementation).__qualname__}."
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
