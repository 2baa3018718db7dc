"""`pairs`: few of the combinations of some values, in which every two values meet.

Most faults need one value, or two together: all pairs find them without the whole product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


def pairs(**values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations of the values, one of each name, that hold every pair of two names.

    The first values stand together in the first combination, so that the plain case is there. The
    choice depends on nothing but the values' number and order.

    Args:
        **values: The values of each parameter, by its name.

    Returns:
        Tuples with a value of each name, in the names' order.

    Example:
        >>> pairs(dtype=["float32", "float64"], mask=[True, False], axis=[0, 1])
        [('float32', True, 0), ('float32', False, 1), ('float64', True, 1), ('float64', False, 0)]
    """
    lists = [list(several) for several in values.values()]
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(lists)), 2)
        for i, j in itertools.product(range(len(lists[a])), range(len(lists[b])))
    }
    every = list(itertools.product(*(range(len(several)) for several in lists)))
    chosen = [every[0]] if len(lists) < 2 else []
    while left:
        best = max(every, key=lambda places: len(_pairs_of(places) & left))
        chosen.append(best)
        left -= _pairs_of(best)
    rest = [places for places in every if len(lists) < 2 and places not in chosen]
    return [
        tuple(several[i] for several, i in zip(lists, places, strict=True))
        for places in sorted(chosen + rest)
    ]


def _pairs_of(places: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(itertools.combinations(enumerate(places), 2))
