"""Layers that are named alone: each gets the weights of what it is compared with."""

from __future__ import annotations

from typing import Any

from anymha.errors import AnymhaError, ArgumentError
from anymha.framework.registry import homes
from anymha.interchange.layers import convert, get_weights, new_layer
from anymha.interchange.libraries import MAKERS
from anymha.options.config import AttentionConfig
from anymha.parity.adapters import adapter_for
from anymha.parity.adapters.arguments import HEADS
from anymha.parity.adapters.module_state import unready
from anymha.parity.comparison.proven_weights import by_names
from anymha.parity.comparison.unexplained import offer
from anymha.parity.stages.saved_case import SavedLayer

LIVE = tuple(name for name, (module, _) in MAKERS.items() if module != "params")
"""The layouts whose layers can be made alone."""


def make_named(name: str, layer: SavedLayer) -> Any:
    """The layer of a backend or of a layout with these options and weights."""
    options = layer.config.to_dict()
    names = {"query_features": "query", "value_features": "value", "key_features": "key"}
    options |= {o: layer.weights[f"{name}.kernel"].shape[0] for o, name in names.items()}
    options["dtype"] = layer.weights["query.kernel"].dtype.name
    config = AttentionConfig.from_dict(options)
    return convert(new_layer("numpy", config, layer.weights), to=name)


def known_layer(implementation: Any) -> tuple[SavedLayer | None, str]:
    """Options and weights of an implementation, and how they were found, if nobody named them.

    None where they are not known.
    """
    adapter: Any = adapter_for(implementation)
    description, note = getattr(adapter, "description", None), ""
    if description is None:
        try:
            weights = get_weights(implementation)
        except AnymhaError:
            reading = by_names(adapter)
            if reading is None:
                return None, ""
            description, note = reading.adapter.description, reading.note
        else:
            return SavedLayer(weights.config or implementation.config, dict(weights)), ""
    return SavedLayer(description.config, description.weights), note


def without_weights(named: str, name: str, implementation: Any) -> str:
    """The message where the weights that a named layer must get are not known."""
    adapter: Any = adapter_for(implementation)
    told = getattr(getattr(adapter, "parameters", None), "heads", 0)
    why = ("its layers' names mean one thing, or one mistake explains its output in one meaning"
           if told else f"it says how many heads it has, as `{HEADS[0]}`")  # fmt: skip
    remedy = (f"{offer(adapter)} of `anymha.parity`, or give a layer or a saved case. Those of a "
              f"module are read where {why}.")  # fmt: skip
    try:
        get_weights(implementation)
    except ArgumentError:  # it is no layer of a library
        remedy = unready(implementation) or remedy
    except AnymhaError as error:
        remedy = str(error)
    return f"A layer of {named} must get the weights of {name}, which are not known. {remedy}"


def with_layers(reference: Any, candidate: Any) -> tuple[Any, Any, str]:
    """Two implementations, with a layer for a name; and how its weights were found, if not named.

    Raises:
        ArgumentError: the weights that it must get are not known.
    """
    named = [isinstance(one, str) and one in (*LIVE, *homes()) for one in (reference, candidate)]
    if not any(named):
        return reference, candidate, ""
    name, other = (reference, candidate) if named[0] else (candidate, reference)
    if all(named):
        raise ArgumentError(
            f"One of both must have weights for the other, as `anymha.MultiHeadAttention(..., "
            f"backend={name!r})` has. Received: {reference!r} and {candidate!r}."
        )
    layer, note = known_layer(other)
    if layer is None:
        raise ArgumentError(without_weights(name, adapter_for(other).name, other))
    made = make_named(name, layer)
    return (made, other, note) if named[0] else (other, made, note)
