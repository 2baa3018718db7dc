"""Functions that the adapters of other libraries' layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    POSITIONS,
    STAGES,
    Request,
    Trace,
    as_numpy,
    check_numbers,
    differs_between_calls,
    name_of_dtype,
    problem_of,
)

COARSE = {("tensorflow", "float16")}
"""Frameworks whose matrix products add a dtype in itself; others add half precision in float32."""


@dataclass(frozen=True)
class LayerDescription:
    """Weights, options and layout of a live layer."""

    weights: Arrays  # Its canonical weights
    config: AttentionConfig
    layout: str  # The name of its layout
    arrays: Mapping[str, Any]  # Its arrays by their names there
    # The steps of its forward pass apart from plain attention, in words
    needs: tuple[str, ...] = ()
    # Arrays of these steps, by their names there
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for its users."""
        needs = "; ".join(dict.fromkeys(self.needs))
        return (f"it computes more than attention: {needs}",) if needs else ()

    def recipe(self, request: Request) -> Recipe:
        """The recipe of these weights, as anymha means it."""
        return fold(problem_of(self.config, self.weights, request)).recipe

    def canonical(self, gradients: Mapping[str, Any]) -> Arrays:
        """Gradients of its arrays by canonical name; zeros for a name that has none."""
        arrays = {}
        for name, array in self.arrays.items():
            got = gradients.get(name)
            arrays[name] = np.zeros_like(as_numpy(array)) if got is None else as_numpy(got)
        config = self.config
        sizes = {"num_heads": config.num_heads, "num_key_value_heads": config.num_key_value_heads}
        weighted = {feature.option for feature in config.features if feature.weights(config, 1)}
        options = {name: getattr(config, name) for name in weighted}
        return dict(to_canonical(arrays, self.layout, **sizes, **options)[0])

    @property
    def changes_heads(self) -> bool:
        """Whether it rotates or normalizes queries and keys after their projections."""
        return bool(self.needs or self.config.rotary or self.config.query_key_norm)


def describe_layer(layer: Any, **sizes: Any) -> LayerDescription:
    """Describe a live layer, or parameters by name; with the sizes that do not follow from it."""
    weights = get_weights(layer, **sizes)
    assert isinstance(weights, Weights)
    assert weights.config is not None
    arrays = weights if weights.layout == "anymha" else open_layer(layer).arrays
    return _of_weights(weights, weights.config, weights.layout, arrays)


def _of_weights(
    weights: Weights, config: AttentionConfig, layout: str, arrays: Mapping[str, Any]
) -> LayerDescription:
    """Describe canonical weights; what computes with them need not do so in reproducible mode."""
    config = dataclasses.replace(config, compute_dtype=None)
    return LayerDescription(dict(weights), config, layout, arrays, weights.needs, weights.extras)


def describe_arrays(
    arrays: Mapping[str, Any], layout: str, sizes: Mapping[str, Any]
) -> LayerDescription:
    """Describe the arrays of a named layout; other arrays are left out.

    Weights that `get_weights` gave of a layer of anymha have its options too.
    """
    names = get_layout(layout).names()
    own = {name: arrays[name] for name in names if name in arrays}
    if layout == "anymha" and getattr(arrays, "layout", None) == layout and not sizes:
        assert isinstance(arrays, Weights)
        assert arrays.config is not None
        return _of_weights(arrays, arrays.config, layout, own)
    return _of_weights(*to_canonical(own, layout, **sizes), layout, own)


def dense_mask(recipe: Recipe) -> np.ndarray | None:
    """All masks as one (B, H, T, S), True = may attend; None where everything may be attended to.

    It is for libraries that know fewer kinds of masks than anymha.
    """
    if not recipe.masks and not recipe.causal and recipe.window is None:
        return None
    batch, queries, keys = recipe.lengths
    return np.ascontiguousarray(
        np.broadcast_to(allowed(recipe), (batch, recipe.heads[0], queries, keys))
    )


def refuse(request: Request, library: str, **unknown: bool) -> None:
    """Raise a LayoutError where a library's layer does not know an argument of the call."""
    asked = [f"`{name}`" for name, there in unknown.items() if there]
    asked += [f"`{name}`" for name in POSITIONS if name in request.call]
    if request.inputs["query"].ndim != 3:
        asked.append("inputs with more axes than (batch, length, features)")
    if asked:
        raise LayoutError(f"The layer of {library} cannot be compared with {', '.join(asked)}.")


def make_trace(
    name: str,
    request: Request,
    call: Callable[[], Mapping[str, Any]],
    description: LayerDescription | None,
    gradients: Arrays | str = "",
    notes: tuple[str, ...] = (),
    framework: str = "",
) -> Trace:
    """The trace of a layer that is called twice, to see whether it gives the same.

    `call` returns "output", and the stages and "scores" that it reports, by name. `framework` is
    that of its operations, where these add half precision in itself. In place of gradients stand
    words that say why there are none.
    """
    results, again = dict(call()), call()
    check_numbers(name, results)
    stages = {n: a.astype(np.float64) if n in STAGES[:-1] else a for n, a in results.items()}
    output, scores = stages.pop("output"), stages.pop("scores", None)
    dtype = name_of_dtype(output)
    stored = dtype if "float" in dtype else None
    accumulated = stored if (framework, stored) in COARSE else None
    weights = config = None
    settled: Arrays = {}
    if description is not None:
        weights, config = description.weights, description.config
        stages, settled = settle_masked_positions(stages, description.recipe(request))
        notes = (*description.notes, *notes)
    random = differs_between_calls(output, again["output"])
    extras = {} if description is None else description.extras
    if not random and not np.array_equal(output, again["output"], equal_nan=True):
        notes = (*notes, "two calls gave results that differ, as the order of sums explains")
    reason = gradients if isinstance(gradients, str) else ""
    gradients = {} if isinstance(gradients, str) else gradients
    return Trace(name, output, scores, stages, gradients, reason, weights, config, accumulated,
                 stored, random, notes, extras, settled)  # fmt: skip


def settle_masked_positions(stages: Arrays, recipe: Recipe) -> tuple[Arrays, Arrays]:
    """The stages in float64; at positions that a mask excludes, the numbers of the recipe.

    These positions count for nothing, and layers have different numbers there: anymha zeros.
    Also by stage where they are: booleans that broadcast to it, False = settled.
    """
    stages = {name: array.astype(np.float64) for name, array in stages.items()}
    keys = [recipe.masks[name] for name in ("value_mask", "key_mask") if name in recipe.masks]
    rows = [recipe.masks["query_mask"]] if "query_mask" in recipe.masks else []
    if recipe.segments is not None and recipe.key_segments is not None:
        rows.append(recipe.segments[:, None, :, None] >= 0)
        keys.append(recipe.key_segments[:, None, None] >= 0)
    if not keys and not rows:
        return stages, {}
    batch, queries, length = recipe.lengths
    seen = np.logical_and.reduce([np.ones((batch, 1, 1, length), bool), *keys])  # (B, 1, 1, S)
    asking = np.logical_and.reduce([np.ones((batch, 1, queries, 1), bool), *rows])  # (B, 1, T, 1)
    own = recipe.stages
    places = {"query": asking[:, 0, :, :, None], "logits": seen & asking}
    places |= dict.fromkeys(("key", "value"), seen[:, 0, 0, :, None, None])
    settled: Arrays = {}
    for name, place in places.items():
        if name in stages and stages[name].shape == own[name].shape:
            stages[name] = np.where(place, stages[name], own[name])
            settled[name] = place
    return stages, settled
