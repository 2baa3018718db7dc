"""Functions that read a sequence in several calls without saying so: what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare

pytestmark = pytest.mark.usefixtures("folded_once")

HEADS, WIDTH = 2, 4
FEATURES = HEADS * WIDTH
HALF = WIDTH // 2


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways of decoding are searched for as long as it takes; pairs of mistakes are not."""
    for name, seconds in {"CALLS_SECONDS": 60.0, "PAIRS_SECONDS": 0.0}.items():
        monkeypatch.setattr(f"anymha.parity.diagnose.diagnosis.{name}", seconds)


def layer_of(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 6, **options}
    return anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)


def turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    angles = places[:, None, None] * 10_000.0 ** (-np.arange(HALF) / HALF)
    z = (x[..., :HALF] + 1j * x[..., HALF:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


Seen = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def reader(
    layer: Any,
    sizes: tuple[int, ...],
    capacity: int,
    seen: Seen = lambda slots, places, end: slots <= places,
    asked: Callable[[np.ndarray, int], np.ndarray] = lambda places, begin: places,
    placed: Callable[[np.ndarray, int], np.ndarray] = lambda places, begin: places,
) -> Callable[..., np.ndarray]:
    """A function that reads a sequence in calls of these sizes, into a cache of a capacity.

    What does not fit is written over the last slots. `seen` says which slots are seen, `asked` and
    `placed` by which positions queries and keys are turned.
    """
    w = {name: a.astype(np.float64) for name, a in anymha.get_weights(layer).items()}
    rotary = layer.config.rotary is not None

    def port(query: Any, use_causal_mask: bool = True, value_mask: Any = None) -> np.ndarray:
        x = query.astype(np.float64)
        keys = np.zeros((len(x), capacity, HEADS, WIDTH))
        values, slots = keys.copy(), np.arange(capacity)
        outputs, begin = [], 0
        while begin < x.shape[1]:
            size = sizes[min(len(outputs), len(sizes) - 1)]
            part = x[:, begin : begin + size]
            q, k, v = (np.einsum("btd,dhk->bthk", part, w[f"{n}.kernel"]) + w[f"{n}.bias"]
                       for n in ("query", "key", "value"))  # fmt: skip
            places = begin + np.arange(part.shape[1])
            if rotary:
                q, k = turned(q, asked(places, begin)), turned(k, placed(places, begin))
            at = min(begin, capacity - len(places))
            keys[:, at : at + len(places)], values[:, at : at + len(places)] = k, v
            logits = np.einsum("bthk,bshk->bhts", q, keys) / WIDTH**0.5
            may = np.broadcast_to(seen(slots, places[:, None], begin + len(places)),
                                  (len(x), len(places), capacity))  # fmt: skip
            if value_mask is not None:
                more = np.ones((len(x), capacity), bool)
                more[:, : value_mask.shape[1]] = value_mask[:, :capacity]
                may = may & more[:, None]
            logits = np.where(may[:, None], logits, -np.inf)
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares = shares / shares.sum(-1, keepdims=True)
            y = np.einsum("bhts,bshk,hko->bto", shares, values, w["output.kernel"])
            outputs.append(y + w["output.bias"])
            begin += size
        return np.concatenate(outputs, 1).astype(query.dtype)

    return port


def named(layer: Any, port: Any, length: int = 7, **call: Any) -> str | None:
    x = np.random.default_rng(8).standard_normal((2, length, FEATURES)).astype(np.float32)
    report = compare(layer, port, x, use_causal_mask=True, **call)
    return None if report.passed else str(report.diagnosis).partition(" (or: ")[0]


PADDING = np.arange(7) < [[7], [5]]


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize("sizes", [(1,), (3, 1, 2, 1), (4, 3)])
def test_functions_that_read_in_calls_rightly_pass(sizes, rotary) -> None:
    layer = layer_of(rotary=rotary)
    assert named(layer, reader(layer, sizes, 9)) is None
    assert named(layer, reader(layer, sizes, 7), value_mask=PADDING) is None


def with_empty(slots: np.ndarray, places: np.ndarray, end: int) -> np.ndarray:
    return (slots <= places) | (slots >= end)


@pytest.mark.parametrize(
    ("sizes", "capacity", "words"),
    [
        ((1,), 9, "of 9 slots, as of decoding one position at a time"),
        ((1,), 21, "of 21 slots, as of decoding one position at a time"),
        ((4, 1), 8, "of 8 slots, as of decoding 4 positions first, then one at a time"),
        ((3, 1, 2, 1), 12, "of 12 slots, as of decoding in calls of 3, 1, 2 and 1 positions"),
    ],
)
def test_empty_slots_that_are_seen(sizes, capacity, words) -> None:
    layer = layer_of()
    expected = f"empty slots seen ({words})"
    assert named(layer, reader(layer, sizes, capacity, with_empty)) == expected


def test_empty_slots_that_are_seen_after_the_prompt() -> None:
    def empty_later(slots: np.ndarray, places: np.ndarray, end: int) -> np.ndarray:
        return (slots <= places) | ((slots >= end) & (places >= 4))

    layer = layer_of()
    told = named(layer, reader(layer, (4, 1), 13, empty_later))
    words = "of 13 slots, in calls after the first, as of decoding 4 positions first, then one at"
    assert told.startswith(f"empty slots seen ({words}")


def test_empty_slots_that_are_seen_beside_padding() -> None:
    layer = layer_of()
    told = named(layer, reader(layer, (1,), 11, with_empty), value_mask=PADDING)
    assert told == "empty slots seen (of 11 slots, as of decoding one position at a time)"


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize(("capacity", "length"), [(5, 7), (6, 7), (20, 24)])
def test_what_does_not_fit_is_written_over_the_last_slot(capacity, length, rotary) -> None:
    layer = layer_of(rotary=rotary)
    told = named(layer, reader(layer, (1,), capacity), length)
    words = f"a cache of {capacity} positions, the last slot is overwritten"
    assert told == f"cache overwritten ({words}, as of decoding one position at a time)"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 1), "as of decoding 4 positions first, then one at a time"),
        ((2, 5), "as of decoding in calls of 2 and 5 positions"),
        ((3, 1, 2, 1), "as of decoding in calls of 3, 1, 2 and 1 positions"),
    ],
)
def test_positions_of_a_call_that_begin_at_zero(sizes, words) -> None:
    layer = layer_of(rotary=True)
    within: Any = lambda places, begin: places - begin  # noqa: E731
    told = named(layer, reader(layer, sizes, 7, asked=within, placed=within))
    assert told == f"positions of a call begin at 0 ({words})"


@pytest.mark.parametrize("by", [2, 3, -4, 7])
def test_queries_that_are_turned_further_than_keys(by) -> None:
    layer = layer_of(rotary=True)
    port = reader(layer, (1,), 7, asked=lambda places, begin: places + by)
    more = ", the number of keys" if by == 7 else ""
    assert named(layer, port) == f"rotary positions shifted (query {by:+d}{more})"


def test_a_layer_that_sees_later_keys_is_not_decoded() -> None:
    layer, x = layer_of(), np.random.default_rng(8).standard_normal((2, 7, FEATURES))
    port = reader(layer, (1,), 9, with_empty)
    report = compare(layer, lambda query: port(query), x.astype(np.float32))
    assert not report.passed
    assert "decoding" not in str(report.diagnosis)
