"""Stages that are right, but reported in other axes or with a factor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.evidence import MASKED, Evidence
from anymha.parity.diagnose.measured import number
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.trace import Trace

AXES = {"query": "BTHd", "key": "BSHd", "value": "BSHd", "logits": "BHTS",
        "masked_logits": "BHTS", "probabilities": "BHTS", "dropped_probabilities": "BHTS",
        "context": "BTHd", "output": "BTO", "scores": "BHTS"}  # fmt: skip
"""The axes in which a stage is reported: batch, queries T, keys S, heads, width d."""


def told_otherwise(
    recipe: Recipe, trace: Trace, reported: Arrays, reference: Trace | None
) -> Diagnosis:
    """The stages that are reported in another form, where all is right; else no cause."""
    evidence = Evidence(trace, reported, reference)
    errors = evidence.errors(recipe)
    shapes = {name: a.shape for name, a in (recipe.stages | {"scores": recipe.stages[
        "probabilities"]}).items()}  # fmt: skip
    wrong = [n for n, error in errors.items() if not error <= 1 or reported[n].shape != shapes[n]]
    right_shape = "output" in reported and reported["output"].shape == recipe.stages["output"].shape
    if not wrong or ("output" in wrong and right_shape):
        return Diagnosis()
    causes, right = [], dict(reported)
    biased = recipe.bias is not None and np.any(recipe.bias)
    for name in wrong:
        if name == "logits" and biased and _fits(evidence, recipe, reported[name] - recipe.bias):
            fix = "Report the logits without the attention bias: all that follows is right."
            words = "the logits are reported with the attention bias in them"
            causes.append(Cause(words, "", name, fix))
            right[name] = reported[name] - recipe.bias
            continue
        exact = recipe.stages["probabilities" if name == "scores" else name]
        for words, array in _forms(name, reported[name], exact):
            one = Evidence(trace, {name: array}, reference)
            if one.errors(recipe)[name] <= 1:
                axes = ", ".join(AXES[name])
                fix = f"Report the {name} as ({axes}), without a factor: all that follows is right."
                verb = "are" if name.endswith("s") else "is"
                causes.append(Cause(f"the {name} {verb} reported {words}", "", name, fix))
                right[name] = array
                break
    if len(causes) < len(wrong):
        return Diagnosis()
    return Diagnosis(tuple(causes), max(Evidence(trace, right, reference).errors(recipe).values()))


def with_told_bias(recipe: Recipe, reported: Arrays) -> bool:
    """Whether logits are told that are the masked ones already, where there is a bias."""
    if recipe.bias is None or not np.any(recipe.bias):
        return False
    got, masked = reported.get("logits"), reported.get("masked_logits")
    if got is None or masked is None or masked.shape != got.shape:
        return False
    return bool(np.all((got == masked) | (masked < -MASKED)))


def _fits(evidence: Evidence, recipe: Recipe, logits: np.ndarray) -> bool:
    one = Evidence(evidence.trace, {"logits": logits}, evidence.reference)
    return one.errors(recipe)["logits"] <= 1


def _forms(name: str, got: np.ndarray, exact: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What was reported, as the stage's own axes: from other orders and folds of them."""
    axes = AXES[name]
    if got.size != exact.size:
        return
    for order in itertools.permutations(range(exact.ndim)):
        shape = [exact.shape[i] for i in order]
        back = np.transpose(got.reshape(shape), np.argsort(order))
        if back.shape != got.shape or order != tuple(range(exact.ndim)):
            folded = "" if list(got.shape) == shape else f", in the shape {got.shape}"
            yield f"as ({', '.join(axes[i] for i in order)}){folded}", back
    if name == "output":
        return
    if got.shape == exact.shape and "H" in axes:
        heads, told = (np.moveaxis(a, axes.index("H"), 0) for a in (exact, got))
        apart = [[np.nanmax(np.abs(_finite(one - other))) for one in heads] for other in told]
        order = tuple(np.argmin(apart, 1))
        if sorted(order) == list(range(len(order))) != list(order):
            back = np.moveaxis(told[np.argsort(order)], 0, axes.index("H"))
            yield f"with its heads in the order {', '.join(map(str, order))}", back
    if got.shape != exact.shape or name == "probabilities":
        return
    finite = np.isfinite(exact) & np.isfinite(got)
    if np.any(finite):
        own = exact[finite]
        factor = float(own @ got[finite]) / (float(own @ own) or 1.0)
        if factor:
            yield f"with a factor of {number(factor)} in it, a scale", got / factor


def _finite(array: np.ndarray) -> np.ndarray:
    """With zero where two numbers are both infinite."""
    return np.where(np.isnan(array), 0.0, array)
