"""Recipes whose queries see a cache that is wrong: other slots, other keys, slots without keys.

Arrays of pairs are booleans (B, T, T), queries before keys, in the columns of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.features.alibi import AlibiSection
from anymha.parity.oracle.recipe import Arrays, Recipe, Step, context_by, logits_by, softmax

OF_SLOTS = "mask of slots"
"""The name of a mask (B, 1, 1, T) that hides padding in slots, before they are written too."""


def facts_of(recipe: Recipe) -> Decoded | None:
    """How the sequences were read; None where they were not read step by step."""
    facts = recipe.decoded
    return facts if facts is not None and facts.valid.shape == recipe.lengths[::2] else None


def past(facts: Decoded) -> np.ndarray:
    """(T, T): the keys up to each query, in the columns of the call."""
    return np.tri(len(facts.calls), dtype=bool)


def cached(facts: Decoded) -> np.ndarray:
    """(T, T): the keys of calls before the query's."""
    return facts.calls[:, None] > facts.calls


def begins_without(facts: Decoded, lost: np.ndarray) -> np.ndarray:
    """(B, T): where each column's call begins, if the columns of some calls (T,) do not count."""
    held = facts.valid & ~lost
    counts = np.cumsum(held, axis=1) - held
    return counts[:, np.searchsorted(facts.calls, facts.calls)]


def behind(facts: Decoded) -> np.ndarray:
    """(B, T, T): how many positions each key stands before the query, in its row's sequence."""
    return facts.places[:, :, None] - facts.places[:, None]


def given(recipe: Recipe, counted: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Positions as far from those of the call as a count is from the right one."""
    return recipe.places("query") + (counted - places)


def in_window(recipe: Recipe, distance: np.ndarray) -> np.ndarray:
    """Where a distance is in the recipe's window, if it has one."""
    return np.ones_like(distance, bool) if recipe.window is None else (
        np.abs(distance) < recipe.window)  # fmt: skip


def right(recipe: Recipe, facts: Decoded) -> np.ndarray:
    """The pairs that are seen."""
    return facts.valid[:, None] & past(facts) & in_window(recipe, behind(facts))


def seeing(
    recipe: Recipe, seen: np.ndarray, empty: np.ndarray | None = None,
    queries: np.ndarray | None = None, **changes: Any,
) -> Recipe:  # fmt: skip
    """The recipe whose queries see these pairs, and slots (B, T, C) that are empty.

    An empty slot holds a key and a value of zeros; it is as far, to ALiBi, as it stands from the
    position of the query, one of `queries` (B, T).
    """
    masks = {name: mask for name, mask in recipe.masks.items() if name != "value_mask"}
    masks["cache"] = seen[:, None]
    wrong = recipe.but(masks=masks, causal=False, window=None, **changes)
    if empty is not None and OF_SLOTS in masks:
        length = masks[OF_SLOTS].shape[-1]
        padding = np.pad(
            ~masks[OF_SLOTS][:, 0], [(0, 0), (0, 0), (0, max(empty.shape[2] - length, 0))]
        )
        empty = empty & ~padding[..., : empty.shape[2]]
    if empty is None or not empty.any():
        return wrong
    logits = np.where(empty, 0.0, -np.inf)[:, None]  # [B, 1, T, C]
    for section in recipe.sections:
        if isinstance(section, AlibiSection):
            slots = np.arange(empty.shape[2])
            places = wrong.places("query") if queries is None else queries
            distance = places[..., None] - slots
            logits = logits + section.of_distance(distance, recipe.heads[0])

    def step(_: Recipe, stages: Arrays) -> np.ndarray:
        masked = stages["masked_logits"]
        more = np.broadcast_to(logits, (*masked.shape[:-1], logits.shape[-1]))
        return softmax(np.concatenate([masked, more], -1))[..., : masked.shape[-1]]

    made = wrong.stepping("probabilities", step)
    made.computed["terms"] = empty.shape[2]
    return made


def in_slots(
    recipe: Recipe, facts: Decoded, slots: np.ndarray, last: np.ndarray, size: int | None = None,
    empty: bool = True, by_slot: str | None = "keys", **changes: Any,
) -> Recipe:  # fmt: skip
    """The recipe of a cache whose keys are written into other slots.

    Args:
        recipe: The right one.
        facts: How its sequences are read.
        slots: (B, T): the slot into which a valid column is written; outside the cache it is lost.
            A later call overwrites what is there.
        last: (B, T): the last slot that each query sees, the place from which its window counts.
        size: How many slots there are; default one for each column.
        empty: Whether slots are seen that hold no key.
        by_slot: Whether ALiBi takes slots for positions, of "keys" or of all "slots"; None: of
            nothing.
        changes: Further fields of the recipe.
    """
    contents = _contents(facts, slots, size or len(facts.calls))
    index = np.arange(contents.shape[2])
    visible = (index <= last[..., None]) & in_window(recipe, last[..., None] - index)
    seen = np.zeros((*facts.valid.shape, len(facts.calls)), bool)
    place = np.zeros(seen.shape)
    b, t, c = np.nonzero(visible & (contents >= 0))
    seen[b, t, contents[b, t, c]] = True
    place[b, t, contents[b, t, c]] = c
    bias, queries = recipe.bias, last if by_slot == "slots" else facts.places
    if by_slot is not None:
        bias = _with_alibi(recipe, queries[..., None] - place, seen)
    holes = visible & (contents < 0) if empty else None
    return seeing(recipe, seen, holes, queries, bias=bias, **changes)


def alibi_of(
    recipe: Recipe, facts: Decoded, places: Callable[[int], np.ndarray]
) -> np.ndarray | None:
    """The bias of the recipe and what turns ALiBi into one of other positions of the keys.

    `places` is that of `keys_turned`.
    """
    every = np.stack([places(call) for call in range(facts.calls[-1] + 1)], 1)  # [B, calls, T]
    distance = recipe.places("query")[..., None] - every[:, facts.calls]
    return _with_alibi(recipe, distance, right(recipe, facts))


def _with_alibi(recipe: Recipe, distance: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    """The bias of the recipe, and what turns ALiBi into one of other distances of these pairs."""
    total = recipe.bias
    for section in recipe.sections:
        if isinstance(section, AlibiSection):
            usual = recipe.places("query")[:, :, None] - recipe.places("key")[:, None]
            other = section.of_distance(distance, recipe.heads[0])
            other = other - section.of_distance(usual.astype(float), recipe.heads[0])
            other = np.where(seen[:, None], other, 0.0)
            total = other if total is None else total + other
    return total


def _contents(facts: Decoded, slots: np.ndarray, size: int) -> np.ndarray:
    """(B, T, C): the column that each slot holds as a query's call attends; -1: none."""
    contents = np.full((*facts.valid.shape, size), -1)
    for row, valid in enumerate(facts.valid):
        now = np.full(size, -1)
        for call in range(facts.calls[-1] + 1):
            own = facts.calls == call
            columns = np.flatnonzero(own & valid & (slots[row] >= 0) & (slots[row] < size))
            now[slots[row, columns]] = columns
            contents[row, own] = now
    return contents


def without(recipe: Recipe, pairs: np.ndarray, keys: bool = True, values: bool = True) -> Recipe:
    """The recipe with zeros for keys, values or both of some pairs, which are seen."""
    kept = ~pairs[:, None]

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return logits_by(recipe, stages) * kept

    def context(recipe: Recipe, stages: Arrays) -> np.ndarray:
        shares = stages["dropped_probabilities"] * kept
        return context_by(recipe, {**stages, "dropped_probabilities": shares})

    wrong = recipe.stepping("logits", logits) if keys else recipe
    return wrong.stepping("context", context) if values else wrong


def replaced(
    recipe: Recipe, pairs: np.ndarray, change: Callable[[np.ndarray], np.ndarray],
    keys: bool = True, values: bool = True,
) -> Recipe:  # fmt: skip
    """The recipe with other keys, values or both for some pairs: `change` of all (B, T, K, d)."""
    which = pairs[:, None]

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        other = logits_by(recipe, {**stages, "key": change(stages["key"])})
        return np.where(which, other, logits_by(recipe, stages))

    def context(recipe: Recipe, stages: Arrays) -> np.ndarray:
        shares = stages["dropped_probabilities"]
        other = {
            **stages,
            "value": change(stages["value"]),
            "dropped_probabilities": shares * which,
        }
        own = {**stages, "dropped_probabilities": shares * ~which}
        return context_by(recipe, own) + context_by(recipe, other)

    wrong = recipe.stepping("logits", logits) if keys else recipe
    return wrong.stepping("context", context) if values else wrong


def exchanged(recipe: Recipe, pairs: np.ndarray) -> Recipe:
    """The recipe in which cached keys and values of some pairs stand for each other."""
    which = pairs[:, None]

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        theirs = logits_by(recipe, {**stages, "key": stages["value"]})
        return np.where(which, theirs, logits_by(recipe, stages))

    def context(recipe: Recipe, stages: Arrays) -> np.ndarray:
        shares = stages["dropped_probabilities"]
        mine = context_by(recipe, {**stages, "dropped_probabilities": shares * ~which})
        theirs = {"value": stages["key"], "dropped_probabilities": shares * which}
        return mine + context_by(recipe, theirs)

    return recipe.stepping("logits", logits).stepping("context", context)


def of_rows(
    recipe: Recipe, facts: Decoded, source: np.ndarray, call: int | None, keys: bool = True,
    values: bool = True, own: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe whose rows read the cache of other rows, `source` (B,), slot by slot.

    Args:
        recipe: The right one.
        facts: How its sequences are read.
        source: The row whose slots each row reads.
        call: The call whose slots alone are another row's; None: those of all calls before.
        keys: Whether keys are read from there.
        values: Whether values are.
        own: Whether what a call itself writes is read from there too.
    """
    pairs, read = cached(facts) & ((facts.calls == call) | (call is None)), dict[int, Columns]()
    for now in range(0 if own else 1, facts.calls[-1] + 1):
        held = facts.valid & (facts.calls < now + own) & ((facts.calls == call) | (call is None))
        read[now] = source[:, None], _standing(recipe, facts, source, held)
    pairs = pairs | (own & (facts.calls[:, None] == facts.calls))
    return _reading(recipe, facts, read, pairs, keys, values)


def misaligned(
    recipe: Recipe, facts: Decoded, slots: np.ndarray | None, keys: bool, values: bool
) -> Recipe:
    """The recipe of a cache in which keys or values alone stand in other slots.

    Args:
        recipe: The right one.
        facts: How its sequences are read.
        slots: (B, T): the slot into which a valid column is written; an empty slot holds zeros.
            None: a call's columns are joined in front of those that are held.
        keys: Whether keys stand there.
        values: Whether values do.
    """
    places, calls, length = facts.places, facts.calls, len(facts.calls)
    held = None if slots is None else _contents(facts, slots, 2 * length)
    read = dict[int, Columns]()
    for now in range(calls[-1] + 1):
        if held is None:
            column = np.full(facts.valid.shape, -1)
            for row, valid in enumerate(facts.valid & (calls <= now)):
                columns = np.flatnonzero(valid)
                order = columns[np.argsort(-calls[columns], kind="stable")]
                fits = places[row] < len(order)
                column[row, fits] = order[places[row, fits]]
        else:
            column = np.take_along_axis(held[:, np.argmax(calls == now)], places, 1)
        read[now] = np.arange(len(places))[:, None], np.where(facts.valid, column, -1)
    pairs = calls[:, None] >= calls
    return _reading(recipe, facts, read, pairs, keys, values)


def with_shared_pages(
    recipe: Recipe, facts: Decoded, shared: np.ndarray, written: bool, read: bool, at_once: bool
) -> Recipe:
    """The recipe of a cache of which some slots are row 0's for all rows.

    Args:
        recipe: The right one.
        facts: How its sequences are read.
        shared: (slots,): which slots are row 0's.
        written: Whether they are written there; where they are not, a row writes its own.
        read: Whether they are read from there.
        at_once: Whether all rows of a call write before one of them attends; else row after row.
    """
    rows, columns = np.full((2, len(facts.valid), len(shared)), -1)  # what each slot holds
    found = dict[int, Columns]()
    every = range(len(rows))
    for now in range(facts.calls[-1] + 1):
        found[now] = np.zeros_like(facts.places), np.zeros_like(facts.places)
        for writing in (every,) if at_once else ((row,) for row in every):
            for row in writing:
                new = np.flatnonzero(facts.valid[row] & (facts.calls == now))
                slots = facts.places[row, new]
                target = np.where(shared[slots] & written, 0, row)
                rows[target, slots], columns[target, slots] = row, new
            for row in writing:
                slots = facts.places[row]
                source = np.where(shared[slots] & read, 0, row)
                found[now][0][row], found[now][1][row] = rows[source, slots], columns[source, slots]
    return _reading(recipe, facts, found, facts.calls[:, None] >= facts.calls, True, True)


Columns = tuple[np.ndarray, np.ndarray]
"""The row and the column, each (B, T) or what broadcasts to it, that are read in place of each
column; a column of -1: zeros."""


def _reading(
    recipe: Recipe, facts: Decoded, read: Mapping[int, Columns], pairs: np.ndarray, keys: bool,
    values: bool,
) -> Recipe:  # fmt: skip
    """The recipe whose queries read other columns for those of some pairs (T, T).

    `read` has what is read by the number of the query's call.
    """

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        array = logits_by(recipe, stages)
        for now, (rows, column) in read.items():
            at = facts.calls == now
            theirs = {"query": stages["query"][:, at], "key": stages["key"][rows, column]}
            theirs = np.where((column >= 0)[:, None, None], logits_by(recipe, theirs), 0.0)
            array[:, :, at] = np.where(pairs[at], theirs, array[:, :, at])
        return array

    def context(recipe: Recipe, stages: Arrays) -> np.ndarray:
        shares = stages["dropped_probabilities"]
        array = context_by(recipe, {**stages, "dropped_probabilities": shares * ~pairs})
        for now, (rows, column) in read.items():
            at = facts.calls == now
            part = shares[:, :, at] * (pairs[at] & (column >= 0)[:, None, None])
            theirs = {"value": stages["value"][rows, column], "dropped_probabilities": part}
            array[:, at] += context_by(recipe, theirs)
        return array

    wrong = recipe.stepping("logits", logits) if keys else recipe
    return wrong.stepping("context", context) if values else wrong


def _standing(recipe: Recipe, facts: Decoded, source: np.ndarray, held: np.ndarray) -> np.ndarray:
    """(B, T): the column that stands in each one's slot in another row; -1: none.

    `held` (B, T) are the columns that the cache holds. A window's cache is a ring.
    """
    column = np.full(facts.valid.shape, -1)
    for row, other in enumerate(source):
        theirs = np.flatnonzero(held[other])
        place = facts.places[row]
        if recipe.window is not None and theirs.size:
            last = len(theirs) - 1
            place = last - (last - place) % recipe.window
        fits = (place >= 0) & (place < len(theirs))
        column[row, fits] = theirs[place[fits]]
    return column


def of_rows_and_lengths(recipe: Recipe, facts: Decoded, source: np.ndarray) -> Recipe:
    """The recipe whose rows have, after the first call, its cache and length of other rows."""
    first = facts.calls == 0
    ends = facts.ends[:, :1]
    places = np.where(first, facts.places, facts.places - ends + ends[source])
    held = facts.valid[source] & first
    pairs = cached(facts) & first
    old = np.where(first, facts.places[source], places)  # as the queries after see keys
    seen = np.where(pairs, held[:, None], facts.valid[:, None]) & past(facts)
    distance = np.where(pairs, places[..., None] - old[:, None], behind(facts))

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        theirs = logits_by(recipe, {**stages, "key": stages["key"][source]})
        return np.where(pairs, theirs, logits_by(recipe, stages))

    def context(recipe: Recipe, stages: Arrays) -> np.ndarray:
        shares = stages["dropped_probabilities"]
        mine = context_by(recipe, {**stages, "dropped_probabilities": shares * ~pairs})
        theirs = {**stages, "value": stages["value"][source]}
        return mine + context_by(recipe, {**theirs, "dropped_probabilities": shares * pairs})

    both = recipe.places("query") + places - facts.places
    wrong = recipe.but(positions=both, key_positions=both)
    bias = _with_alibi(wrong, distance, seen)
    wrong = seeing(wrong, seen & in_window(recipe, distance), bias=bias)
    return wrong.stepping("logits", logits).stepping("context", context)


def keys_turned(
    recipe: Recipe, facts: Decoded, places: Callable[[int], np.ndarray], turns: int = 1
) -> Recipe:
    """The recipe with keys rotated by other positions.

    `places` gives the positions (B, T) of all keys as the queries of a call see them, by its
    number; a key is rotated, and rounded, in `turns` calls at most.
    """
    calls = range(facts.calls[-1] + 1)
    turned = [recipe.but(key_positions=places(call)).until("key")["key"] for call in calls]
    made = with_keys_of_calls(recipe, facts, turned)
    made.computed["turns"] = turns - 1
    return made


def with_keys_of_calls(recipe: Recipe, facts: Decoded, turned: Sequence[np.ndarray]) -> Recipe:
    """The recipe whose queries of a call see other keys: those (B, T, K, d) of its number."""

    def logits(recipe: Recipe, stages: Arrays) -> np.ndarray:
        array = logits_by(recipe, stages)
        for call, keys in enumerate(turned):
            at = facts.calls == call
            theirs = {"query": stages["query"][:, at], "key": keys}
            array[:, :, at] = logits_by(recipe, theirs)
        return array

    step: Step = logits
    return recipe.stepping("logits", step)
