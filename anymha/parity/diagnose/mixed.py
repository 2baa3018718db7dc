"""Mistakes that a port makes in some calls alone, in some sequences, or from some query on.

A port may be right in the prompt and leave an option out in the steps after it, or hide the
padding of a first piece alone. Its stages are then those of the wrong recipe in the columns of
these calls, those of queries and of the keys that they write, and those of the right one elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from anymha.parity.diagnose.wrong_caches import facts_of
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Arrays, Recipe

OF_KEYS = ("key", "value")
"""The stages whose columns are those of keys."""


@dataclass(frozen=True)
class Group:
    """Where a mistake is made.

    Args:
        words: Words for it, after those of the mistake.
        columns: (1 or B, 1 or T) booleans, the queries.
        keys: Whether the keys of these columns have it too; else a mistake that changes keys is
            none of these.
    """

    words: str
    columns: np.ndarray
    keys: bool


@dataclass(frozen=True, kw_only=True)
class MixedRecipe(Recipe):
    """A right recipe but for a group of columns, whose stages are those of a wrong one."""

    wrong: Recipe
    group: Group

    def stage(self, name: str, stages: Arrays) -> np.ndarray:
        """A stage, from those before it, which are mixed too."""
        right, wrong = super().stage(name, stages), self.wrong.stage(name, stages)
        if right.shape != wrong.shape:
            raise ValueError(f"`{name}` has another shape in the wrong recipe.")
        columns = self.group.columns
        if name in OF_KEYS and not self.group.keys:
            if not np.array_equal(right, wrong, equal_nan=True):
                raise ValueError(f"`{name}` is another in the wrong recipe.")
            return right
        behind = 1 if right.ndim == 3 else 2
        if name in (*OF_KEYS, "query", "context", "output"):
            columns = columns.reshape(*columns.shape, *(1,) * behind)
        else:
            columns = columns[:, None, :, None]
        return np.where(columns, wrong, right)


def mixed(right: Recipe, wrong: Recipe, group: Group) -> MixedRecipe:
    """The recipe that is wrong in a group of columns."""
    own: dict[str, Any] = {one.name: getattr(right, one.name) for one in fields(Recipe)}
    return MixedRecipe(**own, wrong=wrong, group=group)


def groups(recipe: Recipe, fitting: np.ndarray) -> Iterator[Group]:
    """The groups of columns that may be all that is wrong.

    Args:
        recipe: The right one.
        fitting: (B, T) booleans, the queries whose results are right.
    """
    facts = facts_of(recipe)
    if facts is not None:
        fitting = fitting | ~facts.valid
        if facts.calls[-1] > 0:
            yield from _of_calls(facts, fitting)
    elif fitting.any():
        yield from _of_queries(fitting)
    if not fitting.all(1).any():
        return
    rows = np.arange(len(fitting))[:, None]
    wrong = np.flatnonzero(~fitting.all(1))
    if len(wrong) == 1:
        yield Group(f"in sequence {wrong[0]} of the batch alone", rows == wrong[0], True)
    elif len(wrong) and wrong[0] > 0:
        yield Group(f"in the sequences from {wrong[0]} on", rows >= wrong[0], True)
    elif len(wrong):
        yield Group(f"in the sequences up to {wrong[-1]}", rows <= wrong[-1], True)


def _of_calls(facts: Decoded, fitting: np.ndarray) -> Iterator[Group]:
    calls = facts.calls
    size = np.bincount(calls)[calls]
    wrong = calls[~fitting.all(0)]
    tried: list[np.ndarray] = []
    for words, which in {
        "in calls after the first": calls > 0,
        "in the first call alone": calls == 0,
        "in calls of one position": size == 1,
        "in calls of several positions": size > 1,
        "in the last call alone": calls == calls[-1],
        "in the second call alone": calls == 1,
        "in calls after the second": calls > 1,
    }.items():
        known = any(np.array_equal(which, other) for other in tried)
        # What is written wrongly is read later; what was before is right.
        before = not len(wrong) or not which.any() or wrong.min() >= calls[which].min()
        if which.any() and not which.all() and not known and before:
            tried.append(which)
            yield Group(words, which[None], True)


def _of_queries(fitting: np.ndarray) -> Iterator[Group]:
    wrong = np.flatnonzero(~fitting.all(0))
    index = np.arange(fitting.shape[1])[None]
    if len(wrong) and wrong[0] > 0:
        yield Group(f"for queries from {wrong[0]} on", index >= wrong[0], False)
    if len(wrong) and wrong[-1] < fitting.shape[1] - 1:
        yield Group(f"for queries up to {wrong[-1]}", index <= wrong[-1], False)
