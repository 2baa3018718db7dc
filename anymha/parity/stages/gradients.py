"""Weights and gradients compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.stagewise import Stage, compare_stage
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import Trace, name_of_dtype


def compare_weights(first: Trace, second: Trace) -> list[Stage]:
    """The weights that differ, where those of both are known: the first thing to fix."""
    if first.weights is None or second.weights is None:
        return []
    stages = []
    for name in {**first.weights, **second.weights}:
        wanted, got = first.weights.get(name), second.weights.get(name)
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
        numbers = (one, other, one, exact[name], allowed[name])
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
