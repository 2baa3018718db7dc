"""Positions of calls that are counted wrongly: where a call begins, and how it counts from there.

A position is where the call begins, which the cache tells, and an index within the call. Each of
the two has its usual mistakes, and what uses the positions may be the rotation or ALiBi alone, of
queries, keys or both, the causal rule too, or the place where keys are written.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.wrong_caches import facts_of, given, in_slots
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Recipe, Variants

PARTS = {
    "": ("positions", "key_positions"),
    ", of queries alone": ("positions",),
    ", of keys alone": ("key_positions",),
}
"""The fields that have other positions."""


def counted_wrongly(recipe: Recipe) -> Variants:
    """Every other count, of what uses positions; those of few changes first."""
    facts = facts_of(recipe)
    if facts is None or facts.calls[-1] == 0:
        return
    placed = bool(recipe.options.keys() & {"rotary", "alibi"})
    for words, counted in _counts(recipe, facts, usual=False) if placed else ():
        for part, names in PARTS.items():
            other = given(recipe, counted, facts.places)
            yield words + part, recipe.but(**dict.fromkeys(names, other))
    for words, counted in _counts(recipe, facts, usual=True):
        yield from _with_the_causal_rule(recipe, facts, words, counted)


def _with_the_causal_rule(
    recipe: Recipe, facts: Decoded, words: str, counted: np.ndarray
) -> Variants:
    """What queries see is told by the counted positions too, or by them alone."""
    places, most = facts.places, len(facts.calls)
    other = given(recipe, counted, places)
    for of, slots, size in (
        ("the causal rule", places, most),
        ("the slots of keys and the causal rule", counted, 2 * most),
    ):
        for hidden, empty in (", of a buffer", True), ("", False):
            detail = f"{words}, of {of}{hidden}"
            yield f"{detail} alone", in_slots(recipe, facts, slots, counted, size, empty)
            if recipe.options.keys() & {"rotary", "alibi"}:
                for part, names in PARTS.items():
                    changed = dict.fromkeys(names, other)
                    yield f"{detail} too{part}", in_slots(
                        recipe, facts, slots, counted, size, empty, by_slot=None, **changed
                    )


def _counts(recipe: Recipe, facts: Decoded, usual: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Words and the counted positions (B, T), each once; `usual`: within the call as is usual."""
    later, told = facts.calls > 0, {facts.places[facts.valid].tobytes()}
    every = _together(recipe, facts, usual)
    for words, counted in every if usual else (*every, *_bounded(facts)):
        behind = np.where(later, counted, facts.places)
        for said, array in (words, counted), (f"{words}, behind the first call", behind):
            key = np.asarray(array[facts.valid], int).tobytes()
            if key not in told:
                told.add(key)
                yield said, array


def _together(recipe: Recipe, facts: Decoded, usual: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Where a call begins, with how it counts from there; those that differ in one come first."""
    begins, indices = _begins(recipe, facts), _indices(facts)
    own, index = next(iter(begins)), next(iter(indices))
    pairs = [(own, i) for i in indices] + [(b, index) for b in begins]
    pairs += [(b, i) for b in begins for i in indices]
    for base, of in dict.fromkeys(pairs):
        if not usual or of in tuple(indices)[:2]:
            yield ", ".join(filter(None, (base, of))), begins[base] + indices[of]


def _begins(recipe: Recipe, facts: Decoded) -> dict[str, np.ndarray]:
    """Where calls may be said to begin, (B, T) or what broadcasts to it; the right one first."""
    calls, begins, first = facts.calls, facts.begins, facts.calls == 0
    columns = np.searchsorted(calls, calls)  # the first of each column's call
    prompt, padded = facts.ends[:, :1], np.count_nonzero(first)
    before = np.maximum(calls - 1, 0)
    old = np.searchsorted(calls, before)  # the first column of the call before
    told = {
        "": begins,
        "a call counts as one position": calls + 0 * begins,
        "a call counts as one position of its row": facts.rounds,
        "a call begins at 0": 0 * begins,
        "a call begins behind all columns before it, padding counted": columns + 0 * begins,
        "padding of the first call counted": np.where(first, 0, begins - prompt + padded),
        "padding of calls behind the first counted": np.where(first, 0, columns - padded + prompt),
        "calls behind the first begin where it ends": np.where(first, 0, prompt),
        "calls behind the first begin where it ends, padding counted":
            np.where(first, 0, padded) + 0 * begins,
        "each call behind the first counts as one position":
            np.where(first, 0, prompt + before),
        "each call behind the first counts as one position, padding of the first counted":
            np.where(first, 0, padded + before) + 0 * begins,
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
    }  # fmt: skip
    for of, row in {
        "the longest row": begins.max(0), "the shortest row": begins.min(0), "row 0": begins[0],
        "the last row": begins[-1], "the row before": np.roll(begins, 1, 0),
        "the row behind": np.roll(begins, -1, 0),
    }.items():  # fmt: skip
        told[f"a call begins at the length of {of}"] = row + 0 * begins
    for most in {recipe.window, recipe.window and recipe.window - 1} - {None}:
        told[f"a call begins at {most} at most"] = np.minimum(begins, most)
    return told


def _indices(facts: Decoded) -> dict[str, np.ndarray]:
    """How positions may be counted within a call; the right way first."""
    index, columns = facts.places - facts.begins, np.arange(len(facts.calls))
    counts = facts.ends - facts.begins
    start = np.searchsorted(facts.calls, facts.calls)
    width = np.bincount(facts.calls)[facts.calls]
    return {
        "": index,
        "padding within the call counted": columns - start + 0 * index,
        "padding counted as if in front": width - counts + index,
        "all of a call have one": 0 * index,
        "all of a call have its last": counts - 1,
        "from the last to the first of a call": counts - 1 - index,
    }


def _bounded(facts: Decoded) -> Iterator[tuple[str, np.ndarray]]:
    """Positions that end at a greatest one, or begin again behind it."""
    for size in range(int(facts.ends.max()) - 1, 1, -1):
        yield f"{size - 1} at most", np.minimum(facts.places, size - 1)
        yield f"from 0 again behind {size - 1}", facts.places % size
