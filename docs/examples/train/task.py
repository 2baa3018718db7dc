"""What all frameworks train: the text, the batches, the first weights, and how runs are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import numpy as np

TOPICS = ("assignment", "class", "compound", "exceptions", "function", "import", "numbers", "try")
BATCH, LENGTH, WIDTH, HEADS = 8, 32, 32, 4
LEARNING_RATE = 0.3
BOUND = 1e-5

CALL: dict[str, Any] = {"use_causal_mask": True, "training": True}


@dataclass(frozen=True)
class Run:
    """What came of a training run: the loss before each step, and the weights after the last."""

    losses: np.ndarray
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A causal character model and its training, without a framework.

    Args:
        steps: How many steps of plain gradient descent.
        reproducible: Compute in float64, and round gradients to the weights' float32 once.
    """

    steps: int
    reproducible: bool

    @property
    def text(self) -> str:
        """20,000 characters of the documentation that comes with Python."""
        return "\n".join(topics[name] for name in TOPICS)[:20_000]

    @property
    def letters(self) -> list[str]:
        """The vocabulary."""
        return sorted(set(self.text))

    @property
    def dtype(self) -> str:
        """The dtype of everything but the weights."""
        return "float64" if self.reproducible else "float32"

    @property
    def layer(self) -> dict[str, Any]:
        """The attention layer's options; its own seed makes its first weights."""
        return {
            "num_heads": HEADS,
            "key_dim": WIDTH // HEADS,
            "dropout": 0.1,
            "query_features": WIDTH,
            "compute_dtype": self.dtype,
            "seed": 0,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """The first values of the weights around the layer, float32."""
        rng = np.random.default_rng(0)
        letters = len(self.letters)
        values = {
            "token": 0.5 * rng.standard_normal((letters, WIDTH)),
            "position": 0.5 * rng.standard_normal((LENGTH, WIDTH)),
            "kernel": rng.standard_normal((WIDTH, letters)) / np.sqrt(WIDTH),
            "bias": np.zeros(letters),
        }
        return {name: value.astype(np.float32) for name, value in values.items()}

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Each step's characters, the characters that follow them, and the dropout seed."""
        number = {letter: i for i, letter in enumerate(self.letters)}
        text = np.array([number[letter] for letter in self.text], dtype=np.int32)
        for step in range(self.steps):
            starts = np.random.default_rng(step).integers(0, len(text) - LENGTH, BATCH)
            rows = text[starts[:, None] + np.arange(LENGTH + 1)]
            yield rows[:, :-1], rows[:, 1:], step


@dataclass(frozen=True)
class Verdict:
    """How far a framework's two runs are from NumPy's."""

    first: float
    last: float
    relative: float
    losses: int
    weights: int

    @property
    def passed(self) -> bool:
        """Whether the curves agree, and the reproducible runs to the last bit."""
        return self.relative <= BOUND and self.losses == 0 and self.weights == 0


def judge(reference: Mapping[bool, Run], candidate: Mapping[bool, Run]) -> Verdict:
    """Compare a framework's runs with NumPy's; the keys say which run is the reproducible one."""
    expected, found = (runs[False].losses.astype(np.float64) for runs in (reference, candidate))
    distance = np.abs(found - expected) / np.abs(expected)
    exact, mine = reference[True], candidate[True]
    return Verdict(
        first=float(found[0]),
        last=float(found[-1]),
        relative=float(distance.max()) if np.isfinite(found).all() else float("inf"),
        losses=differing(exact.losses, mine.losses),
        weights=sum(differing(exact.weights[name], mine.weights[name]) for name in exact.weights),
    )


def differing(a: np.ndarray, b: np.ndarray) -> int:
    """In how many places two float32 arrays have different bits."""
    if a.dtype != np.float32 or b.dtype != np.float32 or a.shape != b.shape:
        raise ValueError(f"Expected float32 of one shape: {a.dtype} {a.shape}, {b.dtype} {b.shape}")
    return int(np.sum(a.view(np.int32) != b.view(np.int32)))
