"""Results held against the oracle and against each other, in units of the arithmetic's rounding.

The unit of a quantity is ``eps * magnitude``: eps is the distance from 1 to the next number of its
dtype, the magnitude the greatest sum of absolute values that an element of it is made of. Rounding
the exact result once costs half a unit at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from anymha.dtypes import output_dtype
from anymha.parity.cases import Arrays, Problem
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
        compared: How many were compared between backends.
        faults: What is wrong between backends, in words.
    """

    name: str
    dtype: str
    budget: float
    cells: Mapping[str, Cell]
    elements: int
    differing: int
    compared: int
    faults: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every backend passes, and they agree."""
        return not self.faults and all(cell.passed for cell in self.cells.values())


def judge(problem: Problem, truth: Truth, results: Mapping[str, Result | Exception]) -> Row:
    """The verdict on each backend's results, and on their agreement."""
    config = problem.case.config
    narrow = output_dtype(config.dtype, config.compute_dtype or config.dtype)
    exact = {"output": truth.output, "scores": truth.scores, **truth.gradients}
    units = _units(truth, narrow, config.dtype)
    computed = config.compute_dtype or config.dtype
    budget = _budget(narrow, computed, _reduction_length(problem))
    ran = {name: result for name, result in results.items() if isinstance(result, Result)}
    cells = {
        name: _cell(result, exact, units, budget, narrow)
        if isinstance(result, Result)
        else Cell(math.inf, "", {}, (f"raised {type(result).__name__}: {result}",), False)
        for name, result in results.items()
    }
    differing, compared = _differing(ran)
    reproducible = config.compute_dtype == "float64" and config.dtype == "float32"
    faults = ()
    if reproducible and differing:
        faults = (f"{differing} of {compared} elements differ between backends, 0 may",)
    dtype = config.dtype + (f" in {config.compute_dtype}" if config.compute_dtype else "")
    elements = sum(array.size for array in exact.values())
    return Row(problem.case.name, dtype, budget, cells, elements, differing, compared, faults)


def _cell(
    result: Result, exact: Arrays, units: Mapping[str, float], budget: float, narrow: str
) -> Cell:
    got = {**result.forward, **result.gradients}
    faults = []
    if result.flag_matters:
        faults.append("the output changes with `return_attention_scores`")
    for name, array in result.forward.items():
        if array.dtype.name != narrow:
            faults.append(f"{name} is {array.dtype.name}, not {narrow}")
    errors = {}
    for name, array in got.items():
        if array.shape != exact[name].shape:
            faults.append(f"{name} has shape {array.shape}, not {exact[name].shape}")
            continue
        errors[name] = _error(array, exact[name], units[name])
        if not errors[name] <= budget:
            faults.append(f"{name} is off by {errors[name]:.3g} units, {budget:.3g} may")
    worst = max(errors, key=lambda name: errors[name], default="")
    return Cell(errors.get(worst, math.inf), worst, errors, tuple(faults), bool(result.gradients))


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


def _differing(results: Mapping[str, Result]) -> tuple[int, int]:
    """How many elements differ in any bit between some two backends, and of how many."""
    differing = compared = 0
    every = [{**result.forward, **result.gradients} for result in results.values()]
    for name in dict.fromkeys(name for one in every for name in one):
        arrays = [one[name] for one in every if name in one]
        if len(arrays) < 2 or len({(a.shape, a.dtype) for a in arrays}) > 1:
            continue
        unlike = np.zeros(arrays[0].shape, bool)
        for one, other in itertools.pairwise(arrays):
            unlike |= ~((one == other) | (np.isnan(one) & np.isnan(other)))
        differing, compared = differing + int(unlike.sum()), compared + unlike.size
    return differing, compared
