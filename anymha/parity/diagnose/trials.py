"""`Trials`: mistakes tried in a recipe, and weighed against what an implementation reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from anymha.parity.diagnose.around import around
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.evidence import FEW, Evidence, length
from anymha.parity.diagnose.head_maps import head_maps
from anymha.parity.diagnose.measured import Family, fitted
from anymha.parity.diagnose.mistakes import Mistake, catalogue, other_options
from anymha.parity.diagnose.scaled_stages import scaled_stages
from anymha.parity.diagnose.scaled_weights import scaled_weights
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.structure import distance
from anymha.parity.stages.trace import STAGES, Trace

TURN = 24
"""Of a mistake that is tried alone so many variants are computed, then some of the next one."""

SMALL_CASE = 1 << 13
"""Where there are no more logits and weights, the recipes with one mistake are kept."""

EXPLAINED = 0.5
"""The greatest part of the differences that may be left where a cause explains them."""

SAME = 1e-9
"""Of differences, as parts of the size of all of a stage."""

SAMPLE = 1 << 11
"""Of how many differences the effects of two mistakes are added."""


@dataclass(frozen=True)
class Trial:
    """A recipe with a mistake or two, and how well it explains what is reported."""

    causes: tuple[Cause, ...]
    recipe: Recipe
    errors: dict[str, float]  # by observed stage, over what rounding explains
    left: float  # the distance that is left, as a share of that of the right recipe
    apart: np.ndarray  # a sample of the differences that are left
    # 0: a usual mistake; 1: its number is measured; 2: one of many variants. What fits by a lower
    # rank needs no explanation by a higher one.
    rank: int = 0
    # (B, T): the greatest distance of each column's output, as a part of the greatest number; None
    # where it was not computed
    columns: np.ndarray | None = None
    # The recipe with what was computed of it, where columns, and of what is far off errors and
    # differences, are left to `Trials.completed`
    begun: Recipe | None = None

    @property
    def worst(self) -> float:
        """The greatest error, as a share of what rounding explains."""
        return max(self.errors.values())

    @property
    def explains(self) -> bool:
        """Whether rounding explains all that is left."""
        return self.left <= EXPLAINED and self.worst <= 1

    def prefix(self) -> int:
        """How many of the reported stages fit, from the first on."""
        return stages_that_fit(self.errors)


class Trials:
    """Tries mistakes in a recipe.

    Results are the trace's stages by name; `reference` is the trace of the reference, where they
    are a candidate's.
    """

    def __init__(
        self, recipe: Recipe, trace: Trace, reported: Arrays, reference: Trace | None = None
    ) -> None:
        self.recipe, self.trace, self.reference = recipe, trace, reference
        self.reported, self.exact = reported, recipe.stages
        self.evidence = Evidence(trace, reported, reference)

    def reached(self, recipe: Recipe) -> int:
        """How many of the reported stages a recipe gives, from the first on."""
        return stages_that_fit(self.evidence.errors(recipe))

    def fits(self) -> bool:
        """Whether the recipe itself gives the reported results."""
        return max(self.evidence.errors(self.recipe).values()) <= 1

    @cached_property
    def before(self) -> float:
        """The distance of the right recipe from what is reported."""
        return self.evidence.distance(self.recipe) or 1.0

    def tried(
        self, recipe: Recipe, skip: str | None = None,
        keys: Collection[tuple[str, str]] | None = None, alone: bool = False,
        measured: Collection[str] | None = None,
    ) -> Iterator[Trial | None]:  # fmt: skip
        """Each mistake in a recipe but those of one name: those tried `alone`, or the rest.

        None stands for one that is as another, is none, or explains nothing beside another. With
        `keys` only those of these names and details; with none those around the output alone.
        """
        for mistake, detail, wrong in self.variants(recipe, skip, alone, keys):
            yield self._judged(recipe, mistake, detail, wrong)
        if alone:
            for causes, wrong in scaled_weights(recipe, self.reported):
                yield self.weighed(recipe, causes, wrong, 1)
        if alone or keys:
            return
        evidence = self._up_to_the_first_wrong(recipe)
        before = evidence.distance(recipe)
        names = {one.name for one in catalogue(recipe)} if measured is None else {*measured}
        for at, mistake in enumerate(catalogue(recipe) if names else ()):
            wanted = mistake.name in names - {skip}
            for family in self._families(recipe, mistake, at) if wanted else ():
                found = fitted(family, evidence, before)
                if found is not None:
                    yield self._judged(recipe, mistake, *found, rank=1)
        ways = around, head_maps, scaled_stages
        sums = itertools.chain.from_iterable(way(recipe, self.reported) for way in ways)
        for causes, wrong in sums:
            if causes[0].name != skip:
                yield self.weighed(recipe, causes, wrong, 1)

    def _families(self, recipe: Recipe, mistake: Mistake, at: int) -> Iterable[Family]:
        """The families of a mistake, `at` in the catalogue; kept, as `variants` are."""
        if not self._is_small(recipe):
            return mistake.families(recipe)
        place = "families", at
        if place not in recipe.computed:
            recipe.computed[place] = [one.kept() for one in mistake.families(recipe)]
        return recipe.computed[place]

    def _is_small(self, recipe: Recipe) -> bool:
        """Whether what is made of a recipe is kept for other evidence."""
        return recipe is self.recipe and self._small

    @cached_property
    def _small(self) -> bool:
        weights = self.recipe.weights.values()
        return self.exact["logits"].size + sum(w.size for w in weights) <= SMALL_CASE

    def _up_to_the_first_wrong(self, recipe: Recipe) -> Evidence:
        """The evidence by which numbers are measured: what follows may have other mistakes too."""
        if len(self.reported) <= FEW:
            return self.evidence
        errors = self.evidence.errors(recipe)
        names = list(errors)[: stages_that_fit(errors) + 1]
        reported = {name: self.reported[name] for name in names}
        return Evidence(self.trace, reported, self.reference)

    def _judged(
        self, recipe: Recipe, mistake: Mistake, detail: str, wrong: Recipe, rank: int = 0
    ) -> Trial | None:
        def causes(wrong: Recipe) -> tuple[Cause, ...]:
            if "changes" not in wrong.computed:
                wrong.computed["changes"] = first_change(recipe, wrong)
            stage = wrong.computed["changes"]
            return () if stage is None else (Cause(mistake.name, detail, stage, mistake.fix),)

        return self.weighed(recipe, causes, wrong, max(rank, 2 * mistake.alone))

    def weighed(
        self, recipe: Recipe, causes: tuple[Cause, ...] | Callable[[Recipe], tuple[Cause, ...]],
        wrong: Recipe, rank: int, whole: bool = False,
    ) -> Trial | None:  # fmt: skip
        """How well a recipe explains the evidence; None where it is as another, or is none.

        Where many stages are reported, one that comes no further than `recipe` is computed up to
        there alone, but for `whole`. Of fewer, one that is far off is computed no further, where
        `completed` can do it.
        """
        several, many = len(self.reported) > 1, len(self.reported) > FEW
        alone = recipe is self.recipe
        beside = not alone and not several
        begun = wrong if alone and self._small and not whole else None
        with np.errstate(all="ignore"):
            try:
                if beside and self.evidence.distance(wrong) > EXPLAINED * self.before:
                    return None
                found = causes(wrong) if callable(causes) else causes
                if not found:
                    return None
                own, left, apart = dict.fromkeys(self.evidence.names, np.inf), np.inf, np.zeros(0)
                ties = wrong.computed.get("ties")
                hasty = begun is not None and several and not many and not ties
                if hasty and self.evidence.is_far(wrong, recipe):
                    return Trial(found, wrong.alone(), own, left, apart, rank, begun=begun)
                if several:
                    own = self.evidence.first_errors(wrong, recipe)
                if not many or whole or stages_that_fit(own) > self.reached(recipe):
                    apart = self.evidence.differences(wrong)
                    left = length(apart) / self.before
                if not several and left <= EXPLAINED:
                    own = self.evidence.first_errors(wrong, recipe)
                if ties and not many and max(own.values()) > 1 and left <= EXPLAINED:
                    wrong = ties(self.evidence.distance)
                    apart = self.evidence.differences(wrong)
                    left = length(apart) / self.before
                    own = self.evidence.first_errors(wrong, recipe)
            except (ValueError, IndexError):
                return None  # its arrays do not fit to those of the mistake before
            ask = alone and begun is None and left < np.inf
            columns = self.evidence.columns(wrong) if ask else None
        begun = begun and wrong
        return Trial(found, wrong.alone(), own, left, sample(apart), rank, columns, begun)

    def completed(self, tried: Iterable[Trial]) -> list[Trial]:
        """With all that was not computed of each."""
        done = (
            one if one.begun is None else
            replace(one, columns=self.evidence.columns(one.begun), begun=None)
            if one.left < np.inf else
            self.weighed(self.recipe, one.causes, one.begun, one.rank, whole=True)
            for one in tried
        )  # fmt: skip
        return [*filter(None, done)]

    def whole(self, tried: Iterable[Trial]) -> list[Trial]:
        """With what each leaves of all stages."""
        again = (
            one if one.left < np.inf else
            self.weighed(self.recipe, one.causes, one.recipe, one.rank, whole=True)
            for one in tried
        )  # fmt: skip
        return [*filter(None, again)]

    def variants(
        self, recipe: Recipe, skip: str | None = None, alone: bool = False,
        keys: Collection[tuple[str, str]] | None = None,
    ) -> Iterator[tuple[Mistake, str, Recipe]]:  # fmt: skip
        """Each mistake with its detail and the recipe that has it, but those of one name."""
        every = () if alone else other_options(recipe, self.trace.config, self.trace.weights)
        known = _of_catalogue(recipe, alone, keys)
        if self._is_small(recipe) and keys is None:
            # Made once: the recipes know what was computed of them for other evidence.
            place = "mistakes", alone
            known = recipe.computed[place] = recipe.computed.get(place) or list(known)
        for mistake, detail, wrong in itertools.chain(every, known):
            if mistake.name != skip and (keys is None or (mistake.name, detail) in keys):
                yield mistake, detail, wrong


def best(tried: Iterable[Trial]) -> Diagnosis | None:
    """The diagnosis of the mistakes that explain what is reported; None where none does."""
    good = [t for t in tried if t.explains]
    if not good:
        return None
    # The first in the catalogue's order, unless another leaves far less.
    least = min(t.left for t in good)
    near = [t for t in good if t.left <= max(2 * least, 0.1)]
    first, others = near[0], dict[tuple[str, ...], str]()
    own = tuple(cause.name for cause in first.causes)
    for one in near:
        # "another rotary" says less than "rotary of another base".
        less = one.causes[0].name.partition("another ")
        more = one is first or less[0] or less[2] not in str(first.causes[0])
        if one.rank <= first.rank and (more or one.causes[0].name == own[0]):
            names = tuple(cause.name for cause in one.causes)
            # Of a cache many forms give equal numbers; one is told.
            again = names == own and one is not first and first.recipe.decoded is None
            if again and _same_numbers(one, first):
                names = tuple(map(str, one.causes))
            others.setdefault(names, " and ".join(map(str, one.causes)))
    alternatives = tuple(itertools.islice(dict.fromkeys(others.values()), 1, 4))
    return Diagnosis(first.causes, first.worst, alternatives, first.recipe)


def _of_catalogue(
    recipe: Recipe, alone: bool, keys: Collection[tuple[str, str]] | None
) -> Iterator[tuple[Mistake, str, Recipe]]:
    """Each mistake with its detail and the recipe that has it; with `keys` no more than those.

    Those tried `alone` take turns, so that time that runs out leaves out none of them.
    """
    if alone and keys is None:
        rows = [(mistake, iter(mistake.variants(recipe))) for mistake in catalogue(recipe)
                if mistake.alone]  # fmt: skip
        while rows:
            going = []
            for mistake, variants in rows:
                some = list(itertools.islice(variants, TURN))
                yield from ((mistake, detail, wrong) for detail, wrong in some)
                going += [(mistake, variants)] * (len(some) == TURN)
            rows = going
        return
    for mistake in catalogue(recipe):
        wanted = {detail for name, detail in keys or () if name == mistake.name}
        if mistake.alone == alone and (keys is None or wanted):
            for detail, wrong in mistake.variants(recipe):
                if keys is None or detail in wanted:
                    yield mistake, detail, wrong
                    wanted.discard(detail)
                    if keys is not None and not wanted:
                        break


def _same_numbers(one: Trial, other: Trial) -> bool:
    """Whether two explanations differ by no more than float64 does."""
    if one.apart.shape != other.apart.shape:
        return False
    return bool(np.max(np.abs(one.apart - other.apart), initial=0.0) < SAME)


def sample(apart: np.ndarray) -> np.ndarray:
    """Some of the differences, the same for all recipes."""
    return apart[:: len(apart) // SAMPLE + 1].astype(np.float32)


def in_order(*causes: Cause) -> tuple[Cause, ...]:
    """The causes by the first stages that they change."""
    return tuple(sorted(causes, key=lambda cause: STAGES.index(cause.stage)))


def stages_that_fit(errors: dict[str, float]) -> int:
    """How many stages fit, from the first on."""
    wrong = (count for count, error in enumerate(errors.values()) if not error <= 1)
    return next(wrong, len(errors))


def in_time(tried: Iterable[Trial | None], seconds: float) -> Iterator[Trial]:
    """As many as that time allows."""
    until = Deadline(seconds)
    for one in tried:
        if one is not None:
            yield one
        if until.over:
            return


def first_change(right: Recipe, wrong: Recipe) -> str | None:
    """The first stage that a mistake changes, those after it not computed; None of none."""
    for name in STAGES:
        one, other = (recipe.until(name)[name] for recipe in (right, wrong))
        if one is other:
            continue
        if one.shape != other.shape:
            return name
        if ("peak", name) not in right.computed:
            finite = np.abs(one[np.isfinite(one)])
            right.computed["peak", name] = float(np.max(finite, initial=0.0))
        most = np.maximum.reduce(np.abs(one - other), None, initial=0.0)
        if not np.isfinite(most):
            most = np.max(distance(one, other, name), initial=0.0)
        if most > 1e-6 * right.computed["peak", name]:
            return name
    return None
