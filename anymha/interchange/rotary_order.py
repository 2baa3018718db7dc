"""The order of a head's elements: rotary positions turn its two halves together, or its pairs.

A model computes the same with rows of queries and keys permuted and the other order; so a
conversion between the two orders permutes them, and the weights of their norms, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.attention.features.rotary import Rotary
from anymha.errors import LayoutError
from anymha.interchange.forms import Need
from anymha.options.config import AttentionConfig

LAYOUT_OF: Mapping[str, Any] = {"halves": "half", "pairs": "interleaved", "": "half"}
"""The layout of a `Rotary` by the order."""
ORDER_OF = {"half": "halves", "interleaved": "pairs"}


def reordered(
    weights: Mapping[str, np.ndarray], old: Need | None, new: Need | None
) -> dict[str, np.ndarray]:
    """Canonical weights whose heads of queries and keys have the order of another layout.

    Args:
        weights: The weights.
        old: The need of rotary positions of the layout that they are from, whose values nothing
            states.
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
            "`rotary=anymha.Rotary(...)` with the weights, or `dict(weights)` to convert the "
            "arrays as they are."
        )
    width = weights["query.kernel"].shape[-1]
    return permuted(weights, Rotary(layout=LAYOUT_OF[old.order]), width)


def with_order(
    weights: Mapping[str, np.ndarray], config: AttentionConfig | None, order: str
) -> tuple[dict[str, np.ndarray], AttentionConfig | None]:
    """The weights and the config with the rotary positions of an order, where they have another.

    Args:
        weights: Canonical weights.
        config: The config that they fit.
        order: "halves" or "pairs"; empty for any.
    """
    rotary: Any = None if config is None else config.rotary
    if rotary is None or not order or ORDER_OF[rotary.layout] == order:
        return dict(weights), config
    new = dataclasses.replace(rotary, layout=LAYOUT_OF[order])
    assert config is not None
    values = permuted(weights, rotary, config.key_dim)
    return values, dataclasses.replace(config, rotary=new)


def check_order(layout: str, need: Need | None, config: AttentionConfig) -> None:
    """Refuse a config whose rotary positions turn other elements than a layout's.

    Raises:
        LayoutError: they do.
    """
    rotary: Any = config.rotary
    if rotary is None or need is None or not need.order:
        return
    wanted = LAYOUT_OF[need.order]
    if rotary.layout != wanted:
        raise LayoutError(
            f"{layout} has {need.text}: the `rotary` of its weights must have layout={wanted!r}. "
            f"Received: layout={rotary.layout!r}. Pass a `rotary` of that layout, with weights "
            "whose rows are in its order."
        )
    check_columns(layout, need, config)


def check_columns(layout: str, need: Need | None, config: AttentionConfig) -> None:
    """Refuse a config whose rotary positions turn columns that a layout's layers do not turn.

    Raises:
        LayoutError: they do.
    """
    rotary: Any = config.rotary
    if rotary is None or need is None or not need.order:
        return
    part = rotary.width(config.key_dim) < config.key_dim
    if part and (rotary.columns == "last" or not need.partial):
        columns = "the first columns" if need.partial else "all columns"
        raise LayoutError(
            f"A layer of {layout} rotates {columns} of each head. Received: rotary={rotary!r} for "
            f"heads of width {config.key_dim}. Use a layout whose layers rotate these, or none."
        )


def permuted(
    weights: Mapping[str, np.ndarray], rotary: Rotary, key_dim: int
) -> dict[str, np.ndarray]:
    """Canonical weights whose rotated columns are in the other order than that of `rotary`."""
    turned = rotary.width(key_dim)
    start = 0 if rotary.columns == "first" else key_dim - turned
    halves = np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2)])
    columns = np.arange(key_dim)
    columns[start : start + turned] = start + (
        np.argsort(halves) if rotary.layout == "half" else halves
    )

    def of(array: np.ndarray) -> np.ndarray:
        if array.shape[-1] == key_dim:
            return array[..., columns]
        return array.reshape(-1, key_dim)[:, columns].reshape(array.shape)  # a norm over all heads

    return {n: of(a) if n.startswith(("query", "key")) else a for n, a in weights.items()}
