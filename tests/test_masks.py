"""Every mask, the bias, causality and windows: by hand, against the oracle, and as properties."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymha.framework.registry import Backend
from tests.conftest import usable
from tests.support import Problem, check, close, make, normal, run

pytestmark = pytest.mark.usefixtures("quick_programs")

B, T, S, H = 2, 5, 6, 4
ROW, COLUMN = np.arange(T)[:, None], np.arange(S)[None, :]


def _random(*shape: int) -> np.ndarray:
    mask = normal(shape, shape, "mask") > -0.4
    assert mask.any()
    assert not mask.all()
    return mask


def _padding(length: int, *counts: int) -> np.ndarray:
    return np.arange(length) < np.array(counts)[:, None]


def _means(backend: Backend, queries: int, values: np.ndarray, **changes: Any) -> np.ndarray:
    """What equal logits make of values (B, S): each query gets the mean of those it sees."""
    options = {name: changes.pop(name) for name in ("sliding_window",) if name in changes}
    problem = make(
        (len(values), queries), values.shape, (1, 1, 1),
        num_heads=1, key_dim=1, use_bias=False, dtype="float64", **options,
    ).calling(**changes)  # fmt: skip
    weights = {name: np.ones((1, 1, 1)) for name in problem.weights}
    inputs = {
        "query": np.zeros((len(values), queries, 1)),
        "value": values[..., None].astype(np.float64),
        "key": np.zeros((*values.shape, 1)),
    }
    inputs = {**problem.inputs, **inputs}
    return run(backend, problem.but(weights=weights, inputs=inputs), gradients=False).output[..., 0]


# Values of powers of two, so that each mean tells which of them it is made of.
VALUES = np.array([[1, 2, 4, 8], [16, 32, 64, 128]])
OFF, ON = False, True

BY_HAND: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "no mask": ({}, [[15 / 4] * 3, [240 / 4] * 3]),
    "mask (T, S)": (
        {"attention_mask": np.array([[ON, OFF, OFF, OFF], [ON, ON, OFF, OFF], [OFF] * 4])},
        [[1, 3 / 2, 0], [16, 48 / 2, 0]],
    ),
    "mask (B, T, S)": (
        {"attention_mask": np.array([[[ON, OFF, OFF, OFF]], [[OFF, OFF, OFF, ON]]])},
        [[1] * 3, [128] * 3],
    ),
    "value mask": (
        {"value_mask": np.array([[ON, ON, OFF, OFF], [OFF, ON, ON, OFF]])},
        [[3 / 2] * 3, [96 / 2] * 3],
    ),
    "key mask": (
        {"key_mask": np.array([[ON, ON, OFF, OFF], [OFF, ON, ON, OFF]])},
        [[3 / 2] * 3, [96 / 2] * 3],
    ),
    "query mask": (
        {"query_mask": np.array([[ON, OFF, ON], [OFF, OFF, ON]])},
        [[15 / 4, 0, 15 / 4], [0, 0, 240 / 4]],
    ),
    "causal": ({"use_causal_mask": True}, [[1, 3 / 2, 7 / 3], [16, 48 / 2, 112 / 3]]),
    "causal, offset 1": (
        {"use_causal_mask": True, "query_offset": 1},
        [[3 / 2, 7 / 3, 15 / 4], [48 / 2, 112 / 3, 240 / 4]],
    ),
    "causal, offset -1": (
        {"use_causal_mask": True, "query_offset": -1},
        [[0, 1, 3 / 2], [0, 16, 48 / 2]],
    ),
    "causal, offset by batch": (
        {"use_causal_mask": True, "query_offset": np.array([0, 2], np.int32)},
        [[1, 3 / 2, 7 / 3], [112 / 3, 240 / 4, 240 / 4]],
    ),
    "window of 1": ({"sliding_window": 1}, [[1, 2, 4], [16, 32, 64]]),
    "window of 2": (
        {"sliding_window": 2},
        [[3 / 2, 7 / 3, 14 / 3], [48 / 2, 112 / 3, 224 / 3]],
    ),
    "window of 2, offset 2": (
        {"sliding_window": 2, "query_offset": 2},
        [[14 / 3, 12 / 2, 8], [224 / 3, 192 / 2, 128]],
    ),
    "window of 2, causal": (
        {"sliding_window": 2, "use_causal_mask": True},
        [[1, 3 / 2, 6 / 2], [16, 48 / 2, 96 / 2]],
    ),
    "bias of ln 3": (
        {"attention_bias": np.log([1.0, 3, 1, 1])},
        [[19 / 6] * 3, [304 / 6] * 3],
    ),
    "bias of -inf": (
        {"attention_bias": np.array([0, -np.inf, 0, -np.inf])},
        [[5 / 2] * 3, [80 / 2] * 3],
    ),
    "all of them": (
        {
            "attention_mask": np.array([[ON, ON, ON, ON], [ON, OFF, ON, ON], [OFF, ON, ON, ON]]),
            "value_mask": np.array([[ON, ON, ON, OFF], [OFF, ON, ON, ON]]),
            "key_mask": np.array([[ON, ON, ON, ON], [ON, ON, ON, OFF]]),
            "query_mask": np.array([[ON, ON, ON], [ON, OFF, ON]]),
            "use_causal_mask": True,
        },
        [[1, 1, 6 / 2], [0, 0, 96 / 2]],
    ),
}


@pytest.mark.parametrize(("call", "means"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(backend: Backend, call: dict[str, Any], means: list[list[float]]) -> None:
    np.testing.assert_allclose(_means(backend, 3, VALUES, **call), means, rtol=1e-14)


MASK2, MASK3, MASK4 = _random(T, S), _random(B, T, S), _random(B, H, T, S)
QUERY_MASK, VALUE_MASK, KEY_MASK = _padding(T, 5, 3), _padding(S, 4, 6), _padding(S, 6, 5)
OFFSETS = np.array([3, -1], np.int32)
SEEN_BY_OFFSET = ROW + OFFSETS[:, None, None] >= COLUMN
BIAS = normal((B, H, T, S), "bias", spread=2)
HOLES = np.where(_random(H, T, S), normal((H, T, S), "holes"), -np.inf)
HOLES[1, 2] = -np.inf  # a row that the bias alone empties

RULES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    # name: (options, arguments of the call, what they allow)
    "mask (T, S)": ({}, {"attention_mask": MASK2}, MASK2),
    "mask (1, S)": ({}, {"attention_mask": MASK2[:1]}, MASK2[:1]),
    "mask (B, T, S)": ({}, {"attention_mask": MASK3}, MASK3[:, None]),
    "mask (B, 1, S)": ({}, {"attention_mask": MASK3[:, :1]}, MASK3[:, None, :1]),
    "mask (B, H, T, S)": ({}, {"attention_mask": MASK4}, MASK4),
    "mask (1, H, 1, S)": ({}, {"attention_mask": MASK4[:1, :, :1]}, MASK4[:1, :, :1]),
    "query mask": ({}, {"query_mask": QUERY_MASK}, QUERY_MASK[:, None, :, None]),
    "value mask": ({}, {"value_mask": VALUE_MASK}, VALUE_MASK[:, None, None, :]),
    "key mask": ({}, {"key_mask": KEY_MASK}, KEY_MASK[:, None, None, :]),
    "causal": ({}, {"use_causal_mask": True}, COLUMN <= ROW),
    "causal, offset": ({}, {"use_causal_mask": True, "query_offset": 2}, COLUMN <= ROW + 2),
    "causal, offset by batch": (
        {},
        {"use_causal_mask": True, "query_offset": OFFSETS},
        (SEEN_BY_OFFSET)[:, None],
    ),
    "window": ({"sliding_window": 2}, {}, abs(ROW - COLUMN) < 2),
    "window, offset": ({"sliding_window": 2}, {"query_offset": 3}, abs(ROW + 3 - COLUMN) < 2),
    "window, offset by batch": (
        {"sliding_window": 3},
        {"query_offset": OFFSETS},
        (abs(ROW + OFFSETS[:, None, None] - COLUMN) < 3)[:, None],
    ),
    "window, causal": (
        {"sliding_window": 3},
        {"use_causal_mask": True},
        (abs(ROW - COLUMN) < 3) & (COLUMN <= ROW),
    ),
    "bias (S,)": ({}, {"attention_bias": BIAS[0, 0, 0]}, None),
    "bias (T, S)": ({}, {"attention_bias": BIAS[0, 0]}, None),
    "bias (H, T, S)": ({}, {"attention_bias": BIAS[0]}, None),
    "bias (B, 1, 1, S)": ({}, {"attention_bias": BIAS[:, :1, :1]}, None),
    "bias (B, H, T, S)": ({}, {"attention_bias": BIAS}, None),
    "bias of -inf": ({}, {"attention_bias": HOLES}, None),
    "all of them": (
        {"sliding_window": 4},
        {
            "attention_mask": MASK3, "query_mask": QUERY_MASK, "value_mask": VALUE_MASK,
            "key_mask": KEY_MASK, "use_causal_mask": True, "query_offset": OFFSETS,
            "attention_bias": HOLES,
        },
        MASK3[:, None] & QUERY_MASK[:, None, :, None] & (VALUE_MASK & KEY_MASK)[:, None, None]
        & ((SEEN_BY_OFFSET) & (abs(ROW + OFFSETS[:, None, None] - COLUMN) < 4))[:, None],
    ),
}  # fmt: skip


@lru_cache
def _plain_output(name: str) -> np.ndarray:
    return run(usable(name), make(), gradients=False).output


@pytest.mark.parametrize(("options", "call", "allowed"), RULES.values(), ids=RULES)
def test_agrees_with_oracle_and_matters(
    backend: Backend, options: dict[str, Any], call: dict[str, Any], allowed: np.ndarray | None
) -> None:
    problem = make(**options).calling(**call)
    result = check(backend, problem, allowed=allowed)
    assert not np.array_equal(result.output, _plain_output(backend.name))
    if allowed is not None:
        seen = np.broadcast_to(allowed, result.scores.shape)
        assert not result.scores[~seen].any()


@pytest.mark.parametrize("grouped", [1, 2])
def test_masks_act_on_grouped_heads(backend: Backend, grouped: int) -> None:
    problem = make(num_key_value_heads=grouped).calling(attention_mask=MASK4, attention_bias=BIAS)
    check(backend, problem, allowed=MASK4)


def test_mask_of_rank_3_is_batch_even_where_there_are_as_many_heads(backend: Backend) -> None:
    mask = _random(4, T, S)
    problem = make((4, T), (4, S)).calling(attention_mask=mask)
    by_batch = check(backend, problem, allowed=mask[:, None])
    by_head = run(backend, problem.calling(attention_mask=mask[None]), gradients=False)
    assert not np.array_equal(by_batch.scores, by_head.scores)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int16"])
def test_offsets_of_any_integer_dtype_are_the_ints(backend: Backend, dtype: str) -> None:
    if backend.name == "jax" and dtype == "int64":
        dtype = "uint32"  # JAX has no int64 outside of its float64 mode
    each, one, alone = (
        make().calling(use_causal_mask=True, query_offset=np.array(offset, dtype))
        for offset in ([2, 2], 2, [2])
    )
    wanted = check(backend, each, allowed=COLUMN <= ROW + 2)
    for problem in (one, alone):
        got = run(backend, problem, gradients=False)
        close(got.output, wanted.output, 1e-5)
        close(got.scores, wanted.scores, 1e-6)


@pytest.mark.parametrize("offset", [np.int64(2), np.int32(2)])
def test_offset_may_be_an_integer_of_numpy(backend: Backend, offset: Any) -> None:
    check(
        backend,
        make().calling(use_causal_mask=True, query_offset=offset),
        allowed=COLUMN <= ROW + 2,
    )


@pytest.mark.parametrize("offset", [2**31 - 1, 2**32 + 1, -(2**31) - 1, 2**70])
def test_an_offset_of_any_size_is_the_int(backend: Backend, offset: int) -> None:
    distance = np.arange(S) - (np.arange(T)[:, None] + np.float64(offset))
    for window in (3, 2**35):
        allowed = (distance <= 0) & ((distance > -3) if window == 3 else True)
        problem = make(sliding_window=window).calling(use_causal_mask=True, query_offset=offset)
        got = run(backend, problem, gradients=False).scores
        np.testing.assert_array_equal(got > 0, np.broadcast_to(allowed, got.shape))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_offsets_of_any_size_in_an_array_are_the_ints(backend: Backend, dtype: str) -> None:
    if backend.name == "jax":
        dtype = dtype.replace("64", "32")  # JAX has no 64 bits outside of its float64 mode
    limits = np.iinfo(dtype)
    offsets = np.array([limits.max, 2], dtype), np.array([limits.max - 1, limits.min], dtype)
    for offset in offsets:
        first = np.float64(offset)[:, None, None, None]
        allowed = np.arange(S) - (np.arange(T)[:, None] + first) <= 0
        problem = make().calling(use_causal_mask=True, query_offset=offset)
        got = run(backend, problem, gradients=False).scores
        np.testing.assert_array_equal(got > 0, np.broadcast_to(allowed, got.shape))


def _split(problem: Problem, sides: str, step: int) -> Problem:
    inputs = dict(problem.inputs)
    for name in sides.split():
        changed = inputs[name].copy()
        changed[:, step:] += 1
        inputs[name] = changed
    return problem.but(inputs=inputs)


@given(step=st.integers(0, 5), offset=st.integers(-2, 4))
def test_causal_queries_ignore_later_keys(backend: Backend, step: int, offset: int) -> None:
    problem = make(dtype="float64").calling(use_causal_mask=True, query_offset=offset)
    before = run(backend, problem, gradients=False)
    after = run(backend, _split(problem, "value key", step), gradients=False)
    earlier = np.arange(T) + offset < step  # these see no key from `step` on
    assert np.array_equal(before.output[:, earlier], after.output[:, earlier])
    assert not np.isclose(before.output[:, ~earlier], after.output[:, ~earlier]).any()


@given(count=st.integers(1, S), data=st.data())
def test_what_padding_holds_changes_nothing(backend: Backend, count: int, data: Any) -> None:
    counts = (count, data.draw(st.integers(1, S)))
    mask = _padding(S, *counts)
    problem = make().calling(value_mask=mask)
    noise = normal((B, S, 1), "noise", counts, spread=1e6).astype(np.float32)
    inputs = dict(problem.inputs)
    for name in ("value", "key"):
        inputs[name] = np.where(mask[..., None], inputs[name], noise)
    a, b = run(backend, problem), run(backend, problem.but(inputs=inputs))
    for name in a.all:
        assert a.all[name].tobytes() == b.all[name].tobytes(), name
    for name in ("value", "key"):
        assert not a.gradients[name][~mask].any()


def test_padding_at_the_end_is_as_good_as_none(backend: Backend) -> None:
    short = make(value=(2, 4), dtype="float64")
    long = make(value=(2, 6), dtype="float64")
    for name in ("value", "key"):
        long.inputs[name][:, :4] = short.inputs[name]
    a = run(backend, short, gradients=False)
    b = run(backend, long.calling(key_mask=_padding(6, 4, 4)), gradients=False)
    np.testing.assert_allclose(a.output, b.output, rtol=1e-13)
    np.testing.assert_allclose(a.scores, b.scores[..., :4], rtol=1e-13)
