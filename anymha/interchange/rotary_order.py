"""The order of a head's elements: rotary positions turn its two halves together, or its pairs.

A model computes the same with rows of queries and keys permuted and the other order; so a
conversion between the two orders permutes them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.interchange.forms import Need
from anymha.options.config import AttentionConfig


def reordered(
    weights: Mapping[str, np.ndarray], old: Need | None, new: Need | None
) -> dict[str, np.ndarray]:
    """Canonical weights whose heads of queries and keys have the order of another layout.

    Args:
        weights: The weights.
        old: The need of rotary positions of the layout that they are from.
        new: That of the layout that they are for; where one of the two has none, or no order of
            its own, the weights stay as they are.

    Raises:
        LayoutError: the orders differ, and only a part of each head turns.
    """
    if old is None or new is None or not old.order or not new.order or old.order == new.order:
        return dict(weights)
    if old.partial or new.partial:
        raise LayoutError(
            f"One layout needs {old.text}, the other {new.text}: the rows of queries and keys "
            "would have to be permuted, and the rotated part of a head is not known. Pass "
            "`dict(weights)` to convert the arrays as they are."
        )
    return {
        name: _permuted(array, new.order) if name.startswith(("query", "key")) else array
        for name, array in weights.items()
    }


def check_order(layout: str, need: Need | None, config: AttentionConfig) -> None:
    """Refuse a config whose rotary positions turn other elements together than a layout's.

    Raises:
        LayoutError: they do.
    """
    rotary: Any = config.rotary
    if rotary is None or need is None or not need.order:
        return
    order = "halves" if rotary.layout == "half" else "pairs"
    if order != need.order:
        other = "interleaved" if rotary.layout == "half" else "half"
        raise LayoutError(
            f"{layout} has {need.text}: the `rotary` of its weights must have layout={other!r}. "
            f"Received: layout={rotary.layout!r}. Pass a `rotary` of that layout, with weights "
            "whose rows are in its order."
        )


def _permuted(array: np.ndarray, order: str) -> np.ndarray:
    """The elements along the last axis in halves, where they were in pairs, or back."""
    width = array.shape[-1]
    if width % 2:
        raise LayoutError(f"Heads that rotate must have an even width. Received: {width}.")
    halves = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    return array[..., halves if order == "halves" else np.argsort(halves)]
