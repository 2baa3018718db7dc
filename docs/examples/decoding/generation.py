"""The text, letter by letter: with caches, and from the whole text each time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from homes import home
from model import forward

import anymha

BUCKET = 64  # without caches the text is padded to a multiple of it, so that few lengths occur
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Generated:
    """What a home wrote.

    Args:
        letters: The numbers of the letters, prompt included, (length,).
        seconds: The time of each letter behind the prompt.
    """

    letters: np.ndarray
    seconds: np.ndarray

    @property
    def rate(self) -> float:
        """Letters a second."""
        return len(self.seconds) / float(self.seconds.sum())


class Writer:
    """The model in one home.

    Args:
        name: The home.
        weights: The weights around the attention layers, in NumPy.
        layers: The attention layers of any home; they are converted.
    """

    def __init__(self, name: str, weights: dict[str, np.ndarray], layers: list[Any]) -> None:
        self.home = home(name)
        self.weights = {name: self.home.array(value) for name, value in weights.items()}
        self.layers = [anymha.convert(layer, to=name) for layer in layers]
        self.cached = self.home.compiled(self._cached)
        self.uncached = self.home.compiled(self._uncached)

    def _next(self, logits: Any, noise: Any) -> Any:
        """A letter drawn by its probability, (B, 1): the noise is Gumbel's."""
        return self.home.xp.argmax(logits / TEMPERATURE + noise, -1)[:, None]

    def _cached(self, weights: Any, layers: Any, caches: Any, letters: Any, noise: Any) -> Any:
        hidden = self.home.take(weights["token"], letters)
        logits, caches = forward(self.home.xp, weights, layers, hidden, caches)
        return self._next(logits[:, -1], noise), caches

    def _uncached(self, weights: Any, layers: Any, letters: Any, last: Any, noise: Any) -> Any:
        hidden = self.home.take(weights["token"], letters)
        logits, _ = forward(self.home.xp, weights, layers, hidden)
        # The row `last` (1, length) marks, in every framework by a product.
        return self._next((last[..., None] * logits).sum(1), noise)
