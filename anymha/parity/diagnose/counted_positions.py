"""Positions of calls that are counted wrongly: where a call begins, and how it counts from there.

A position is where the call begins, which the cache tells, and an index within the call. Each of
the two has its usual mistakes, and what uses the positions may be the rotation or ALiBi alone, of
queries, keys or both, the causal rule too, or the place where keys are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.parity.diagnose.wrong_caches import (
    begins_without,
    facts_of,
    given,
    in_slots,
    in_window,
    right,
    seeing,
)
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Recipe, Variants

PARTS = {
    "": ("positions", "key_positions"),
    ", of queries alone": ("positions",),
    ", of keys alone": ("key_positions",),
}
"""The fields that have other positions."""

SMALL = 1 << 15
"""Where there are no more logits, both of what makes a position may be wrong at once."""


def counted_wrongly(recipe: Recipe) -> Variants:
    """Every other count, of what uses positions; those with one thing wrong first."""
    facts = facts_of(recipe)
    if facts is None or facts.calls[-1] == 0:
        return
    begins, indices = _begins(recipe, facts), _indices(facts)
    (own, *bases), (index, *others) = begins, indices
    usual = [(own, i) for i in others] + [(base, index) for base in bases]
    usual += [(base, others[0]) for base in bases]
    single = {_words(*pair): begins[pair[0]] + indices[pair[1]] for pair in usual}
    counts = _told_once(facts, {**single, **_bounded(facts)})
    yield from _placed(recipe, facts, counts)
    for words, counted in _told_once(facts, single).items():
        yield from _with_the_causal_rule(recipe, facts, words, counted)
    if recipe.stages["logits"].size <= SMALL:
        double = {_words(b, i): begins[b] + indices[i] for b in bases for i in others[1:]}
        double = _told_once(facts, {**single, **double})
        yield from _placed(recipe, facts, {n: x for n, x in double.items() if n not in counts})


def _words(base: str, index: str) -> str:
    return ", ".join(filter(None, (base, index)))


def _placed(recipe: Recipe, facts: Decoded, counts: Mapping[str, np.ndarray]) -> Variants:
    """The positions by which queries, keys or both are rotated, or which ALiBi counts."""
    for words, counted in counts.items() if recipe.options.keys() & {"rotary", "alibi"} else ():
        other = given(recipe, counted, facts.places)
        for part, names in PARTS.items():
            yield words + part, recipe.but(**dict.fromkeys(names, other))


def _with_the_causal_rule(
    recipe: Recipe, facts: Decoded, words: str, counted: np.ndarray
) -> Variants:
    """What queries see is told by the counted positions too, or by them alone."""
    places, most = facts.places, len(facts.calls)
    other = given(recipe, counted, places)
    for follows, slots, size in (
        ("the causal rule follows", places, most),
        ("keys are written there, the causal rule follows", counted, 2 * most),
    ):
        for hidden, empty in ("", False), (", empty slots are seen", True):
            detail = f"{words}; {follows}{hidden}"
            if "rotary" in recipe.options:
                for part, names in PARTS.items():
                    changed: dict[str, Any] = dict.fromkeys(names, other)
                    made = in_slots(recipe, facts, slots, counted, size, empty, **changed)
                    yield detail + part, made
                detail += ", and no rotation"
            yield detail, in_slots(recipe, facts, slots, counted, size, empty, by_slot="slots")
            if "alibi" in recipe.options:
                yield f"{detail}, not ALiBi", in_slots(recipe, facts, slots, counted, size, empty)
    if recipe.window is not None:
        past = right(recipe.but(window=None), facts)
        for keys in places, counted:
            near = in_window(recipe, counted[:, :, None] - keys[:, None])
            yield f"{words}; the window follows", seeing(recipe, past & near)


def _told_once(facts: Decoded, counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The counts that differ from each other and the right one, in all calls or but the first."""
    later, told = facts.calls > 0, {facts.places[facts.valid].tobytes()}
    made = dict[str, np.ndarray]()
    for words, counted in counts.items():
        behind = np.where(later, counted, facts.places)
        for said, array in (words, counted), (f"{words}, after the first call", behind):
            key = np.asarray(array[facts.valid], int).tobytes()
            if key not in told:
                told.add(key)
                made[said] = array
    return made


def _begins(recipe: Recipe, facts: Decoded) -> dict[str, np.ndarray]:
    """Where calls may be said to begin, (B, T) or what broadcasts to it; the right one first."""
    calls, begins, first = facts.calls, facts.begins, facts.calls == 0
    columns = np.searchsorted(calls, calls)  # the first of each column's call
    prompt, padded = facts.ends[:, :1], np.count_nonzero(first)
    before = np.maximum(calls - 1, 0)
    width = np.bincount(calls)[calls]
    old = np.searchsorted(calls, before)  # the first column of the call before
    told = {
        "": begins,
        "a call counts as one position": calls + 0 * begins,
        "a call counts as one position of its row": facts.rounds,
        "a call begins at 0": 0 * begins,
        "a call begins after all columns before it, padding counted": columns + 0 * begins,
        "padding of the first call counted": np.where(first, 0, begins - prompt + padded),
        "padding of calls after the first counted": np.where(first, 0, columns - padded + prompt),
        "calls after the first begin where it ends": np.where(first, 0, prompt),
        "calls after the first begin where it ends, padding counted":
            np.where(first, 0, padded) + 0 * begins,
        "each call after the first counts as one position":
            np.where(first, 0, prompt + before),
        "each call after the first counts as one position, padding of the first counted":
            np.where(first, 0, padded + before) + 0 * begins,
        "calls of one position are not counted": begins_without(facts, width == 1),
        "a call begins with the one before": np.where(first, 0, begins[:, old]),
        "a call begins at the count of the one before": np.where(
            first, 0, begins - begins[:, old]),
        "a call begins at the columns of the one before": np.where(
            first, 0, columns - columns[old]) + 0 * begins,
        "a call begins where it ends": facts.ends,
        "a call begins at twice the length": 2 * begins,
        "a call begins one too late": begins + 1,
        "a call begins one too early": begins - 1,
        "a call begins at the capacity": len(calls) + 0 * begins,
        "a call ends at the capacity": len(calls) - width + 0 * begins,
        "a call ends at 0": -width + 0 * begins,
    }  # fmt: skip
    for of, row in {
        "the longest row": begins.max(0), "the shortest row": begins.min(0), "row 0": begins[0],
        "the last row": begins[-1], "the row before": np.roll(begins, 1, 0),
        "the next row": np.roll(begins, -1, 0),
    }.items():  # fmt: skip
        told[f"a call begins at the length of {of}"] = row + 0 * begins
    window = recipe.window
    for most in () if window is None else (window, window - 1):
        told[f"a call begins at {most} at most"] = np.minimum(begins, most)
    return told


def _indices(facts: Decoded) -> dict[str, np.ndarray]:
    """How positions may be counted within a call; the right way first."""
    index, columns = facts.places - facts.begins, np.arange(len(facts.calls))
    counts = facts.ends - facts.begins
    start = np.searchsorted(facts.calls, facts.calls)
    ranks = np.cumsum(facts.valid, axis=1)  # of columns that may be padding in their own row
    ranks = ranks - ranks[:, start] + facts.valid[:, start] - 1
    width = np.bincount(facts.calls)[facts.calls]
    return {
        "": index,
        "padding within the call counted": columns - start + 0 * index,
        "padding counted as if in front": width - counts + index,
        "padding of row 0 for all": ranks[:1] + 0 * index,
        "padding of the last row for all": ranks[-1:] + 0 * index,
        "all of a call have one": 0 * index,
        "all of a call have its last": counts - 1,
        "from the last to the first of a call": counts - 1 - index,
    }


def _bounded(facts: Decoded) -> dict[str, np.ndarray]:
    """Positions that end at a greatest one, or begin again after it."""
    made = {"each position counts twice": 2 * facts.places}
    for size in range(int(facts.ends.max()) - 1, 1, -1):
        made[f"{size - 1} at most"] = np.minimum(facts.places, size - 1)
        made[f"from 0 again after {size - 1}"] = facts.places % size
    return made
