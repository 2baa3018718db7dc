"""What stands around attention: factors of the output, and other arrays that are added to it.

The output is a sum: the heads brought together, and the bias. How often a candidate has each of
them, and the inputs, is measured by least squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.measured import number
from anymha.parity.diagnose.scaled_stages import meaning
from anymha.parity.oracle.recipe import Arrays, Recipe, Step

CLEAR = 1e-3
"""A factor differs where it is off by more than this."""

NEARER = 0.5
"""What a sum may leave of the differences; more, and it explains nothing."""


def around(recipe: Recipe, reported: Arrays) -> Iterator[tuple[tuple[Cause, ...], Recipe]]:
    """The recipes whose output has more or less of one or two terms, near to what is reported."""
    exact, got = recipe.stages["output"], reported.get("output")
    if got is not None and got.shape == exact.shape:
        for causes, more in sums(_terms(recipe, exact), exact, got, recipe):
            yield causes, recipe.stepping("output", _step(recipe, more))


def sums(
    terms: Arrays, exact: np.ndarray, got: np.ndarray, recipe: Recipe | None = None
) -> Iterator[tuple[tuple[Cause, ...], dict[str, float]]]:
    """How much more of one or two terms brings an output near to another, and what that means."""
    finite = np.isfinite(got) & np.isfinite(exact)
    if not np.any(finite):
        return
    apart = (got - exact)[finite]
    before, clear = float(apart @ apart), False
    for count in (1, 2):
        if clear:  # one term is enough
            return
        for chosen in itertools.combinations(terms, count):
            columns = np.stack([terms[name][finite] for name in chosen], -1)
            factors = np.linalg.lstsq(columns, apart, rcond=None)[0]
            left = apart - columns @ factors
            if not float(left @ left) <= NEARER**2 * before or min(abs(factors)) < CLEAR:
                continue
            clear = clear or float(left @ left) <= CLEAR**2 * before
            if _leaves_nothing(dict(zip(chosen, factors, strict=True))):
                continue
            more = dict(zip(chosen, map(_rounded, map(float, factors)), strict=True))
            yield tuple(_cause(name, factor, recipe) for name, factor in more.items()), more
            # Beside another mistake a factor is not measured well: a half or a whole is tried.
            near = {name: round(2 * factor) / 2 for name, factor in more.items()}
            if near != more and all(near.values()) and not _leaves_nothing(near):
                yield tuple(_cause(name, factor, recipe) for name, factor in near.items()), near


def _leaves_nothing(more: Mapping[str, float]) -> bool:
    """Whether nothing of the attention is left."""
    return any(abs(more.get(name, 0.0) + 1) < CLEAR for name in ("output", "heads"))


def _terms(recipe: Recipe, output: np.ndarray) -> Arrays:
    """The arrays of which a candidate may have more or less, by name."""
    bias = recipe.weights.get("output.bias")
    terms = {"output": output}
    if bias is not None and np.any(bias):
        whole = np.broadcast_to(bias, output.shape)
        terms |= {"heads": output - whole, "bias": whole}
    for name, x in recipe.inputs.items():
        if x.shape == output.shape and not any(np.array_equal(x, t) for t in terms.values()):
            terms[name] = x
    return terms


def _cause(name: str, factor: float, recipe: Recipe | None) -> Cause:
    if name in ("output", "heads"):
        words = {"output": "", "heads": ", the bias is not"}[name]
        times = number(1 + factor)
        known = "" if recipe is None else meaning(recipe, 1 + factor)
        fix = ("Return the output as it is: no factor, such as that of a dropout in evaluation or "
               "of a mean, belongs to it.")  # fmt: skip
        what = "negative" if abs(factor + 2) < CLEAR else f"multiplied by {times}{words}{known}"
        return Cause("output scaled", what, "output", fix)
    if name == "bias":
        fix = "Add the output's bias once."
        return Cause("output bias scaled", f"{number(1 + factor)} times", "output", fix)
    often = "" if abs(factor - 1) < CLEAR else f", {number(factor)} times"
    fix = "The residual connection is not of the layer: leave it to the block around it."
    return Cause("residual added", f"the {name}{often}", "output", fix)


def _rounded(factor: float) -> float:
    """A factor that is a short number but for rounding is this number."""
    short = round(factor, 3)
    return short if abs(factor - short) < 1e-5 else factor


def _step(recipe: Recipe, more: dict[str, float]) -> Step:
    own = recipe.steps["output"]

    def step(other: Recipe, stages: Arrays) -> np.ndarray:
        output = own(other, stages)
        terms = _terms(other, output)
        return output + sum(factor * terms[name] for name, factor in more.items() if name in terms)

    return step
