"""The text: the documentation of Python's language that comes with Python."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
LETTERS = sorted(set(TEXT))
NUMBERS = {letter: number for number, letter in enumerate(LETTERS)}


def encode(text: str) -> np.ndarray:
    """The numbers of the letters, (length,) int64."""
    return np.array([NUMBERS[letter] for letter in text])


def decode(numbers: np.ndarray) -> str:
    """The letters of the numbers."""
    return "".join(LETTERS[number] for number in numbers)


def batches(steps: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """For each step, rows of length + 1 letters from places drawn anew, (batch, length + 1)."""
    text, rng = encode(TEXT), np.random.default_rng(0)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - length, batch)
        yield text[starts[:, None] + np.arange(length + 1)]
