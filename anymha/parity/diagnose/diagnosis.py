"""`Search`: looks for the known mistake, or the two, that give a candidate's results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from anymha.parity.diagnose.assumed_calls import as_decoded
from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.evidence import FEW, Evidence
from anymha.parity.diagnose.in_part import SMALL, in_a_part
from anymha.parity.diagnose.measured_dropout import measured_dropout
from anymha.parity.diagnose.measured_logits import measured_logits
from anymha.parity.diagnose.measured_mask import measured_mask
from anymha.parity.diagnose.measured_positions import measured_positions
from anymha.parity.diagnose.measured_weights import measured_weights
from anymha.parity.diagnose.mistakes import catalogue
from anymha.parity.diagnose.own_weights import (
    FIX,
    one_weight,
    other_kernels,
    same_weights,
    with_own_weights,
)
from anymha.parity.diagnose.pairs import promising_pairs, usual_pairs
from anymha.parity.diagnose.precision import rounded_cause, rounded_places
from anymha.parity.diagnose.quantised_weights import quantised_kernels
from anymha.parity.diagnose.running_sums import rounded_sums
from anymha.parity.diagnose.trials import Trial, Trials, best, first_change, in_order, in_time
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.structure import distance, is_masked
from anymha.parity.stages.trace import STAGES

ALONE_SECONDS = 12.0
"""How long mistakes alone are computed, those with many variants included."""

PARTS_SECONDS = 3.0
"""How long mistakes in some calls, sequences or queries alone are computed."""

CALLS_SECONDS = 4.0
"""How long mistakes of decoding are computed where it is not told that a candidate decodes."""

PAIRS_SECONDS = 1.0
"""How long pairs of mistakes are computed."""

LARGE = 1 << 17
"""Where there are more logits, one element of the batch is diagnosed."""

EMPTY_ROWS = "fully masked rows give NaN"
"""The mistake whose places of NaN are known: rows that see nothing."""


class Search(Trials):
    """Looks for mistakes with which a recipe gives the reported results.

    Results are the trace's stages by name; `reference` is the trace of the reference, where they
    are a candidate's.
    """

    def diagnose(self, pairs: bool = True) -> Diagnosis:
        """The mistakes that explain the reported results; one alone without `pairs`.

        Each search ends it where it finds something, the surest and the quickest first.
        """
        searches: tuple[Callable[[], Diagnosis | None], ...] = (
            self._settled, self._of_holes, lambda: self._of_one_batch_element(pairs),
            self._of_a_constant, lambda: best(self.singles), self._of_roundings, self._of_weights,
        )  # fmt: skip
        if pairs:
            searches += (
                self._of_untold, self._in_a_part, self._solved, self._one_after_another,
                self._of_pairs,
            )  # fmt: skip
        return next(filter(None, (search() for search in searches)), Diagnosis())

    def _settled(self) -> Diagnosis | None:
        """What needs no search: nothing is wrong, or nothing can be compared."""
        if self.trace.random:
            fix = "Two calls gave two results: switch the candidate to evaluation."
            return Diagnosis.certain("dropout left on", "dropped_probabilities", fix)
        output = self.reported.get("output")
        if output is not None and output.shape != self.exact["output"].shape:
            return Diagnosis()
        return Diagnosis() if self.fits() else None

    def _of_holes(self) -> Diagnosis | None:
        """Where NaN and infinity are all that is wrong, the one mistake that has them."""
        if not self._without_holes_fits():
            return None
        return best(filter(None, self.tried(self.recipe, keys={(EMPTY_ROWS, "")}))) or Diagnosis()

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
    def singles(self) -> list[Trial]:
        """Each known mistake alone; those with many variants where no other explains it."""
        tried = list(in_time(self.tried(self.recipe), ALONE_SECONDS / 2))
        reached = self.reached(self.recipe)
        nearer = len(self.reported) > FEW and any(one.prefix() > reached for one in tried)
        if not nearer and not any(one.explains for one in tried):
            alone = in_time(self.tried(self.recipe, alone=True), ALONE_SECONDS / 2)
            names = [mistake.name for mistake in catalogue(self.recipe) if mistake.alone]
            places = {name: at for at, name in reversed([*enumerate(names)])}
            # What is measured stands after the catalogue's variants.
            tried += sorted(alone, key=lambda one: (
                one.rank < 2, places.get(one.causes[0].name, len(names))
            ))  # fmt: skip
        return tried

    @cached_property
    def _completed(self) -> list[Trial]:
        """The mistakes alone with all that each leaves."""
        return self.completed(self.singles)

    def _of_a_constant(self) -> Diagnosis | None:
        """Of an output that does not depend on the inputs, a usual mistake, or this."""
        if not self._is_constant():
            return None
        usual = best(filter(None, self.tried(self.recipe)))
        fix = "Return what the attention computes: all positions have one output here."
        name = "the output does not depend on the inputs"
        return usual or Diagnosis.certain(name, "output", fix)

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

    def _of_roundings(self) -> Diagnosis | None:
        """Steps that are computed in fewer bits."""
        with np.errstate(all="ignore"):
            places = rounded_places(self.recipe, self.evidence)
            if places is not None:
                return Diagnosis((places[0],), *places[1:])
            rounded = rounded_sums(self.recipe, self.evidence) or rounded_cause(
                self.recipe, self.evidence)  # fmt: skip
        return rounded and Diagnosis((rounded[0],), rounded[1], (), rounded[2])

    def _of_weights(self) -> Diagnosis | None:
        """Other weights that the candidate tells, and one mistake more; or one other weight."""
        told = with_own_weights(self.recipe, self.trace)
        if told is None:
            one = one_weight(self.recipe, self.evidence, self.before)
            return one and self._weights_cause("one weight differs", *one)
        every = itertools.chain(self.variants(self.recipe), self.variants(self.recipe, alone=True))
        known = ((m.name, d) for m, d, w in every if same_weights(w.weights, told[1].weights))
        own = {n: w for n, w in told[1].weights.items() if w is not self.recipe.weights[n]}
        levels = quantised_kernels(self.recipe.weights, own)
        name, detail = next(known, levels or ("other weights", told[0]))
        first = self._weights_cause(name, detail, told[1])
        rest = Search(told[1], self.trace, self.reported, self.reference)
        if rest.fits():
            return first
        more = rest.diagnose(pairs=False)
        if not more.explained:
            return None
        return replace(more, causes=in_order(*first.causes, *more.causes))

    def _weights_cause(self, name: str, detail: str, recipe: Recipe) -> Diagnosis:
        stage = first_change(self.recipe, recipe) or "output"
        return Diagnosis((Cause(name, detail, stage, FIX),), 0.0, (), recipe)

    def _of_one_batch_element(self, pairs: bool) -> Diagnosis | None:
        """Of a large batch, the diagnosis of the one element that differs most, to save time."""
        if self.recipe.lengths[0] == 1 or self.exact["logits"].size <= LARGE:
            return None
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
            every = itertools.chain(self.variants(whole), self.variants(whole, alone=True))
            whole = next((w for m, d, w in every if (m.name, d) == cause.key), whole)
        return replace(one, recipe=None if one.recipe is None else whole)

    def _of_untold(self) -> Diagnosis | None:
        """A mistake in a stage that is told right: the next one is made of another."""
        errors = self.evidence.errors(self.recipe)
        right = [*errors][: self.reached(self.recipe)]
        first = next((name for name in errors if name not in right), "")
        if not {*right} - {"query", "key", "value"} or not first:
            return None
        rest = {name: array for name, array in self.reported.items() if name not in right}
        found = best(Search(self.recipe, self.trace, rest, self.reference).singles)
        if found is None or any(cause.stage in rest for cause in found.causes):
            return None
        told = next((name for name in right if STAGES.index(name) >= min(
            STAGES.index(cause.stage) for cause in found.causes)), right[-1])  # fmt: skip
        verb, others = ("are", "others") if told.endswith("s") else ("is", "another")
        words = f"the {told} that {verb} told {verb} right, the {first} made of {others}"
        fix = f"Make the {first} of the {told} that {verb} told: all before it is right."
        causes = (Cause(one.name, f"{one.detail}; {words}".lstrip("; "), first, fix)
                  for one in found.causes)  # fmt: skip
        return replace(found, causes=tuple(causes), alternatives=())

    def _in_a_part(self) -> Diagnosis | None:
        """One mistake in a part of the call, or of decoding in calls that are not told."""
        part = in_a_part(self, self._completed, PARTS_SECONDS)
        several = {one.name for one in catalogue(self.recipe) if one.alone}
        if part is not None and part.causes[0].name not in several:
            return part
        decoded = as_decoded(self, CALLS_SECONDS)
        if part is None or decoded is None:
            return part or decoded
        # A part with one of many variants says less than one mistake of decoding.
        others = *decoded.alternatives, str(part.causes[0])
        return replace(decoded, alternatives=others)

    def _solved(self) -> Diagnosis | None:
        """Positions, a mask, logits or weights that are measured number by number."""
        searches: tuple[Callable[[], tuple[Cause, Recipe] | None], ...] = (
            lambda: measured_dropout(self.recipe, self.reported),
            lambda: measured_positions(self.recipe, self.evidence),
            lambda: measured_mask(self.recipe, self.reported),
            lambda: measured_logits(self.recipe, self.evidence),
            lambda: measured_weights(self.recipe, self.evidence),
        )
        for solved in (search() for search in searches):
            if solved is not None and max(self.evidence.errors(solved[1]).values()) <= 1:
                return Diagnosis((solved[0],), 0.0, (), solved[1])
        return None

    def _one_after_another(self) -> Diagnosis | None:
        """Mistakes that the stages show one after another; or other kernels."""
        begun = self._begun
        other = None if begun.explained else other_kernels(self.recipe, self.evidence)
        if other is not None:
            return self._weights_cause("other weights", *other)
        return begun if begun.explained or (begun.causes and len(self.reported) > FEW) else None

    def _of_pairs(self) -> Diagnosis:
        """Two mistakes at once; else what is known without them."""
        hurried = False
        for search in (promising_pairs, usual_pairs):
            found, late = search(self, self._completed, PAIRS_SECONDS)
            if found is not None:
                return found
            hurried |= late
        if self._begun.causes:
            return self._begun
        return replace(self._begun, small=self.before < SMALL, hurried=hurried)

    @cached_property
    def _begun(self) -> Diagnosis:
        """One mistake after another: with each, more of the reported stages must fit."""
        causes: list[Cause] = []
        reached = self.reached(self.recipe)
        tried = self._completed
        while tried:
            named = {cause.name for cause in causes}
            tried = [one for one in tried if one.causes[0].name not in named]
            best = max(tried, key=Trial.prefix, default=None)
            if best is None or best.prefix() <= reached:
                break
            causes += best.causes
            reached = best.prefix()
            if best.worst <= 1:
                return Diagnosis(in_order(*causes), best.worst, (), best.recipe)
            tried = list(filter(None, self.tried(best.recipe)))
            if max(map(Trial.prefix, tried), default=0) <= reached:
                tried += filter(None, self.tried(best.recipe, alone=True))
        return Diagnosis(in_order(*causes), np.inf)
