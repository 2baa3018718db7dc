"""Stages that are clipped, and heads in whole numbers with a factor that is fixed beforehand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.measured import Family, number
from anymha.parity.diagnose.precision import with_joined_sections
from anymha.parity.oracle.recipe import Recipe, Variants

HEADS = (
    ("key", "value"), ("key",), ("value",), ("query", "key", "value"), ("query", "key"), ("query",)
)  # fmt: skip
"""Stages that are bounded together."""

LEAST = 1 / 32
"""The least limit that is tried, as a part of the greatest number of the stages."""

RANGES = (1.0, 2.0, 4.0, 8.0, 0.5, 3.0, 5.0, 6.0, 10.0)
"""Greatest numbers that whole numbers of some bits stand for."""

FACTORS = {
    8: (1 / 128, 1 / 64, 1 / 32, 1 / 16, 0.1, 0.05, 0.025, 0.02, 0.01),
    4: (1 / 8, 1 / 4, 1 / 2, 0.1, 0.2),
}
"""Usual factors of whole numbers, by their bits."""


def clipped_stages(recipe: Recipe) -> Iterator[Family]:
    """Heads or the context cut at a limit; of logits that is "another softcap"."""
    for names in (*HEADS, ("context",)):
        peak = _peak(recipe, names)
        if not 0 < peak < np.inf:
            continue

        def make(power: float, names: tuple[str, ...] = names) -> Recipe:
            most = math.exp(power)
            return with_joined_sections(recipe).after(names, lambda x: np.clip(x, -most, most))

        def words(power: float, names: tuple[str, ...] = names) -> str:
            limit = number(math.exp(power))
            return f"{listed(names)} at {limit} and -{limit}"

        yield Family(make, tuple(math.log(peak) + np.linspace(math.log(LEAST), 0, 12)), words)


def _peak(recipe: Recipe, names: tuple[str, ...]) -> float:
    return max(float(np.max(np.abs(recipe.stages[n]), initial=0.0)) for n in names)


def _wrapped(whole: np.ndarray, most: int) -> np.ndarray:
    return (np.round(whole) + most + 1) % (2 * most + 2) - most - 1


_WAYS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "clipped to {low} and {most}": lambda x, most: np.clip(np.round(x), -most - 1, most),
    "clipped to -{most} and {most}": lambda x, most: np.clip(np.round(x), -most, most),
    "cut off in place of rounded, clipped to {low} and {most}": lambda x, most: np.clip(
        np.trunc(x), -most - 1, most
    ),
    "wrapped round beyond {most}": _wrapped,
}


def quantised_heads(recipe: Recipe) -> Variants:
    """Heads in whole numbers of some bits, with a factor that does not follow their size."""
    for bits, others in FACTORS.items():
        most = 2 ** (bits - 1) - 1
        factors = {f"{limit:g}/{most}": limit / most for limit in RANGES}
        factors |= {f"{factor:g}": factor for factor in others}
        for names in HEADS:
            peak = _peak(recipe, names)
            usable = {told: f for told, f in factors.items() if f < peak < f * most / LEAST}
            for (told, factor), (how, whole) in itertools.product(usable.items(), _WAYS.items()):

                def change(
                    x: np.ndarray, factor: float = factor, most: int = most,
                    whole: Callable[[np.ndarray, int], np.ndarray] = whole,
                ) -> np.ndarray:  # fmt: skip
                    return whole(x / factor, most) * factor

                words = how.format(low=-most - 1, most=most)
                detail = f"{listed(names)} in int{bits} with a factor of {told}, {words}"
                yield detail, with_joined_sections(recipe).after(names, change)
