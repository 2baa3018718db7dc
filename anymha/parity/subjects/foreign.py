"""What the subjects of other libraries' layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.config import AttentionConfig
from anymha.errors import LayoutError
from anymha.interchange.layers import get_weights
from anymha.interchange.weights import Weights
from anymha.parity.recipe import Arrays, Recipe, allowed
from anymha.parity.trace import Request, Trace, name_of_dtype, problem_of
from anymha.parity.truth import fold


def described(layer: Any) -> tuple[Arrays, AttentionConfig]:
    """A live layer's canonical weights and options.

    Raises:
        LayoutError: it computes more than attention, as rotary positions.
    """
    weights = get_weights(layer)
    assert isinstance(weights, Weights)
    if weights.needs:
        raise LayoutError(
            f"The {type(layer).__name__} computes more than attention: {'; '.join(weights.needs)}. "
            "Compare it as a function, `lambda query, value, key: layer(...)`."
        )
    assert weights.config is not None
    return dict(weights), weights.config


def recipe_of(weights: Arrays, config: AttentionConfig, request: Request) -> Recipe:
    """What a layer with these weights would compute by the written meaning."""
    return fold(problem_of(config, weights, request)).recipe


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
    asked = [name for name, there in unknown.items() if there]
    if request.inputs["query"].ndim != 3:
        asked.append("inputs with more axes than (batch, length, features)")
    if asked:
        raise LayoutError(f"The layer of {library} cannot be compared with {', '.join(asked)}.")


def finished(
    name: str,
    call: Callable[[], Arrays],
    weights: Arrays,
    config: AttentionConfig,
    **more: Any,
) -> Trace:
    """The trace of a layer that is called twice; `call` gives "output" and what else it tells."""
    found, again = call(), call()
    output = found.pop("output")
    return Trace(
        name,
        output,
        found.pop("scores", None),
        {stage: array.astype(np.float64) for stage, array in found.items()},
        weights=weights,
        config=config,
        accumulated=name_of_dtype(output),
        random=not np.array_equal(output, again["output"], equal_nan=True),
        **more,
    )
