"""Results compared with the oracle and with each other; units: `anymha.parity.stages.limits`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.framework.dtypes import output_dtype
from anymha.parity.matrix.checkpoint import RecordedResults
from anymha.parity.matrix.run import Result, Skipped
from anymha.parity.oracle.cases import Arrays, OracleProblem
from anymha.parity.oracle.oracle import Truth
from anymha.parity.stages.limits import longest_sum, units_of
from anymha.parity.stages.structure import count_differing
from anymha.parity.stages.tolerance import tolerance


@dataclass(frozen=True)
class Cell:
    """One backend on one case."""

    units: float  # The greatest error of any quantity, in its units
    worst: str  # The quantity that has it
    errors: Mapping[str, float]  # The error of each quantity, in its units
    faults: tuple[str, ...]  # What is wrong, in words; empty where the cell passes
    gradients: bool  # Whether gradients were compared

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True)
class Row:
    """One case on all backends."""

    name: str
    dtype: str  # Its dtypes, e.g. "float32" or "float32 in float64"
    budget: float  # The greatest error allowed, in units
    # By backend that ran it; a backend that raised has a cell with that fault
    cells: Mapping[str, Cell]
    elements: int  # How many elements each backend gave: outputs, scores and gradients
    differing: int  # How many of them differ in any bit between some two backends
    # How many of those are ties: the exact value lies so close to the middle between two numbers of
    # the dtype that float64 does not decide the rounding
    ties: int
    compared: int  # How many were compared between backends
    reproducible: bool  # Whether none may differ
    faults: tuple[str, ...] = ()  # What is wrong between backends, in words
    # Why a backend did not run it, by backend
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every backend that ran it passes, and they agree."""
        return not self.faults and all(cell.passed for cell in self.cells.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; an infinite error is null."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        plain |= {"faults": list(self.faults), "passed": self.passed}
        for name, cell in plain["cells"].items():
            cell["faults"] = list(cell["faults"])
            cell["passed"] = self.cells[name].passed
            cell["units"] = _finite(cell["units"])
            cell["errors"] = {k: _finite(v) for k, v in cell["errors"].items()}
        return plain


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def judge(
    problem: OracleProblem,
    truth: Truth,
    results: Mapping[str, Result | Skipped | Exception],
    recorded: RecordedResults | None = None,
) -> Row:
    """The verdict on each backend's results, and on their agreement.

    The results of another implementation, if there are recorded ones, are compared too.
    """
    config = problem.case.config
    computed = config.compute_dtype or config.dtype
    narrow = output_dtype(config.dtype, computed)
    exact = {"output": truth.output, "scores": truth.scores, **truth.gradients}
    budget, units = units_of(problem, truth)
    recorded_units = _recorded_units(problem, truth, recorded, units) if recorded else {}
    ran = {name: result for name, result in results.items() if isinstance(result, Result)}
    cells = {}
    for name, result in results.items():
        if isinstance(result, Result):
            errors, faults = _errors(result, exact, units, problem, narrow)
            if recorded:
                errors |= _recorded_errors(result, recorded, recorded_units)
            cells[name] = _cell(errors, faults, budget, bool(result.gradients))
        elif isinstance(result, Exception):
            fault = f"raised {type(result).__name__}: {result}"
            cells[name] = Cell(math.inf, "", {}, (fault,), False)
    close = {
        name: tolerance(computed, longest_sum(problem), float(np.max(array, initial=0.0)))
        for name, array in truth.magnitudes.items()
    }
    every = [{**result.forward, **result.gradients} for result in ran.values()]
    reproducible = computed == "float64" and config.dtype == "float32"
    differing, ties, compared = count_differing(every, exact, close if reproducible else None)
    faults = ()
    if reproducible and differing > ties:
        faults = (
            f"{differing - ties} of {compared} elements differ between backends, of 0 allowed",
        )
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
        {name: one.reason for name, one in results.items() if isinstance(one, Skipped)},
    )


def _cell(errors: Mapping[str, float], faults: list[str], budget: float, gradients: bool) -> Cell:
    for name, error in errors.items():
        if not error <= budget:
            faults.append(f"{name} is off by {error:.3g} units, of {budget:.3g} allowed")
    worst = max(errors, key=lambda name: errors[name], default="")
    return Cell(errors.get(worst, math.inf), worst, errors, tuple(faults), gradients)


def _errors(
    result: Result, exact: Arrays, units: Mapping[str, float], problem: OracleProblem, narrow: str
) -> tuple[dict[str, float], list[str]]:
    """The error of each quantity in its units, and faults apart from numbers."""
    errors, faults = {}, []
    if result.flag_matters:
        faults.append("the output changes with `return_attention_scores`")
    got = {**result.forward, **result.gradients}
    arguments = {**problem.weights, **problem.inputs}
    wanted = exact if result.gradients else ("output", "scores")
    faults += [f"{name} is missing" for name in wanted if name not in got]
    for name, array in got.items():
        if name not in exact:
            faults.append(f"{name} should not be there")
            continue
        dtype = arguments[name].dtype.name if name in arguments else narrow
        if array.dtype.name != dtype:
            faults.append(f"{name} is {array.dtype.name}, not {dtype}")
        if array.shape != exact[name].shape:
            faults.append(f"{name} has shape {array.shape}, not {exact[name].shape}")
        else:
            errors[name] = _error(array, exact[name], units[name])
    return errors, faults


def _recorded_errors(
    result: Result, recorded: RecordedResults, units: Mapping[str, float]
) -> dict[str, float]:
    """The errors against the results of another implementation, at the positions that count."""
    errors = {}
    for name, array in recorded.results.items():
        got, counts = result.forward.get(name, array[:0]), recorded.counts
        if got.shape != array.shape:
            continue  # is a fault already
        if name == "scores":  # (B, H, T, S): some queries may be padding
            got, array = got.swapaxes(1, 2), array.swapaxes(1, 2)
        errors[f"recorded {name}"] = _error(got[counts], array[counts], units[name])
    return errors


def _recorded_units(
    problem: OracleProblem, truth: Truth, recorded: RecordedResults, units: Mapping[str, float]
) -> dict[str, float]:
    """Units for the errors against recorded results, which have roundings of their own.

    The unit is that of the coarser of both; the recorded result was computed in its own dtype.
    """
    budget, length = units_of(problem, truth)[0], longest_sum(problem)
    coarser = {}
    for name, array in recorded.results.items():
        size = float(np.max(truth.magnitudes[name], initial=0.0))
        coarser[name] = max(units[name], tolerance(array.dtype.name, length, size) / budget)
    return coarser


def _error(got: np.ndarray, exact: np.ndarray, unit: float) -> float:
    """The greatest error in units; NaN or infinity where the other has a number is infinite."""
    got, exact = got.astype(np.float64), exact.astype(np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(exact)):
        return math.inf
    error = float(np.max(np.abs(np.nan_to_num(got) - np.nan_to_num(exact)), initial=0.0))
    return 0.0 if error == 0 else error / unit if unit else math.inf
