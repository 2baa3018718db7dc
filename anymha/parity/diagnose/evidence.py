"""`Evidence`: what an implementation reports, and how far the results of a recipe are from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe
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

    def errors(self, recipe: Recipe) -> dict[str, float]:
        """The errors of the reported stages, as shares of what rounding explains."""
        tolerances = Tolerances(recipe, self.reference)
        return {
            name: self._share(name, self._distance(name, recipe.stages), tolerances)
            for name in self._observed
        }

    def first_errors(
        self, recipe: Recipe, like: Recipe, errors: dict[str, float]
    ) -> dict[str, float]:
        """The errors up to the first that is too great; infinite behind it.

        `errors` are those of `like`, with which the recipe may have stages in common. A large error
        counts as infinite, without its limit.
        """
        results, found = recipe.stages, dict.fromkeys(self._observed, np.inf)
        tolerances = None
        for name in self._observed:
            exact = _stage(results, name)
            if exact is _stage(like.stages, name):
                found[name] = errors[name]
            else:
                apart = self._distance(name, results)
                size = float(np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0))
                if not np.any(apart > FAR * eps(computed_dtype(self.trace)) * size):
                    tolerances = tolerances or Tolerances(recipe, self.reference)
                    found[name] = self._share(name, apart, tolerances)
            if not found[name] <= 1:
                break
        return found

    def _share(self, name: str, apart: np.ndarray, tolerances: Tolerances) -> float:
        shares = error_shares(apart, tolerances.of(name, self.trace))
        return float(np.max(shares, initial=0.0))

    def _distance(self, name: str, results: Arrays) -> np.ndarray:
        """The distance of a reported stage from that of a recipe."""
        got, exact = self._observed[name], _stage(results, name)
        if exact.size == got.size and name in ("query", "key", "value", "context"):
            exact = exact.reshape(got.shape)  # of another number of heads
        return distance(got, exact, name) if got.shape == exact.shape else np.full(1, np.inf)

    def differences(self, results: Arrays) -> np.ndarray:
        """What the reported stages have more than a recipe's, in one vector.

        Each stage counts as much as another; NaN and infinity where one side has a number count
        as ten of its usual numbers.
        """
        parts = []
        for name, got in self._observed.items():
            exact = _stage(results, name)
            if exact.size != got.size:
                parts.append(np.full(got.size, 10.0 / np.sqrt(got.size)))
                continue
            exact, got = exact.reshape(-1), got.reshape(-1)
            if name == "masked_logits":
                exact, got = (np.where(a < -MASKED, -np.inf, a) for a in (exact, got))
            size = self._sizes[name]
            with np.errstate(invalid="ignore"):
                apart = (got - exact) / size
            same = (got == exact) | (np.isnan(got) & np.isnan(exact))
            apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, 10.0))
            parts.append(apart / np.sqrt(apart.size))
        return np.concatenate(parts)

    def distance(self, recipe: Recipe) -> float:
        """The length of the differences: of the order of the relative error."""
        return float(np.linalg.norm(self.differences(recipe.stages)))

    @cached_property
    def _observed(self) -> Arrays:
        return {name: self.reported[name] for name in OBSERVED if name in self.reported}

    @cached_property
    def _sizes(self) -> dict[str, float]:
        """The usual size of the numbers of each stage."""
        sizes = {}
        for name, got in self._observed.items():
            finite = got[np.isfinite(got) & (np.abs(got) < MASKED)]
            sizes[name] = float(np.sqrt(np.mean(finite**2))) if finite.size else 1.0
        return {name: size or 1.0 for name, size in sizes.items()}


def _stage(results: Arrays, name: str) -> np.ndarray:
    return results["probabilities" if name == "scores" else name]
