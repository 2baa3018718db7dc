"""Mistakes in some calls of decoding alone, in some sequences, or from some query on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, decoding

BATCH, LENGTH, FEATURES, STEPS = 3, 12, 12, (5, 3, 1)
X = 1.5 * np.random.default_rng(3).standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
NORM = {"query_key_norm": {"kind": "rms", "eps": 0.1}}


def pair_of(options: dict[str, Any], **wrong: Any) -> tuple[Any, Any]:
    """Two layers with the same weights, the second one with other options."""
    right, other = (
        anymha.MultiHeadAttention(
            4, 4, query_features=FEATURES, num_key_value_heads=2, backend="numpy", seed=2,
            bias_initializer="random_normal", **{**options, **changed},
        )
        for changed in ({}, wrong)
    )  # fmt: skip
    rng, weights = np.random.default_rng(4), anymha.get_weights(right)
    for name, array in weights.items():
        weights[name] = array + 0.3 * rng.standard_normal(array.shape).astype(array.dtype)
    anymha.set_weights(right, weights)
    anymha.set_weights(other, {n: weights[n] for n in anymha.get_weights(other)})
    return right, other


FIRST, ONE, SEVERAL = (
    lambda begin, count: begin == 0,
    lambda begin, count: count == 1,
    lambda begin, count: count > 1,
)
LATER: Callable[[int, int], bool] = lambda begin, count: begin > 0  # noqa: E731

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[int, int], bool], str]] = {
    "softcap": ({"softcap": 2.0}, {"softcap": None}, ONE,
                "softcap left out (in calls of one position)"),
    "sinks": ({"sinks": True}, {"sinks": False}, LATER,
              "sinks left out (in calls after the first)"),
    "gate": ({"gate": "elementwise"}, {"gate": None}, FIRST,
             "gate left out (in the first call alone)"),
    "scale": ({}, {"scale": 0.25}, SEVERAL,
              "wrong scale (applied twice, 1/(width of a head), in calls of several positions)"),
    "alibi": ({"alibi": True}, {"alibi": False}, ONE, "alibi left out (in calls of one position)"),
    "norm": (NORM, {"query_key_norm": None}, ONE,
             "query_key_norm left out (in calls of one position)"),
    "norm of the prompt": (NORM, {"query_key_norm": None}, FIRST,
                           "query_key_norm left out (in the first call alone)"),
    "base": ({"rotary": True}, {"rotary": {"base": 1e6}}, LATER,
             "rotary of another base (1000000 in place of 10000, in calls after the first)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_mistake_in_some_calls_is_named(kind: str) -> None:
    options, wrong, where, words = KINDS[kind]
    right, other = pair_of(options, **wrong)

    def step(x: Any, cache: Any) -> Any:
        layer = other if where(int(cache.lengths[0]), x.shape[1]) else right
        return layer(x, cache=cache)

    make_cache = lambda batch, length: right.make_cache(batch, length)  # noqa: E731
    report = compare(right, decoding(step, make_cache, steps=STEPS), X)
    assert not report.passed
    assert report.diagnosis is not None
    assert report.diagnosis.explained, str(report.diagnosis)
    assert str(report.diagnosis).startswith(words), str(report.diagnosis)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ((slice(None), slice(7, None)), "for queries from 7 on"),
        ((slice(None), slice(None, 5)), "for queries up to 4"),
        ((slice(1, 2),), "in sequence 1 of the batch alone"),
        ((slice(1, None),), "in the sequences from 1 on"),
        ((slice(None, 2),), "in the sequences up to 1"),
    ],
)
def test_mistake_in_some_queries_or_sequences_is_named(where: Any, words: str) -> None:
    right, other = pair_of({"softcap": 2.0}, softcap=None)

    def port(x: Any) -> Any:
        output = right(x)
        output[where] = other(x)[where]
        return output

    report = compare(right, port, X)
    assert not report.passed
    assert str(report.diagnosis).startswith(f"softcap left out ({words})")


def test_mask_of_the_first_piece_alone_is_told() -> None:
    right, _ = pair_of({})
    seen = np.ones((BATCH, LENGTH), bool)
    seen[:, -4:] = seen[1, :2] = False

    def port(x: Any, value_mask: Any) -> Any:
        output = right(x, value_mask=value_mask)
        output[:, 4:] = right(x[:, 4:], x)
        return output

    report = compare(right, port, X, value_mask=seen)
    assert str(report.diagnosis).startswith("ignored mask (`value_mask`, for queries from 4 on)")


def test_what_is_no_mistake_in_a_part_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 0.0)
    right, _ = pair_of({"softcap": 2.0})

    def step(x: Any, cache: Any) -> Any:
        output, cache = right(x, cache=cache)
        return (output + 0.1 * np.sin(output) if x.shape[1] == 1 else output), cache

    make_cache = lambda batch, length: right.make_cache(batch, length)  # noqa: E731
    report = compare(right, decoding(step, make_cache, steps=STEPS), X)
    assert not report.passed
    assert report.diagnosis is not None
    assert not report.diagnosis.explained, str(report.diagnosis)


def test_other_causes_that_fit_a_part_are_told_too() -> None:
    right, _ = pair_of({})
    seen = np.ones((LENGTH, LENGTH), bool)
    seen[-1, -1] = False  # the last query alone does not see its own key

    def port(x: Any, use_causal_mask: bool) -> Any:
        return right(x, use_causal_mask=use_causal_mask, attention_mask=seen)

    text = str(compare(right, port, X, use_causal_mask=True).diagnosis)
    assert "mask" in text.partition(" (or: ")[0], text


def test_steps_that_return_nothing_of_what_they_read() -> None:
    right, _ = pair_of({"rotary": True})
    report = compare(right, decoding(lambda x, cache: (0 * x, cache), steps=STEPS), X)
    assert str(report.diagnosis) == "the output does not depend on the inputs"
