"""Two traces compared: stage by stage, structure first, then numbers; weights and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.limits import Tolerances, computed_dtype, error_shares, reproducible
from anymha.parity.stages.structure import count_differing, distance, is_masked, structure
from anymha.parity.stages.tolerance import eps, tolerance
from anymha.parity.stages.trace import STAGES, Trace, name_of_dtype

OBSERVED = (*STAGES, "scores")


@dataclass(frozen=True)
class Stage:
    """One stage of the candidate compared with the reference's."""

    name: str  # The stage, "scores", or "gradient of NAME"
    error: float  # The greatest difference from the reference, built up over all stages before
    # The difference that is this stage's own: from what the reference's step makes of the
    # candidate's own earlier stages
    own_error: float
    unit: float  # ``eps * max |reference|`` of the stage: the rounding of its greatest number
    budget: float  # How many units rounding explains
    # The candidate's error against float64 over the reference's; None where unknown
    ratio: float | None = None
    faults: tuple[str, ...] = ()  # What is wrong apart from numbers, in words
    at: tuple[int, ...] = ()  # Where the greatest difference is
    values: tuple[float, float] | None = None  # The reference's and the candidate's number there

    @property
    def units(self) -> float:
        """The error in units."""
        return in_units(self.error, self.unit)

    @property
    def own_units(self) -> float:
        """The stage's own error in units."""
        return in_units(self.own_error, self.unit)

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error."""
        return not self.faults and self.units <= self.budget

    @property
    def culprit(self) -> bool:
        """Whether the stage itself is wrong, whatever came before it."""
        return bool(self.faults) or not self.own_units <= self.budget


def in_units(error: float, unit: float) -> float:
    """An error in units; infinite where the unit is 0."""
    return 0.0 if error == 0 else error / unit if unit else math.inf


def reported_stages(trace: Trace, output: np.ndarray) -> Arrays:
    """The stages of a trace by name, with the output as (B, T, O)."""
    stages = {**trace.stages, "output": output}
    if trace.scores is not None:
        stages["scores"] = trace.scores
    every = {name: stages[name].astype(np.float64) for name in OBSERVED if name in stages}
    for name in ("probabilities", "dropped_probabilities", "scores"):
        if name in every:
            # In a row that holds NaN, frameworks give a hidden key zero or NaN: it says nothing.
            rows = np.isnan(every[name]).any(-1, keepdims=True)
            every[name] = np.where(rows, np.nan, every[name])
    return every


def compare_stages(
    recipe: Recipe, exact: Arrays, traces: tuple[Trace, Trace], reported: tuple[Arrays, Arrays]
) -> list[Stage]:
    """Every stage that the candidate reports.

    `recipe` is what the reference computes, `exact` its stages in float64 and the "scores" that it
    returns; `reported` has the stages that both report.
    """
    tolerances = Tolerances(recipe, traces[0])
    own: Arrays = {}  # the candidate's stages; the reference's steps compute those it lacks
    stages = []
    for name in OBSERVED:
        float64 = exact[name]
        reference = reported[0].get(name, float64)
        if name == "scores":
            fed = own["probabilities"]
        else:
            fits = all(array.shape == exact[name].shape for name, array in own.items())
            fed = recipe.stage(name, own) if fits else float64
        candidate = reported[1].get(name)
        if candidate is not None:
            allowed = tolerances.of(name, traces[0]) + tolerances.of(name, traces[1])
            faults = output_faults(traces) if name == "output" else []
            if name in ("output", "scores") and all(map(reproducible, traces)):
                close = tolerance("float64", tolerances.length, recipe.sizes[name].max())
                faults += _bits(reference, candidate, float64, close)
            numbers = (reference, candidate, fed, float64, allowed)
            stages.append(compare_stage(name, *numbers, computed_dtype(traces[0]), faults))
        own[name] = fed if candidate is None else candidate
        if name == "masked_logits":
            own[name] = _emptied(own[name], float64)
    return stages


def _emptied(logits: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Masked logits with -inf in rows that see nothing, for the numbers that stand for it.

    Such numbers hide a key beside one that is seen; the softmax of a row of them is no zeros.
    """
    if logits.shape != exact.shape:
        return logits
    rows = np.isneginf(exact).all(-1, keepdims=True)
    return np.where(rows & is_masked(logits), -np.inf, logits)


def compare_stage(
    name: str,
    reference: np.ndarray,
    candidate: np.ndarray,
    fed: np.ndarray,
    exact: np.ndarray,
    allowed: np.ndarray | float,
    dtype: str,
    faults: Sequence[str] = (),
) -> Stage:
    """A stage at the position whose error is the greatest share of what rounding explains.

    `fed` is what the reference's step makes of the candidate's earlier stages; `exact` the stage in
    float64; `allowed` the error of each position that rounding explains; `faults` are further ones.
    """
    limits = np.nan_to_num(np.asarray(allowed, np.float64), nan=np.inf, posinf=np.inf)
    sizes_of = np.nan_to_num(np.abs(reference), nan=0.0, posinf=0.0)
    axes = tuple(i for i, n in enumerate(limits.shape) if n == 1) if limits.ndim else None
    if limits.shape == reference.shape and not axes:
        axes = tuple(range(2, reference.ndim))  # of each feature: one position is the unit's
    wrong = structure(name, reference, candidate, limits)
    faults = (*wrong, *faults)
    if candidate.shape != reference.shape or not reference.size:
        unit = eps(dtype) * float(np.max(sizes_of, initial=0.0)) or eps(dtype)
        budget, error = float(np.max(limits, initial=0.0)) / unit, math.inf if wrong else 0.0
        return Stage(name, error, error, unit, budget, None, faults)
    apart = distance(candidate, reference, name)
    own = distance(candidate, fed, name) if fed.shape == candidate.shape else apart
    shares = error_shares(apart, limits)
    at = np.unravel_index(int(np.argmax(shares)), apart.shape)
    limit = float(np.broadcast_to(limits, apart.shape)[at])
    largest = np.max(sizes_of, axis=axes, keepdims=True)
    unit = eps(dtype) * float(np.broadcast_to(largest, apart.shape)[at])
    unit = unit or eps(dtype) * float(np.max(sizes_of)) or eps(dtype)
    mine, theirs = distance(candidate, exact, name), distance(reference, exact, name)
    ratio = float(mine.max() / theirs.max()) if theirs.max() > 0 else None
    return Stage(
        name,
        float(apart[at]),
        _own_error(error_shares(own, limits), limit, own[at]),
        unit,
        limit / unit,
        ratio if ratio is not None and math.isfinite(ratio) else None,
        faults,
        tuple(int(i) for i in at),
        (float(reference[at]), float(candidate[at])),
    )


def _own_error(shares: np.ndarray, limit: float, own: float) -> float:
    """The worst of a stage's own errors, on the scale of the limit at the shown position."""
    worst = float(shares.max())
    return worst * limit if math.isfinite(limit) and worst > 0 else float(own)


def output_faults(traces: tuple[Trace, Trace]) -> list[str]:
    """Faults of the candidate's output apart from its numbers."""
    names = [name_of_dtype(trace.output) for trace in traces]
    faults = [] if names[0] == names[1] else [f"dtype {names[1]}, not {names[0]}"]
    if traces[1].random and not traces[0].random:
        faults.append("two calls gave two results")
    return faults


def _bits(
    reference: np.ndarray, candidate: np.ndarray, exact: np.ndarray, close: float
) -> list[str]:
    """Says how many elements differ in reproducible mode, where ties alone may differ."""
    both = [{"it": array.astype(np.float32)} for array in (reference, candidate)]
    differing, ties, total = count_differing(both, {"it": exact}, {"it": close})
    if differing <= ties:
        return []
    return [f"{differing - ties} of {total} elements differ in a bit, 0 may if reproducible"]


def compare_weights(first: Trace, second: Trace) -> list[Stage]:
    """The weights that differ, where those of both are known: the first thing to fix."""
    if first.weights is None or second.weights is None:
        return []
    stages = []
    for name in {**first.weights, **second.weights}:
        # Also what was told of a weight whose option was not.
        wanted = first.weights.get(name, first.extras.get(name))
        got = second.weights.get(name, second.extras.get(name))
        only = next((a for a in (wanted, got) if wanted is None or got is None), None)
        if only is not None and name.endswith(".bias") and not np.any(only):
            continue  # a bias of zeros is as none
        if wanted is None or got is None or got.shape != wanted.shape:
            have, other = (f"shape {a.shape}" if a is not None else "none" for a in (got, wanted))
            fault = f"the weight has {have}, not {other}"
            stages.append(Stage(f"weight {name}", math.inf, math.inf, 1.0, 0.0, None,
                                (fault,)))  # fmt: skip
            continue
        one, other = wanted.astype(np.float64), got.astype(np.float64)
        unit = max(eps(name_of_dtype(wanted)), eps(name_of_dtype(got)))
        unit *= float(np.max(np.abs(one), initial=0.0)) or 1.0
        error = float(np.max(np.abs(one - other), initial=0.0))
        if not error <= unit:
            stages.append(Stage(f"weight {name}", error, error, unit, 1.0))
    return stages


def compare_gradients(
    traces: tuple[Trace, Trace], exact: Mapping[str, np.ndarray], allowed: Mapping[str, float]
) -> list[Stage]:
    """The gradients that both have; `exact` and `allowed` by name."""
    reference, candidate = traces
    dtype = max(map(computed_dtype, traces), key=eps)
    stages = []
    for name, wanted in reference.gradients.items():
        got = candidate.gradients.get(name)
        if got is None or name not in exact:
            continue
        one, other = wanted.astype(np.float64), got.astype(np.float64)
        # The last rounding of both, whatever cancels before it
        least = eps(dtype) * float(np.max(np.abs(one), initial=0.0, where=np.isfinite(one)))
        numbers = (one, other, one, exact[name], max(allowed[name], least))
        stages.append(compare_stage(f"gradient of {name}", *numbers, dtype))
    return stages


def nonfinite_gradients(reference: Trace, stages: Sequence[Stage]) -> list[str]:
    """A note on the reference's gradients that hold NaN or infinity: no numbers to compare."""
    named = []
    for stage in stages:
        wanted = reference.gradients[stage.name.removeprefix("gradient of ")].astype(np.float64)
        known = int(np.isfinite(wanted).sum()) if math.isfinite(stage.budget) else 0
        if known < wanted.size:
            named.append(f"{stage.name} ({wanted.size - known} of {wanted.size})")
    if not named:
        return []
    return [
        "NaN or infinity limits what can be compared: of these numbers it is only known that both "
        f"implementations have NaN at the same places: {', '.join(named)}."
    ]
