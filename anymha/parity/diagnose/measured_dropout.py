"""Dropout that is left on with the same numbers in each call: which numbers it drops is measured.

A stage that is told, or seen through the output, tells them at once. Those of probabilities are
solved for: the context of a head is linear in its probabilities, so there must be no more keys than
features, of all heads and sequences together that drop the same. Of some keys more every choice is
tried, at the rates that models use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.measured import number
from anymha.parity.diagnose.measured_mask import context_of
from anymha.parity.diagnose.scaled_stages import RATES
from anymha.parity.oracle.recipe import Arrays, Recipe, reads

SEEN = 0.02
"""What is smaller, as a part of the greatest, is lost in rounding."""

NEAR = 0.05
"""How far a factor may be from zero, or from that of what is kept."""

LEFT = 1e-4
"""What a choice of keys may leave of a context, as a part of what all keys add."""

MOST_MORE = 8
"""Of no more keys than features and this every choice is tried."""

UNLIKELY = 5.0
"""How many standard deviations the share of what is dropped may be from the rate."""

WHOLE = 1 / 65536
"""Of what the rates of the generator are whole multiples."""

FIX = "Two calls give one result, as with a fixed key: switch the candidate to evaluation."


def measured_dropout(recipe: Recipe, reported: Arrays) -> tuple[Cause, Recipe] | None:
    """The dropout of probabilities, of the context or of the output that gives what is reported."""
    for stage, got in _told(recipe, reported):
        exact = recipe.stages[stage]
        counts = np.abs(exact) > SEEN * np.max(np.abs(exact), initial=0.0)
        ratios = np.divide(got, exact, out=np.zeros_like(got), where=exact != 0)
        factors = _factors(ratios, counts)
        if factors is not None:
            return _cause(stage, *factors), recipe.after(
                (stage,), lambda x, kept=factors[0]: x * kept)  # fmt: skip
    context = context_of(recipe, reported)
    if context is None:
        return None
    for axes in ((), (1,), (0, 1), (0,)):
        found = _solved(recipe, context, axes) or (None if axes else _chosen(recipe, context))
        if found is not None:
            kept, factor, count = found
            alike = " and ".join(("sequences", "heads")[axis] for axis in axes)
            cause = _cause("dropped_probabilities", kept, factor, count, alike)
            return cause, recipe.but(kept=kept if recipe.kept is None else kept * recipe.kept)
    return None


def other_factors(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Other factors of what a call's dropout keeps, by words for each, as fields of a recipe.

    A port takes its factor from the rate as it is given, not as the generator rounds it.
    """
    kept, every = np.asarray(recipe.kept), {"does not act": None}
    factor = float(kept.max(initial=0.0))
    share, ones = 1 / max(factor, 1.0), np.where(kept > 0, 1.0, 0.0)  # the share that is kept
    given = round(share, 3)
    for own in (share, *([given] if 0 < abs(given - share) <= WHOLE else [])):
        of, what = f", of a rate of {number(1 - own)}" * (own != share), "kept probabilities are"
        every |= {
            f"{what} not scaled by 1/(1 - rate){of}": own * kept,
            f"{what} scaled by 1/(1 - rate) twice{of}": kept / own,
            f"{what} scaled by 1 - rate, not by 1/(1 - rate){of}": own * ones,
        }
        if 0 < own < 1:
            every[f"{what} scaled by 1/rate, not by 1/(1 - rate){of}"] = ones / (1 - own)
    return {words: {"kept": array} for words, array in every.items()}


def _told(recipe: Recipe, reported: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    for stage in ("probabilities", "dropped_probabilities", "context", "output"):
        got = context_of(recipe, reported) if stage == "context" else reported.get(stage)
        if got is not None and got.shape == recipe.stages[stage].shape:
            yield stage, got


def _terms(recipe: Recipe) -> np.ndarray:
    """What each key adds to the context, (B, H, T, d, S)."""
    values = recipe.stages["value"][:, :, reads(recipe)].transpose(0, 2, 3, 1)  # (B, H, d, S)
    return recipe.stages["dropped_probabilities"][:, :, :, None] * values[:, :, None]


def _chosen(recipe: Recipe, context: np.ndarray) -> tuple[np.ndarray, float, int] | None:
    """As `_solved`, of more keys than features: every choice of those that are more is tried."""
    terms, got = _terms(recipe), context.swapaxes(1, 2)
    *_, width, keys = terms.shape
    if not width < keys <= width + MOST_MORE or not np.all(np.isfinite(terms)):
        return None
    terms, got = terms.reshape(-1, width, keys), got.reshape(-1, width)
    choices = np.indices((2,) * (keys - width)).reshape(keys - width, -1).astype(np.float64)
    for rate in RATES:
        kept = np.ones((len(got), keys))
        for row, own, target in zip(kept, terms, (1 - rate) * got, strict=True):
            # What adds most is solved for, beside each choice of the rest.
            order = np.argsort(np.linalg.norm(own, axis=0))
            few, most = order[: keys - width], order[keys - width :]
            rest = target[:, None] - own[:, few] @ choices
            bits = np.clip(np.round(np.linalg.pinv(own[:, most]) @ rest), 0, 1)
            left = np.linalg.norm(rest - own[:, most] @ bits, axis=0)
            best = int(np.argmin(left))
            if not left[best] <= LEFT * np.linalg.norm(own):
                break
            row[few], row[most] = choices[:, best], bits[:, best]
        else:
            sizes = np.linalg.norm(terms, axis=1)
            factors = _factors(kept / (1 - rate), sizes > SEEN * sizes.max())
            shape = recipe.stages["probabilities"].shape
            return factors and (factors[0].reshape(shape), *factors[1:])
    return None


def _solved(
    recipe: Recipe, context: np.ndarray, axes: tuple[int, ...]
) -> tuple[np.ndarray, float, int] | None:
    """The factors of the probabilities, alike along sequences (0) or heads (1): see `_factors`."""
    terms = _terms(recipe)
    got = context.swapaxes(1, 2)[..., None]  # (B, H, T, d, 1)
    batch, heads, queries, width, keys = terms.shape
    alone = [1 if axis in axes else n for axis, n in enumerate((batch, heads))]
    if any(n == 1 for axis, n in enumerate((batch, heads)) if axis in axes):
        return None
    rows = batch * heads * width // (alone[0] * alone[1])
    order = (*(a for a in (0, 1, 2) if a not in axes), *axes, 3, 4)
    terms, got = (a.transpose(order).reshape(*alone, queries, rows, -1) for a in (terms, got))
    sizes = np.linalg.norm(terms, axis=-2)  # (.., T, S)
    if rows < keys or not (np.all(np.isfinite(terms)) and np.all(np.isfinite(got))):
        return None
    columns = terms / np.where(sizes > 0, sizes, 1.0)[..., None, :]
    factors = (np.linalg.pinv(columns, rcond=1e-5) @ got)[..., 0] / np.where(sizes > 0, sizes, 1.0)
    return _factors(factors, sizes > SEEN * sizes.max())


def _factors(ratios: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float, int] | None:
    """Zero or one factor above one, how great it is and how many are zero; None of others.

    As many must be zero as the rate of the factor says, as far as chance allows.
    """
    kept = ratios > 0.5
    if not np.any(kept & counts) or not np.any(counts & ~kept):
        return None
    factor = float(np.median(ratios[kept & counts]))
    factors, rate = np.where(kept | ~counts, factor, 0.0), 1 - 1 / max(factor, 1.0)
    total, dropped = int(counts.sum()), int((counts & ~kept).sum())
    chance = UNLIKELY * np.sqrt(rate * (1 - rate) * total) + 1
    if np.max(np.abs(ratios - factors)[counts]) > NEAR or abs(dropped - rate * total) > chance:
        return None
    return np.where(kept, factor, 0.0), factor, dropped


def _cause(stage: str, kept: np.ndarray, factor: float, count: int, alike: str = "") -> Cause:
    shares = stage.endswith("probabilities")
    what = "probabilities" if shares else f"numbers of the {stage}"
    words = (f"measured: {count} of {kept.size} {what} are zero, the others multiplied by "
             f"{number(factor)}, as of a rate of {number(1 - 1 / factor)}")  # fmt: skip
    words += f", the same for all {alike}" if alike else ""
    name = "dropout left on" if shares else f"dropout of the {stage} left on"
    return Cause(name, words, stage, FIX)
