"""How far results may be from float64: the stages of a trace, the quantities of a problem.

The error of a quantity of a problem may be

    eps * (max |exact| / 2 + sums * magnitude),

eps being the distance from 1 to the next number of its dtype: half an eps for the last rounding,
and what the sums before it lose, which grows with the terms that they are made of, however much
these cancel. Half precision may also round the result of each stage: twice what that was seen to
do (`anymha.parity.oracle.rounding`) is added. One unit is this over ``1/2 + sums``: so every
quantity of a problem may be off by ``1/2 + sums`` units, and without such stages a unit is about
the rounding of one number as great as its greatest.
"""

from __future__ import annotations

import math

import numpy as np

from anymha.framework.dtypes import accumulation_dtype, output_dtype
from anymha.parity.oracle.cases import OracleProblem
from anymha.parity.oracle.oracle import Truth
from anymha.parity.oracle.recipe import Recipe, reads
from anymha.parity.stages.structure import spread_limits
from anymha.parity.stages.tolerance import eps, smallest, tolerance
from anymha.parity.stages.trace import Trace, name_of_dtype

UNSQUARED = smallest("float64") ** 0.5
"""Sizes are roots of sums of squares in float64, where the squares of smaller numbers are 0."""


class Tolerances:
    """How far a trace may be from float64 at each stage, in the dtype of the reference at most."""

    def __init__(self, recipe: Recipe, reference: Trace | None = None) -> None:
        self.reference, self.recipe = reference, recipe
        widths = [array.shape[-1] for array in recipe.inputs.values()]
        widths += [recipe.weights[f"{name}.kernel"].shape[2] for name in ("query", "value")]
        heads, width, _ = recipe.weights["output.kernel"].shape
        more = recipe.computed.get("terms", 0)  # of a softmax over more than the keys
        self.length = max(*widths, recipe.lengths[2], heads * width, more)
        # What is turned again is rounded again: each time it is a sum of two products more.
        self.length += 2 * recipe.computed.get("turns", 0)

    def of(self, stage: str, trace: Trace) -> np.ndarray:
        """The greatest error that rounding explains, of each position; broadcasts to the stage."""
        reference = self.reference
        if reference and eps(computed_dtype(trace)) > eps(computed_dtype(reference)):
            trace = reference
        dtype = computed_dtype(trace)
        relative = tolerance(
            dtype, self.length, 1.0, accumulated=trace.accumulated, stored=trace.stored
        )
        # Angles of positions are computed in float32 at least, in one product and no sum.
        own = min(eps(trace.accumulated or accumulation_dtype(dtype)), eps("float32"))
        lost = smallest(dtype) * self.length
        size = self.recipe.sizes_at(relative, own / relative, lost / relative)[stage]
        return relative * size + lost + UNSQUARED * self.length


def turned_away(recipe: Recipe, dtype: str) -> np.ndarray | None:
    """How much rounded angles of rotary positions change the logits of a query, (B, T, 1).

    None where nothing is turned. It needs no logits, so it may be asked of long sequences: with
    errors d of the numbers of queries and keys, as `Section.own_errors` has them, the logit of a
    query and a key is off by

        scale * sqrt(sum_i (d_qi k_i)^2 + (q_i d_ki)^2),

    here with the greatest number and error that any key has. Probabilities change by no greater a
    part than that; so does the output, a mean of values by them.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    stages = recipe.until("key")
    for name in ("query", "key"):
        errors = np.zeros(1)
        for section, taken in recipe.taken(name, stages):
            errors = section.sizes(name, errors, taken, recipe, stages)
            errors = np.hypot(errors, section.own_errors(name, taken, recipe, stages))
        if np.shape(errors) != stages[name].shape:
            return None
        found[name] = errors, np.abs(stages[name])
    heads = reads(recipe)
    (off, query), key = found["query"], found["key"]
    far, most = (np.nan_to_num(array[:, :, heads]).max(1, keepdims=True) for array in key)
    squares = np.sum(np.square(off * most) + np.square(query * far), axis=-1)
    changes = abs(recipe.scale) * np.sqrt(squares).max(-1, keepdims=True)
    return eps(accumulation_dtype(dtype)) * changes


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


def reproducible(trace: Trace) -> bool:
    """Whether the layer of a trace is in reproducible mode, where every bit is defined."""
    config = trace.config
    return config is not None and (config.dtype, config.compute_dtype) == ("float32", "float64")


def error_shares(apart: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Errors as shares of the errors that rounding explains; infinite where it explains none."""
    limits = spread_limits(limits, apart.shape)
    shares = np.where(apart > 0, np.inf, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        np.divide(apart, limits, out=shares, where=limits > 0)
    return np.nan_to_num(shares, nan=np.inf, posinf=np.inf)


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
        rounded = 2 * float(np.max(truth.rounding.get(name, 0.0), initial=0.0))
        units[name] = (coarse * (last + before) + rounded) / (0.5 + sums)
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
