"""Positions that a decoding port counts wrongly, and keys that it turns again, are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, decoding
from anymha.parity.reports.report import Comparison

pytestmark = pytest.mark.usefixtures("quick_programs")

STEPS = (4, 1, 3, 1)
COUNTED = "positions of a call counted wrongly"
TURNED = "cached keys rotated wrongly"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of mistakes are not searched for long."""
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 0.0)


def turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Heads (B, t, H, d) turned by positions that broadcast to (B, t), in halves."""
    half = x.shape[-1] // 2
    angles = np.asarray(places, np.float64)[..., None, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1).astype(x.dtype)


def reported(
    count: Callable[[Mapping[str, Any]], Any] | None = None,
    again: Callable[[np.ndarray, int, int], np.ndarray] | None = None,
    of: str = "query key",
    causal: bool = False,
    option: str = "rotary",
    see: Callable[[Mapping[str, Any]], Any] | None = None,
    lost: Callable[[Mapping[str, Any]], bool] | None = None,
    shared: str = "",
    late: bool = False,
) -> Comparison:
    """The comparison of a port that keeps rows one after the other, with what is wrong.

    Args:
        count: Gives the positions (B, t) of a call from what is known of it.
        again: Changes the keys (B, S, H, d) that are held and new, of `past` and `t` positions.
        of: Whose positions `count` gives.
        causal: Whether the causal rule follows them.
        option: "rotary", "alibi" or "sliding_window", of 3, which `see` hides.
        see: Gives the slots (B, t, S) that are seen.
        lost: Says whether a call leaves the cache as it was.
        shared: "written", "read" or both: how the second page of four slots is row 0's for all.
        late: Whether a call attends before it writes.
    """
    layer = anymha.MultiHeadAttention(
        4, 8, query_features=16, backend="numpy", seed=3,
        **{option: 3 if option == "sliding_window" else True},
    )  # fmt: skip
    w = anymha.get_weights(layer)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 12, 16)).astype(np.float32)
    valid = np.ones((3, 12), bool)
    if again is None:
        valid[[0, 1, 1, 2, 2], [1, 2, 3, 5, 6]] = False

    def empty() -> dict[str, Any]:
        heads = np.zeros((3, 24, 4, 8), np.float32)
        return {"k": heads, "v": heads, "n": np.zeros(3, int), "calls": 0, "columns": 0}

    def step(x: Any, cache: Any, value_mask: Any = None) -> Any:
        held = np.ones(x.shape[:2], bool) if value_mask is None else value_mask
        q, k, v = (np.einsum("btd,dhk->bthk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"]
                   for n in ("query", "key", "value"))  # fmt: skip
        rank = np.cumsum(held, axis=1) - held
        slots, told = cache["n"][:, None] + rank, dict(cache, rank=rank, t=x.shape[1])
        told["index"] = np.arange(x.shape[1])
        told["count"] = held.sum(1)[:, None]
        other = slots if count is None else np.asarray(count(told)) + 0 * slots
        asked, placed = (other if name in of else slots for name in ("query", "key"))
        if option == "rotary":
            q, k = turned(q, asked), turned(k, placed)
        keys, values, marks = cache["k"].copy(), cache["v"].copy(), cache.get("marks")
        marks = np.zeros((3, 24), int) if marks is None else marks.copy()
        rows = np.arange(3)[:, None] + 0 * slots
        rows = np.where((slots // 4 == 1) & ("written" in shared), 0, rows)
        for array, new in ((keys, k), (values, v), (marks, placed)):
            array[rows[held], slots[held]] = new[held]
        past = int(cache["n"].max())
        if again is not None:
            keys[:, : past + x.shape[1]] = again(keys[:, : past + x.shape[1]], past, x.shape[1])
        page = [4, 5, 6, 7] if "read" in shared else []
        read, found = keys.copy(), values.copy()
        read[:, page], found[:, page] = keys[:1, page], values[:1, page]
        if late:
            read, found = cache["k"], cache["v"]
        logits = np.einsum("bthk,bshk->bhts", q, read) / np.float32(8**0.5)
        if option == "alibi":
            slopes = 2.0 ** -(2 * np.arange(1.0, 5))
            apart = np.abs(asked[:, None, :, None] - marks[:, None, None])
            logits = logits - (slopes[:, None, None] * apart).astype(np.float32)
        ends = (cache["n"] + held.sum(1))[:, None, None]
        seen = np.arange(24) <= (other if causal else slots)[..., None]
        seen = seen & (np.arange(24) < ends)
        if see is not None:
            seen = see(dict(told, slots=slots, seen=seen, ends=ends))
        logits = np.where(seen[:, None], logits, -np.inf)
        shares = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e30))
        shares = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-30)
        output = np.einsum("bhts,bshk,hko->bto", shares, found, w["output.kernel"])
        if lost is not None and lost(told):
            return (output + w["output.bias"]).astype(x.dtype), cache
        cache = {"k": keys, "v": values, "n": cache["n"] + held.sum(1), "marks": marks,
                 "calls": cache["calls"] + 1, "columns": cache["columns"] + x.shape[1]}  # fmt: skip
        return (output + w["output.bias"]).astype(x.dtype), cache

    call = {} if valid.all() else {"value_mask": valid}
    return compare(layer, decoding(step, empty, steps=STEPS), x, **call)


COUNTS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], str]] = {
    "padding of a call": (
        lambda c: c["n"][:, None] + c["index"], "padding within the call counted"),
    "calls": (lambda c: c["calls"] + c["rank"], "a call counts as one position"),
    "twice": (lambda c: 2 * c["n"][:, None] + c["rank"], "a call begins at twice the length"),
    "columns, one for all": (
        lambda c: c["columns"],
        "a call begins after all columns before it, padding counted, all of a call have one"),
    "from the end": (
        lambda c: c["n"][:, None] + c["t"] - c["count"] + c["rank"],
        "padding counted as if in front"),
    "at most": (lambda c: np.minimum(c["n"][:, None] + c["rank"], 6), "6 at most"),
    "again": (lambda c: (c["n"][:, None] + c["rank"]) % 7, "from 0 again after 6"),
    "reversed": (lambda c: c["n"][:, None] + c["count"] - 1 - c["rank"],
                 "from the last to the first of a call"),
}  # fmt: skip
"""Counts, and their words."""


# Of ALiBi's distances a count that moves all keys of a query alike changes nothing.
PLACED = [
    ("padding of a call", "query key", "rotary"), ("padding of a call", "key", "alibi"),
    ("calls", "query", "rotary"), ("calls", "query key", "alibi"), ("twice", "key", "rotary"),
    ("columns, one for all", "query", "rotary"), ("from the end", "key", "rotary"),
    ("at most", "query key", "alibi"), ("again", "query", "rotary"), ("reversed", "key", "alibi"),
]  # fmt: skip
"""The count, whose positions it gives, and what they are for."""


def test_each_count_is_placed() -> None:
    assert {name for name, *_ in PLACED} == {*COUNTS}


@pytest.mark.parametrize(("name", "of", "option"), PLACED)
def test_count_is_named(name: str, of: str, option: str) -> None:
    count, detail = COUNTS[name]
    words = {"query": ", of queries alone", "key": ", of keys alone"}.get(of, "")
    report = reported(count, of=of, option=option)
    assert not report.passed
    assert report.diagnosis is not None
    assert report.diagnosis.causes, str(report.diagnosis)
    told = [str(report.diagnosis.causes[0]), *report.diagnosis.alternatives]
    assert f"{COUNTED} ({detail}{words})" in told, str(report.diagnosis)


def test_causal_rule_that_follows_is_told() -> None:
    report = reported(COUNTS["calls"][0], causal=True)
    expected = f"{COUNTED} (a call counts as one position; the causal rule follows)"
    assert str(report.diagnosis) == expected


@pytest.mark.parametrize("option", ["rotary", "alibi"])
def test_port_with_nothing_wrong_passes(option: str) -> None:
    assert reported(option=option).passed
    assert reported(again=lambda keys, past, t: keys, option=option).passed


def of_old(places: Callable[[int, int], Any]) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """What turns the keys that are held by positions of `past` and `t`."""

    def again(keys: np.ndarray, past: int, t: int) -> np.ndarray:
        old = turned(keys[:, :past], np.asarray(places(past, t)) + np.zeros(past))
        return np.concatenate([old, keys[:, past:]], axis=1)

    return again


@pytest.mark.parametrize(
    ("again", "words"),
    [
        (lambda k, past, t: turned(k, np.arange(past + t)) if past else k,
         "old and new keys turned again by their own positions, in each call after the first"),
        (lambda k, past, t: turned(k, np.arange(past + t)),
         "old and new keys turned again by their own positions, in each call"),
        (lambda k, past, t: turned(k, np.full(past + t, past + t - 1)),
         "old and new keys turned again by the newest position, in each call"),
        (of_old(lambda past, t: past),
         "what is held turned again by the length before, in each call"),
        (of_old(lambda past, t: past + t),
         "what is held turned again by the length after, in each call"),
        (of_old(lambda past, t: 1), "what is held turned again by one position, in each call"),
        (of_old(lambda past, t: past * (t == 1)),
         "what is held turned again by the length before, in calls of one position"),
        (of_old(lambda past, t: np.arange(past) * (t == 1)),
         "what is held turned again by their own positions, in calls of one position"),
        (of_old(lambda past, t: past * (np.arange(past) == past - 1)),
         "the newest that is held turned again by the length before, in each call"),
        (of_old(lambda past, t: -np.arange(past)),
         "what is held turned back by their own positions, in each call"),
        (of_old(lambda past, t: np.arange(past) * (past == 4)),
         "those of the first call turned again by their own positions, after it"),
    ],
)  # fmt: skip
def test_keys_that_are_turned_again_are_named(again: Any, words: str) -> None:
    report = reported(again=again)
    assert not report.passed
    assert report.diagnosis is not None
    assert report.diagnosis.causes, str(report.diagnosis)
    assert str(report.diagnosis.causes[0]) == f"{TURNED} ({words})"


SLOTS = np.arange(24)


def unused(begin: np.ndarray) -> np.ndarray:
    """The slots from one on, of 16."""
    return (begin <= SLOTS) & (SLOTS < 16)


@pytest.mark.parametrize(
    ("see", "words"),
    [
        (lambda c: np.maximum(c["slots"] // 4 * 4, 1)[..., None] > SLOTS,
         "last page not seen (pages of 4, the query's own not even when it is full, but the "
         "first key is"),
        (lambda c: ((c["slots"] // 4 * 4)[..., None] > SLOTS) | (c["slots"][..., None] == SLOTS),
         "last page not seen (pages of 4, the query's own not even when it is full, but a "
         "query's own key is"),
        (lambda c: c["seen"] | (unused(c["ends"] - 1) & (c["calls"] > 0)),
         "empty slots seen (of 16 slots, and the last position of the call, in calls after the"),
        (lambda c: c["seen"] | (unused(c["ends"]) & (c["t"] == 1)),
         "empty slots seen (of 16 slots, in calls of one position)"),
        (lambda c: c["seen"] | unused(c["ends"] - 1),
         "empty slots seen (of 16 slots, and the last position of the call)"),
        (lambda c: c["slots"][..., None] + 1 >= SLOTS,
         "empty slots seen (of 12 slots, the one after the query's own)"),
        (lambda c: c["seen"] | (c["n"].max() > SLOTS),
         "empty slots seen (up to the longest row's length before the call)"),
        (lambda c: np.where(c["t"] > 1, c["seen"], c["ends"].max() > SLOTS),
         "empty slots seen (up to the longest row's length after the call, in calls of one"),
    ],
)  # fmt: skip
def test_pages_and_empty_slots_are_named(see: Any, words: str) -> None:
    told = str(reported(see=see).diagnosis)
    assert told.startswith(words), told


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (lambda c: c["t"] == 1, "calls of one position are not stored, nor is their length"),
        (lambda c: c["t"] > 1 and c["calls"] > 0,
         "calls of several positions after the first are not stored, nor is their length"),
        (lambda c: c["calls"] > 0, "calls after the first begin where it ends"),
    ],
)  # fmt: skip
def test_calls_that_leave_the_cache_as_it_was_are_named(lost: Any, words: str) -> None:
    assert str(reported(lost=lost).diagnosis) == f"stale keys ({words})"


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ("written", "the second page is written into the first row's"),
        ("written and read", "the second page is the first row's for all"),
    ],
)
def test_pages_of_the_first_row_are_named(shared: str, words: str) -> None:
    told = str(reported(shared=shared).diagnosis)
    assert told.startswith(f"cache of another row (of pages of 4, {words})"), told


def test_calls_that_attend_before_they_write_are_named() -> None:
    told = str(reported(late=True).diagnosis)
    words = "keys and values of a call are written after it attends, zeros are seen"
    assert told == f"stale keys ({words})"


def overwritten(c: Mapping[str, Any], held: np.ndarray) -> np.ndarray:
    """What a ring shows whose call is written first; `held` is seen where nothing else is."""
    seen = c["seen"] & (c["ends"] - 3 <= SLOTS)
    return np.where(seen.any(-1, keepdims=True), seen, held & (c["ends"] - 3 <= SLOTS))


def first_held(c: Mapping[str, Any]) -> np.ndarray:
    """What a ring shows that holds the first positions of a first call."""
    places, seen = c["slots"], c["seen"] & (c["slots"][..., None] - 3 < SLOTS)
    for row, prompt in enumerate((3, 2, 4)) if c["calls"] else ():
        for query, place in enumerate(places[row]):
            held = {slot: slot for slot in range(min(prompt, 3))}
            held |= {new % 3: new for new in range(prompt, place + 1)}
            seen[row, query] = np.isin(SLOTS, [*held.values()])
    return seen


@pytest.mark.parametrize(
    ("see", "words"),
    [
        (lambda c: overwritten(c, (c["slots"][..., None] % 3 == SLOTS % 3) & (c["ends"] > SLOTS)),
         "ring off by one (a call is written before its queries attend, a query that sees nothing "
         "sees its own slot)"),
        (first_held, "ring off by one (of the first call the first 3 positions are held)"),
        (lambda c: c["seen"] & (c["slots"][..., None] // 3 == SLOTS // 3),
         "another kind of window (blocks of 3 in its place, as of a ring of which slots up to the "
         "query's are seen)"),
        (lambda c: c["seen"] & (c["slots"][..., None] - 3 < SLOTS), None),
    ],
)  # fmt: skip
def test_rings_are_named(see: Any, words: str | None) -> None:
    report = reported(see=see, option="sliding_window")
    assert report.passed == (words is None)
    assert words is None or str(report.diagnosis) == words
