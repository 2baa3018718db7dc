"""`Search`: looks for the known mistake, or the two, that give a candidate's results."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from anymha.parity.diagnose.around import around
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.evidence import FEW, Evidence
from anymha.parity.diagnose.head_maps import head_maps
from anymha.parity.diagnose.measured import fitted
from anymha.parity.diagnose.measured_mask import measured_mask
from anymha.parity.diagnose.measured_positions import measured_positions
from anymha.parity.diagnose.mistakes import Mistake, catalogue, other_options
from anymha.parity.diagnose.mixed import OF_KEYS, groups, mixed
from anymha.parity.diagnose.own_weights import (
    FIX,
    one_weight,
    other_kernels,
    same_weights,
    with_own_weights,
)
from anymha.parity.diagnose.precision import (
    rounded_alone,
    rounded_cause,
    rounded_places,
)
from anymha.parity.diagnose.scaled_weights import scaled_weights
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.structure import distance, is_masked
from anymha.parity.stages.trace import STAGES, Trace

ALONE_SECONDS = 12.0
"""How long mistakes alone are computed, those with many variants included."""

TURN = 24
"""Of a mistake that is tried alone so many variants are computed, then some of the next one."""

PARTS_SECONDS = 3.0
"""How long mistakes in some calls, sequences or queries alone are computed."""

SAME_PART = 1e-3
"""Outputs that differ by no more than this part of the greatest number are alike in a group of
columns. Once a mistake is found, only those whose outputs are alike are tried too."""

PAIRS_SECONDS = 1.0
"""How long pairs of mistakes are computed."""

SMALL_CASE = 1 << 13
"""Where there are no more logits and weights, the recipes with one mistake are kept."""

LARGE = 1 << 17
"""Where there are more logits, one element of the batch is diagnosed."""

EXPLAINED = 0.5
"""The greatest part of the differences that may be left where a cause explains them."""

SMALL = 0.02
"""Relative differences up to this are small."""

FIRST = 40
"""How many of the single mistakes are tried together with every other."""

TRANCHES = (0, 200), (200, 1200)
"""Which of the pairs that promise to leave least are tried first, and which then."""

USUAL = (
    "inverted mask", "ignored mask", "additive mask", "transposed mask", "mask applied wrongly",
    "causal mask ignored", "causal mask at the other corner", "causal mask off by one",
    "causal mask not asked for", "query offset ignored", "window ignored", "window off by one",
    "wrong attention bias", "wrong scale", "softmax over another axis", "no softmax",
    "grouped heads tiled", "inputs exchanged", "heads merged wrongly", "heads split wrongly",
    "transposed kernel", "packed weights in another order", "packed weights split wrongly",
    "heads interleaved", "missing bias", "output kernel interleaved",
    "weights of another projection", "rotary of another base", "rotary layout swapped",
    "rotary positions, by halves", "rotary positions, by pairs", "rotary of queries or keys alone",
)  # fmt: skip
"""Mistakes of which every two are tried together, those of options that are left out too."""

FORMS = 4
"""How many forms of each of these, the usual ones."""

NEAREST = 6
"""Beside how many of the nearest mistakes every other is tried between these."""

MEASURED = 8
"""Beside how many mistakes those of `NUMBERS` are measured again."""

NUMBERS = ("wrong scale", "wrong attention bias", "mask applied wrongly")
"""The mistakes with a number that come with another."""

SAME = 1e-9
"""Of differences, as parts of the size of all of a stage."""

SAMPLE = 1 << 11
"""Of how many differences the effects of two mistakes are added."""

OF_CALLS = re.compile("calls|(first|last|second|each) call")
"""What mistakes say that are in some calls themselves."""

LEFT_OUT = "left out"
"""How the names of mistakes end where an option is not there."""

EMPTY_ROWS = "fully masked rows give NaN"
"""The mistake whose places of NaN are known: rows that see nothing."""

EXACT = 1e-3
"""What two measured numbers may leave of the differences."""


@dataclass(frozen=True)
class _Tried:
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

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def explains(self) -> bool:
        return self.worst <= 1 and self.left <= EXPLAINED

    def prefix(self) -> int:
        """How many of the reported stages fit, from the first on."""
        return _reached(self.errors)


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
        self.evidence = Evidence(trace, reported, reference)

    def _reached(self, recipe: Recipe) -> int:
        """How many of the reported stages a recipe gives, from the first on."""
        return _reached(self.evidence.errors(recipe))

    def fits(self) -> bool:
        """Whether the recipe itself gives the reported results."""
        return max(self.evidence.errors(self.recipe).values()) <= 1

    def _without_holes_fits(self) -> bool:
        """Whether NaN and infinity in place of numbers are all that is wrong.

        Any mistake that gives the same places NaN would then explain it.
        """
        reported = dict(self.reported)
        for name, got in reported.items():
            exact = self.exact["probabilities" if name == "scores" else name]
            if got.shape == exact.shape and not np.all(np.isfinite(got)):
                empty = np.isfinite(exact) & ~np.isfinite(got)
                reported[name] = np.where(empty & ~is_masked(got), exact, got)
        if all(array is self.reported[name] for name, array in reported.items()):
            return False
        evidence = Evidence(self.trace, reported, self.reference)
        return max(evidence.errors(self.recipe).values()) <= 1

    @cached_property
    def before(self) -> float:
        """The distance of the right recipe from what is reported."""
        return self.evidence.distance(self.recipe) or 1.0

    @cached_property
    def singles(self) -> list[_Tried]:
        """Each known mistake alone; those with many variants where no other explains it."""
        tried = list(_in_time(self._tried(self.recipe), ALONE_SECONDS / 2))
        reached = self._reached(self.recipe)
        nearer = len(self.reported) > FEW and any(one.prefix() > reached for one in tried)
        if not nearer and not any(one.explains for one in tried):
            alone = _in_time(self._tried(self.recipe, alone=True), ALONE_SECONDS / 2)
            names = [mistake.name for mistake in catalogue(self.recipe) if mistake.alone]
            places = {name: at for at, name in reversed([*enumerate(names)])}
            # What is measured stands behind the catalogue's variants.
            tried += sorted(alone, key=lambda one: (
                one.rank < 2, places.get(one.causes[0].name, len(names))
            ))  # fmt: skip
        return tried

    def diagnose(self, pairs: bool = True) -> Diagnosis:
        """The mistakes that explain the reported results; one alone without `pairs`."""
        if self.trace.random:
            fix = "Two calls gave two results: switch the candidate to evaluation."
            return Diagnosis.certain("dropout left on", "dropped_probabilities", fix)
        output = self.reported.get("output")
        if output is not None and output.shape != self.exact["output"].shape:
            return Diagnosis()
        if self.fits():
            return Diagnosis()
        if self._without_holes_fits():
            known = filter(None, self._tried(self.recipe, keys={(EMPTY_ROWS, "")}))
            return self._fitting(known) or Diagnosis()
        if self.recipe.lengths[0] > 1 and self.exact["logits"].size > LARGE:
            return self._of_one_batch_element(pairs)
        if self._is_constant():
            usual = self._fitting(filter(None, self._tried(self.recipe)))
            fix = "Return what the attention computes: all positions have one output here."
            name = "the output does not depend on the inputs"
            return usual or Diagnosis.certain(name, "output", fix)
        singles = self.singles
        best = self._fitting(singles)
        if best is not None:
            return best
        with np.errstate(all="ignore"):
            places = rounded_places(self.recipe, self.evidence)
            if places is not None:
                return Diagnosis((places[0],), *places[1:])
            rounded = rounded_cause(self.recipe, self.evidence)
        if rounded is not None:
            return Diagnosis((rounded[0],), rounded[1], (), rounded[2])
        own = self._of_weights()
        if own is not None or not pairs:
            return own or Diagnosis()
        found = self._in_a_part(singles)
        if found is not None:
            return found
        for solved in (
            measured_positions(self.recipe, self.evidence),
            measured_mask(self.recipe, self.reported),
        ):
            if solved is not None and max(self.evidence.errors(solved[1]).values()) <= 1:
                return Diagnosis((solved[0],), 0.0, (), solved[1])
        begun = self._by_prefix(singles)
        other = None if begun.explained else other_kernels(self.recipe, self.evidence)
        if other is not None:
            return self._weights_cause("other weights", *other)
        if begun.explained or (begun.causes and len(self.reported) > FEW):
            return begun
        found, hurried = self._pairs(singles)
        if not (found and found.causes):
            found, also = self._usual_pairs(singles)
            hurried |= also
        found = found or begun
        if found.causes:
            return found
        return replace(found, small=self.before < SMALL, hurried=hurried)

    def _is_constant(self) -> bool:
        """Whether the output alone is told, and does not depend on the inputs.

        In one sequence all positions may have one mean of the values; so there it must be what an
        output of no values is, zero or the bias.
        """
        output = self.reported.get("output")
        if output is None or len(self.reported) > 1 or output.ndim != 3:
            return False
        rows = output.reshape(-1, output.shape[-1])
        if len(rows) < 2 or not np.all(rows == rows[0]):
            return False
        several = any(np.any(x != x[:1]) for x in self.recipe.inputs.values())
        bias = self.recipe.weights.get("output.bias", np.zeros(1))
        return several or not rows.any() or bool(np.allclose(rows[0], bias, 1e-6, 0))

    def _in_a_part(self, singles: list[_Tried]) -> Diagnosis | None:
        """One mistake in some calls alone, in some sequences, or from some query on."""
        fitting = self.evidence.fitting(self.recipe)
        # A group that is all that is wrong comes first.
        parts = sorted(groups(self.recipe, fitting), key=lambda one: np.any(one.columns == fitting))
        if parts and self.before < SMALL:
            rounded = (
                self._weighed(self.recipe, (cause,), wrong, 1)
                for cause, wrong in rounded_alone(self.recipe, self.evidence)
            )
            singles = [*singles, *filter(None, rounded)]
        # Those whose own results are those of the group come first: all that change no keys are
        # found so, and others change these. Of them what is left out is usual.
        order = [
            (self._apart_in(one, group.columns), number, at, one)
            for number, group in enumerate(parts) for at, one in enumerate(singles)
            if len(one.causes) == 1 and not OF_CALLS.search(one.causes[0].detail)
        ]  # fmt: skip
        order = [
            each for each in order
            if each[0] <= SAME_PART or each[3].causes[0].stage in ("query", *OF_KEYS)
        ]  # fmt: skip
        order.sort(key=lambda each: (
            each[0] > SAME_PART, not each[3].causes[0].name.endswith(LEFT_OUT),
            each[0] if each[0] <= SAME_PART else each[1], each[0],
        ))  # fmt: skip
        found: list[tuple[int, _Tried]] = []
        until = time.thread_time() + PARTS_SECONDS
        for apart, number, at, one in order:
            if time.thread_time() > until or (found and apart > SAME_PART):
                break
            (cause,), group = one.causes, parts[number]
            detail = ", ".join(filter(None, (cause.detail, group.words)))
            wrong = mixed(self.recipe, one.recipe, group)
            tried = self._weighed(
                self.recipe, (replace(cause, detail=detail),), wrong, one.rank
            )  # fmt: skip
            if tried is not None and tried.explains:
                found.append((at, tried))
        # Of those that fit the usual ones in the catalogue's order.
        found.sort(key=lambda one: (one[1].rank, one[0]))
        return self._fitting(one for _, one in found)

    def _apart_in(self, one: _Tried, columns: np.ndarray) -> float:
        """How far a mistake's own output is from the reported one in a group of columns."""
        if one.columns is None:
            return np.inf
        where = np.broadcast_to(columns, one.columns.shape)
        return float(np.max(one.columns, where=where, initial=0.0))

    def _of_weights(self) -> Diagnosis | None:
        """Other weights that the candidate tells, and one mistake more; or one other weight."""
        told = with_own_weights(self.recipe, self.trace)
        if told is None:
            one = one_weight(self.recipe, self.evidence, self.before)
            return one and self._weights_cause("one weight differs", *one)
        every = itertools.chain(
            self._variants(self.recipe), self._variants(self.recipe, alone=True)
        )
        known = ((m.name, d) for m, d, w in every if same_weights(w.weights, told[1].weights))
        name, detail = next(known, ("other weights", told[0]))
        first = self._weights_cause(name, detail, told[1])
        rest = Search(told[1], self.trace, self.reported, self.reference)
        if rest.fits():
            return first
        more = rest.diagnose(pairs=False)
        if not more.explained:
            return None
        return replace(more, causes=_in_order(*first.causes, *more.causes))

    def _weights_cause(self, name: str, detail: str, recipe: Recipe) -> Diagnosis:
        stage = _first_change(self.recipe, recipe) or "output"
        return Diagnosis((Cause(name, detail, stage, FIX),), 0.0, (), recipe)

    def _of_one_batch_element(self, pairs: bool) -> Diagnosis:
        """The diagnosis of the one batch element that differs most, to save time."""
        most = np.zeros(self.recipe.lengths[0])
        for name, got in self.reported.items():
            apart = distance(got, self.exact["probabilities" if name == "scores" else name], name)
            most = np.maximum(most, apart.reshape(len(apart), -1).max(1))
        at = int(np.argmax(most))
        reported = {name: array[at : at + 1] for name, array in self.reported.items()}
        settled = {name: array[at : at + 1] for name, array in self.trace.settled.items()}
        trace = replace(self.trace, settled=settled)
        one = Search(self.recipe.of_batch(at), trace, reported, self.reference).diagnose(pairs)
        whole = self.recipe
        for cause in one.causes:
            every = itertools.chain(self._variants(whole), self._variants(whole, alone=True))
            whole = next((w for m, d, w in every if (m.name, d) == cause.key), whole)
        return replace(one, recipe=None if one.recipe is None else whole)

    def _fitting(self, tried: Iterable[_Tried]) -> Diagnosis | None:
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
                again = names == own and one is not first and self.recipe.decoded is None
                if again and _same_numbers(one, first):
                    names = tuple(map(str, one.causes))
                others.setdefault(names, " and ".join(map(str, one.causes)))
        alternatives = tuple(itertools.islice(dict.fromkeys(others.values()), 1, 4))
        return Diagnosis(first.causes, first.worst, alternatives, first.recipe)

    def _by_prefix(self, singles: list[_Tried]) -> Diagnosis:
        """One mistake after another: with each, more of the reported stages must fit."""
        causes: list[Cause] = []
        reached = self._reached(self.recipe)
        tried = singles
        while tried:
            named = {cause.name for cause in causes}
            tried = [one for one in tried if one.causes[0].name not in named]
            best = max(tried, key=_Tried.prefix, default=None)
            if best is None or best.prefix() <= reached:
                break
            causes += best.causes
            reached = best.prefix()
            if best.worst <= 1:
                return Diagnosis(_in_order(*causes), best.worst, (), best.recipe)
            tried = list(filter(None, self._tried(best.recipe)))
            if max(map(_Tried.prefix, tried), default=0) <= reached:
                tried += filter(None, self._tried(best.recipe, alone=True))
        return Diagnosis(_in_order(*causes), np.inf)

    def _pairs(self, singles: list[_Tried]) -> tuple[Diagnosis | None, bool]:
        """Two mistakes, those that promise most first; and whether the time ran out."""
        if self.evidence.errors(self.recipe).get("output", np.inf) <= 1:
            return None, False  # no two mistakes give a right output
        until = time.thread_time() + PAIRS_SECONDS
        singles = self._whole(singles)
        # Of those that give the same numbers the usual one.
        nearest = sorted(singles, key=lambda one: (round(one.left, 6), one.rank))
        nearest = [*nearest[:FIRST], *(one for one in nearest[FIRST:] if one.rank < 2)]
        # Sums around the output and maps of heads are found by themselves beside each.
        none, rest = set[tuple[str, str]](), ((one, None) for one in nearest)
        first, more = self._promising(singles)
        sums = ((one, none) for one in nearest[NEAREST : 2 * FIRST])
        every = itertools.chain(first, itertools.islice(rest, NEAREST), sums, more, rest)
        measuring = {id(one) for one in nearest[:MEASURED]}
        for one, keys in every:
            measured = NUMBERS if not keys and id(one) in measuring else ()
            for other in self._tried(one.recipe, one.causes[0].name, keys, measured=measured):
                # Two measured numbers may fit what is no attention at all.
                certain = other and (not one.rank == other.rank == 1 or other.left <= EXACT)
                if other and other.explains and certain:
                    usual = self._tried(one.recipe, one.causes[0].name, measured=())
                    other = next((u for u in usual if u and u.explains and not u.rank), other)
                    both = _in_order(*one.causes, *other.causes)
                    return Diagnosis(both, other.worst, (), other.recipe), False
                if time.thread_time() > until:
                    return None, True
        return None, False

    def _usual_pairs(self, singles: list[_Tried]) -> tuple[Diagnosis | None, bool]:
        """Any two usual mistakes, however little each alone does; and whether time ran out."""
        if self.evidence.errors(self.recipe).get("output", np.inf) <= 1:
            return None, False
        until = time.thread_time() + PAIRS_SECONDS
        counts: dict[str, int] = {}
        usual = list[_Tried]()
        for one in singles:
            name = one.causes[0].name
            if one.rank == 0 and (name in USUAL or name.endswith(LEFT_OUT)):
                counts[name] = counts.get(name, 0) + 1
                usual += [one] * (counts[name] <= FORMS)
        # With those first that change an early stage, whatever is before the other is known.
        usual.sort(key=lambda one: STAGES.index(one.causes[0].stage))
        for at, one in enumerate(usual):
            keys = {other.causes[0].key for other in usual[at + 1 :]}
            for both in self._tried(one.recipe, None, keys) if keys else ():
                if both is not None and both.explains:
                    return Diagnosis(_in_order(*one.causes, *both.causes), both.worst, (),
                                     both.recipe), False  # fmt: skip
                if time.thread_time() > until:
                    return None, True
        return None, False

    def _promising(
        self, singles: list[_Tried]
    ) -> Iterator[Iterator[tuple[_Tried, set[tuple[str, str]]]]]:
        """Mistakes with those to be tried beside each: pairs along whose effects most lies."""
        seconds = [at for at, one in enumerate(singles) if one.rank == 0]
        if not seconds:
            return (iter(()) for _ in TRANCHES)
        right = _sample(self.evidence.differences(self.recipe))
        effects = np.stack([one.apart for one in singles]) - right
        one = np.sum(effects * effects, axis=1)
        other = one[seconds]
        both, along = effects @ effects[seconds].T, effects @ right
        one, also = one[:, None], along[seconds]
        part = along[:, None] ** 2 * other - 2 * np.outer(along, also) * both + also**2 * one
        part = part / np.maximum(one * other - both**2, 1e-6 * one * other + 1e-30)
        part = np.round(part / (float(right @ right) or 1.0), 6).reshape(-1)
        part = np.where(np.isnan(part), -np.inf, part)
        most = min(TRANCHES[-1][1], part.size)
        best = np.flatnonzero(part >= np.partition(part, -most)[-most])
        best = best[np.argsort(-part[best], kind="stable")]  # the usual ones stand first

        def tranche(begin: int, end: int) -> Iterator[tuple[_Tried, set[tuple[str, str]]]]:
            together: dict[int, set[tuple[str, str]]] = {}
            for at in best[begin:end]:
                first, second = divmod(int(at), len(seconds))
                together.setdefault(first, set()).add(singles[seconds[second]].causes[0].key)
            return ((singles[first], keys) for first, keys in together.items())

        return (tranche(*counts) for counts in TRANCHES)

    def _tried(
        self,
        recipe: Recipe,
        skip: str | None = None,
        keys: Collection[tuple[str, str]] | None = None,
        alone: bool = False,
        measured: Collection[str] | None = None,
    ) -> Iterator[_Tried | None]:
        """Each mistake in a recipe but those of one name: those tried `alone`, or the rest.

        None stands for one that is as another, is none, or explains nothing beside another. With
        `keys` only those of these names and details; with none those around the output alone.
        """
        for mistake, detail, wrong in self._variants(recipe, skip, alone, keys):
            yield self._judged(recipe, mistake, detail, wrong)
        if alone:
            for causes, wrong in scaled_weights(recipe, self.reported):
                yield self._weighed(recipe, causes, wrong, 1)
        if alone or keys:
            return
        evidence = self._up_to_the_first_wrong(recipe)
        before = evidence.distance(recipe)
        names = {one.name for one in catalogue(recipe)} if measured is None else {*measured}
        for mistake in catalogue(recipe) if names else ():
            for family in mistake.families(recipe) if mistake.name in names - {skip} else ():
                found = fitted(family, evidence, before)
                if found is not None:
                    yield self._judged(recipe, mistake, *found, rank=1)
        sums = itertools.chain(around(recipe, self.reported), head_maps(recipe, self.reported))
        for causes, wrong in sums:
            if causes[0].name != skip:
                yield self._weighed(recipe, causes, wrong, 1)

    def _up_to_the_first_wrong(self, recipe: Recipe) -> Evidence:
        """The evidence by which numbers are measured: what follows may have other mistakes too."""
        if len(self.reported) <= FEW:
            return self.evidence
        errors = self.evidence.errors(recipe)
        names = list(errors)[: _reached(errors) + 1]
        reported = {name: self.reported[name] for name in names}
        return Evidence(self.trace, reported, self.reference)

    def _judged(
        self, recipe: Recipe, mistake: Mistake, detail: str, wrong: Recipe, rank: int = 0
    ) -> _Tried | None:
        def causes(wrong: Recipe) -> tuple[Cause, ...]:
            stage = _first_change(recipe, wrong)
            return () if stage is None else (Cause(mistake.name, detail, stage, mistake.fix),)

        return self._weighed(recipe, causes, wrong, max(rank, 2 * mistake.alone))

    def _weighed(
        self, recipe: Recipe, causes: tuple[Cause, ...] | Callable[[Recipe], tuple[Cause, ...]],
        wrong: Recipe, rank: int, whole: bool = False,
    ) -> _Tried | None:  # fmt: skip
        """How well a recipe explains the evidence; None where it is as another, or is none.

        Where many stages are reported, one that comes no further than `recipe` is computed up to
        there alone, but for `whole`.
        """
        several, many = len(self.reported) > 1, len(self.reported) > FEW
        with np.errstate(all="ignore"):
            try:
                beside = not several and recipe is not self.recipe
                if beside and self.evidence.distance(wrong) > EXPLAINED * self.before:
                    return None
                found = causes(wrong) if callable(causes) else causes
                if not found:
                    return None
                own, left, apart = dict.fromkeys(self.evidence.names, np.inf), np.inf, np.zeros(0)
                if many:
                    own = self.evidence.first_errors(wrong, recipe)
                if not many or whole or _reached(own) > self._reached(recipe):
                    apart = self.evidence.differences(wrong)
                    left = float(np.linalg.norm(apart)) / self.before
                if not many and (several or left <= EXPLAINED):
                    own = self.evidence.first_errors(wrong, recipe)
                ties = wrong.computed.get("ties")
                if ties and not many and max(own.values()) > 1 and left <= EXPLAINED:
                    wrong = ties(self.evidence.distance)
                    apart = self.evidence.differences(wrong)
                    left = float(np.linalg.norm(apart)) / self.before
                    own = self.evidence.first_errors(wrong, recipe)
            except (ValueError, IndexError):
                return None  # its arrays do not fit to those of the mistake before
            columns = self.evidence.columns(wrong) if left < np.inf else None
        return _Tried(found, replace(wrong), own, left, _sample(apart), rank, columns)

    def _whole(self, tried: Iterable[_Tried]) -> list[_Tried]:
        """With what each leaves of all stages."""
        again = (
            one if one.left < np.inf else
            self._weighed(self.recipe, one.causes, one.recipe, one.rank, whole=True)
            for one in tried
        )  # fmt: skip
        return [*filter(None, again)]

    def _variants(
        self, recipe: Recipe, skip: str | None = None, alone: bool = False,
        keys: Collection[tuple[str, str]] | None = None,
    ) -> Iterator[tuple[Mistake, str, Recipe]]:  # fmt: skip
        """Each mistake with its detail and the recipe that has it, but those of one name."""
        every = () if alone else other_options(recipe, self.trace.config, self.trace.weights)
        numbers = self.exact["logits"].size + sum(w.size for w in recipe.weights.values())
        small = recipe is self.recipe and numbers <= SMALL_CASE
        known = _of_catalogue(recipe, alone, keys)
        if small and keys is None:
            # Made once: the recipes know what was computed of them for other evidence.
            place = "mistakes", alone
            known = recipe.computed[place] = recipe.computed.get(place) or list(known)
        for mistake, detail, wrong in itertools.chain(every, known):
            if mistake.name != skip and (keys is None or (mistake.name, detail) in keys):
                yield mistake, detail, wrong


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


def _same_numbers(one: _Tried, other: _Tried) -> bool:
    """Whether two explanations differ by no more than float64 does."""
    if one.apart.shape != other.apart.shape:
        return False
    return bool(np.max(np.abs(one.apart - other.apart), initial=0.0) < SAME)


def _sample(apart: np.ndarray) -> np.ndarray:
    """Some of the differences, the same for all recipes."""
    return apart[:: len(apart) // SAMPLE + 1].astype(np.float32)


def _in_order(*causes: Cause) -> tuple[Cause, ...]:
    """The causes by the first stages that they change."""
    return tuple(sorted(causes, key=lambda cause: STAGES.index(cause.stage)))


def _reached(errors: dict[str, float]) -> int:
    """How many stages fit, from the first on."""
    wrong = (count for count, error in enumerate(errors.values()) if not error <= 1)
    return next(wrong, len(errors))


def _in_time(tried: Iterable[_Tried | None], seconds: float) -> Iterator[_Tried]:
    """As many as that time allows."""
    until = time.thread_time() + seconds
    for one in tried:
        if one is not None:
            yield one
        if time.thread_time() > until:
            return


def _first_change(right: Recipe, wrong: Recipe) -> str | None:
    """The first stage that a mistake changes, those behind it not computed; None of none."""
    for name in STAGES:
        one, other = (recipe.until(name)[name] for recipe in (right, wrong))
        if one is other:
            continue
        if one.shape != other.shape:
            return name
        if ("peak", name) not in right.computed:
            finite = np.abs(one[np.isfinite(one)])
            right.computed["peak", name] = float(np.max(finite, initial=0.0))
        most = np.max(np.abs(one - other), initial=0.0)
        if not np.isfinite(most):
            most = np.max(distance(one, other, name), initial=0.0)
        if most > 1e-6 * right.computed["peak", name]:
            return name
    return None
