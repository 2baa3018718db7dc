"""How far half precision takes results from the exact ones, where each stage is rounded.

Half precision may round the result of each projection, the probabilities, the context and the
output to its dtype, with float32 between, what the options make of each, and likewise the gradients
of these on the way back. The sums of the oracle are done again with random errors of at most half a
distance between two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import ml_dtypes
import numpy as np

from anymha.framework.dtypes import BITS
from anymha.parity.oracle.oracle import results_of
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Step, einsum

SAMPLES = 8
"""How often results are computed with other errors."""

ROUNDED = ("query", "key", "value", "probabilities", "context", "output")
"""The stages whose results are rounded."""


def rounding_errors(
    recipe: Recipe, d_output: np.ndarray, d_scores: np.ndarray, dtype: str,
    stages: Collection[str] = ROUNDED,
) -> Arrays:  # fmt: skip
    """The greatest error of each element of output, scores and gradients, by name.

    There is none in float32 and float64, whose stages are not rounded further.

    Args:
        recipe: The computation.
        d_output: The gradient of the output, (B, T, O).
        d_scores: The gradient of the scores, (B, H, T, S).
        dtype: The dtype in which the layer computes.
        stages: Those that are rounded; others' layers round every one.
    """
    if BITS[dtype] > 16:
        return {}
    d_output, d_scores = np.asarray(d_output, np.float64), np.asarray(d_scores, np.float64)
    rounded = _roundings(dtype)

    def rounding(step: Step) -> Step:
        return lambda recipe, stages: rounded(step(recipe, stages))

    def sums(formula: str, *arrays: np.ndarray) -> np.ndarray:
        return rounded(einsum(formula, *arrays))

    exact = results_of(recipe, d_output, d_scores, einsum, {})
    steps = {n: rounding(s) if n in stages else s for n, s in recipe.steps.items()}
    around = _Rounding(rounded, ()), _Rounding(rounded, stages)
    sections = (around[0], *recipe.sections, around[1]) if recipe.sections else ()
    errors = {name: np.zeros_like(array) for name, array in exact.items()}
    changes: dict[str, Callable[..., np.ndarray]] = {"logits": rounded}
    for _ in range(SAMPLES):
        wrong = recipe.but(steps=steps, sections=sections)
        found = results_of(wrong, d_output, d_scores, sums, changes)
        for name, array in found.items():
            np.maximum(errors[name], np.abs(array - exact[name]), out=errors[name])
    return errors


class _Rounding(Section):
    """Rounds what is made of some stages before it, and every gradient on the way back."""

    option = "rounding"

    def __init__(self, rounded: Callable[[np.ndarray], np.ndarray], stages: Collection[str]):
        super().__init__(None)
        self.rounded, self.stages = rounded, stages

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The stage, rounded."""
        return self.rounded(array) if stage in self.stages else array

    def backward(
        self, stage: str, gradient: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:  # fmt: skip
        """The gradient, rounded."""
        return self.rounded(gradient)


def output_errors(recipe: Recipe, dtype: str) -> np.ndarray:
    """Sizes of errors of the output, several of each number, (SAMPLES, B, T, O).

    Each step is rounded, and what the options make of its result once more.
    """
    rounded, steps = _roundings(dtype), {}
    for name, own in recipe.steps.items():
        once = recipe.stepping(name, lambda r, stages, own=own: rounded(own(r, stages)))
        sections = bool(recipe.sections)
        steps[name] = lambda r, stages, once=once, name=name, more=sections: (
            rounded(once.stage(name, stages)) if more else once.stage(name, stages)
        )
    exact = recipe.stages["output"]
    every = (recipe.but(steps=dict(steps), sections=()) for _ in range(SAMPLES))
    return np.abs(np.stack([one.stages["output"] - exact for one in every]))


def _roundings(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function that adds random errors, of at most half a distance between two numbers."""
    info = ml_dtypes.finfo(dtype)
    eps, least = float(info.eps), float(info.smallest_subnormal)
    generator = np.random.default_rng(0)

    def rounded(array: np.ndarray) -> np.ndarray:
        # The numbers below the smallest normal one are as far apart as those above it; none is off
        # by more than itself.
        apart = np.maximum(eps * np.abs(array), np.minimum(least, 2 * np.abs(array)))
        noise = apart * generator.uniform(-0.5, 0.5, np.shape(array))
        return array + np.where(np.isfinite(noise), noise, 0.0)

    return rounded
