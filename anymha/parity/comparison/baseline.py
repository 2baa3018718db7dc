"""`Baseline`: a reference's results, with which candidates are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anymha.framework.dtypes import BITS, accumulation_dtype
from anymha.parity.diagnose.causes import Diagnosis
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.exercised import not_exercised, not_told_apart
from anymha.parity.diagnose.gradient_mistakes import diagnose_gradients, gradients_of_inputs
from anymha.parity.diagnose.precision import rounded_places
from anymha.parity.diagnose.reference_semantics import ReferenceSemantics, reference_semantics_of
from anymha.parity.oracle.recipe import STEPS, Arrays, Recipe
from anymha.parity.oracle.rounding import output_errors, rounding_errors
from anymha.parity.oracle.truth import Folded, expected
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.limits import computed_dtype, longest_sum
from anymha.parity.stages.stagewise import (
    Stage,
    compare_gradients,
    compare_stage,
    compare_stages,
    compare_weights,
    nonfinite_gradients,
    output_faults,
    reported_stages,
)
from anymha.parity.stages.structure import distance
from anymha.parity.stages.tolerance import eps, smallest, tolerance
from anymha.parity.stages.trace import STAGES, Request, Trace

PROJECTIONS = ("query", "key", "value")
ROUNDED_OFTEN = 4
"""How many times the errors of rounding each stage once gradients of half precision may have."""

ROUNDINGS = 7
"""How many roundings a step has at most: a softmax scales, hides, subtracts, exponentiates, adds
and divides the numbers of a product."""

FEW = 4
"""Fewer output features do not tell how great the terms are of which they are sums."""
MANY = 256
"""Of how many numbers the median is told from chance."""
SATURATED = 64
"""How much greater the terms of a gradient may be than the output tells."""
UNSETTLED = 0.05
"""Gradients that the rounding of inputs changes by more than this part say nothing."""


@dataclass(frozen=True)
class Baseline:
    """A reference's trace, and all that follows from it alone: candidates are compared with it."""

    request: Request
    folded: Folded  # The recipe of these weights and this call, as anymha means it
    trace: Trace  # The results of the reference

    @cached_property
    def reported(self) -> Arrays:
        """The stages that the reference reports, by name."""
        return _reported(self.trace, self.folded)

    @cached_property
    def semantics(self) -> ReferenceSemantics:
        """What the reference computes."""
        return reference_semantics_of(self.folded.recipe, self.trace, self.reported)

    @cached_property
    def not_exercised(self) -> list[str]:
        """The features of the call that change nothing."""
        return [] if self.semantics.recipe is None else not_exercised(self.semantics.recipe)

    def judge(self, second: Trace, cotangent: np.ndarray | None = None) -> Comparison:
        """The comparison with the results of a candidate; `cotangent` as for `judge_traces`."""
        first, semantics = self.trace, self.semantics
        if semantics.recipe is None:
            return outputs_alone(self.request, first, second, cotangent, semantics.notes)
        notes = [*_notes_of(first, second), *semantics.notes]
        notes += gradients_not_compared(self.request, first, second)
        traces, exact = (first, second), semantics.stages()
        reported = _reported(second, self.folded)
        stages = compare_stages(semantics.recipe, exact, traces, (self.reported, reported))
        stages += compare_weights(first, second)
        if cotangent is not None and first.gradients and second.gradients:
            plain = semantics.recipe.sections == self.folded.recipe.sections
            gradients = _gradients(self.folded, traces, cotangent, plain)
            notes += nonfinite_gradients(first, gradients)
            stages += gradients
        words: list[str] = []
        if all(stage.passed for stage in stages):
            words = _coarser(semantics.recipe, traces, reported["output"])
            stages = [
                dataclasses.replace(stage, faults=(*stage.faults, *words))
                if stage.name == "output" else stage for stage in stages
            ]  # fmt: skip
        wrong = [stage.name for stage in stages if not stage.passed or stage.culprit]

        def of_gradients() -> Diagnosis:
            if cotangent is None:
                return Diagnosis()
            return diagnose_gradients(self.folded, traces, cotangent, wrong)

        diagnosis = (
            _of_fewer_bits(semantics.recipe, traces, reported["output"]) if words
            else semantics.diagnose(second, reported, wrong, of_gradients)
        )  # fmt: skip
        return Comparison(
            first.name,
            second.name,
            tuple(stages),
            _first_divergence(stages, reported, diagnosis),
            diagnosis,
            (
                *self.not_exercised,
                *not_told_apart(self.request, semantics.recipe, reported),
                *_undecided(stages, computed_dtype(first)),
            ),
            tuple(notes),
            self.request,
            traces,
            exact,
            reported,
        )


def _coarser(recipe: Recipe, traces: tuple[Trace, Trace], output: np.ndarray) -> list[str]:
    """Says so where a candidate's output in half precision has more errors than rounding makes.

    The greatest error that rounding explains is several times the usual one, so a step in a format
    of fewer bits may hide below it. Errors of many numbers are told by their median: with k
    independent roundings in each step it is sqrt(k) times that of rounding each step once.
    """
    dtypes = {computed_dtype(trace) for trace in traces}
    dtype, exact = min(dtypes), recipe.stages["output"]
    if len(dtypes) > 1 or BITS[dtype] > 16 or output.shape != exact.shape:
        return []
    if len(np.unique(output)) < MANY:  # equal numbers, as of queries that see alike, are off alike
        return []
    once, size = output_errors(recipe, dtype), np.max(np.abs(exact), -1, keepdims=True)
    seen = np.broadcast_to((size > 0) & np.isfinite(size), exact.shape)
    with np.errstate(all="ignore"):
        usual = float(np.median((once / size)[:, seen])) if seen.any() else 0.0
        own = float(np.median((np.abs(output - exact) / size)[seen])) if seen.any() else 0.0
    usual = max(usual, eps(dtype) / 16)  # of one rounding, of numbers that are smaller than others
    if not own > math.sqrt(ROUNDINGS) * usual:
        return []
    return [f"errors are {own / usual:.2g} times those of rounding each step to {dtype}"]


def _of_fewer_bits(recipe: Recipe, traces: tuple[Trace, Trace], output: np.ndarray) -> Diagnosis:
    """The place that is rounded to fewer bits, of errors that are small each."""
    with np.errstate(all="ignore"):
        found = rounded_places(recipe, Evidence(traces[1], {"output": output}, traces[0]))
    if found is not None:
        return Diagnosis((found[0],), *found[1:])
    untried = "rounding explains each error by itself, not all: a step in fewer bits does, or noise"
    return Diagnosis(small=True, untried=untried)


def _reported(trace: Trace, folded: Folded) -> Arrays:
    """The stages of a trace by name, in the shapes of the recipe."""
    output = trace.output
    flat = folded.flat(output) if output.shape == folded.output_shape else output
    stages = reported_stages(trace, flat)
    if "scores" in stages and stages["scores"].shape == folded.full:
        batch, queries, keys = folded.recipe.lengths
        stages["scores"] = stages["scores"].reshape(batch, -1, queries, keys)
    return stages


def gradients_not_compared(request: Request, first: Trace, second: Trace) -> list[str]:
    """Why gradients, or some of them, are not compared; empty where all are."""
    if request.training:
        return ["Gradients are not compared: dropout acts in training."]
    reasons = [f"{trace.name}: {trace.without_gradients}" for trace in (first, second)
               if trace.without_gradients]  # fmt: skip
    if reasons or not first.gradients or not second.gradients:
        return [f"Gradients are not compared. {'; '.join(reasons)}".rstrip(". ") + "."]
    named = {name for name in (*first.gradients, *second.gradients) if "." in name}
    silent = [trace for trace in (first, second) if not named & {*trace.gradients}]
    if not silent or not named:
        return []
    lacks = "does not tell its weights" if silent[0].weights is None else "tells no such gradients"
    return [f"Gradients of the weights are not compared: {silent[0].name} {lacks}; "
            "those of the inputs are."]  # fmt: skip


def outputs_alone(
    request: Request,
    first: Trace,
    second: Trace,
    cotangent: np.ndarray | None = None,
    notes: Sequence[str] = (),
    stirred: Trace | None = None,
    turned: np.ndarray | None = None,
) -> Comparison:
    """The comparison of what both returned, where no weights are known; with these notes.

    `stirred` as for `judge_traces`; `turned` is the part of each position of the output, (B, T, 1),
    by which rounded angles of rotary positions may change it (`limits.turned_away`).
    """
    stages = []
    dtype = computed_dtype(first)
    length = max(a.shape[-1] for a in request.three)
    for name in ("scores", "output"):
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:
            continue
        reference = one.astype(np.float64)
        axes = (-1,) if name == "output" else (-3, -1) if reference.ndim > 3 else (-1,)
        if name == "output" and reference.shape[-1] < FEW:  # which may be small by chance
            axes = (-2, -1)
        # Sums exceed results, and layers of other libraries round each step.
        relative = max(8 * tolerance(dtype, length, 1.0),
                       6 * tolerance(dtype, length, 1.0, stored=first.stored))  # fmt: skip
        sizes = _sizes_alone(reference, axes)
        # A probability that underflows is off by the smallest number, times values that are as
        # great as the greatest outputs.
        least = length * smallest(dtype) * max(1.0, _greatest(reference))
        allowed = 2 * relative * sizes + least
        if turned is not None and name == "output":
            allowed = allowed + 2 * turned * sizes
        nearby = None if stirred is None else getattr(stirred, name)
        if nearby is not None and nearby.shape == reference.shape:
            apart = distance(nearby.astype(np.float64), reference)
            most = float(np.max(apart, initial=0.0))
            if most > UNSETTLED * _greatest(reference):  # elsewhere by chance less
                apart = np.full_like(apart, most)
            elif name == "scores":  # so too in a row, of which any key's logit may be off
                apart = np.max(apart, axis=axes, keepdims=True)
            allowed = np.maximum(allowed, 8 * apart)
        candidate = other.astype(np.float64)
        faults = output_faults((first, second)) if name == "output" else ()
        numbers = (reference, candidate, reference, reference, allowed)
        stages.append(compare_stage(name, *numbers, dtype, faults))
    if cotangent is not None and first.gradients and second.gradients:
        exact = {name: array.astype(np.float64) for name, array in first.gradients.items()}
        dtype = max(map(computed_dtype, (first, second)), key=eps)
        # A gradient comes through the sums of the forward pass too, and sums over positions.
        length = max(length, *(math.prod(a.shape[:-1]) for a in request.three))
        relative = 32 * tolerance(dtype, length, 1.0, stored=dtype)
        # Where the softmax is saturated, a gradient is the small rest of terms as great as these.
        terms = _greatest(first.output) * _greatest(cotangent)
        saturated = min(SATURATED * relative, 0.1) * terms
        allowed = {
            name: relative * _greatest(array) + length * smallest(dtype)
            + saturated / (_greatest(request.inputs.get(name, np.ones(1))) or 1.0)
            for name, array in exact.items()
        }  # fmt: skip
        for name, array in ({} if stirred is None else stirred.gradients).items():
            apart = float(np.max(distance(array.astype(np.float64), exact[name]), initial=0.0))
            greatest = max(
                _greatest(exact[name]), _greatest(second.gradients.get(name, np.zeros(1)))
            )
            if apart > UNSETTLED * greatest:
                notes = (*notes, f"The gradient of {name} is not compared: rounding of the inputs "
                         "alone changes it, as great as the logits are.")  # fmt: skip
                del exact[name]
            allowed[name] = max(allowed[name], 8 * apart)
        stages += compare_gradients((first, second), exact, allowed)
    divergence = next((stage.name for stage in stages if not stage.passed), None)
    diagnosis = Diagnosis()
    if divergence is not None and divergence.startswith("gradient"):
        diagnosis = gradients_of_inputs(divergence, (first, second))
    unknown = ("The weights of neither are known: outputs alone are compared, and causes are "
               "searched for in the arguments and around the output. Tell the weights with "
               "`declare`.",) if first.weights is second.weights is None else ()  # fmt: skip
    return Comparison(
        first.name, second.name, tuple(stages), divergence, diagnosis if divergence else None,
        (), (*_notes_of(first, second), *notes, *unknown,
             *gradients_not_compared(request, first, second)), request, (first, second),
    )  # fmt: skip


def _notes_of(*traces: Trace) -> list[str]:
    """What their users should know, each note once."""
    return list(dict.fromkeys(f"{one.name}: {note}" for one in traces for note in one.notes))


def _greatest(array: np.ndarray) -> float:
    """The greatest finite size of its numbers."""
    sizes = np.abs(array.astype(np.float64))
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def _sizes_alone(reference: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The size of each number of a result whose sums are not known.

    It is the greatest of its position over the features; and not more than the greatest of its
    feature over the positions, so that one great feature hides no other. A feature counts as at
    least as great as the median of all.
    """
    finite = np.nan_to_num(np.abs(reference), nan=0.0, posinf=0.0)
    rows = np.max(finite, axis=axes, keepdims=True, initial=0.0)
    if axes != (-1,) or finite.size < 8 * finite.shape[-1]:
        return rows
    features = np.max(finite.reshape(-1, finite.shape[-1]), axis=0)
    return np.minimum(rows, np.maximum(features, np.median(features)))


def _undecided(stages: list[Stage], dtype: str) -> list[str]:
    """Says so where rounding explains errors as great as the numbers themselves."""
    outputs = [stage for stage in stages if stage.name == "output" and stage.values is not None]
    finite = all(math.isfinite(stage.values[0]) for stage in outputs if stage.values)
    if finite and all(stage.budget * eps(dtype) < 1 for stage in outputs):
        return []
    return ["the output's numbers: rounding explains any value, as great as the logits are"]


def _gradients(
    folded: Folded, traces: tuple[Trace, Trace], cotangent: np.ndarray, plain: bool
) -> list[Stage]:
    """The gradients that both have, of weights and inputs; `plain`: of a layer as the recipe is."""
    problem = dataclasses.replace(folded.problem, d_output=cotangent)
    truth, length = expected(problem), longest_sum(problem)
    dtype = max(map(computed_dtype, traces), key=eps)
    # A bias's gradient is a sum over positions; JAX adds in the dtype of the gradient.
    relative = sum(tolerance(dtype, length, 1.0, accumulated=trace.stored) for trace in traces)
    recipe, wider = folded.recipe, 1.0
    if recipe.sections:
        # The logits that an option bounds are off by more than they are great, and so are slopes.
        sizes, logits = recipe.sizes["masked_logits"], recipe.stages["masked_logits"]
        peak = np.max(np.abs(logits), initial=1.0, where=np.isfinite(logits))
        wider = max(1.0, 2 * float(np.max(sizes, initial=0.0)) / peak)
    allowed = {
        name: wider * relative * float(np.max(truth.magnitudes[name], initial=0.0))
        + 2 * length * smallest(dtype)
        for name in truth.gradients
    }
    none = np.zeros_like(recipe.stages["probabilities"])
    rounding = rounding_errors(recipe, folded.flat(cotangent), none, dtype, STEPS) if plain else {}
    # Terms that cancel within a step, as on the way back through a norm, are not stored: they have
    # the errors of the dtype in which the step is computed.
    within = 2 * wider * tolerance(accumulation_dtype(dtype), length, 1.0)
    for name, errors in (folded.shaped(rounding) if rounding else {}).items():
        most = (ROUNDED_OFTEN + math.sqrt(length)) * float(np.max(errors, initial=0.0))
        most += within * float(np.max(truth.magnitudes[name], initial=0.0))
        allowed[name] = min(allowed[name], most + 2 * length * smallest(dtype))
    return compare_gradients(traces, truth.gradients, allowed)


def _first_divergence(
    stages: list[Stage], reported: Arrays, diagnosis: Diagnosis | None
) -> str | None:
    """The first stage that is itself wrong; between two reported stages, the stage of the cause."""
    wrong = [stage for stage in stages if stage.culprit] or [s for s in stages if not s.passed]
    if not wrong:
        return None
    first = wrong[0].name
    cause = diagnosis.causes[0] if diagnosis is not None and diagnosis.causes else None
    if cause is None or cause.stage not in STAGES:
        return first
    end = STAGES.index(first) if first in STAGES else len(STAGES)
    right = [place for place, name in enumerate(STAGES[:end]) if name in reported]
    # The projections do not depend on each other: that one is right says nothing of another.
    begin = max((place for place in right if STAGES[place] not in PROJECTIONS), default=-1)
    place = STAGES.index(cause.stage)
    return cause.stage if begin < place <= end and place not in right else first
