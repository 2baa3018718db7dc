"""Whether a layer gives the right values: it is timed only if it does."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from anymha.parity.stages.tolerance import SUMS, tolerance
from benchmarks.cases import Arrays, Case
from benchmarks.reference import Reference

HALVES = ("bfloat16", "float16")
DROPPED = (0.5, 2.0)
"""How much a layer's dropout may change its values, as multiples of what ours changes."""


def allowed(case: Case, size: float) -> float:
    """The greatest absolute error that rounding explains in a value of that size.

    Products in half precision sum in float32, as everywhere, but a layer may round each of its
    stages; the sums of float32 are as long as the longest, over features or positions.
    """
    length = max(case.features, case.length * (case.batch if case.training else 1))
    error = tolerance("float32", length, size)
    if case.dtype in HALVES:
        error += SUMS * float(ml_dtypes.finfo(case.dtype).eps) * size
    return error


def error_of(case: Case, values: Mapping[str, np.ndarray], reference: Reference) -> float:
    """The greatest error, as a share of what is allowed: right up to 1.

    Raises:
        ValueError: a value is missing, or has another shape.
    """
    worst = 0.0
    for name, right in reference.values.items():
        if name not in values:
            raise ValueError(f"gives no {name}")
        found = reference.rows_of(name, values[name])
        worst = max(worst, _share(found, right, allowed(case, reference.sizes[name]), name))
    return worst


def error_beside(
    case: Case, values: Mapping[str, np.ndarray], ours: Arrays, reference: Reference
) -> float:
    """As `error_of`, of all rows beside those of our layer, which has errors of its own."""
    worst = 0.0
    for name, right in ours.items():
        limit = 2 * allowed(case, reference.sizes[name])
        worst = max(worst, _share(values[name], right, limit, name))
    return worst


def change(values: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray]) -> float:
    """How much dropout changed the output: the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values["output"] - plain["output"]))))


def drops_as(changed: float, ours: float) -> bool:
    """Whether a layer's dropout acts about as much as ours."""
    return DROPPED[0] * ours <= changed <= DROPPED[1] * ours


def _share(found: np.ndarray, right: np.ndarray, limit: float, name: str) -> float:
    if found.shape != right.shape:
        raise ValueError(f"{name} has shape {found.shape}, not {right.shape}")
    error = float(np.max(np.abs(found - right), initial=0.0))
    return error / limit if math.isfinite(error) else math.inf
