"""Mistakes with a number in them, which is measured: the one that fits the results best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anymha.parity.diagnose.evidence import Evidence, length
from anymha.parity.oracle.recipe import Recipe

STEPS = 12
"""How often a fitted number is improved."""

NEARER = 0.9
"""A number that leaves more of the differences is of no use."""

BETWEEN = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
"""Where, between two starts, a search looks too."""

TURNS = 4
"""How often a search begins anew in a smaller room, as long as each leaves half as much."""

SMALL = 1e-4
"""By how much, of the distance between two starts, a number is changed to see its effect."""

SETTLED = 1e-6
"""A number is found where a step takes no more than this share of the squared differences."""


FINEST = 1e-6
"""In what room a number is found that is looked for without slopes."""


@dataclass(frozen=True)
class Family:
    """Recipes that differ in one number."""

    make: Callable[[float], Recipe]  # The recipe with this number
    starts: Sequence[float]  # Numbers from which the search begins, in order
    words: Callable[[float], str]  # Words for the number
    # The recipes of the starts, kept with what was computed of them; None: they are made anew
    begun: Sequence[Recipe] | None = None

    def kept(self) -> Family:
        """The family with the recipes of its starts, for one evidence after another."""
        return replace(self, begun=[self.make(start) for start in self.starts])


Families = Callable[[Recipe], Iterator[Family]]
"""Makes the families that have a mistake, each with another number, from a right recipe."""


def fitted(family: Family, evidence: Evidence, before: float) -> tuple[str, Recipe] | None:
    """The recipe of a family that is nearest to the evidence, with words for its number.

    None where the family comes no nearer than `before`, the distance of the right recipe.
    """
    starts = np.asarray(family.starts, float)
    with np.errstate(all="ignore"):
        recipes = map(family.make, starts) if family.begun is None else family.begun
        far = [evidence.distance(recipe) for recipe in recipes]
        best = int(np.argmin(far))
        if not far[best] <= before * (1 + 1e-9) or max(far) == far[best]:
            return None  # the last: it changes nothing that is reported
        room = float(np.max(np.abs(np.diff(starts)[max(best - 1, 0) : best + 1]), initial=1e-3))
        value, left = float(starts[best]), far[best]
        recipe = family.make(value) if family.begun is None else family.begun[best]
        for _ in range(TURNS):  # slopes alone are no guide where numbers are cut off
            begin, before_it = value, left
            for one in (begin + part * room for part in BETWEEN):
                other = family.make(one)
                far_off = evidence.distance(other)
                if far_off < left:
                    value, recipe, left = one, other, far_off
            value, recipe, apart = _improved(family, evidence, value, recipe, room)
            left, room = length(apart), room / 8
            if not 0 < left < before_it / 2:
                break
        if not left < NEARER * before:
            return None
    return family.words(value), recipe


def _improved(
    family: Family, evidence: Evidence, value: float, recipe: Recipe, room: float
) -> tuple[float, Recipe, np.ndarray]:
    """Gauss and Newton's steps from a value, none longer than the room between two starts.

    Returned are the value, its recipe, and what this leaves.
    """
    apart = evidence.differences(recipe)
    for _ in range(STEPS):
        small = SMALL * room
        slope = (apart - evidence.differences(family.make(value + small))) / small
        step = float(slope @ apart) / (float(slope @ slope) or 1.0)
        least, most = min(family.starts) - value, max(family.starts) - value
        step = float(np.clip(np.clip(step, -room, room), least, most))
        for _ in range(4):
            made = family.make(value + step)
            nearer = evidence.differences(made)
            if nearer @ nearer <= apart @ apart:
                break
            step /= 4
        else:
            break
        gained = apart @ apart - nearer @ nearer
        value, recipe, apart = value + step, made, nearer
        if abs(step) < 1e-9 * room or gained < SETTLED * (apart @ apart):
            break
        room = max(4 * abs(step), 1e-6)
    return value, recipe, apart


def nearest(
    distance: Callable[[float], float], starts: Sequence[float] | np.ndarray, finest: float = FINEST
) -> float:
    """The number whose distance is least, from starts at equal steps, in ever smaller rooms.

    It needs no slopes: the distance may go by steps.
    """
    values, best = np.asarray(starts, float), float(starts[0])
    room = float(np.abs(values[1] - values[0]))
    while room > finest:
        best = float(min(values, key=distance))
        values = best + room * np.linspace(-1, 1, 9)
        room /= 4
    return best


def number(value: float) -> str:
    """A measured number, as short as it is certain; what is almost 1 is told from it."""
    short = f"{value:.3g}"
    return f"{value:.6g}" if short == "1" else short
