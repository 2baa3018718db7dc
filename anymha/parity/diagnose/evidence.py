"""`Evidence`: what an implementation reports, and how far the results of a recipe are from it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import PLACES, Arrays, Recipe
from anymha.parity.stages.limits import Tolerances, computed_dtype, error_shares
from anymha.parity.stages.stagewise import OBSERVED
from anymha.parity.stages.structure import distance
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import Trace

FEW = 3
"""Where more stages are reported, mistakes are found one after another."""

FAR = 1 << 14
"""No rounding explains an error of so many units of the dtype."""

MASKED = 9e3
"""Logits below the negative of this stand for -inf."""


@dataclass(frozen=True)
class Evidence:
    """The stages that a trace reports; `reference` is that of the reference, or None."""

    trace: Trace
    reported: Arrays
    reference: Trace | None = None

    @property
    def names(self) -> Collection[str]:
        """The reported stages, in order."""
        return self._observed.keys()

    def errors(self, recipe: Recipe) -> dict[str, float]:
        """The errors of the reported stages, as shares of what rounding explains.

        Those of the recipe that was asked for last are not computed again.
        """
        if self._last.get("recipe") is not recipe:
            tolerances = Tolerances(recipe, self.reference)
            errors = {
                name: self._share(name, self._distance(name, recipe.stages), tolerances)
                for name in self._observed
            }
            self._last.update(recipe=recipe, errors=errors)
        return self._last["errors"]

    def first_errors(self, recipe: Recipe, like: Recipe) -> dict[str, float]:
        """The errors up to the first that is too great; infinite after it.

        The recipe may have stages in common with `like`, whose errors are known. A large error
        counts as infinite, without its limit.
        """
        found, tolerances = dict.fromkeys(self._observed, np.inf), None
        for name in self._observed:
            exact = _stage(recipe, name)
            if exact is _stage(like, name):
                found[name] = self.errors(like)[name]
            else:
                apart = self._distance(name, recipe.until(_source(name)))
                if not self._is_far(apart, exact):
                    tolerances = tolerances or Tolerances(recipe, self.reference)
                    found[name] = self._share(name, apart, tolerances)
            if not found[name] <= 1:
                break
        return found

    def is_far(self, recipe: Recipe, like: Recipe) -> bool:
        """Whether a stage is off by what no rounding explains, `like` as in `first_errors`.

        The stages that are computed first are asked first, those after them not computed.
        """
        for name in sorted(self._observed, key=lambda name: PLACES[_source(name)]):
            exact = _stage(recipe, name)
            if exact is _stage(like, name):
                if not self.errors(like)[name] <= 1:
                    return True
            elif self._is_far(self._distance(name, recipe.until(_source(name))), exact):
                return True
        return False

    def _is_far(self, apart: np.ndarray, exact: np.ndarray) -> bool:
        """Whether no rounding explains a distance from a stage."""
        size = np.maximum.reduce(np.abs(exact), None, initial=0.0)
        if not math.isfinite(size):
            size = np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0)
        return bool((apart > FAR * self._eps * float(size)).any())

    @cached_property
    def _eps(self) -> float:
        return eps(computed_dtype(self.trace))

    def fitting(self, recipe: Recipe) -> np.ndarray:
        """(B, T): the queries whose reported results are those of a recipe, within rounding."""
        fits = np.ones(recipe.lengths[:2], bool)
        tolerances = Tolerances(recipe, self.reference)
        for name in self._observed:
            apart = self._distance(name, recipe.stages)
            if name in ("key", "value") or apart.ndim < 3:
                continue
            shares = error_shares(apart, tolerances.of(name, self.trace))
            if name not in ("query", "context", "output"):
                shares = np.swapaxes(shares, 1, 2)
            fits &= shares.reshape(*fits.shape, -1).max(-1, initial=0.0) <= 1
        return fits

    def columns(self, recipe: Recipe) -> np.ndarray | None:
        """(B, T): how far each reported output is from a recipe's; None where none is reported."""
        got = self._observed.get("output")
        if got is None or got.ndim != 3:
            return None
        exact = recipe.stages["output"]
        if exact.shape != got.shape:
            return None
        if "most" not in self._last:
            most = float(np.max(np.abs(got), where=np.isfinite(got), initial=0.0))
            self._last["most"] = most or 1.0
        return distance(got, exact, "output").max(-1, initial=0.0) / self._last["most"]

    def _share(self, name: str, apart: np.ndarray, tolerances: Tolerances) -> float:
        shares = error_shares(apart, tolerances.of(name, self.trace))
        return float(np.max(shares, initial=0.0))

    def _distance(self, name: str, results: Arrays) -> np.ndarray:
        """The distance of a reported stage from that of a recipe."""
        got, exact = self._observed[name], results[_source(name)]
        if exact.size == got.size and name in ("query", "key", "value", "context"):
            exact = exact.reshape(got.shape)  # of another number of heads
        if got.shape != exact.shape:
            return np.full(1, np.inf)
        apart, counts = distance(got, exact, name), self._counts(name, got)
        return apart if counts is None else np.where(counts, apart, 0.0)

    def _counts(self, name: str, got: np.ndarray) -> np.ndarray | None:
        """Where a stage counts, and is not settled as what a mask excludes; None for everywhere."""
        counts = self.trace.settled.get(name)
        if counts is None or got.ndim != counts.ndim or len(got) != len(counts):
            return None
        alike = all(n in (1, size) for n, size in zip(counts.shape, got.shape, strict=True))
        return np.broadcast_to(counts, got.shape) if alike else None

    def differences(self, recipe: Recipe) -> np.ndarray:
        """What the reported stages have more than a recipe's, in one vector.

        Each stage counts as much as another; NaN and infinity where one side has a number count
        as ten of its usual numbers.
        """
        parts = [self._part(name, _stage(recipe, name)) for name in self._observed]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _part(self, name: str, exact: np.ndarray) -> np.ndarray:
        """The differences of a stage; those of the array that was asked for last are kept."""
        last = self._last.get(name)
        if last is None or last[0] is not exact:
            last = self._last[name] = exact, self._apart(name, exact.reshape(-1))
        return last[1]

    def _apart(self, name: str, exact: np.ndarray) -> np.ndarray:
        got, size = self._numbers[name]
        most = 10.0 / np.sqrt(got.size)
        if exact.size != got.size:
            return np.full(got.size, most)
        if name == "masked_logits":
            exact = _unseen(exact)
        counts = self._counts(name, self._observed[name])
        if counts is not None:
            exact = np.where(counts.reshape(-1), exact, got)
        with np.errstate(invalid="ignore"):
            apart = (got - exact) / size
        numbers = np.isfinite(apart)
        if math.isfinite(apart.dot(apart)) or numbers.all():
            return apart
        same = (got == exact) | (np.isnan(got) & np.isnan(exact))
        return np.where(same, 0.0, np.where(numbers, apart, most))

    def distance(self, recipe: Recipe) -> float:
        """The length of the differences: of the order of the relative error."""
        return length(self.differences(recipe))

    @cached_property
    def _last(self) -> dict[str, Any]:
        """What was computed last."""
        return {}

    @cached_property
    def _observed(self) -> Arrays:
        return {name: self.reported[name] for name in OBSERVED if name in self.reported}

    @cached_property
    def _numbers(self) -> dict[str, tuple[np.ndarray, float]]:
        """The numbers of each stage, and what each counts, from their usual size and how many."""
        numbers = {}
        for name, got in self._observed.items():
            finite = got[np.isfinite(got) & (np.abs(got) < MASKED)]
            size = float(np.sqrt(np.mean(finite**2))) if finite.size else 1.0
            flat = got.reshape(-1)
            numbers[name] = (
                _unseen(flat) if name == "masked_logits" else flat,
                (size or 1.0) * np.sqrt(got.size),
            )
        return numbers


def length(apart: np.ndarray) -> float:
    """That of a vector of differences, as `np.linalg.norm` gives it."""
    return math.sqrt(apart.dot(apart))


def _unseen(logits: np.ndarray) -> np.ndarray:
    """Masked logits with -inf for the numbers that stand for it."""
    return np.where(logits < -MASKED, -np.inf, logits)


def _source(name: str) -> str:
    """The recipe's stage that is reported under a name."""
    return "probabilities" if name == "scores" else name


def _stage(recipe: Recipe, name: str) -> np.ndarray:
    """A stage of a recipe, those after it not computed."""
    own = _source(name)
    return recipe.until(own)[own]
