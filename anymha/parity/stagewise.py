"""Two traces held against each other, stage by stage: structure first, then numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.parity.recipe import Arrays, Recipe, sizes
from anymha.parity.structure import distance, structure
from anymha.parity.tolerance import tolerance
from anymha.parity.trace import STAGES, Trace, name_of_dtype
from anymha.parity.units import eps

OBSERVED = (*STAGES, "scores")


@dataclass(frozen=True)
class Stage:
    """One stage of the candidate beside the reference's.

    Args:
        name: The stage, "scores", or "gradient of NAME".
        told: Whether the candidate told it; else it was computed from its weights, or not known.
        error: The greatest difference from the reference, built up over all stages before.
        own_error: The difference that is this stage's own: from what the reference's step makes of
            the candidate's own earlier stages.
        unit: ``eps * max |reference|`` of the stage: the rounding of its greatest number.
        budget: How many units rounding explains.
        ratio: The candidate's error against float64 over the reference's; None where unknown.
        faults: What is wrong beside numbers, in words.
        at: Where the greatest difference is.
        values: The reference's and the candidate's number there.
    """

    name: str
    told: bool
    error: float
    own_error: float
    unit: float
    budget: float
    ratio: float | None = None
    faults: tuple[str, ...] = ()
    at: tuple[int, ...] = ()
    values: tuple[float, float] | None = None

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
    """An error in units, of which there may be none."""
    return 0.0 if error == 0 else error / unit if unit else math.inf


class Tolerances:
    """How far a trace may be from float64 at each stage.

    Args:
        recipe: What is computed.
        stages: Its stages in float64.
        reference: The reference's trace, in whose dtype a candidate has to compute.
    """

    def __init__(self, recipe: Recipe, stages: Arrays, reference: Trace | None = None) -> None:
        self.reference = reference
        self.sizes = sizes(recipe, stages)
        widths = [array.shape[-1] for array in recipe.inputs.values()]
        widths += [recipe.weights[f"{name}.kernel"].shape[2] for name in ("query", "value")]
        heads, width, _ = recipe.weights["output.kernel"].shape
        self.length = max(*widths, recipe.lengths[2], heads * width)

    def of(self, stage: str, trace: Trace) -> float:
        """The greatest error that rounding explains."""
        meant = self.reference
        if meant is not None and eps(computed_dtype(trace)) > eps(computed_dtype(meant)):
            trace = meant
        dtype, size = computed_dtype(trace), self.sizes[stage]
        return tolerance(dtype, self.length, size, accumulated=trace.accumulated)


def computed_dtype(trace: Trace) -> str:
    """The narrowest dtype through which a trace's numbers went."""
    names = [name_of_dtype(trace.output)]
    if "float" not in names[0]:
        names = ["float64"]  # integers have no rounding of their own
    config = trace.config
    if config is not None:
        names += [config.dtype, config.compute_dtype or config.dtype]
        if config.compute_dtype == "float64":  # rounded once, from float64
            return names[0]
    return max(names, key=eps)


def observed(trace: Trace, output: np.ndarray) -> Arrays:
    """What a trace told, by stage, the output flat (B, T, O)."""
    found = {**trace.stages, "output": output}
    if trace.scores is not None:
        found["scores"] = trace.scores
    return {name: found[name].astype(np.float64) for name in OBSERVED if name in found}


def compared(
    recipe: Recipe,
    honest: Arrays,
    traces: tuple[Trace, Trace],
    told: tuple[Arrays, Arrays],
) -> list[Stage]:
    """Every stage that the candidate told, and its projections where it told its weights.

    Args:
        recipe: What the reference computes.
        honest: Its stages in float64, and the "scores" that it returns.
        traces: The reference's and the candidate's.
        told: What both told, by stage.
    """
    tolerances = Tolerances(recipe, honest, traces[0])
    wanted, found = told
    own: Arrays = {}  # the candidate's stages, filled up by the reference's steps
    stages = []
    for name in OBSERVED:
        expected = honest[name]
        reference = wanted.get(name, expected)
        if name == "scores":
            fed = own["probabilities"]
        else:
            fed = recipe.steps[name](recipe, own) if _fits(own, honest) else expected
        candidate = found.get(name)
        if candidate is not None:
            allowed = tolerances.of(name, traces[0]) + tolerances.of(name, traces[1])
            dtype = computed_dtype(traces[0])
            stages.append(_stage(name, reference, candidate, fed, expected, allowed, dtype))
            if name == "output":
                stages[-1] = _with_dtypes(stages[-1], traces)
        own[name] = fed if candidate is None else candidate
    return stages


def _fits(own: Arrays, honest: Arrays) -> bool:
    """Whether the candidate's stages so far have the right shapes to compute with."""
    return all(array.shape == honest[name].shape for name, array in own.items())


def _stage(
    name: str,
    reference: np.ndarray,
    candidate: np.ndarray,
    fed: np.ndarray,
    exact: np.ndarray,
    allowed: float,
    dtype: str,
) -> Stage:
    finite = np.abs(reference[np.isfinite(reference)])
    unit = eps(dtype) * float(np.max(finite, initial=0.0)) or eps(dtype)
    faults = tuple(structure(name, reference, candidate))
    if candidate.shape != reference.shape:
        return Stage(name, True, math.inf, math.inf, unit, allowed / unit, None, faults)
    apart = distance(candidate, reference)
    own = distance(candidate, fed) if fed.shape == candidate.shape else apart
    at = np.unravel_index(int(np.argmax(apart)), apart.shape) if apart.size else ()
    mine, theirs = distance(candidate, exact), distance(reference, exact)
    ratio = float(mine.max() / theirs.max()) if theirs.size and theirs.max() > 0 else None
    return Stage(
        name,
        True,
        float(np.max(apart, initial=0.0)),
        float(np.max(own, initial=0.0)),
        unit,
        allowed / unit,
        ratio if ratio is not None and math.isfinite(ratio) else None,
        faults,
        tuple(int(i) for i in at),
        (float(reference[at]), float(candidate[at])) if at else None,
    )


def _with_dtypes(stage: Stage, traces: tuple[Trace, Trace]) -> Stage:
    names = [name_of_dtype(trace.output) for trace in traces]
    if names[0] == names[1]:
        return stage
    fault = f"dtype {names[1]}, not {names[0]}"
    fields: dict[str, Any] = {**vars(stage), "faults": (*stage.faults, fault)}
    return Stage(**fields)


def gradients_compared(
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
        stages.append(
            _stage(
                f"gradient of {name}",
                wanted.astype(np.float64),
                got.astype(np.float64),
                wanted.astype(np.float64),
                exact[name],
                2 * allowed[name],
                dtype,
            )
        )
    return stages
