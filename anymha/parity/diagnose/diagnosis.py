"""Which known mistake, or which two, give what a candidate gives."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from anymha.parity.diagnose.attention_mistakes import PRECISIONS, precision
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.mistakes import Mistake, catalogue, other_options
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.limits import Tolerances, computed_dtype, shares_of
from anymha.parity.stages.stagewise import OBSERVED
from anymha.parity.stages.structure import distance, like_rounding
from anymha.parity.stages.trace import STAGES, Trace
from anymha.parity.stages.units import eps

SECONDS = 10.0
"""How long pairs of mistakes are tried; single ones three times as long."""

LARGE = 1 << 17
"""Where there are more logits, one element of the batch is looked at."""

FEW = 3
"""Of a candidate that tells more stages than these, mistakes are found one after another."""

FAR = 1 << 14
"""No rounding explains an error of so many units of the dtype."""

GREATER, SMALLER = 4.0, 1 / 16
"""How much greater or smaller the errors of a dtype may be than where each stage is rounded."""


@dataclass(frozen=True)
class _Tried:
    cause: Cause
    recipe: Recipe
    errors: dict[str, float]  # by observed stage, over what rounding explains

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    def prefix(self) -> int:
        """How many of the stages that were told fit, from the first on."""
        for count, error in enumerate(self.errors.values()):
            if not error <= 1:
                return count
        return len(self.errors)


class Search:
    """Looks for mistakes that make a recipe give what was observed.

    Args:
        recipe: What is meant.
        trace: Whose results they are.
        found: What it told, by stage.
        reference: The trace of what is right, where the results are a candidate's.
    """

    def __init__(
        self, recipe: Recipe, trace: Trace, found: Arrays, reference: Trace | None = None
    ) -> None:
        self.recipe, self.trace, self.found, self.reference = recipe, trace, found, reference
        self.honest = recipe.stages

    def fits(self) -> bool:
        """Whether the recipe itself gives what was observed."""
        return max(self._errors(self.recipe).values()) <= 1

    def diagnose(self, pairs: bool = True) -> Diagnosis:
        """The mistakes that explain what was observed; one alone without `pairs`."""
        if self.trace.random:
            stage = "dropped_probabilities"
            cure = "Two calls gave two results: switch the candidate to evaluation."
            return Diagnosis((Cause("dropout left on", "", stage, cure),), 0.0)
        if any(a.shape != self.honest.get(n, a).shape for n, a in self.found.items()):
            return Diagnosis()
        if self.recipe.lengths[0] > 1 and self.honest["logits"].size > LARGE:
            return self._of_one(pairs)
        singles = list(_in_time(self._tried(self.recipe), 3 * SECONDS))
        best = self._fitting(singles)
        if best is not None:
            return best
        narrower = self._precision()
        if narrower is not None:
            return Diagnosis((narrower,), 0.0, (), self.recipe)
        if not pairs:
            return Diagnosis()
        begun = self._by_prefix(singles)
        if begun.explained or len(self.found) > FEW:
            return begun
        return self._pairs(singles) or begun

    def _of_one(self, pairs: bool) -> Diagnosis:
        """The same from the one element of the batch that differs most, for the sake of time."""
        most = np.zeros(self.recipe.lengths[0])
        for name, got in self.found.items():
            apart = distance(got, self.honest["probabilities" if name == "scores" else name], name)
            most = np.maximum(most, apart.reshape(len(apart), -1).max(1))
        at = int(np.argmax(most))
        found = {name: array[at : at + 1] for name, array in self.found.items()}
        one = Search(self.recipe.of_batch(at), self.trace, found, self.reference).diagnose(pairs)
        whole = self.recipe
        for cause in one.causes:
            known = (w for m, d, w in self._variants(whole) if (m.name, d) == cause.known)
            whole = next(known, whole)
        return replace(one, recipe=None if one.recipe is None else whole)

    def _fitting(self, tried: Iterable[_Tried]) -> Diagnosis | None:
        good = [t for t in tried if t.worst <= 1]
        if not good:
            return None
        others = dict.fromkeys(str(t.cause) for t in good[1:] if t.cause.name != good[0].cause.name)
        return Diagnosis((good[0].cause,), good[0].worst, tuple(others), good[0].recipe)

    def _by_prefix(self, singles: list[_Tried]) -> Diagnosis:
        """One mistake after another: each must make the told stages fit further than before."""
        causes: list[Cause] = []
        honest = self._errors(self.recipe)
        reached = next((i for i, error in enumerate(honest.values()) if not error <= 1), 0)
        tried = singles
        while tried:
            best = max(tried, key=_Tried.prefix)
            if best.prefix() <= reached:
                break
            causes.append(best.cause)
            reached = best.prefix()
            if best.worst <= 1:
                return Diagnosis(tuple(causes), best.worst, (), best.recipe)
            tried = list(self._tried(best.recipe))
        return Diagnosis(tuple(causes), np.inf)

    def _pairs(self, singles: list[_Tried]) -> Diagnosis | None:
        """Two mistakes together."""
        until = time.monotonic() + SECONDS
        for first in singles:
            for second in self._tried(first.recipe, skip=first.cause.name):
                if second.worst <= 1:
                    pair = sorted((first.cause, second.cause), key=lambda c: STAGES.index(c.stage))
                    return Diagnosis(tuple(pair), second.worst, (), second.recipe)
                if time.monotonic() > until:
                    return None
        return None

    def _precision(self) -> Cause | None:
        """A narrower dtype in which the stages were computed: the errors have its size."""
        given = computed_dtype(self.reference or self.trace)
        mine = {n: float(np.max(a, initial=0.0)) for n, a in self._distances(self.honest).items()}
        if not like_rounding(self.found.get("output"), self.honest["output"]):
            return None
        right = self._errors(self.recipe)
        for dtype in PRECISIONS:
            if eps(dtype) <= eps(given):
                continue
            [(_, rounded)] = precision(self.recipe, dtype)
            results = rounded.stages
            usual = {n: float(np.max(distance(a, self.honest[n], n))) for n, a in results.items()}
            usual["scores"] = usual["probabilities"]
            wrong = [name for name in mine if not right[name] <= 1]
            if all(mine[n] <= GREATER * usual[n] for n in mine) and any(
                mine[n] >= SMALLER * usual[n] for n in wrong
            ):
                stage = wrong[0] if len(self.found) > 2 else "query"
                stage = "probabilities" if stage == "scores" else stage
                cure = (f"The reference computes in {given}: cast weights and inputs, or switch "
                        "mixed precision and TF32 off.")  # fmt: skip
                return Cause(f"computed in {dtype}", "", stage, cure)
        return None

    def _distances(self, results: Arrays) -> dict[str, np.ndarray]:
        """How far what was observed is from a recipe's results."""
        distances = {}
        for name in OBSERVED:
            if name in self.found:
                exact, got = (
                    results["probabilities" if name == "scores" else name],
                    self.found[name],
                )
                fits = got.shape == exact.shape
                distances[name] = distance(got, exact, name) if fits else np.full(1, np.inf)
        return distances

    def _tried(self, recipe: Recipe, skip: str | None = None) -> Iterator[_Tried]:
        for mistake, detail, wrong in self._variants(recipe, skip):
            with np.errstate(all="ignore"):
                stage = _first_change(recipe.stages, wrong.stages)
            if stage is not None:
                cause = Cause(mistake.name, detail, stage, mistake.cure)
                errors = self._errors(wrong, hasty=True)
                yield _Tried(cause, wrong.but(), errors)  # a copy, which does not keep its stages

    def _variants(
        self, recipe: Recipe, skip: str | None = None
    ) -> Iterator[tuple[Mistake, str, Recipe]]:
        """Each mistake with its detail and the recipe that has it, but those of one name."""
        for mistake, detail, wrong in other_options(recipe, self.trace.config):
            if mistake.name != skip:
                yield mistake, detail, wrong
        for mistake in catalogue():
            if mistake.name != skip:
                for detail, wrong in mistake.plant(recipe):
                    yield mistake, detail, wrong

    def _errors(self, recipe: Recipe, hasty: bool = False) -> dict[str, float]:
        """How far what was observed is from a recipe's results, over what rounding explains.

        In haste, a great error is not asked how great it may be.
        """
        results = recipe.stages
        distances = self._distances(results)
        far = FAR * eps(computed_dtype(self.trace)) * float(np.max(np.abs(results["output"])))
        if hasty and len(distances) <= FEW and np.any(distances.get("output", 0.0) > far):
            return dict.fromkeys(distances, np.inf)
        tolerances = Tolerances(recipe, self.reference)
        return {
            name: float(np.max(shares_of(apart, tolerances.of(name, self.trace)), initial=0.0))
            for name, apart in distances.items()
        }


def _in_time(tried: Iterable[_Tried], seconds: float) -> Iterator[_Tried]:
    """As many as can be tried in that time."""
    until = time.monotonic() + seconds
    for one in tried:
        yield one
        if time.monotonic() > until:
            return


def _first_change(honest: Arrays, wrong: Arrays) -> str | None:
    """The first stage in which a mistake shows; None where it changes nothing."""
    for name in STAGES:
        one, other = honest[name], wrong[name]
        if one.shape != other.shape:
            return name
        size = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
        if np.max(distance(one, other, name), initial=0.0) > 1e-6 * size:
            return name
    return None
