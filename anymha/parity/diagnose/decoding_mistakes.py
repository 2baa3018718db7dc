"""Mistakes of decoding with a cache: what is held, where it is written, which positions it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from anymha.parity.diagnose.changes import Maker, Row, no_families
from anymha.parity.diagnose.counted_positions import counted_wrongly
from anymha.parity.diagnose.mask_mistakes import with_empty_rows
from anymha.parity.diagnose.merged_parts import merged_by
from anymha.parity.diagnose.wrong_caches import (
    alibi_of,
    begins_without,
    behind,
    cached,
    exchanged,
    facts_of,
    given,
    in_slots,
    in_window,
    keys_turned,
    misaligned,
    of_rows,
    of_rows_and_lengths,
    past,
    replaced,
    right,
    seeing,
    with_keys_of_calls,
    with_shared_pages,
    without,
)
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Arrays, Recipe, Variants

CAPACITIES = (16, 32, 64, 128, 256, 512, 1024)
"""Lengths that caches have beside those that `compare` asks for."""

LENGTHS = (20, 24, 30, 40, 48, 50, 60, 80, 96, 100, 200, 500, 1000)
"""Lengths that caches of other functions have too; with up to `MORE` slots than are written all."""

MORE = 16

MOST_OF_A_PAGE = 64
"""Up to so many positions every size of a page is tried."""

PAGES = (2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256)
"""Sizes of pages of which one may be another row's."""

CLAMPED = 16
"""How many lengths of a cache that is too short are tried."""

Decoding = Callable[[Recipe, Decoded], Variants]


def _decoding(make: Decoding) -> Maker:
    """Mistakes that can be made where sequences are read in two calls or more."""

    def variants(recipe: Recipe) -> Variants:
        facts = facts_of(recipe)
        if facts is not None and facts.calls[-1] > 0:
            yield from make(recipe, facts)

    return variants


def _seen(recipe: Recipe, pairs: Mapping[str, np.ndarray]) -> Variants:
    for words, seen in pairs.items():
        yield words, seeing(recipe, seen)


@with_empty_rows
@_decoding
def _stale(recipe: Recipe, facts: Decoded) -> Variants:
    seen, old, calls = right(recipe, facts), cached(facts), facts.calls
    own, first, single = calls[:, None] == calls, calls == 0, np.bincount(calls)[calls] == 1
    yield from _seen(recipe, {
        "a call does not see its own positions": seen & old,
        "calls after the first do not see their own positions": seen & (old | first[:, None]),
        "the last position that the cache holds is not seen":
            seen & ~(old & (facts.places[:, None] == facts.begins[..., None] - 1)),
        "a call sees the first one and itself alone": seen & (own | first),
        "a call sees itself alone": seen & own,
        "the last call alone is held, a call sees the one before it and itself":
            seen & (calls[:, None] - calls <= 1),
        "the call before is not seen": seen & (own | (calls <= calls[:, None] - 2)),
        "of a call the first position alone is held":
            seen & (own | (facts.places == facts.begins)[:, None]),
        "of a call the last position alone is held":
            seen & (own | (facts.places == facts.ends - 1)[:, None]),
    })  # fmt: skip
    # A cache that some calls leave as it was, its length too
    for words, left in {
        "calls after the first begin where it ends": ~first,
        "calls of one position are not stored, nor is their length": single,
        "calls of several positions after the first are not stored, nor is their length": ~first
        & ~single,
    }.items():
        alone = begins_without(facts, left) + facts.places - facts.begins
        near = in_window(recipe, alone[:, :, None] - alone[:, None])
        both = dict.fromkeys(("positions", "key_positions"), given(recipe, alone, facts.places))
        yield words, seeing(
            recipe, facts.valid[:, None] & past(facts) & near & (own | ~left), **both)  # fmt: skip
    # One position of each call after the first, by which the length grows
    index = facts.places - facts.begins
    grown = facts.ends[:, :1] + np.maximum(facts.rounds - 1, 0) + index
    counted = np.where(first, facts.places, grown)
    near = in_window(recipe, counted[:, :, None] - counted[:, None])
    both = dict.fromkeys(("positions", "key_positions"), given(recipe, counted, facts.places))
    for words, at in (("first", facts.begins), ("last", facts.ends - 1)):
        held = own | first | (facts.places == at)[:, None]
        yield f"of calls after the first the {words} position alone is held and counted", seeing(
            recipe, facts.valid[:, None] & past(facts) & near & held, **both)  # fmt: skip
    for of, lost in {
        "a call are written after it attends": own,
        "a call after the first are written after it attends": own & ~first[:, None],
        "calls before the query's are not held": old,
        "calls after the first are not held": old & ~first,
        "calls after the first are not written": np.broadcast_to(~first, old.shape),
        "calls after the first but their last position are not written": np.broadcast_to(
            (~first & (facts.places != facts.ends - 1))[:, None], (len(facts.valid), *old.shape)
        ),
        "calls of one position are not held": old & single,
        "calls of one position are not written": np.broadcast_to(single, old.shape),
        "calls of several positions are not held": old & ~single,
        "calls but the last are not held": old & (calls < calls[:, None] - 1),
        "calls that are first are not held": old & first,
    }.items():
        pairs = np.broadcast_to(lost, seen.shape)
        for words, keys, values in (("keys and values", True, True), ("keys", True, False),
                                    ("values", False, True)):  # fmt: skip
            detail = f"{words} of {of}, zeros are seen"
            yield detail, without(recipe, pairs, keys, values)
    last = np.max(np.where(first & facts.valid, np.arange(len(calls)), 0), 1)  # of the first call
    lost = np.broadcast_to(old & ~first, seen.shape)
    for words, keys, values in (("keys and values", True, True), ("keys", True, False),
                                ("values", False, True)):  # fmt: skip
        detail = f"{words} of calls after the first are not held, the last one that is is repeated"
        yield detail, replaced(recipe, lost, lambda x: x[np.arange(len(x)), last][:, None] + 0 * x,
                               keys, values)  # fmt: skip


@_decoding
def _own_hidden(recipe: Recipe, facts: Decoded) -> Variants:
    """No query sees its own key; the rows that then see nothing, as masks leave them."""
    seen, own, calls = right(recipe, facts), np.eye(len(facts.calls), dtype=bool), facts.calls
    for words, which in (
        ("", np.ones_like(calls, bool)),
        (" in calls after the first", calls > 0),
    ):
        less = seen & ~(own & which[:, None])
        empty = ~less.any(-1, keepdims=True) & facts.valid[..., None]
        for rows, more in {
            "": np.zeros_like(own),
            ", but where it is alone": own,
            ", where it is alone its whole call is seen": calls[:, None] == calls,
        }.items():
            if not rows or empty.any():
                pairs = less | (empty & more & facts.valid[:, None])
                yield f"a query's own{words}{rows}", seeing(recipe, pairs)


@_decoding
def _exchanged(recipe: Recipe, facts: Decoded) -> Variants:
    """Cached keys taken for values, and values for keys."""
    if recipe.stages["key"].shape != recipe.stages["value"].shape:
        return
    old, first = cached(facts), facts.calls == 0
    often = facts.calls[:, None] - facts.calls
    for words, pairs in {
        "all that is held": old,
        "in each call anew": old & (often % 2 == 1),
        "those of the first call": old & first,
        "those of calls after the first": old & ~first,
    }.items():
        yield words, exchanged(recipe, np.broadcast_to(pairs, (len(facts.valid), *old.shape)))


@_decoding
def _dropped(recipe: Recipe, facts: Decoded) -> Variants:
    """The oldest positions of a cache without a window lost as others are written."""
    places, near = facts.places, right(recipe, facts)
    count = facts.begins - facts.begins[:, :1]
    for words, lost in {
        "the first position, in each call after the first": facts.rounds,
        "the first position, in each call after the second": np.maximum(facts.rounds - 1, 0),
        "the first position, in calls after the first": np.minimum(facts.rounds, 1),
        "as many of the first positions as calls after the first read": np.where(
            facts.calls > 0, facts.ends - facts.ends[:, :1], 0
        ),
        "as many of the first positions as the cache held": count,
    }.items():
        kept = near & (places[:, None] >= lost[..., None])
        yield words, seeing(recipe, kept)
        if recipe.options.keys() & {"rotary", "alibi"}:
            other = given(recipe, places - lost, places)
            for said, names in ((", and positions count what is held",
                                 ("positions", "key_positions")),
                                (", and those of queries count what is held", ("positions",)),
                                ):  # fmt: skip
                yield words + said, seeing(recipe, kept, **dict.fromkeys(names, other))


@_decoding
def _overwritten(recipe: Recipe, facts: Decoded) -> Variants:
    places, index = facts.places, facts.places - facts.begins
    yield from _in_slots(recipe, facts, "each call is written at slot 0", index, places)
    length, most = len(facts.calls), int(facts.ends.max())
    count = facts.ends - facts.begins
    for size in range(most - 1, max(most - 1 - CLAMPED, 0), -1):
        words = f"a cache of {size} positions"
        last = np.minimum(places, size - 1)
        yield f"{words}, the last slot is overwritten", in_slots(recipe, facts, last, last, length)
        yield (f"{words}, the last slot is overwritten, which has the positions of all",
               in_slots(recipe, facts, last, last, length, positions=given(recipe, last, places),
                        key_positions=given(recipe, last, places)))  # fmt: skip
        block = np.maximum(np.minimum(facts.begins, size - count), 0) + index
        yield (f"{words}, a call that does not fit is written over the last slots",
               in_slots(recipe, facts, block, places, size))  # fmt: skip
        fitting = np.where(places < size, places, -1)
        yield f"{words}, what does not fit is lost", in_slots(
            recipe, facts, fitting, places, size)  # fmt: skip
        if recipe.window is None:
            held = facts.valid[:, None] & past(facts)
            held = held & (places[:, None] >= facts.ends[..., None] - size)
            yield f"{words}, the oldest are overwritten", seeing(recipe, held)


def _in_slots(
    recipe: Recipe, facts: Decoded, words: str, slots: np.ndarray, *lasts: np.ndarray
) -> Variants:
    """Other slots, with each of the last slots that queries see, and the positions to that."""
    kinds = {"": "keys"}
    if "alibi" in recipe.options:
        kinds |= {", ALiBi of slots alone": "slots", ", ALiBi of positions": None}
    for last in lasts:
        for detail, by_slot in kinds.items():
            for hidden, empty in (("", True), (", empty slots are hidden", False)):
                yield words + hidden + detail, in_slots(
                    recipe, facts, slots, last, empty=empty, by_slot=by_slot)  # fmt: skip
        if "rotary" in recipe.options:
            both: dict[str, Any] = {
                "positions": given(recipe, last, facts.places),
                "key_positions": given(recipe, slots, facts.places),
            }
            for hidden, empty in (("", True), (", empty slots are hidden", False)):
                yield f"{words}{hidden}, and positions are slots", in_slots(
                    recipe, facts, slots, last, empty=empty, **both)  # fmt: skip


@_decoding
def _off_by_one(recipe: Recipe, facts: Decoded) -> Variants:
    places, later = facts.places, (facts.calls > 0).astype(int)[None]
    single = (np.bincount(facts.calls)[facts.calls] == 1).astype(int)[None]
    grown = 2 * len(facts.calls)
    for words, slots in {
        "each position one slot late": places + 1,
        "calls after the first one slot late": places + later,
        "calls after the first one slot early": places - later,
        "calls of one position one slot early": np.maximum(places - single, 0),
        "calls of one position one slot late": places + single,
        "each call one slot earlier than the one before": np.maximum(places - facts.rounds, 0),
        "each call one slot later than the one before": places + facts.rounds,
    }.items():
        yield from _in_slots(recipe, facts, words, slots, places, slots)
        for detail, by_slot in (("", "keys"), (", ALiBi of slots alone", "slots")):
            yield f"{words}, the last is seen{detail}", in_slots(
                recipe, facts, slots, slots, grown, by_slot=by_slot)  # fmt: skip
        within = np.minimum(slots, len(facts.calls) - 1)
        for said, keys, values in _ONE_OF_BOTH:
            yield f"{said} alone, {words}", misaligned(recipe, facts, slots, keys, values)
            if np.any(within != slots):
                yield f"{said} alone, {words}, but for the last slot", misaligned(
                    recipe, facts, within, keys, values)  # fmt: skip


_ONE_OF_BOTH = ("values", False, True), ("keys", True, False)
"""Keys or values alone: words, whether keys, whether values."""


def _row_of_another(facts: Decoded) -> Iterator[tuple[str, np.ndarray]]:
    """For each row another one, (B,)."""
    rows = np.arange(len(facts.valid))
    for words, row in (("row 0", 0), ("the last row", len(rows) - 1)):
        yield f"{words} for all", np.full_like(rows, row)
    for by, words in ((1, "before"), (-1, "after")) if len(rows) > 1 else ():
        yield f"the row {words}", np.roll(rows, by)
    if len(rows) > 2:
        yield "the rows from the last to the first", rows[::-1]


@_decoding
def _row_zero(recipe: Recipe, facts: Decoded) -> Variants:
    if not facts.ragged:
        return
    places, index = facts.places, facts.places - facts.begins
    for words, rows in _row_of_another(facts):
        held, theirs = facts.valid[rows], facts.places[rows]
        distance = theirs[:, :, None] - theirs[:, None]
        seen = held[:, None] & past(facts)
        near = seen & in_window(recipe, distance)
        yield f"the mask of {words}", seeing(recipe, near)
        yield f"the mask of {words}, the window by the row's own", seeing(
            recipe, seen & in_window(recipe, behind(facts)))  # fmt: skip
        other = given(recipe, theirs, places)
        both = {"positions": other, "key_positions": other}
        yield f"mask and positions of {words}", seeing(recipe, near, **both)
        asking = near & held[..., None]
        yield f"the mask of {words}, of queries too", seeing(recipe, asking)
        yield f"mask and positions of {words}, of queries too", seeing(recipe, asking, **both)
        begins = facts.begins[rows]
        yield from _placed(recipe, facts, f"the length of {words}", begins + index)
        yield from _in_slots(recipe, facts, f"written at the length of {words}", begins + index,
                             begins + index, places)  # fmt: skip
        yield f"as many seen as of {words}", in_slots(recipe, facts, places, begins + index)


@_decoding
def _longest(recipe: Recipe, facts: Decoded) -> Variants:
    if not facts.ragged:
        return
    places, index = facts.places, facts.places - facts.begins
    first = facts.calls == 0
    prompt = facts.ends[:, :1]
    # The longest row may have no padding: all lengths are then those that count padding
    columns = np.searchsorted(facts.calls, facts.calls)
    both = ", as lengths that count padding do"
    for words, rows in (("longest", np.max), ("shortest", np.min)):
        begins = rows(facts.begins, axis=0, keepdims=True) + np.zeros_like(places)
        after = np.where(first, places, rows(prompt) + places - prompt)
        grown = _grown(facts, rows) + index
        for said, slots in ((words, begins + index), (f"{words} at the first call", after),
                            (f"{words} of each call", grown)):  # fmt: skip
            counted = both if np.array_equal(slots - index, columns + 0 * places) else ""
            its = "its length" if said == "longest" else said
            yield from _placed(recipe, facts, its + counted, slots)
            yield (
                f"as many slots are seen as the {said} has",
                in_slots(recipe, facts, places, slots),
            )
            held = f"written after the {said}{counted}"
            yield from _in_slots(recipe, facts, held, slots, slots, places)


def _grown(facts: Decoded, most: Callable[..., np.ndarray]) -> np.ndarray:
    """(1, T): the length before each call where all rows grow by one row's positions."""
    counts = facts.ends - facts.begins
    first = np.searchsorted(facts.calls, np.arange(facts.calls[-1] + 1))
    each = most(counts[:, first], axis=0)
    return (np.cumsum(each) - each)[facts.calls][None]


@_decoding
def _padding(recipe: Recipe, facts: Decoded) -> Variants:
    if not facts.ragged:
        return
    places, columns = facts.places, np.broadcast_to(np.arange(len(facts.calls)), facts.valid.shape)
    apart = columns[:, :, None] - columns[:, None]
    own, first = behind(facts), facts.calls == 0
    prompt = np.cumsum(facts.valid | first, axis=1) - (facts.valid | first)
    for words, held, counted in (
        ("", np.ones_like(facts.valid), columns),
        ("that of the first call", facts.valid | first, prompt),
        ("that of calls after the first", facts.valid | ~first, places + 0),
    ):
        detail = words or "all of it"
        own_counted = counted[:, :, None] - counted[:, None]
        for distance in (own, own_counted) if recipe.window is not None else (own,):
            seen = held[:, None] & past(facts) & in_window(recipe, distance)
            yield detail, seeing(recipe, seen)
            for said, other in ((", and counted in positions", counted),
                                (", and counted in positions of the batch", columns)):  # fmt: skip
                both = dict.fromkeys(("positions", "key_positions"),
                                     given(recipe, other, places))  # fmt: skip
                yield detail + said, seeing(recipe, seen, **both)
                yield f"{detail}{said} of queries", seeing(
                    recipe, seen, positions=both["positions"])  # fmt: skip
    hidden = facts.valid[:, None] & past(facts)
    for words, counted in (("", columns), (" in the first call", prompt)):
        yield from _placed(recipe, facts, f"hidden, and counted in positions{words}", counted)
        if recipe.window is not None:
            near = in_window(recipe, counted[:, :, None] - counted[:, None])
            said = f"hidden, and counted in the window{words}"
            yield said, seeing(recipe, hidden & near)
            both = dict.fromkeys(("positions", "key_positions"), given(recipe, counted, places))
            yield f"{said} and in positions", seeing(recipe, hidden & near, **both)
    if recipe.window is not None:
        yield "hidden, and counted in the window of the batch", seeing(
            recipe, hidden & in_window(recipe, apart))  # fmt: skip


@_decoding
def _joined(recipe: Recipe, facts: Decoded) -> Variants:
    if not facts.joined or "rotary" not in recipe.options:
        return
    places, first, prompt = facts.places, facts.calls == 0, facts.ends[:, :1]
    shift = prompt.max() - prompt
    by_column = np.cumsum(np.ones_like(places), axis=1) - 1
    for words, other in {
        "by their positions once more": 2 * places,
        "by positions of the padded batch": places + shift,
        "by positions of the padded batch once more": 2 * places + shift,
        "by the columns of the call": by_column,
        "by the columns of the call once more": places + by_column,
        "by the length, once more": places + prompt,
        "back to no rotation": np.zeros_like(places),
    }.items():
        yield words, keys_turned(recipe, facts, partial(_of_call, recipe, facts, other, first))


def _of_call(
    recipe: Recipe, facts: Decoded, other: np.ndarray, which: np.ndarray, call: int
) -> np.ndarray:
    """Other positions of the keys of some calls, as calls after them see them."""
    old = which & (facts.calls < call)
    return given(recipe, np.where(old, other, facts.places), facts.places)


@_decoding
def _rotated_again(recipe: Recipe, facts: Decoded) -> Variants:
    if "rotary" not in recipe.options:
        return
    places, every = facts.places, np.ones_like(facts.calls, bool)
    for words, other in {
        "once more as they are read": 2 * places,
        "held without rotation": np.zeros_like(places),
        "held without rotation, and turned by the slots of a call": places - facts.begins,
    }.items():
        yield words, keys_turned(recipe, facts, partial(_of_call, recipe, facts, other, every))

    later = facts.calls > 0
    for words, other in {"without rotation": np.zeros_like(places),
                         "turned twice": 2 * places}.items():  # fmt: skip
        counted = given(recipe, np.where(later, other, places), places)
        yield f"{words} after the first call, for the call itself too", recipe.but(
            key_positions=counted)  # fmt: skip
        yield f"held {words} after the first call", keys_turned(
            recipe, facts, partial(_of_call, recipe, facts, other, later))  # fmt: skip

    def each(call: int) -> np.ndarray:
        times = facts.rounds[:, facts.calls == call][:, :1] - facts.rounds
        return given(recipe, places * (1 + np.maximum(times, 0)), places)

    yield "again in each call", keys_turned(recipe, facts, each, int(facts.calls[-1]) + 1)

    def lengths(call: int) -> np.ndarray:
        end = facts.ends[:, facts.calls == call][:, :1]
        return given(recipe, np.where(facts.calls < call, places + end, places), places)

    yield "once more by the length of the cache", keys_turned(recipe, facts, lengths)


@_decoding
def _turned_again(recipe: Recipe, facts: Decoded) -> Variants:
    """Keys that are held turned again: which of them, in which calls, by what, and whether kept."""
    if "rotary" not in recipe.options:
        return
    places, calls = facts.places, facts.calls
    first = np.searchsorted(calls, np.arange(calls[-1] + 1))
    begins, ends = facts.begins[:, first], facts.ends[:, first]  # of each call, (B, calls)
    by = {
        "by their own positions": places[:, None] + 0 * begins[..., None],
        "by the length before": begins[..., None] + 0 * places[:, None],
        "by the length after": ends[..., None] + 0 * places[:, None],
        "by the newest position": (ends - 1)[..., None] + 0 * places[:, None],
        "by one position": np.ones((*begins.shape, len(calls)), int),
        "by as many as the call reads": (ends - begins)[..., None] + 0 * places[:, None],
    }  # [B, calls, T]: what a call turns each key by
    number = np.arange(calls[-1] + 1)
    old, behind_first = number[:, None] > calls, (number > 0)[:, None]
    both = number[:, None] >= calls
    # Of whom, when, which calls turn which keys (calls, T), and whether they stay turned.
    single = (np.bincount(calls) == 1)[:, None]
    some = behind_first & single & np.any(behind_first & ~single)  # else it is each call
    of_one = "in calls of one position"
    newest = old & (places[:, None] == begins[..., None] - 1)
    turned = (
        ("what is held", "in each call", old, True),
        ("what is held", of_one, old & some, True),
        ("the newest that is held", "in each call", newest, True),
        ("old and new keys", "in each call after the first", both & behind_first, True),
        ("old and new keys", "in each call", both, True),
        ("old and new keys", of_one, both & some, True),
        ("those of the first call", "after it", old & (number == 1)[:, None], True),
        ("old and new keys", "in the second call", both & (number == 1)[:, None], True),
        ("what is held", "as it is read", old, False),
        ("what is held", f"as it is read {of_one}", old & some, False),
        ("old and new keys", "as they are read after the first call", both & behind_first, False),
        ("old and new keys", "as they are read", both, False),
    )
    begun = {"turned again": places, "turned back": places,
             "held without rotation, turned": 0 * places}  # fmt: skip
    for of, when, which, kept in turned:
        if not np.any(which):
            continue
        # By one angle for all as they are read: that are the queries' positions.
        for words, angles in by.items() if kept else [*by.items()][:1]:
            steps = angles * which
            total = np.cumsum(steps, axis=1) if kept else steps
            for said, base in begun.items():
                more = -total if said == "turned back" else total
                every = given(recipe, base, places)[:, None] + more
                most = len(number) if kept else 2
                yield f"{of} {said} {words}, {when}", keys_turned(
                    recipe, facts, lambda call, every=every: every[:, call], most)  # fmt: skip


@_decoding
def _normed_again(recipe: Recipe, facts: Decoded) -> Variants:
    """Keys that are held normed again, in each call or as they are read."""
    norm = recipe.options.get("query_key_norm")
    if norm is None:
        return
    (section,) = (one for one in recipe.sections if one.option == "query_key_norm")
    calls, stages = facts.calls, recipe.until("key")
    most = int(calls[-1]) + 1
    times = [stages["key"]]
    for _ in range(most):
        times.append(section.forward("key", times[-1], recipe, stages))
    every, later = np.arange(most)[:, None] - calls, np.arange(most)[:, None] > 0
    for words, often in {
        "what is held normed again in each call": every,
        "what is held normed again as it is read": np.minimum(every, 1),
        "old and new keys normed again in each call after the first": (every + 1) * later,
        "old and new keys normed again in each call": every + 1,
    }.items():
        often = np.where(every < 0, 0, np.minimum(often, most))  # [calls, T]

        def seen_in(call: int, often: np.ndarray = often) -> np.ndarray:
            keys = np.stack(times)[often[call], :, np.arange(len(calls))]  # [T, B, K, d]
            return keys.swapaxes(0, 1)

        yield words, with_keys_of_calls(recipe, facts, [seen_in(call) for call in range(most)])


@with_empty_rows
@_decoding
def _in_front(recipe: Recipe, facts: Decoded) -> Variants:
    """New positions joined in front of those that are held, where a mask counts slots."""
    places, index, free = facts.places, facts.places - facts.begins, facts.valid[:, None]
    slots = (facts.ends[..., None] - facts.ends[:, None]) + index[:, None]
    seen = free & (facts.calls <= facts.calls[:, None]) & (slots <= places[..., None])
    yield "new positions in front of the old", seeing(
        recipe, seen & in_window(recipe, places[..., None] - slots))  # fmt: skip
    if recipe.window is not None:
        yield "new positions in front of the old, the window by positions", seeing(
            recipe, seen & in_window(recipe, behind(facts)))  # fmt: skip
    for said, keys, values in _ONE_OF_BOTH:
        yield f"new {said} alone in front of the old", misaligned(
            recipe, facts, None, keys, values)  # fmt: skip
        yield f"{said} alone, each call at slot 0", misaligned(
            recipe, facts, index, keys, values)  # fmt: skip
    for words, rows in (("longest", np.max), ("shortest", np.min)) if facts.ragged else ():
        begins = rows(facts.begins, axis=0, keepdims=True)
        for said, keys, values in _ONE_OF_BOTH:
            yield f"{said} alone, after the {words} row", misaligned(
                recipe, facts, begins + index, keys, values)  # fmt: skip


@_decoding
def _narrow(recipe: Recipe, facts: Decoded) -> Variants:
    """Keys and values that are rounded as they are held."""
    pairs = np.broadcast_to(cached(facts), (len(facts.valid), *cached(facts).shape))
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        for of, names in {"": KEYS_AND_VALUES, "keys alone, ": ("key",),
                          "values alone, ": ("value",)}.items():  # fmt: skip
            exact = {name: recipe.stages[name] for name in names}
            rounded = {name: x.astype(dtype).astype(x.dtype) for name, x in exact.items()}
            made = _held_as(recipe, pairs, rounded)
            made.computed["ties"] = partial(_other_ties, recipe, pairs, exact, rounded, dtype)
            yield f"{of}in {np.dtype(dtype).name}", made


KEYS_AND_VALUES = "key", "value"

NEAR_TIE = 16 * 2.0**-24
"""How near to the middle of two numbers, as a part of the greatest number of a vector, float32 may
be on its other side."""

MOST_TIES = 16
"""How many such numbers, of keys and of values, are tried on the other side."""


def _held_as(recipe: Recipe, pairs: np.ndarray, held: Arrays) -> Recipe:
    for name, array in held.items():
        keys = name == "key"
        recipe = replaced(recipe, pairs, lambda _, array=array: array, keys, not keys)
    return recipe


def _other_ties(
    recipe: Recipe, pairs: np.ndarray, exact: Arrays, rounded: Arrays, dtype: Any,
    distance: Callable[[Recipe], float],
) -> Recipe:  # fmt: skip
    """The recipe that is nearest, numbers near the middle of two rounded to either of them."""
    held, best = dict(rounded), _held_as(recipe, pairs, rounded)
    least = distance(best)
    for name, x in exact.items():
        size = np.abs(x).max(-1, keepdims=True)  # what is turned has errors of its vector's size
        away = x + np.sign(x - rounded[name]) * NEAR_TIE * size
        other = away.astype(dtype).astype(x.dtype)
        near = np.abs(x - (rounded[name] + other) / 2) / size
        places = np.argwhere(other != rounded[name])
        places = places[np.argsort(near[tuple(places.T)], kind="stable")][:MOST_TIES]
        for place in map(tuple, places):
            array = held[name].copy()
            array[place] = other[place]
            made = _held_as(recipe, pairs, {**held, name: array})
            left = distance(made)
            if left < least:
                held, best, least = {**held, name: array}, made, left
    return best


@with_empty_rows
@_decoding
def _ring(recipe: Recipe, facts: Decoded) -> Variants:
    window = recipe.window
    if window is None:
        return
    places, apart, free = facts.places, behind(facts), facts.valid[:, None]
    before, first, old = free & past(facts), facts.calls == 0, cached(facts)
    begins, ends = facts.begins[..., None], facts.ends[..., None]
    for size in (window - 1, window + 1, window, *range(max(window - 3, 1), window - 1)):
        words = f"a ring of {size} positions for a window of {window}"
        narrow = before & (apart < size)
        held, kept = places[:, None] >= ends - size, places[:, None] >= begins - size
        near = before & (apart < window)
        later = {"": narrow, ", of which a call overwrites what its first queries see": near & held,
                 ", whose window is not looked at": before & held,
                 ", all of which a call sees": free & (places[:, None] < ends) & held,
                 ", which calls see as it was before them": near & (~old | kept),
                 ", whose window is not looked at, and the call": before & (~old | kept),
                 }  # fmt: skip
        for detail, seen in later.items():
            yield words + detail, seeing(recipe, seen)
            yield f"{words}{detail}, in calls after the first", seeing(
                recipe, np.where(first[:, None], near, seen))  # fmt: skip
    # A call of several is written as a whole before its first query attends
    held = places[:, None] >= ends - window
    own_slot = (free & (places[:, None] < ends) & held
                & ((places[:, None] - places[..., None]) % window == 0))  # fmt: skip
    filled = places[:, None] % window < np.minimum(places + 1, window)[..., None]
    overwritten = "a call is written before its queries attend"
    for words, seen in {
        "a query that sees nothing sees its own slot": np.where(
            (before & held).any(-1, keepdims=True), before & held, own_slot
        ),
        "a query's own slot is seen": (before & held) | own_slot,
        "as many slots are seen as the query has positions": free
        & (places[:, None] < ends)
        & held
        & filled,
    }.items():
        yield f"{overwritten}, {words}", seeing(recipe, seen)
    # Of a first call that is longer than the window the first positions are held
    prompt = facts.ends[:, :1]
    until = prompt + (places - prompt) % window
    head = (places < window)[:, None] & (until[:, None] > places[..., None])
    near = right(recipe, facts)
    for words, more in (("", before), (", the window is looked at", near)):
        seen = np.where(first, head & more, near)
        yield f"of the first call the first {window} positions are held{words}", seeing(
            recipe, np.where(first[:, None], near, seen))  # fmt: skip
    seen, slots = right(recipe, facts), np.arange(window)
    for words, written in (("", places[..., None] + 1), (", before the call", begins),
                           (", after the call", ends)):  # fmt: skip
        empty = slots >= written
        detail = f"slots are seen that are not yet written{words}"
        yield detail, seeing(recipe, seen, empty)
        yield f"{detail}, in calls after the first", seeing(
            recipe, seen, empty & ~first[:, None])  # fmt: skip
    turned = places % window
    for words, queries in (("", places), (", those of queries too", turned),
                           (", queries are at its end", np.minimum(places, window - 1)),
                           ):  # fmt: skip
        both = {"positions": given(recipe, queries, places),
                "key_positions": given(recipe, turned, places)}  # fmt: skip
        yield f"slots are taken for positions{words}", recipe.but(**both)
    every = np.ones_like(facts.calls, bool)
    held_at = partial(_of_call, recipe, facts, turned, every)
    wrong = recipe.but(bias=alibi_of(recipe, facts, held_at))
    if "rotary" in recipe.options:
        wrong = keys_turned(wrong, facts, held_at)
    yield "slots are taken for positions of what is held", wrong


@_decoding
def _empty(recipe: Recipe, facts: Decoded) -> Variants:
    if recipe.window is not None:
        return
    seen, most, calls = right(recipe, facts), len(facts.calls), facts.calls
    own, ends = calls == calls[:, None], facts.ends[..., None]
    last = facts.places[:, None] == facts.ends[..., None] - 1
    kinds = {
        "": seen,
        ", and the whole call": facts.valid[:, None] & (calls <= calls[:, None]),
        ", and the last position of the call": seen | (facts.valid[:, None] & own & last),
    }
    when = {"": calls >= 0, ", in calls after the first": calls > 0,
            ", in calls of one position": np.bincount(calls)[calls] == 1}  # fmt: skip
    for size in (most, most + 1, most + 2, *(n for n in CAPACITIES if n > most)):
        empty = np.arange(size) >= ends
        for (said, more), (words, which) in itertools.product(kinds.items(), when.items()):
            at = which[None, :, None]
            if which.any() and not (said and "of one" in words):
                yield f"of {size} slots{said}{words}", seeing(
                    recipe, np.where(at, more, seen), empty & at)  # fmt: skip
    for size in (*range(most + 3, most + MORE), *(n for n in LENGTHS if n >= most + MORE)):
        for words, which in when.items() if size not in CAPACITIES else ():
            if which.any():
                yield f"of {size} slots{words}", seeing(
                    recipe, seen, (np.arange(size) >= ends) & which[None, :, None])  # fmt: skip
    # One slot too many is seen, which within a call is the next position
    places, slots = facts.places[..., None], np.arange(most + 1)
    written = facts.valid[:, None] & (calls <= calls[:, None])
    for words, which in when.items():
        at = which[None, :, None]
        for size in most, most + 1:
            if which.any():
                yield f"of {size} slots, the one after the query's own{words}", seeing(
                    recipe, seen | (written & at & (facts.places[:, None] == places + 1)),
                    at & (slots[:size] >= ends) & (slots[:size] == places + 1))  # fmt: skip
        # Rows of the batch that are shorter see as much as the longest
        for said, length in (
            ("before the call", facts.begins), ("after the call", facts.ends)
        ) if facts.ragged else ():  # fmt: skip
            bound = length.max(0)[:, None]
            yield f"up to the longest row's length {said}{words}", seeing(
                recipe, seen | (written & at & (facts.places[:, None] < bound)),
                at & (slots >= ends) & (slots < bound))  # fmt: skip
    # Of the slots that no position has, the first ones are seen
    for count, of in ((1, "the first slot"), (2, "the first two slots")):
        for size in (most, most + count):
            slots = np.arange(size)
            next_ones = (slots >= ends) & (slots < ends + count)
            for words, which in when.items():
                if which.any():
                    yield f"of {size} slots, {of} that no position has{words}", seeing(
                        recipe, seen, next_ones & which[None, :, None])  # fmt: skip


@with_empty_rows
@_decoding
def _last_page(recipe: Recipe, facts: Decoded) -> Variants:
    """Keys in pages of a size, of which the last is not seen until it is full."""
    places, longest = facts.places, int(facts.ends.max())
    new = facts.valid[:, None] & (facts.calls <= facts.calls[:, None])
    for size in (n for n in range(2, longest) if n <= MOST_OF_A_PAGE):
        near, slots = right(recipe, facts), np.arange(size)
        whole = np.maximum(facts.ends // size * size, np.minimum(facts.ends, size))[..., None]
        yield f"pages of {size}, of those that the row has after the call", seeing(
            recipe, near & (places[:, None] < whole))  # fmt: skip
        for words, full in {
            f"pages of {size}": (places + 1) // size * size,
            f"pages of {size}, the query's own not even when it is full": places // size * size,
        }.items():
            seen = near & (places[:, None] < full[..., None])
            yield words, seeing(recipe, seen)
            yield f"{words}, but the first key is", seeing(
                recipe, seen | (near & (places == 0)[:, None]))  # fmt: skip
            yield f"{words}, but a query's own key is", seeing(
                recipe, seen | (near & np.eye(len(facts.calls), dtype=bool)))  # fmt: skip
            bound = np.maximum(full, size)[..., None]
            yield f"{words}, the first is seen as a whole", seeing(
                recipe, new & in_window(recipe, behind(facts)) & (places[:, None] < bound),
                (slots >= facts.ends[..., None]) & (slots < bound))  # fmt: skip


@_decoding
def _shared_pages(recipe: Recipe, facts: Decoded) -> Variants:
    """Pages that are the first row's for all rows, as where a table of pages is not each row's."""
    slots = np.arange(int(facts.ends.max()) + 1)  # padding at the end stands after the last
    for size in (n for n in PAGES if n < slots[-1]) if len(facts.valid) > 1 else ():
        page = slots // size
        for (of, shared), (words, written, read), at_once in itertools.product(
            {"the first page": page == 0, "the second page": page == 1,
             "each page after the first": page > 0}.items(),
            (("is the first row's for all", True, True),
             ("is written into the first row's", True, False),
             ("is read from the first row's", False, True)), (True, False),
        ):  # fmt: skip
            if written or at_once:
                rows = "" if at_once else ", row after row"
                yield f"of pages of {size}, {of} {words}{rows}", with_shared_pages(
                    recipe, facts, shared, written, read, at_once)  # fmt: skip


@_decoding
def _merged(recipe: Recipe, facts: Decoded) -> Variants:
    """What is held and what a call brings, each with a softmax of its own, merged wrongly."""
    old = cached(facts)
    for words, merged in merged_by((old, ~old)):

        def step(_: Recipe, stages: Arrays, merged: Callable[..., np.ndarray] = merged) -> Any:
            return merged(stages["masked_logits"])

        yield words, recipe.stepping("probabilities", step)


@_decoding
def _not_causal(recipe: Recipe, facts: Decoded) -> Variants:
    seen, first = right(recipe, facts), (facts.calls == 0)[:, None]
    whole = facts.valid[:, None] & (facts.calls <= facts.calls[:, None])
    for distance in (behind(facts), np.maximum(behind(facts), 0)):
        more = whole & in_window(recipe, distance)
        yield from _seen(recipe, {
            "without the causal rule": more,
            "in calls after the first": np.where(first, seen, more),
            "in the first call": np.where(first, more, seen),
        })  # fmt: skip


def _placed(recipe: Recipe, facts: Decoded, words: str, counted: np.ndarray) -> Variants:
    """Other positions of queries and keys, or of one of both."""
    if not recipe.options.keys() & {"rotary", "alibi"}:
        return
    other = given(recipe, counted, facts.places)
    both = "positions", "key_positions"
    for said, names in (
        ("", both), (", of queries alone", both[:1]), (", of keys alone", both[1:])
    ):  # fmt: skip
        told = words + said if words else said.removeprefix(", ")
        yield told, recipe.but(**dict.fromkeys(names, other))


@_decoding
def _after_the_update(recipe: Recipe, facts: Decoded) -> Variants:
    count, later = facts.ends - facts.begins, facts.calls > 0
    yield from _placed(recipe, facts, "each call", facts.places + count)
    yield from _placed(recipe, facts, "calls after the first", facts.places + count * later)
    yield from _placed(recipe, facts, "calls after the first, one too far", facts.places + later)
    yield from _placed(recipe, facts, "calls after the first, one too near", facts.places - later)
    alone = np.where(later, facts.ends - 1, facts.places)
    yield from _placed(recipe, facts, "all of a call have its last position", alone)
    alone = np.where(later, facts.begins, facts.places)
    yield from _placed(recipe, facts, "all of a call have its first position", alone)
    of = "of the first call too"
    yield from _placed(recipe, facts, f"all of a call have its first position, {of}", facts.begins)
    yield from _placed(recipe, facts, f"all of a call have its last position, {of}", facts.ends - 1)


@with_empty_rows
@_decoding
def _from_zero(recipe: Recipe, facts: Decoded) -> Variants:
    index = facts.places - facts.begins
    yield from _placed(recipe, facts, "", index)
    seen = right(recipe, facts) & (facts.places[:, None] <= index[..., None])
    yield "the causal rule alone, its corner at the first key", seeing(recipe, seen)
    if recipe.options.keys() & {"rotary", "alibi"}:
        other = given(recipe, index, facts.places)
        both = {"positions": other, "key_positions": other}
        yield "positions and the causal rule", seeing(recipe, seen, **both)


@_decoding
def _other_rows(recipe: Recipe, facts: Decoded) -> Variants:
    if len(facts.valid) == 1:
        return
    groups: list[tuple[str, int | None]] = [("", None)]
    if facts.turned is not None:
        groups.insert(0, ("the first call's, ", 0))
        for said, keys, values in (("rows", True, True), *_ONE_OF_BOTH):
            back = np.argsort(facts.turned)
            ways = {"not reordered": back,
                    "reordered by the inverse of the indices": back[back],
                    "reordered twice": facts.turned}  # fmt: skip
            for how, source in ways.items():
                yield f"the {said} are {how}", of_rows(recipe, facts, source, 0, keys, values)
                if facts.ragged and said == "rows":
                    yield f"rows and lengths are {how}", of_rows_and_lengths(
                        recipe, facts, source)  # fmt: skip
    index = facts.places - facts.begins
    for words, call in groups:
        for of, rows in _row_of_another(facts):
            for said, keys, values in (("", True, True), (", keys alone", True, False),
                                       (", values alone", False, True)):  # fmt: skip
                yield f"{words}those of {of}{said}", of_rows(
                    recipe, facts, rows, call, keys, values)  # fmt: skip
                if call is None:
                    yield f"those of {of}, what the call writes too{said}", of_rows(
                        recipe, facts, rows, None, keys, values, own=True)  # fmt: skip
            if facts.ragged and call == 0:
                yield f"{words}those of {of}, and the length", of_rows_and_lengths(
                    recipe, facts, rows)  # fmt: skip
                slots = np.where(facts.calls > 0, facts.begins[rows] + index, facts.places)
                yield from _in_slots(recipe, facts, f"{words}the length of {of}", slots, slots,
                                     facts.places)  # fmt: skip


MISTAKES: tuple[Row, ...] = (
    ("stale keys", "Write the new keys and values into the cache before the queries attend, and "
     "give the cache that a call returns to the next one.", _stale),
    ("own position not seen", "A query sees its own position too: write its key before it attends.",
     with_empty_rows(_own_hidden)),
    ("cached keys and values exchanged", "Return keys and values in the order in which they are "
     "read.", _exchanged),
    ("first positions dropped", "A cache without a window keeps all positions: join new ones "
     "after them, and cut none off.", with_empty_rows(_dropped)),
    ("cache overwritten", "Write a call's keys and values after those that the row holds, and "
     "refuse what does not fit: nothing is clamped to the last slot.", _overwritten),
    ("cache written off by one", "Write the first new position of row b at lengths[b], read before "
     "the call.", _off_by_one),
    ("position from the batch's longest row", "Count positions from lengths[b], the row's own, not "
     "from the greatest length of the batch.", _longest),
    ("padding held", "Write the valid positions of a row one after the other, or hide the others "
     "in all calls that follow; padding has no position.", _padding),
    ("mask of another row", "Each row has a mask and a length of its own: do not take those of row "
     "0 for the batch.", _row_zero),
    ("rotation after the join", "Keys are rotated once, as they are written: join caches as they "
     "are.", _joined),
    ("cached keys rotated wrongly", "Rotate each key once, by its own position: before it is "
     "written, or whenever it is read.", _rotated_again),
    ("cached keys rotated wrongly", "Rotate each key once, by its own position: before it is "
     "written, or whenever it is read.", _turned_again, no_families, True),
    ("cached keys normed again", "Norm each key once, before it is written: what is held is normed "
     "already.", _normed_again),
    ("ring off by one", "A ring for a window of W holds W positions; a call of several reads what "
     "it overwrites before it writes.", _ring),
    ("positions read after the update", "Read lengths[b] before the new positions are added to it.",
     _after_the_update),
    ("positions of a call begin at 0", "Add lengths[b] to the positions of a call: rotary "
     "positions and the causal rule count from the begin of the sequence.", _from_zero),
    ("later positions of a call seen", "Within a call a query sees the new positions up to its own "
     "alone.", _not_causal),
    ("empty slots seen", "Hide the slots from lengths[b] on.", _empty),
    ("last page not seen", "Read the pages up to the row's length, the last one as far as it is "
     "filled.", _last_page, no_families, True),
    ("held and new keys merged wrongly", "Weigh what is held and what is new by their sums, "
     "s * exp(m), m being the greatest logit of each.", _merged, no_families, True),
    ("cache in another order", "Join new positions after those that are held.", _in_front),
    ("cache in half precision", "Hold keys and values in the dtype of the call.", _narrow),
    ("positions of a call counted wrongly", "Position i of row b in a call is lengths[b] + i: "
     "count the row's own valid positions, of all calls before.", counted_wrongly, no_families,
     True),
    ("cache of another row", "Row b reads and writes row b of the cache; reorder keys, values and "
     "lengths together.", _other_rows),
    ("cache of another row", "Row b reads and writes row b of the cache; reorder keys, values and "
     "lengths together.", _shared_pages, no_families, True),
)  # fmt: skip
