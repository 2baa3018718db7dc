"""`Weights`: weights by name, with the options and the other arrays of their layer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from anymha.interchange.forms import Need


class Weights(dict[str, np.ndarray]):
    """A dict of weights by name, with the options and the other arrays of their layer.

    `get_weights` and `to_canonical` return canonical weights so, `from_canonical` the arrays of a
    layout. ``dict(weights)`` has the weights alone.

    Attributes:
        layout: The layout that they were converted from, or into.
        form: The name of the layout's form, where it has several.
        extras: Arrays that the canonical form has no place for, by their names in the layout, bit
            for bit: norms of queries and keys, sinks, buffers. `from_canonical` writes them back.
        lost: The names of the extras without which the layer computes something else.
        needs: What the layer's forward pass needs besides plain attention, in words. Empty where
            anymha's layer with these weights computes what the foreign one computes.
        unknown: Options of `anymha.AttentionConfig` among these needs: the layer may have them, but
            nothing states their values.
        config: The options of the layer that they are from.
        rotary: The need of rotary positions of the layout that they are from, if it has one.
    """

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        *,
        layout: str,
        form: str = "",
        extras: Mapping[str, np.ndarray] | None = None,
        lost: tuple[str, ...] = (),
        needs: tuple[str, ...] = (),
        unknown: tuple[str, ...] = (),
        config: Any = None,
        rotary: Need | None = None,
    ) -> None:
        super().__init__(values)
        _register_with_jax()
        self.layout = layout
        self.form = form
        self.extras = dict(extras or {})
        self.lost = lost
        self.needs = needs
        self.unknown = unknown
        self.config = config
        self.rotary = rotary

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {array.shape}" for name, array in self.items())
        needs = "".join(f"; needs {need}" for need in self.needs)
        more = f"; extras {', '.join(self.extras)}" if self.extras else ""
        return f"<Weights from {self.layout}: {arrays}{more}{needs}>"


def _register_with_jax() -> None:
    """Make `Weights` a pytree like any dict, where JAX is imported; its copies are plain dicts."""
    tree_util: Any = sys.modules.get("jax.tree_util")
    if tree_util is None or _REGISTERED:
        return

    def flatten(weights: Weights) -> tuple[list[tuple[Any, np.ndarray]], tuple[str, ...]]:
        names = sorted(weights)
        return [(tree_util.DictKey(name), weights[name]) for name in names], tuple(names)

    def unflatten(names: tuple[str, ...], arrays: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(names, arrays, strict=True))

    tree_util.register_pytree_with_keys(Weights, flatten, unflatten)
    _REGISTERED.append(True)


_REGISTERED: list[bool] = []
