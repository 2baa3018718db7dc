"""`Search`: looks for the known mistake, or the two, that give a candidate's results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from anymha.parity.diagnose.attention_mistakes import PRECISIONS, precision
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.mistakes import Mistake, catalogue, other_options
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.limits import Tolerances, computed_dtype, error_shares
from anymha.parity.stages.stagewise import OBSERVED
from anymha.parity.stages.structure import distance, looks_like_rounding
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import STAGES, Trace

SECONDS = 10.0
"""How long pairs of mistakes are tried; single ones three times as long."""

LARGE = 1 << 17
"""Where there are more logits, one element of the batch is diagnosed."""

FEW = 3
"""Where a candidate reports more stages, mistakes are found one after another."""

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
        """How many of the reported stages fit, from the first on."""
        for count, error in enumerate(self.errors.values()):
            if not error <= 1:
                return count
        return len(self.errors)


class Search:
    """Looks for mistakes with which a recipe gives the reported results.

    Results are the trace's stages by name; `reference` is the trace of the reference, where they
    are a candidate's.
    """

    def __init__(
        self, recipe: Recipe, trace: Trace, reported: Arrays, reference: Trace | None = None
    ) -> None:
        self.recipe, self.trace, self.reference = recipe, trace, reference
        self.reported, self.exact = reported, recipe.stages

    def fits(self) -> bool:
        """Whether the recipe itself gives the reported results."""
        return max(self._errors(self.recipe).values()) <= 1

    def diagnose(self, pairs: bool = True) -> Diagnosis:
        """The mistakes that explain the reported results; one alone without `pairs`."""
        if self.trace.random:
            fix = "Two calls gave two results: switch the candidate to evaluation."
            return Diagnosis.certain("dropout left on", "dropped_probabilities", fix)
        if any(a.shape != self.exact.get(n, a).shape for n, a in self.reported.items()):
            return Diagnosis()
        if self.recipe.lengths[0] > 1 and self.exact["logits"].size > LARGE:
            return self._of_one_batch_element(pairs)
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
        if begun.explained or len(self.reported) > FEW:
            return begun
        return self._pairs(singles) or begun

    def _of_one_batch_element(self, pairs: bool) -> Diagnosis:
        """The diagnosis of the one batch element that differs most, to save time."""
        most = np.zeros(self.recipe.lengths[0])
        for name, got in self.reported.items():
            apart = distance(got, self.exact["probabilities" if name == "scores" else name], name)
            most = np.maximum(most, apart.reshape(len(apart), -1).max(1))
        at = int(np.argmax(most))
        reported = {name: array[at : at + 1] for name, array in self.reported.items()}
        one = Search(self.recipe.of_batch(at), self.trace, reported, self.reference).diagnose(pairs)
        whole = self.recipe
        for cause in one.causes:
            same = (w for m, d, w in self._variants(whole) if (m.name, d) == cause.key)
            whole = next(same, whole)
        return replace(one, recipe=None if one.recipe is None else whole)

    def _fitting(self, tried: Iterable[_Tried]) -> Diagnosis | None:
        good = [t for t in tried if t.worst <= 1]
        if not good:
            return None
        others = dict.fromkeys(str(t.cause) for t in good[1:] if t.cause.name != good[0].cause.name)
        return Diagnosis((good[0].cause,), good[0].worst, tuple(others), good[0].recipe)

    def _by_prefix(self, singles: list[_Tried]) -> Diagnosis:
        """One mistake after another: with each, more of the reported stages must fit."""
        causes: list[Cause] = []
        right = self._errors(self.recipe)
        reached = next((i for i, error in enumerate(right.values()) if not error <= 1), 0)
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
        expected = computed_dtype(self.reference or self.trace)
        mine = {n: float(np.max(a, initial=0.0)) for n, a in self._distances(self.exact).items()}
        if not looks_like_rounding(self.reported.get("output"), self.exact["output"]):
            return None
        right = self._errors(self.recipe)
        for dtype in PRECISIONS:
            if eps(dtype) <= eps(expected):
                continue
            [(_, rounded)] = precision(self.recipe, dtype)
            results = rounded.stages
            usual = {n: float(np.max(distance(a, self.exact[n], n))) for n, a in results.items()}
            usual["scores"] = usual["probabilities"]
            wrong = [name for name in mine if not right[name] <= 1]
            if all(mine[n] <= GREATER * usual[n] for n in mine) and any(
                mine[n] >= SMALLER * usual[n] for n in wrong
            ):
                stage = wrong[0] if len(self.reported) > 2 else "query"
                stage = "probabilities" if stage == "scores" else stage
                fix = (f"The reference computes in {expected}: cast weights and inputs, or switch "
                        "mixed precision and TF32 off.")  # fmt: skip
                return Cause(f"computed in {dtype}", "", stage, fix)
        return None

    def _distances(self, results: Arrays) -> dict[str, np.ndarray]:
        """The distances of the reported stages from a recipe's."""
        distances = {}
        for name in OBSERVED:
            if name in self.reported:
                exact, got = (
                    results["probabilities" if name == "scores" else name],
                    self.reported[name],
                )
                fits = got.shape == exact.shape
                distances[name] = distance(got, exact, name) if fits else np.full(1, np.inf)
        return distances

    def _tried(self, recipe: Recipe, skip: str | None = None) -> Iterator[_Tried]:
        for mistake, detail, wrong in self._variants(recipe, skip):
            with np.errstate(all="ignore"):
                stage = _first_change(recipe.stages, wrong.stages)
            if stage is not None:
                cause = Cause(mistake.name, detail, stage, mistake.fix)
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
                for detail, wrong in mistake.variants(recipe):
                    yield mistake, detail, wrong

    def _errors(self, recipe: Recipe, hasty: bool = False) -> dict[str, float]:
        """The errors of the reported stages, as shares of what rounding explains.

        In haste, a large error counts as infinite, without its limit.
        """
        results = recipe.stages
        distances = self._distances(results)
        far = FAR * eps(computed_dtype(self.trace)) * float(np.max(np.abs(results["output"])))
        if hasty and len(distances) <= FEW and np.any(distances.get("output", 0.0) > far):
            return dict.fromkeys(distances, np.inf)
        tolerances = Tolerances(recipe, self.reference)
        return {
            name: float(np.max(error_shares(apart, tolerances.of(name, self.trace)), initial=0.0))
            for name, apart in distances.items()
        }


def _in_time(tried: Iterable[_Tried], seconds: float) -> Iterator[_Tried]:
    """As many as that time allows."""
    until = time.monotonic() + seconds
    for one in tried:
        yield one
        if time.monotonic() > until:
            return


def _first_change(right: Arrays, wrong: Arrays) -> str | None:
    """The first stage that a mistake changes; None where it changes none."""
    for name in STAGES:
        one, other = right[name], wrong[name]
        if one.shape != other.shape:
            return name
        size = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
        if np.max(distance(one, other, name), initial=0.0) > 1e-6 * size:
            return name
    return None
