"""The error of each quantity of a problem that rounding explains, and its unit.

The error of a quantity may be

    eps * (max |exact| / 2 + sums * magnitude),

eps being the distance from 1 to the next number of its dtype: half an eps for the last rounding,
and what the sums before it lose, which grows with the terms that they are made of, however much
these cancel. One unit is this over ``1/2 + sums``: so every quantity of a problem may be off by
``1/2 + sums`` units, and a unit is about the rounding of one number as great as its greatest.
"""

from __future__ import annotations

import math

import numpy as np

from anymha.framework.dtypes import accumulation_dtype, output_dtype
from anymha.parity.oracle.cases import OracleProblem
from anymha.parity.oracle.oracle import Truth
from anymha.parity.stages.tolerance import eps, tolerance


def units_of(problem: OracleProblem, truth: Truth) -> tuple[float, dict[str, float]]:
    """The budget of the problem in units, and the unit of each quantity.

    A gradient has the dtype of what it is the gradient of, after a pass in the narrower one.
    """
    config = problem.case.config
    computed = config.compute_dtype or config.dtype
    narrow, working = output_dtype(config.dtype, computed), accumulation_dtype(computed)
    lost = tolerance(working, longest_sum(problem), 1.0) - eps(working) / 2
    sums = lost / eps(narrow)
    units = {}
    every = {"output": truth.output, "scores": truth.scores, **truth.gradients}
    for name, exact in every.items():
        coarse = eps(narrow) if name not in truth.gradients else max(eps(narrow), eps(config.dtype))
        last = float(np.max(np.abs(exact), initial=0.0)) / 2
        before = sums * float(np.max(truth.magnitudes[name], initial=0.0))
        units[name] = coarse * (last + before) / (0.5 + sums)
    return 0.5 + sums, units


def longest_sum(problem: OracleProblem) -> int:
    """The length of the longest sum: over features, or over all positions of queries or keys."""
    sides = []
    for name, weight in problem.weights.items():
        axes = 2 if name == "output.kernel" else 1  # of its inputs
        sides += [math.prod(weight.shape[:axes]), math.prod(weight.shape[axes:])]
    inputs = [a for name, a in problem.inputs.items() if name != "attention_bias"]
    positions = [math.prod(array.shape[:-1]) for array in inputs]
    return max(*sides, *positions)
