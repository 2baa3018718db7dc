"""Mistakes with masks of sequences, of segments, and of several at once: each has its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare

pytestmark = pytest.mark.usefixtures("folded_once")

BATCH, LENGTH, HEADS, WIDTH, FEATURES = 4, 8, 3, 8, 24
RNG = np.random.default_rng(12)
X = 1.5 * RNG.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
X_SQUARE = X[:, :BATCH]
LENGTHS = np.arange(LENGTH) < np.array([[8], [5], [7], [6]])
HOLES = (np.arange(LENGTH) + np.arange(BATCH)[:, None]) % 4 > 1
HOLES[:, 6] = False
SQUARE = np.arange(BATCH) < np.array([[4], [2], [3], [1]])
SEEN = RNG.random((BATCH, LENGTH, LENGTH)) < 0.5
SEEN |= np.eye(LENGTH, dtype=bool)
IDS = np.array([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2, -1],
                [0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, -1, -1]])  # fmt: skip
TRIL = np.tri(LENGTH, dtype=bool)
OWN = np.eye(LENGTH, dtype=bool)
EMPTY = (
    np.isin(np.arange(LENGTH), (2, 5))[:, None]
    & np.array([False, True, True, False])[:, None, None]
)
LONELY = np.where(EMPTY, OWN, SEEN)
SEEN_TWICE = LONELY.sum(-1, keepdims=True) > 1
Mask = Callable[..., np.ndarray]


def report_of(
    seen: Mask, x: np.ndarray = X, lower: float = np.inf, window: int | None = None, **call: Any
) -> Comparison:
    """The layer beside a port that hides, by `lower`, what `seen` does not let see."""
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3, bias_initializer="random_normal",
                                      sliding_window=window)  # fmt: skip
    w = {name: array.astype(np.float64) for name, array in anymha.get_weights(layer).items()}

    def port(query: Any, use_causal_mask: bool = False, **masks: Any) -> Any:
        q, k, v = (np.einsum("btd,dhk->bthk", query, w[f"{name}.kernel"]) + w[f"{name}.bias"]
                   for name in ("query", "key", "value"))  # fmt: skip
        logits = np.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5
        seeing = seen(**masks)
        shares = np.exp(np.where(seeing, logits, logits - lower))
        total = shares.sum(-1, keepdims=True)
        context = np.einsum("bhts,bshv->bthv", shares / np.where(total == 0, 1, total), v)
        y = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        return y.astype(np.float32)

    return compare(layer, port, x, **call)


def of_keys(value_mask: np.ndarray) -> np.ndarray:
    return value_mask[:, None, None]


def later(offset: int) -> np.ndarray:
    return np.tri(LENGTH, k=offset, dtype=bool)[None, None]


def same(ids: np.ndarray) -> np.ndarray:
    return ((ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None] & TRIL)[:, None]


def pieces(ids: np.ndarray) -> np.ndarray:
    """Pieces between the last positions of segments, as where 1 is not added to the edges."""
    seen = np.zeros((len(ids), LENGTH, LENGTH), bool)
    for row, own in enumerate(ids):
        edges = np.flatnonzero(np.diff(own))
        for start, end in zip([0, *edges], [*edges, LENGTH], strict=True):
            seen[row, start:end, start:end] = own[start] >= 0
    return (seen & TRIL)[:, None]


def without_last(ids: np.ndarray) -> np.ndarray:
    last = ids.max(1, keepdims=True)
    return same(np.where(ids == last, -1, ids))


PADDING = {"value_mask": LENGTHS}
BOTH = {"value_mask": LENGTHS, "attention_mask": SEEN}
TWO_SIDES = {"value_mask": LENGTHS, "query_mask": np.roll(LENGTHS, 1, 0)}
EMPTY_ROWS = "fully masked rows are not masked (rounded beside"
CAUSAL = {"use_causal_mask": True}
KINDS: dict[str, tuple[Mask, dict[str, Any], str]] = {
    "third row": (lambda value_mask: of_keys(value_mask[2:3]), PADDING,
                  "mask of another sequence (`value_mask`, that of sequence 2 for all)"),
    "shortest": (lambda value_mask: of_keys(value_mask.all(0)[None]), PADDING,
                 "what one sequence hides, all hide, as cut to the shortest"),
    "longest": (lambda value_mask: of_keys(value_mask.any(0)[None]), {"value_mask": HOLES},
                "mask of another sequence (`value_mask`, what one sequence sees, all see"),
    "two by or": (lambda value_mask, attention_mask: of_keys(value_mask) | attention_mask[:, None],
                  BOTH, "mask of other positions (masks joined by or, not by and: a key that one"),
    "two of three by or": (lambda value_mask, attention_mask: (
                               (of_keys(value_mask) | attention_mask[:, None]) & TRIL),
                           {**BOTH, **CAUSAL},
                           "(masks joined by or, not by and: `attention_mask` and `value_mask`)"),
    "blocks": (lambda: (np.arange(LENGTH) // 3 <= np.arange(LENGTH)[:, None] // 3)[None, None],
               CAUSAL, "causal mask by blocks (of 3, each query sees its own block and those"),
    "tiles": (lambda: TRIL & (np.arange(LENGTH) // 3 * 3
                              <= np.arange(LENGTH)[:, None] // 4 * 4),
              CAUSAL, "causal mask by blocks (tiles of 4 queries and 3 keys: those that begin"),
    "reduced": (lambda attention_mask: attention_mask.any(1)[:, None, None],
                {"attention_mask": SEEN & (np.arange(LENGTH) < 6)},
                "(`attention_mask`, reduced over the queries: what one of them sees is seen)"),
    "edges": (lambda segment_ids: pieces(segment_ids), {"segment_ids": IDS, **CAUSAL},
              "segment ids shifted by one (segments begin one position early, each has the id"),
    "ends": (lambda segment_ids: without_last(np.where(segment_ids == 0, -1, segment_ids)),
             {"segment_ids": IDS, **CAUSAL}, "left out (the first and the last of each row)"),
    "as many": (lambda value_mask: of_keys(np.arange(LENGTH) < value_mask.sum(-1, keepdims=True)),
                {"value_mask": HOLES}, "(`value_mask`, taken for a length: as many of the first"),
    "one for all": (lambda segment_ids: same(segment_ids[:1]), {"segment_ids": IDS, **CAUSAL},
                    "segments of the other side (those of the first sequence for all)"),
    "offset twice": (lambda query_offset: later(2 * query_offset),
                     {**CAUSAL, "query_offset": 2}, "wrong query offset (added twice)"),
    "offset of another": (lambda query_offset: later(3 * query_offset),
                          {**CAUSAL, "query_offset": 2},
                          "as of a causal rule that lets query i see keys j <= i + 6)"),
    "queries' for keys'": (
        lambda value_mask, query_mask: of_keys(query_mask) & query_mask[:, None, :, None],
        TWO_SIDES, "mask of other positions (`query_mask` hides keys in the place of"),
    "queries' for all": (
        lambda attention_mask, query_mask: of_keys(query_mask)
        & np.ones_like(attention_mask)[:, None],
        {"attention_mask": SEEN, "query_mask": HOLES},
        "(`query_mask` hides keys in the place of `attention_mask`, and no queries)"),
    "both exchanged": (
        lambda value_mask, query_mask: of_keys(query_mask) & value_mask[:, None, :, None],
        TWO_SIDES, "mask of other positions (`query_mask` and `value_mask` exchanged)"),
    "own key": (lambda attention_mask: (attention_mask & ~OWN)[:, None],
                {"attention_mask": SEEN}, "own key hidden"),
    "own key or none": (lambda attention_mask: (attention_mask & ~(OWN & SEEN_TWICE))[:, None],
                        {"attention_mask": LONELY},
                        "own key hidden (but where it is all that is seen)"),
    "own key seen": (lambda attention_mask: (attention_mask | OWN)[:, None],
                     {"attention_mask": SEEN & ~(TRIL & OWN)},
                     "own key seen in spite of the mask"),
    **{f"empty rows, {words}": (
        lambda attention_mask, key=key: (attention_mask | (key & EMPTY))[:, None],
        {"attention_mask": SEEN & ~EMPTY}, told)
       for words, key, told in (
           ("first", np.arange(LENGTH) == 0, "fully masked rows are given a key (the first key)"),
           ("own", OWN, "fully masked rows are given a key (their own key)"))},
    "last": (lambda segment_ids: without_last(segment_ids), {"segment_ids": IDS, **CAUSAL},
             "segment left out (the last of each row)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_named(kind) -> None:
    seen, call, words = KINDS[kind]
    report = report_of(seen, **call)
    assert not report.passed
    assert words in report.to_text(), report.to_text()


def test_zeros_in_place_of_the_bias_of_the_output() -> None:
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3, bias_initializer="random_normal")  # fmt: skip

    def port(query: Any, attention_mask: Any) -> Any:
        return layer(query, attention_mask=attention_mask) * attention_mask.any(-1)[..., None]

    report = compare(layer, port, X, attention_mask=SEEN & ~EMPTY)
    assert str(report.diagnosis).startswith("fully masked rows without the output's bias (zeros")


def test_sequences_taken_for_queries() -> None:
    report = report_of(lambda value_mask: value_mask[None, None], X_SQUARE, value_mask=SQUARE)
    assert "(`value_mask`, of (B, S) taken for one of (T, S))" in str(report.diagnosis)


def test_what_gives_the_same_numbers_is_told_too() -> None:
    """One less for what is hidden is one more for what is seen."""
    text = report_of(of_keys, lower=1.0, **PADDING).to_text()
    assert "additive mask (`value_mask`, 1 where True)" in text
    assert "(or: mask applied wrongly (`value_mask`: hidden logits are lowered by 1 only" in text


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("inverted", [True, False])
def test_rows_that_see_nothing_are_rounded_beside_a_great_number(scale, inverted) -> None:
    """10000 is taken from all logits of such a row: a softmax of what float32 leaves of them."""
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3, bias_initializer="random_normal")  # fmt: skip
    w = anymha.get_weights(layer)

    def port(query: Any, value_mask: Any) -> Any:
        q, k, v = (np.einsum("btd,dhk->bthk", query, w[f"{name}.kernel"]) + w[f"{name}.bias"]
                   for name in ("query", "key", "value"))  # fmt: skip
        logits = np.einsum("bthk,bshk->bhts", q, k) * np.float32(WIDTH**-0.5 if scale else 1)
        logits = logits - np.float32(1e4) * (value_mask == inverted)[:, None, None]
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        context = np.einsum("bhts,bshv->bthv", shares / shares.sum(-1, keepdims=True), v)
        return np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]

    mask = LENGTHS if inverted else LENGTHS & np.array([[True], [True], [False], [True]])
    report = compare(layer, port, X, value_mask=mask)
    rows = "inverted mask (`value_mask`; rows that see nothing are not" if inverted else EMPTY_ROWS
    words = [rows, "wrong scale ("] if not scale else [rows]
    assert all(one in str(report.diagnosis) for one in words), report.to_text()
    assert len(report.diagnosis.causes) == len(words)


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        (lambda i, j: i - j, None),
        (lambda i, j: i - j // 4 * 4, "the first key of its block, blocks of 4"),
        (lambda i, j: i - j // 4 * 4 - 3, "the last key of its block, blocks of 4"),
        (lambda i, j: i // 3 * 3 - j, "the first query of its block, blocks of 3"),
        (lambda i, j: i // 2 * 2 + 1 - j, "the last query of its block, blocks of 2"),
        (lambda i, j: i - np.clip(i, j // 3 * 3, j // 3 * 3 + 2),
         "the block's nearest key, blocks of 3"),
        (lambda i, j: i // 2 * 2 - j // 2 * 2,
         "block to block, by their first positions, blocks of 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_windows_counted_by_blocks(counted, words, causal) -> None:
    i, j = np.indices((LENGTH, LENGTH))
    seen = (np.abs(counted(i, j)) < 3) & (TRIL if causal else True)
    report = report_of(lambda: seen[None, None], window=3, use_causal_mask=causal)
    told = f"another kind of window (counted to {words})"
    assert report.passed if words is None else told in str(report.diagnosis), report.to_text()


@pytest.mark.parametrize(
    ("seen", "call"),
    [
        (of_keys, PADDING),
        (same, {"segment_ids": IDS, **CAUSAL}),
        (lambda: TRIL[None, None], CAUSAL),
    ],
)
def test_the_port_itself_agrees(seen, call) -> None:
    def right(**masks: Any) -> np.ndarray:
        return seen(*masks.values())

    assert report_of(right, **call).passed


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 0, 0, 0], "key and value: the first for all"),
        ([0, 2, 1, 3], "key and value: in the order of (2, 2) read the other way round"),
        ([0, 0, 1, 1], "key and value: the first 2, repeated"),
        ([0, 1, 0, 1], "key and value: the first 2, tiled"),
        ([3, 0, 1, 2], "key and value: the one before each"),
    ],
)
def test_memory_of_another_sequence(order, words) -> None:
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3)  # fmt: skip
    memory = RNG.standard_normal((BATCH, 5, FEATURES)).astype(np.float32)
    report = compare(layer, lambda query, value: layer(query, value[order]), [X, memory])
    assert str(report.diagnosis) == f"another sequence of the batch ({words})"


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize("call", [{}, CAUSAL])
def test_a_batch_that_is_laid_end_to_end(rotary, call) -> None:
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3, rotary=rotary)  # fmt: skip

    def port(query: Any, use_causal_mask: bool = False) -> Any:
        joined = query.reshape(1, -1, FEATURES)
        return layer(joined, use_causal_mask=use_causal_mask).reshape(query.shape)

    words = "each query sees the keys of all sequences, laid end to end"
    words += ", and positions go on" if rotary else ""
    report = compare(layer, port, X, **call)
    assert str(report.diagnosis) == f"another sequence of the batch ({words})"


def test_segments_of_queries_taken_for_keys() -> None:
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy",
                                      seed=3)  # fmt: skip
    memory = RNG.standard_normal((BATCH, 11, FEATURES)).astype(np.float32)
    keys = np.sort(RNG.integers(0, 3, (BATCH, 11)))

    def port(query: Any, value: Any, segment_ids: Any, key_segment_ids: Any) -> Any:
        ids = segment_ids[:, np.minimum(np.arange(11), LENGTH - 1)]
        return layer(query, value, segment_ids=segment_ids, key_segment_ids=ids)

    report = compare(layer, port, [X, memory], segment_ids=np.abs(IDS), key_segment_ids=keys)
    assert str(report.diagnosis) == (
        "segments of the other side (those of the queries for the keys)"
    )


@pytest.mark.parametrize("mask", ["value_mask", "key_mask", "query_mask", "segment_ids"])
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_stages_where_a_mask_excludes_positions_say_nothing(mask, scale) -> None:
    """Both tell their logits; where they count for nothing they are those of the reference."""
    options = {"query_features": FEATURES, "backend": "numpy", "seed": 3}
    right = anymha.MultiHeadAttention(HEADS, WIDTH, **options)
    other = anymha.MultiHeadAttention(HEADS, WIDTH, **options, scale=scale)
    anymha.set_weights(other, dict(anymha.get_weights(right)))
    given = {"segment_ids": IDS}.get(mask, HOLES)
    report = compare(right, other, X, **{mask: given})
    assert report.first_divergence == "logits"
    assert str(report.diagnosis).startswith("wrong scale"), str(report.diagnosis)


@pytest.mark.parametrize(("queries", "offset"), [(4, 0), (4, 2), (7, 0)])
def test_the_corner_at_which_a_causal_mask_is_aligned_is_told(queries, offset) -> None:
    layer = anymha.MultiHeadAttention(
        HEADS, WIDTH, query_features=FEATURES, backend="numpy", seed=3
    )
    value = X[:, :5] if queries > 5 else X
    later = value.shape[1] - queries

    def port(query: Any, value: Any, use_causal_mask: bool, query_offset: int = 0) -> Any:
        rows = np.arange(queries)[:, None] + later
        return layer(query, value, attention_mask=(np.arange(value.shape[1]) <= rows)[None])

    more = {"query_offset": offset} if offset else {}
    report = compare(layer, port, (X[:, :queries], value), use_causal_mask=True, **more)
    words = "causal mask at the other corner (aligned at the bottom right, the last query with the"
    words += " last key, " + (
        "without the query offset)" if offset else "not at the top left, the first with the first)"
    )
    assert str(report.diagnosis).startswith(words)
