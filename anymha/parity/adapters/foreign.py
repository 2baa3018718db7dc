"""What the subjects of other libraries' layers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.interchange.layers import get_weights
from anymha.interchange.layouts import get_layout, to_canonical
from anymha.interchange.libraries import open_layer
from anymha.interchange.weights import Weights
from anymha.options.config import AttentionConfig
from anymha.parity.oracle.recipe import Arrays, Recipe, allowed
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import (
    STAGES,
    Request,
    Trace,
    as_numpy,
    name_of_dtype,
    need_numbers,
    problem_of,
    unsteady,
)

COARSE = {("tensorflow", "float16")}
"""Frameworks whose products of matrices add a dtype in itself; others add halves in float32."""


@dataclass(frozen=True)
class Known:
    """What a live layer tells of itself.

    Args:
        weights: Its canonical weights.
        config: Its options.
        layout: The name of its layout.
        arrays: Its arrays by their names there.
        needs: What its forward pass needs beside plain attention, in words.
    """

    weights: Arrays
    config: AttentionConfig
    layout: str
    arrays: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What its users should know."""
        needs = "; ".join(dict.fromkeys(self.needs))
        return (f"it computes more than attention: {needs}",) if needs else ()

    def recipe(self, request: Request) -> Recipe:
        """What a layer with these weights computes by the written meaning."""
        return fold(problem_of(self.config, self.weights, request)).recipe

    def canonical(self, gradients: Mapping[str, Any]) -> Arrays:
        """Gradients of its arrays by canonical name: layouts only move numbers, and split them.

        Args:
            gradients: By the names of the layout; None or missing where there is none.
        """
        found = {}
        for name, array in self.arrays.items():
            got = gradients.get(name)
            found[name] = np.zeros_like(as_numpy(array)) if got is None else as_numpy(got)
        config = self.config
        sizes = {"num_heads": config.num_heads, "num_key_value_heads": config.num_key_value_heads}
        return dict(to_canonical(found, self.layout, **sizes)[0])


def known(layer: Any, **sizes: Any) -> Known:
    """What a live layer, or parameters by name, tell.

    Args:
        layer: As `anymha.get_weights` takes it.
        **sizes: What it does not tell.
    """
    weights = get_weights(layer, **sizes)
    assert isinstance(weights, Weights)
    assert weights.config is not None
    live = open_layer(layer)
    return Known(dict(weights), weights.config, weights.layout, live.arrays, weights.needs)


def by_layout(arrays: Mapping[str, Any], layout: str, sizes: Mapping[str, Any]) -> Known:
    """What arrays of a named layout tell; others beside them are left out.

    Args:
        arrays: By name.
        layout: The layout's name.
        sizes: What the shapes do not tell.
    """
    names = get_layout(layout).names()
    held = {name: arrays[name] for name in names if name in arrays}
    weights, config = to_canonical(held, layout, **sizes)
    return Known(dict(weights), config, layout, held, weights.needs)


def dense_mask(recipe: Recipe) -> np.ndarray | None:
    """What may be attended to, as one mask (B, H, T, S); None where everything may.

    For libraries that know fewer kinds of masks than anymha.
    """
    if not recipe.masks and not recipe.causal and recipe.window is None:
        return None
    batch, queries, keys = recipe.lengths
    return np.ascontiguousarray(
        np.broadcast_to(allowed(recipe), (batch, recipe.heads[0], queries, keys))
    )


def refuse(request: Request, library: str, **unknown: bool) -> None:
    """Say what of a call a library's layer cannot do.

    Args:
        request: The call.
        library: The library's name.
        **unknown: By argument, whether the call has it.

    Raises:
        LayoutError: it has one.
    """
    asked = [f"`{name}`" for name, there in unknown.items() if there]
    if request.inputs["query"].ndim != 3:
        asked.append("inputs with more axes than (batch, length, features)")
    if asked:
        raise LayoutError(f"The layer of {library} cannot be compared with {', '.join(asked)}.")


def finished(
    name: str,
    request: Request,
    call: Callable[[], Arrays],
    told: Known | None,
    gradients: Arrays | None = None,
    notes: tuple[str, ...] = (),
    framework: str = "",
) -> Trace:
    """The trace of a layer that is called twice, to see whether it gives the same.

    Args:
        name: What it is.
        request: What was asked.
        call: Gives "output", and what else it tells, by stage and "scores".
        told: What it tells of itself.
        gradients: By canonical name.
        notes: What its users should know.
        framework: Whose operations it is made of, where these add half precision as they hold it.
    """
    found, again = call(), call()
    need_numbers(name, found)
    found = {n: a.astype(np.float64) if n in STAGES[:-1] else a for n, a in found.items()}
    output, scores = found.pop("output"), found.pop("scores", None)
    dtype = name_of_dtype(output)
    held = dtype if "float" in dtype else None
    return Trace(
        name,
        output,
        scores,
        found if told is None else settled(found, told.recipe(request)),
        gradients or {},
        None if told is None else told.weights,
        None if told is None else told.config,
        held if (framework, held) in COARSE else None,
        held,
        unsteady(output, again["output"]),
        (*(told.notes if told is not None else ()), *notes),
    )


def settled(stages: Arrays, recipe: Recipe) -> Arrays:
    """The stages in float64, at positions that a mask excludes as the recipe has them.

    These count for nothing, and layers differ in what they hold there: anymha zeros.

    Args:
        stages: What a layer told.
        recipe: What a layer with its weights computes.
    """
    stages = {name: array.astype(np.float64) for name, array in stages.items()}
    keys = [recipe.masks[name] for name in ("value_mask", "key_mask") if name in recipe.masks]
    rows = recipe.masks.get("query_mask")
    if not keys and rows is None:
        return stages
    batch, queries, length = recipe.lengths
    seen = np.logical_and.reduce([np.ones((batch, 1, 1, length), bool), *keys])  # (B, 1, 1, S)
    asking = np.ones((batch, 1, queries, 1), bool) if rows is None else rows  # (B, 1, T, 1)
    own = recipe.stages
    places = {"query": asking[:, 0, :, :, None], "logits": seen & asking}
    places |= dict.fromkeys(("key", "value"), seen[:, 0, 0, :, None, None])
    for name, place in places.items():
        if name in stages and stages[name].shape == own[name].shape:
            stages[name] = np.where(place, stages[name], own[name])
    return stages


def trio(given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Query, value and key, each there; where one is not given, the very object it stands for."""
    query = given["query"]
    value = given.get("value", query)
    return query, value, given.get("key", value)
