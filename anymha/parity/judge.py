"""Results held against the oracle and against each other, in units of the arithmetic's rounding.

The unit of a quantity is ``eps * magnitude``: eps is the distance from 1 to the next number of its
dtype, the magnitude the greatest sum of absolute values that an element of it is made of. Rounding
the exact result once costs half a unit at most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from anymha.dtypes import output_dtype
from anymha.parity.cases import Arrays, Problem
from anymha.parity.checkpoint import Recorded
from anymha.parity.oracle import Truth
from anymha.parity.run import Result
from anymha.parity.tolerance import tolerance


@dataclass(frozen=True)
class Cell:
    """One backend on one case.

    Args:
        units: The greatest error of any quantity, in its units.
        worst: The quantity that has it.
        errors: The error of each quantity, in its units.
        faults: What is wrong, in words; empty where the cell passes.
        gradients: Whether gradients were compared.
    """

    units: float
    worst: str
    errors: Mapping[str, float]
    faults: tuple[str, ...]
    gradients: bool

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True)
class Row:
    """One case on all backends.

    Args:
        name: The case.
        dtype: Its dtypes, e.g. "float32" or "float32 in float64".
        budget: The greatest error allowed, in units.
        cells: By backend; a backend that raised has a cell with that fault.
        elements: How many elements each backend gave: outputs, scores and gradients.
        differing: How many of them differ in any bit between some two backends.
        ties: How many of those lie, exactly computed, so close to the middle between two numbers
            of their dtype that float64 does not tell to which to round.
        compared: How many were compared between backends.
        reproducible: Whether none may differ.
        faults: What is wrong between backends, in words.
    """

    name: str
    dtype: str
    budget: float
    cells: Mapping[str, Cell]
    elements: int
    differing: int
    ties: int
    compared: int
    reproducible: bool
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every backend passes, and they agree."""
        return not self.faults and all(cell.passed for cell in self.cells.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; an infinite error is null."""
        plain = dataclasses.asdict(self) | {"passed": self.passed}
        for name, cell in plain["cells"].items():
            cell["passed"] = self.cells[name].passed
            cell["units"] = _finite(cell["units"])
            cell["errors"] = {k: _finite(v) for k, v in cell["errors"].items()}
        return plain


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def judge(
    problem: Problem,
    truth: Truth,
    results: Mapping[str, Result | Exception],
    recorded: Recorded | None = None,
) -> Row:
    """The verdict on each backend's results, and on their agreement.

    Args:
        problem: The problem.
        truth: The oracle's answer.
        results: Each backend's results, or what it raised.
        recorded: What another implementation returned, to be compared with too.
    """
    config = problem.case.config
    narrow = output_dtype(config.dtype, config.compute_dtype or config.dtype)
    exact = {"output": truth.output, "scores": truth.scores, **truth.gradients}
    units = _units(truth, narrow, config.dtype)
    computed = config.compute_dtype or config.dtype
    length = _reduction_length(problem)
    budget = _budget(narrow, computed, length)
    ran = {name: result for name, result in results.items() if isinstance(result, Result)}
    cells = {}
    for name, result in results.items():
        if isinstance(result, Result):
            errors, faults = _errors(result, exact, units, narrow)
            errors |= _recorded_errors(result, recorded, units, narrow)
            cells[name] = _cell(errors, faults, budget, bool(result.gradients))
        else:
            fault = f"raised {type(result).__name__}: {result}"
            cells[name] = Cell(math.inf, "", {}, (fault,), False)
    close = {
        name: tolerance(computed, length, 1.0) * np.max(a, initial=0.0)
        for name, a in truth.magnitudes.items()
    }
    differing, ties, compared = _differing(ran, exact, close)
    reproducible = computed == "float64" and config.dtype == "float32"
    faults = ()
    if reproducible and differing > ties:
        faults = (f"{differing - ties} of {compared} elements differ between backends, 0 may",)
    return Row(
        problem.case.name,
        config.dtype + (f" in {config.compute_dtype}" if config.compute_dtype else ""),
        budget,
        cells,
        sum(array.size for array in exact.values()),
        differing,
        ties,
        compared,
        reproducible,
        faults,
    )


def _cell(errors: Mapping[str, float], faults: list[str], budget: float, gradients: bool) -> Cell:
    for name, error in errors.items():
        if not error <= budget:
            faults.append(f"{name} is off by {error:.3g} units, {budget:.3g} may")
    worst = max(errors, key=lambda name: errors[name], default="")
    return Cell(errors.get(worst, math.inf), worst, errors, tuple(faults), gradients)


def _errors(
    result: Result, exact: Arrays, units: Mapping[str, float], narrow: str
) -> tuple[dict[str, float], list[str]]:
    """The error of each quantity in its units, and what is wrong beside numbers."""
    errors, faults = {}, []
    if result.flag_matters:
        faults.append("the output changes with `return_attention_scores`")
    for name, array in result.forward.items():
        if array.dtype.name != narrow:
            faults.append(f"{name} is {array.dtype.name}, not {narrow}")
    for name, array in {**result.forward, **result.gradients}.items():
        if array.shape != exact[name].shape:
            faults.append(f"{name} has shape {array.shape}, not {exact[name].shape}")
        else:
            errors[name] = _error(array, exact[name], units[name])
    return errors, faults


def _recorded_errors(
    result: Result, recorded: Recorded | None, units: Mapping[str, float], narrow: str
) -> dict[str, float]:
    """The errors against what another implementation returned, where that means something."""
    errors = {}
    for name, array in recorded.results.items() if recorded else ():
        got, counts = result.forward[name], recorded.counts
        if name == "scores":  # (B, H, T, S), of which the queries may be padding
            got, array = got.swapaxes(1, 2), array.swapaxes(1, 2)
        eps = max(_eps(narrow), _eps(array.dtype.name)) / _eps(narrow)
        exact = array[counts].astype(np.float64)
        errors[f"recorded {name}"] = _error(got[counts], exact, eps * units[name])
    return errors


def _error(got: np.ndarray, exact: np.ndarray, unit: float) -> float:
    """The greatest error in units; NaN or infinity where the other has a number is infinite."""
    got = got.astype(np.float64)
    if not np.array_equal(np.isnan(got), np.isnan(exact)):
        return math.inf
    error = float(np.max(np.abs(np.nan_to_num(got) - np.nan_to_num(exact)), initial=0.0))
    return 0.0 if error == 0 else error / unit if unit else math.inf


def _units(truth: Truth, narrow: str, dtype: str) -> dict[str, float]:
    """The unit of each quantity.

    A gradient has the dtype of what it is the gradient of, after a pass in the narrower one.
    """
    return {
        name: max(_eps(narrow), 0.0 if name in ("output", "scores") else _eps(dtype))
        * float(np.max(array, initial=0.0))
        for name, array in truth.magnitudes.items()
    }


def _budget(narrow: str, computed: str, length: int) -> float:
    """The greatest error allowed, in units: what the sums lose, and the last rounding."""
    if computed == "float64" and narrow != "float64":
        return (_eps(narrow) / 2 + tolerance(computed, length, 1.0)) / _eps(narrow)
    return tolerance(narrow, length, 1.0) / _eps(narrow)


def _eps(dtype: str) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def _reduction_length(problem: Problem) -> int:
    """The longest sum of the computation: over features, keys, or all query positions."""
    shapes = [*problem.weights.values(), *problem.inputs.values()]
    queries = math.prod(problem.case.query)
    return max(queries, problem.d_scores.shape[-1], *(max(array.shape) for array in shapes))


def _differing(
    results: Mapping[str, Result], exact: Arrays, close: Mapping[str, float]
) -> tuple[int, int, int]:
    """How many elements differ in any bit between some two backends, of those ties, of how many."""
    differing = ties = compared = 0
    every = [{**result.forward, **result.gradients} for result in results.values()]
    for name in dict.fromkeys(name for one in every for name in one):
        arrays = [one[name] for one in every if name in one]
        if len(arrays) < 2 or len({(a.shape, a.dtype) for a in arrays}) > 1:
            continue
        low, high = np.fmin.reduce(arrays), np.fmax.reduce(arrays)
        numbers = ~np.any([np.isnan(a) for a in arrays], axis=0)
        unlike = ~((low == high) & numbers) & ~np.all([np.isnan(a) for a in arrays], axis=0)
        differing, compared = differing + int(unlike.sum()), compared + unlike.size
        if unlike.any() and exact[name].shape == low.shape and low.dtype == np.float32:
            middle = (low.astype(np.float64) + high) / 2
            tied = (np.nextafter(low, high) == high) & (abs(exact[name] - middle) <= close[name])
            ties += int((unlike & tied).sum())
    return differing, ties, compared
