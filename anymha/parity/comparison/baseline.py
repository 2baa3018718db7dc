"""What candidates are held against, and what a comparison with it shows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anymha.parity.diagnose.causes import Diagnosis
from anymha.parity.diagnose.exercised import untested
from anymha.parity.diagnose.reference_semantics import Meaning, meaning_of
from anymha.parity.oracle.recipe import Arrays
from anymha.parity.oracle.truth import Folded, expected
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.gradients import gradients_compared, limited, weights_compared
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.stagewise import (
    Stage,
    beside_numbers,
    compared,
    faulted,
    observed,
    staged,
)
from anymha.parity.stages.tolerance import tolerance
from anymha.parity.stages.trace import STAGES, Request, Trace
from anymha.parity.stages.units import eps, longest_sum, smallest

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Standard:
    """What candidates are held against: a reference's trace, and all that follows from it alone.

    Args:
        request: The call.
        folded: What anymha means by the weights that are compared.
        trace: What the reference gave.
    """

    request: Request
    folded: Folded
    trace: Trace

    @cached_property
    def told(self) -> Arrays:
        """What the reference told, by stage."""
        return _told(self.trace, self.folded)

    @cached_property
    def meant(self) -> Meaning:
        """What the reference computes."""
        return meaning_of(self.folded.recipe, self.trace, self.told)

    @cached_property
    def untested(self) -> list[str]:
        """The features of the call that change nothing."""
        return [] if self.meant.recipe is None else untested(self.meant.recipe)

    def judge(self, second: Trace, cotangent: np.ndarray | None = None) -> Comparison:
        """The comparison with what a candidate gave; `cotangent` as for `judged`."""
        first, meant = self.trace, self.meant
        notes = [f"{trace.name}: {note}" for trace in (first, second) for note in trace.notes]
        notes += meant.notes
        if meant.recipe is None:
            return outputs_alone(self.request, first, second, *notes)
        traces, honest, told = (first, second), meant.stages(), _told(second, self.folded)
        stages = compared(meant.recipe, honest, traces, (self.told, told))
        stages += weights_compared(first, second)
        if cotangent is not None and first.gradients and second.gradients:
            gradients = _gradients(self.folded, traces, cotangent)
            notes += limited(first, gradients)
            stages += gradients
        wrong = [stage.name for stage in stages if not stage.passed or stage.culprit]
        diagnosis = meant.diagnosed(second, told, wrong)
        return Comparison(
            first.name,
            second.name,
            tuple(stages),
            _first_divergence(stages, told, diagnosis),
            diagnosis,
            (*self.untested, *_undecided(stages, computed_dtype(first))),
            tuple(notes),
            self.request,
            traces,
            honest,
            told,
        )


def _told(trace: Trace, folded: Folded) -> Arrays:
    """What a trace told, by stage; projections of its own weights where it told these."""
    output = trace.output
    wanted = folded.output_shape
    flat = folded.flat(output) if output.shape == wanted else output
    found = observed(trace, flat)
    if "scores" in found and found["scores"].shape == folded.full:
        batch, queries, keys = folded.recipe.lengths
        found["scores"] = found["scores"].reshape(batch, -1, queries, keys)
    return found


def outputs_alone(request: Request, first: Trace, second: Trace, *notes: str) -> Comparison:
    """The comparison where neither tells its weights: of what both returned; `notes` beside."""
    stages = []
    dtype = computed_dtype(first)
    length = max(a.shape[-1] for a in request.three)
    for name in ("scores", "output"):
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:
            continue
        reference = one.astype(np.float64)
        finite = np.nan_to_num(np.abs(reference), nan=0.0, posinf=0.0)
        axes = (-1,) if name == "output" else (-3, -1) if finite.ndim > 3 else (-1,)
        size = 8 * np.max(finite, axis=axes, keepdims=True, initial=0.0)  # sums exceed results
        allowed = 2 * tolerance(dtype, length, 1.0) * size + length * smallest(dtype)
        candidate = other.astype(np.float64)
        stage = staged(name, reference, candidate, reference, reference, allowed, dtype)
        stages.append(
            faulted(stage, *beside_numbers((first, second))) if name == "output" else stage
        )
    divergence = next((stage.name for stage in stages if not stage.passed), None)
    told = ("Neither tells its weights: the outputs alone are compared, and causes are not looked "
            "for.",) if first.weights is None and second.weights is None else ()  # fmt: skip
    return Comparison(
        first.name, second.name, tuple(stages), divergence, Diagnosis() if divergence else None,
        (), (*notes, *told), request, (first, second),
    )  # fmt: skip


def _undecided(stages: list[Stage], dtype: str) -> list[str]:
    """Where rounding explains errors as great as the numbers themselves."""
    outputs = [stage for stage in stages if stage.name == "output" and stage.values is not None]
    finite = all(math.isfinite(stage.values[0]) for stage in outputs if stage.values)
    if finite and all(stage.budget * eps(dtype) < 1 for stage in outputs):
        return []
    return ["the output's numbers: rounding explains any value, as great as the logits are"]


def _gradients(folded: Folded, traces: tuple[Trace, Trace], cotangent: np.ndarray) -> list[Stage]:
    """The gradients that both have, of weights and inputs."""
    problem = dataclasses.replace(folded.problem, d_output=cotangent)
    truth, length = expected(problem), longest_sum(problem)
    dtype = max(map(computed_dtype, traces), key=eps)
    # A bias's gradient is added up over positions, by JAX in the dtype in which it holds it.
    relative = sum(tolerance(dtype, length, 1.0, accumulated=trace.held) for trace in traces)
    allowed = {
        name: relative * float(np.max(truth.magnitudes[name], initial=0.0))
        + 2 * length * smallest(dtype)
        for name in truth.gradients
    }
    return gradients_compared(traces, truth.gradients, allowed)


def _first_divergence(stages: list[Stage], told: Arrays, diagnosis: Diagnosis | None) -> str | None:
    """The first stage that is itself wrong; between two that were told, where the cause says."""
    wrong = [stage for stage in stages if stage.culprit] or [s for s in stages if not s.passed]
    if not wrong:
        return None
    first = wrong[0].name
    cause = diagnosis.causes[0] if diagnosis is not None and diagnosis.causes else None
    if cause is None or cause.stage not in STAGES:
        return first
    end = STAGES.index(first) if first in STAGES else len(STAGES)
    right = [place for place, name in enumerate(STAGES[:end]) if name in told]
    # Projections stand side by side: that one is right says nothing of another.
    begin = max((place for place in right if STAGES[place] not in PROJECTIONS), default=-1)
    place = STAGES.index(cause.stage)
    return cause.stage if begin < place <= end and place not in right else first
