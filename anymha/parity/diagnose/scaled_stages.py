"""Probabilities or a context with one factor: it is measured, and told as what it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.measured import number
from anymha.parity.oracle.recipe import Arrays, Recipe

CLEAR = 1e-3
"""A factor differs where it is off by more than this part."""

NEAR = 1e-4
"""How near a measured factor is to one that has a meaning, as a part of it."""

LEFT = 0.05
"""What a factor may leave of the differences of its stage."""

RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Rates of dropout that models use."""

FIX = "Probabilities add up to 1, the context is their sum of the values: give neither a factor."


def scaled_stages(
    recipe: Recipe, reported: Arrays
) -> Iterator[tuple[tuple[Cause, ...], Recipe]]:  # fmt: skip
    """The recipes in which a stage that is told has a factor."""
    for name in ("probabilities", "dropped_probabilities", "context"):
        got, exact = reported.get(name), recipe.stages[name]
        if got is None or got.shape != exact.shape or not np.all(np.isfinite(got)):
            continue
        size = float(np.vdot(exact, exact))
        factor = float(np.vdot(exact, got)) / (size or 1.0)
        left, before = (float(np.linalg.norm(got - f * exact)) for f in (factor, 1.0))
        if size and abs(factor - 1) > CLEAR and left <= LEFT * before:
            known = _meanings(recipe, factor)
            factor = next(iter(known), factor)
            words = f"multiplied by {number(factor)}{told_as(known)}"
            wrong = recipe.after((name,), lambda x, factor=factor: factor * x)
            verb = f"{name.replace('_', ' ')} scaled"
            yield (Cause(verb, words, name, FIX),), wrong


def told_as(known: dict[float, list[str]]) -> str:
    """What a factor may be, in words; empty where nothing is known."""
    words = [one for each in known.values() for one in each]
    return f", {' or '.join(words[:3])}" if words else ""


def meaning(recipe: Recipe, factor: float) -> str:
    """What a factor may be in a recipe, in words; empty where it is no number of it."""
    return told_as(_meanings(recipe, factor))


def _meanings(recipe: Recipe, factor: float) -> dict[float, list[str]]:
    """The factor that is meant, with the words for it."""
    _, queries, keys = recipe.lengths
    width = recipe.stages["value"].shape[3]
    found: dict[float, list[str]] = {}
    for what, count in {
        "the number of keys": keys, "the number of queries": queries,
        "the number of heads": recipe.heads[0], "the width of a head": width,
        "the number of key heads": recipe.heads[1],
    }.items():  # fmt: skip
        for of, value in (("", float(count)), ("the root of ", math.sqrt(count))):
            if value == 1 or (what.endswith("key heads") and count == recipe.heads[0]):
                continue
            for verb, own in (("divided", 1 / value), ("multiplied", value)):
                if math.isclose(own, factor, rel_tol=NEAR):
                    found.setdefault(own, []).append(f"as {verb} by {of}{what}")
    for rate in RATES:
        if math.isclose(1 / (1 - rate), factor, rel_tol=NEAR):
            words = f"the 1/(1 - rate) of dropout at {rate:g}, with nothing dropped"
            found.setdefault(1 / (1 - rate), []).append(words)
    return dict(list(found.items())[:1])
