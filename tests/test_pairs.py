"""`pairs` holds every two values, and the plain case."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import pytest

from tests import pairs as module
from tests.pairs import pairs

CASES: list[tuple[dict[str, Any], int]] = [
    ({"a": [1, 2]}, 2),
    ({"a": "xyz", "b": (1, 2)}, 6),
    ({"a": "xyz", "b": (1, 2, 3, 4), "c": range(10)}, 40),
    ({"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0, 1), "e": (0, 1)}, 8),
]


@pytest.mark.parametrize(("values", "most"), CASES)
def test_every_two_values_meet(values: dict[str, Any], most: int) -> None:
    found = pairs(**values)
    lists = [list(several) for several in values.values()]
    assert found[0] == tuple(several[0] for several in lists)
    assert len(set(found)) == len(found) <= most
    for (a, one), (b, other) in itertools.combinations(enumerate(lists), 2):
        assert {(row[a], row[b]) for row in found} == set(itertools.product(one, other))
    assert {row[0] for row in found} == set(lists[0])


def test_the_example_gives_what_it_shows() -> None:
    assert doctest.testmod(module) == (0, 1)
