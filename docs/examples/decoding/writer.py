"""The model at work: it writes letter by letter, with caches or from the whole text each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from homes import home
from model import forward

import anymha

BUCKET = 64  # without caches texts are padded to a multiple of it, so that few lengths occur
TEMPERATURE = 0.5


@dataclass(frozen=True)
class Written:
    """What a home wrote.

    Args:
        letters: The numbers of the letters after the prompt, (T,).
        logits: The logits that they were drawn by, (T, vocabulary).
        seconds: The time that each took, (T,).
    """

    letters: np.ndarray
    logits: np.ndarray
    seconds: np.ndarray

    @property
    def rate(self) -> float:
        """Letters a second, by the median, since first calls compile."""
        return 1 / float(np.median(self.seconds))


class Writer:
    """The model in one home.

    Args:
        name: The home.
        weights: The weights around the attention layers, in NumPy.
        layers: The attention layers of any home; they are converted.
    """

    def __init__(self, name: str, weights: dict[str, np.ndarray], layers: list[Any]) -> None:
        self.home, self.token = home(name), weights["token"]
        self.weights = {name: self.home.array(value) for name, value in weights.items()}
        self.layers = [anymha.convert(layer, to=name) for layer in layers]
        self.step = self.home.of_layers(partial(forward, self.home.xp), self.layers)

    def logits(self, letters: np.ndarray, caches: Any = None) -> tuple[np.ndarray, Any]:
        """The logits (T, vocabulary) after each of the letters (T,), and the new caches."""
        hidden = self.home.array(self.token[letters][None])
        logits, caches = self.step(self.weights, hidden, caches)
        return self.home.numpy(logits)[0], caches

    def write(self, prompt: np.ndarray, noise: np.ndarray) -> Written:
        """Write with caches: the prompt goes in at once, then one letter at a time."""
        length = len(prompt) + len(noise)
        caches = [layer.make_cache(1, length) for layer in self.layers]

        def last(text: np.ndarray) -> np.ndarray:
            nonlocal caches
            new = text if len(text) == len(prompt) else text[-1:]
            logits, caches = self.logits(new, caches)
            return logits[-1]

        return _write(prompt, noise, last)

    def write_anew(self, prompt: np.ndarray, noise: np.ndarray) -> Written:
        """Write without caches: each letter comes from a call with the whole text."""

        def last(text: np.ndarray) -> np.ndarray:
            behind = -len(text) % BUCKET  # the layers are causal: padding after changes nothing
            return self.logits(np.pad(text, (0, behind)))[0][len(text) - 1]

        return _write(prompt, noise, last)


def _write(
    prompt: np.ndarray, noise: np.ndarray, last: Callable[[np.ndarray], np.ndarray]
) -> Written:
    """Draw letters by the logits after the text so far; Gumbel's `noise` (T, vocabulary) draws."""
    text, rows, seconds = prompt, [], []
    for draw in noise:
        start = time.perf_counter()
        rows.append(last(text))
        letter = np.argmax(rows[-1] / TEMPERATURE + draw)
        seconds.append(time.perf_counter() - start)
        text = np.append(text, letter)
    return Written(text[len(prompt) :], np.array(rows), np.array(seconds))
