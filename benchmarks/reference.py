"""What the layers of a case must give: float64, by hand, one head at a time.

Long forward passes are computed at some rows only, gradients whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases import Arrays, Problem

ROWS = 32
"""Of how many queries the outputs are computed where there are no gradients."""


@dataclass(frozen=True)
class Reference:
    """What is right, all in float64.

    Args:
        rows: The queries whose outputs and scores are in `values`.
        values: "output" (B, R, D), "scores" (B, H, R, T), and of a training case the gradients
            by the weights' names and "x".
        sizes: For each, the greatest size of the sums that it is made of, however much they
            cancel: their errors are small or large beside it.
    """

    rows: np.ndarray
    values: Arrays
    sizes: dict[str, float]

    def rows_of(self, name: str, array: np.ndarray) -> np.ndarray:
        """The part of a layer's result that is in `values`."""
        if name == "output":
            return array[:, self.rows]
        return array[:, :, self.rows] if name == "scores" else array


def make_reference(problem: Problem) -> Reference:
    """The reference of a problem, without dropout."""
    case = problem.case
    count = case.length if case.training else min(ROWS, case.length)
    rows = np.unique(np.linspace(0, case.length - 1, count).astype(int))
    w = {name: array.astype(np.float64) for name, array in problem.weights.items()}
    x = problem.x.astype(np.float64)
    total = _Total(problem, w, x, rows)
    allowed = problem.allowed(rows)
    for b in range(case.batch):
        seen = None if allowed is None else allowed[b % len(allowed)]
        for h in range(case.heads):
            total.add(b, h, seen)
    return total.reference()


class _Total:
    """Sums over batch and heads."""

    def __init__(self, problem: Problem, w: Arrays, x: np.ndarray, rows: np.ndarray) -> None:
        case = problem.case
        self.case, self.w, self.x, self.rows = case, w, x, rows
        self.peak = 1.0  # of the logits: an error of a logit is one of all that comes after it
        self.values: Arrays = {"output": np.zeros((case.batch, len(rows), case.features))}
        self.values["output"] += w["output.bias"]
        if case.scores:
            shape = (case.batch, case.heads, len(rows), case.length)
            self.values["scores"] = np.zeros(shape)
        self.squares: Arrays = {}
        if case.training:
            self.d_output = problem.cotangent.astype(np.float64)
            names = {**w, "x": x}
            self.values |= {name: np.zeros(array.shape) for name, array in names.items()}
            self.squares = {name: np.zeros(array.shape) for name, array in names.items()}
            self.values["output.bias"] += self.d_output.sum((0, 1))

    def add(self, b: int, h: int, seen: np.ndarray | None) -> None:
        """One head of one element of the batch."""
        x, w = self.x[b], self.w
        names = ("query", "key", "value")
        q, k, v = (x @ w[f"{n}.kernel"][:, h] + w[f"{n}.bias"][h] for n in names)
        if self.case.modern:
            q, k = (_modern(z, w[f"{n}_norm.scale"]) for z, n in ((q, "query"), (k, "key")))
        scale = 1 / math.sqrt(self.case.key_dim)
        logits = scale * (q[self.rows] @ k.T)  # [R, T]
        if seen is not None:
            logits = np.where(seen, logits, -np.inf)
        greatest = logits.max(-1, keepdims=True)
        self.peak = max(self.peak, float(np.abs(greatest).max()))
        scores = np.exp(logits - greatest)
        sink = np.exp(w["sinks"][h] - greatest) if self.case.modern else 0.0
        scores /= scores.sum(-1, keepdims=True) + sink
        kernel = w["output.kernel"][h]  # [d, D]
        context = scores @ v
        self.values["output"][b] += context @ kernel
        if "scores" in self.values:
            self.values["scores"][b, h] = scores
        if not self.case.training:
            return

        d_context = self.d_output[b] @ kernel.T
        d_scores = d_context @ v.T
        d_logits = scores * (d_scores - (d_scores * scores).sum(-1, keepdims=True))
        parts = {
            "query": scale * (d_logits @ k),
            "key": scale * (d_logits.T @ q),
            "value": scores.T @ d_context,
        }
        self._count("output.kernel", h, context.T, self.d_output[b])
        for name, d in parts.items():
            self._count(f"{name}.kernel", (slice(None), h), x.T, d)
            self._count(f"{name}.bias", h, np.ones(len(x)), d)
            self._count("x", b, d, w[f"{name}.kernel"][:, h].T)

    def _count(self, name: str, place: Any, a: np.ndarray, b: np.ndarray) -> None:
        self.values[name][place] += a @ b
        self.squares[name][place] += (a * a) @ (b * b)

    def reference(self) -> Reference:
        """The sums as they stand."""
        sizes = {}
        for name, value in self.values.items():
            spread = np.sqrt(self.squares[name].max()) if name in self.squares else 0.0
            sizes[name] = self.peak * max(float(np.abs(value).max()), float(spread))
        return Reference(self.rows, self.values, sizes)


def _modern(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A head (T, d_k) with its RMS norm and rotary positions, as complex numbers."""
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale
    length, half = len(x), x.shape[-1] // 2
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)
