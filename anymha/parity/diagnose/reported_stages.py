"""Stages that are right, but reported in other axes or with a factor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.measured import number
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.trace import Trace

AXES = {"query": "BTHd", "key": "BSHd", "value": "BSHd", "logits": "BHTS",
        "masked_logits": "BHTS", "probabilities": "BHTS", "dropped_probabilities": "BHTS",
        "context": "BTHd", "scores": "BHTS"}  # fmt: skip
"""The axes in which a stage is reported: batch, queries T, keys S, heads, width d."""


def told_otherwise(
    recipe: Recipe, trace: Trace, reported: Arrays, reference: Trace | None
) -> Diagnosis:
    """The stages that are reported in another form, where all is right; else no cause."""
    evidence = Evidence(trace, reported, reference)
    errors = evidence.errors(recipe)
    wrong = [name for name, error in errors.items() if not error <= 1]
    if not wrong or "output" in wrong or not set(wrong) <= set(AXES):
        return Diagnosis()
    causes, right = [], dict(reported)
    for name in wrong:
        exact = recipe.stages["probabilities" if name == "scores" else name]
        for words, array in _forms(name, reported[name], exact):
            one = Evidence(trace, {name: array}, reference)
            if one.errors(recipe)[name] <= 1:
                axes = ", ".join(AXES[name])
                fix = f"Report the {name} as ({axes}), without a factor: all that follows is right."
                causes.append(Cause(f"the {name} is reported {words}", "", name, fix))
                right[name] = array
                break
    if len(causes) < len(wrong):
        return Diagnosis()
    return Diagnosis(tuple(causes), max(Evidence(trace, right, reference).errors(recipe).values()))


def _forms(name: str, got: np.ndarray, exact: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What was reported, as the stage's own axes: from other orders and folds of them."""
    axes = AXES[name]
    if got.size != exact.size:
        return
    for order in itertools.permutations(range(4)):
        shape = [exact.shape[i] for i in order]
        back = np.transpose(got.reshape(shape), np.argsort(order))
        if back.shape != got.shape or order != (0, 1, 2, 3):
            folded = "" if list(got.shape) == shape else f", in the shape {got.shape}"
            yield f"as ({', '.join(axes[i] for i in order)}){folded}", back
    finite = np.isfinite(exact) & np.isfinite(got) if got.shape == exact.shape else np.zeros(1)
    if np.any(finite) and name != "probabilities":
        own = exact[finite]
        factor = float(own @ got[finite]) / (float(own @ own) or 1.0)
        if factor:
            yield f"with a factor of {number(factor)} in it, a scale", got / factor
