"""Running sums that are rounded: the context over tiles of keys, the output over heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.precision import ROUGH, THEIRS, Rounding, formats, remaining
from anymha.parity.oracle.recipe import Arrays, Recipe, einsum, reads
from anymha.parity.stages.limits import computed_dtype

TILES = (128, 64, 32, 16, 8, 4, 2, 1, 3, 5, 6, 7, 10, 12, 20, 24, 48, 96, 256)
"""Numbers of keys in a tile, the usual ones first."""

MOST = 1 << 16
"""Of so many logits at most, and in no more than `STEPS` tiles."""

STEPS = 128


def rounded_sums(recipe: Recipe, evidence: Evidence) -> tuple[Cause, float, Recipe] | None:
    """The running sum that is rounded, where a candidate's numbers are those.

    Also the greatest error that is left, as a share of what the format explains, and the recipe.
    """
    expected = computed_dtype(evidence.reference or evidence.trace)
    before = evidence.distance(recipe)
    if recipe.stages["logits"].size > MOST or not 0 < before < ROUGH:
        return None
    found: list[tuple[float, str, str, str, Recipe]] = []
    for dtype, rounding in formats(expected):
        if dtype in ("bfloat16", "float16"):
            for words, stage, wrong in _rounded(recipe, rounding):
                found.append((evidence.distance(wrong) / before, dtype, words, stage, wrong))
    least = min((one[0] for one in found), default=np.inf)
    if not least <= THEIRS:
        return None
    _, dtype, words, stage, wrong = next(one for one in found if one[0] <= 1.1 * least)
    left = remaining(evidence, wrong, expected, dtype)
    fix = f"The reference computes in {expected}: add up in no fewer bits than that."
    return None if left > 1 else (Cause(f"rounded to {dtype}", words, stage, fix), left, wrong)


def _rounded(recipe: Recipe, rounding: Rounding) -> Iterator[tuple[str, str, Recipe]]:
    """What is rounded, in words, its stage, and the recipe."""
    keys = recipe.lengths[2]
    tiles = [n for n in TILES if n < keys <= n * STEPS]
    kinds = {
        "the running sum of the context": ("context",),
        "the running sum of the exponentials": ("sum",),
        "the running sums of the context and of the exponentials": ("context", "sum"),
        "the context so far, divided by its sum": ("divided",),
        "the sum of values by their probabilities": ("probabilities",),
    }
    for (words, what), tile in itertools.product(kinds.items(), (*tiles, keys)):
        each = "after each key" if tile == 1 else f"after each tile of {tile} keys"
        each = each if tile < keys else "before it is divided"
        step = partial(_by_tiles, rounding=rounding, tile=tile, what=what)
        if tile < keys or what == ("context",):
            yield f"{words}, {each}", "context", recipe.stepping("context", step)
    if recipe.heads[0] > 1:
        step = partial(_by_heads, rounding=rounding)
        words = "the running sum of the output, after each head"
        yield words, "output", recipe.stepping("output", step)


def _by_tiles(
    recipe: Recipe, stages: Arrays, rounding: Rounding, tile: int, what: tuple[str, ...]
) -> np.ndarray:
    """The context with running maxima over tiles of keys, rounded after each."""
    logits, shares = stages["masked_logits"], stages["dropped_probabilities"]
    values = stages["value"][:, :, reads(recipe)]
    batch, heads, queries, keys = logits.shape
    top = np.full((batch, heads, queries, 1), -np.inf)
    total = np.zeros_like(top)
    so_far = np.zeros((batch, heads, queries, values.shape[3]))
    for start in range(0, keys, tile):
        if "probabilities" in what:
            part = shares[..., start : start + tile], values[:, start : start + tile]
            so_far = rounding(so_far + einsum("bhts,bshv->bhtv", *part))
            continue
        own = logits[..., start : start + tile]
        new = np.maximum(top, own.max(-1, keepdims=True))
        safe = np.where(np.isfinite(new), new, 0.0)
        old, weights = np.exp(top - safe), np.exp(own - safe)
        more = einsum("bhts,bshv->bhtv", weights, values[:, start : start + tile])
        before, total, top = total, old * total + weights.sum(-1, keepdims=True), new
        if "divided" in what:
            whole = np.where(total > 0, total, 1.0)
            so_far = rounding((old * before * so_far + more) / whole)
            continue
        so_far = old * so_far + more
        so_far = rounding(so_far) if "context" in what else so_far
        total = rounding(total) if "sum" in what else total
    if "probabilities" in what:
        return np.swapaxes(so_far, 1, 2)
    if "divided" not in what:
        so_far = so_far / np.where(total > 0, total, 1.0)
    # Sinks and the like take a share of each row, and leave less to its keys.
    return np.swapaxes(so_far * shares.sum(-1, keepdims=True), 1, 2)


def _by_heads(recipe: Recipe, stages: Arrays, rounding: Rounding) -> np.ndarray:
    """The output as a sum over heads, rounded after each."""
    kernel = recipe.weights["output.kernel"]
    so_far = np.zeros(())
    for head in range(recipe.heads[0]):
        more = einsum("btv,vo->bto", stages["context"][:, :, head], kernel[head])
        so_far = rounding(so_far + more)
    return so_far + recipe.weights.get("output.bias", 0.0)
