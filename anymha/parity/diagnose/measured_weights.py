"""Weights that are all changed alike: by a factor, or by a limit of numbers or of norms.

A factor near 1 is left by an average over steps or by a decay; a limit by a constraint. The number
is measured, from the weights that a candidate tells or from what it reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.measured import Family, fitted, nearest, number
from anymha.parity.diagnose.trials import EXPLAINED, first_change
from anymha.parity.oracle.recipe import Recipe

SECONDS = 1.5
"""How long changes of weights are computed."""

NEAR = 1e-5
"""How far told weights may be from changed ones, as parts of the greatest number."""

PRUNED = "weights pruned"

PARTS = ("query", "key", "value", "output")


class Change(NamedTuple):
    """A change of an array of weights by a number."""

    name: str  # The name of the mistake
    fix: str
    apply: Callable[[np.ndarray, float], np.ndarray]
    measure: Callable[[np.ndarray, np.ndarray], float]  # From the right and the changed array
    starts: Callable[[float], np.ndarray]  # Logarithms of numbers, by the greatest of the weights
    words: str  # What weights are, with a place for the number


def _norms(array: np.ndarray) -> np.ndarray:
    """The norms of the columns of a kernel (inputs, ...); the sizes of a bias (H, d) or (O)."""
    return np.sqrt(np.sum(np.square(array), 0, keepdims=True))


def _within(array: np.ndarray, limit: float) -> np.ndarray:
    """The kernel with norms of its columns no greater than a limit."""
    sizes = _norms(array)
    return array * np.minimum(1.0, limit / np.where(sizes > 0, sizes, 1.0))


def _least(right: np.ndarray, changed: np.ndarray) -> float:
    """Between the numbers that are zero in a changed array, and those that are left."""
    sizes = np.abs(right)
    zero = float(np.max(sizes, where=changed == 0, initial=0.0))
    return (zero + float(np.min(sizes, where=changed != 0, initial=np.inf))) / 2


CHANGES = (
    Change("weights scaled", "Load each weight as it is: an average over steps or a decay "
           "belongs to no copy.", lambda w, n: n * w,
           lambda w, v: float(np.vdot(w, v) / (np.vdot(w, w) or 1.0)),
           lambda most: np.linspace(-1.5, 1.5, 7), "{} times the reference's"),
    Change("weights clipped", "Load each weight as it is: limits of training belong to no copy.",
           lambda w, n: np.clip(w, -n, n), lambda w, v: float(np.max(np.abs(v), initial=0.0)),
           lambda most: math.log(most or 1.0) + np.linspace(-4, 0, 13), "cut at {0} and -{0}"),
    Change("weights clipped", "Load each weight as it is: limits of training belong to no copy.",
           _within, lambda w, v: float(np.max(_norms(v), initial=0.0)),
           lambda most: math.log(most or 1.0) + np.linspace(-3, 4, 15),
           "cut to a norm of {} in each column"),
    Change(PRUNED, "Load each weight as it is: small weights are not zero.",
           lambda w, n: np.where(np.abs(w) < n, 0.0, w), _least,
           lambda most: math.log(most or 1.0) + np.linspace(-5, 0, 26), "zero below {}"),
)  # fmt: skip


def related(right: Mapping[str, np.ndarray], told: Mapping[str, np.ndarray]) -> str | None:
    """How all of the weights that differ, by name, are changed from the right ones, in words."""
    for change in CHANGES:
        numbers = {}
        for name, wrong in told.items():
            one, other = (_as_kernel(name, array) for array in (right[name], wrong))
            n = change.measure(one, other)
            near = NEAR * float(np.max(np.abs(one), initial=0.0))
            if not np.isfinite(n) or not np.allclose(change.apply(one, n), other, 0, near):
                break
            numbers[name] = number(n)
        else:
            by_number: dict[str, list[str]] = {}
            for name, n in numbers.items():
                by_number.setdefault(n, []).append(name)
            every = len(numbers) == len(right) > 1
            return ", ".join(
                f"{'all weights are' if every and len(by_number) == 1 else _which(names)} "
                f"{change.words.format(n)}" for n, names in by_number.items()
            )  # fmt: skip
    return None


def _which(names: list[str]) -> str:
    return f"{listed(names)} {'are' if names[1:] else 'is'}"


def _as_kernel(name: str, array: np.ndarray) -> np.ndarray:
    """The output's kernel as a matrix: its products sum over heads and features."""
    array = np.asarray(array, np.float64)
    return array.reshape(-1, array.shape[-1]) if name == "output.kernel" else array


def measured_weights(recipe: Recipe, evidence: Evidence) -> tuple[Cause, Recipe] | None:
    """The recipe with changed weights that gives what is reported, and how they are changed."""
    before, until = evidence.distance(recipe), Deadline(SECONDS)
    for change in CHANGES:
        for words, names in _sets(recipe, change.name == "weights scaled"):
            if until.over:
                return None
            family = _family(recipe, change, words, names)
            if change.name == PRUNED:
                power = nearest(lambda n, family=family: evidence.distance(family.make(n)),
                                family.starts, 1e-4)  # fmt: skip
                one = family.words(power), family.make(power)
            else:
                one = fitted(family, evidence, before)
            if one is None or evidence.distance(one[1]) > EXPLAINED * before:
                continue
            stage = first_change(recipe, one[1])
            if stage is not None and max(evidence.errors(one[1]).values()) <= 1:
                return Cause(change.name, one[0], stage, change.fix), one[1]
    return None


def _sets(recipe: Recipe, scaled: bool) -> Iterator[tuple[str, list[str]]]:
    """Weights that are changed together, in words and by name."""
    kernels = [f"{part}.kernel" for part in PARTS]
    biases = [n for n in (f"{part}.bias" for part in PARTS) if np.any(recipe.weights.get(n, 0.0))]
    every = [("all kernels are", kernels)]
    every += [("all weights are", [*kernels, *biases])] if biases else []
    yield from reversed(every) if scaled else every
    if scaled and biases:
        yield "all biases are", biases
    of_three = [n for n in (*kernels, *biases) if not n.startswith("output")]
    yield "the weights of query, key and value are", of_three
    for name in kernels:
        yield f"{name} is", [name]


def _family(recipe: Recipe, change: Change, words: str, names: list[str]) -> Family:
    weights = recipe.weights
    most = max(float(np.max(np.abs(weights[name]), initial=0.0)) for name in names)

    def make(power: float) -> Recipe:
        changed = {
            n: change.apply(_as_kernel(n, weights[n]), math.exp(power)).reshape(weights[n].shape)
            for n in names
        }
        return recipe.but(weights={**weights, **changed})

    def told(power: float) -> str:
        return f"{words} {change.words.format(number(math.exp(power)))}"

    return Family(make, tuple(change.starts(most)), told)
