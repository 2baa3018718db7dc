"""Mistakes of many numbers, each of which is measured: factors and biases of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare
from tests.peer_layers import need
from tests.test_diagnose_kinds import (
    BIAS,
    FEATURES,
    HEADS,
    LENGTH,
    SEEN,
    WIDTH,
    X,
    layer,
    mixed,
    named,
    port_of,
    report_of,
    softmax,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("folded_once")

T, S = np.arange(LENGTH)[:, None], np.arange(LENGTH)
RNG = np.random.default_rng(6)
OF_DISTANCE = RNG.standard_normal((HEADS, 2 * LENGTH - 1))
CAUSAL = np.broadcast_to(S <= T, SEEN.shape)


def by_head(*numbers: float) -> np.ndarray:
    return np.reshape(numbers, (-1, 1, 1))


def scaled(factors: Any) -> dict[str, Any]:
    return {"scale": lambda logits: logits / WIDTH**0.5 * factors}


def added(bias: Any) -> dict[str, Any]:
    return {"bias": lambda logits, own: logits + own + bias}


def of_heads(*factors: float) -> dict[str, Any]:
    """The context of each head with a factor of its own."""
    return {"context": lambda p, v: np.einsum("bhts,bshv->bthv", p, v) * np.reshape(
        factors, (-1, 1))}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "call", "steps", "words"),
    [
        ({}, {}, scaled(by_head(1, 1.3, 0.7, 2)),
         "wrong scale (of its own in each head: 1, 1.3, 0.7, 2 times)"),
        ({"num_key_value_heads": 2}, {"attention_mask": SEEN},
         scaled(by_head(1.02, 0.98, 1.01, 1)), "in each head: 1.02, 0.98, 1.01, 1 times"),
        ({"softcap": 1.5}, {}, {"cap": lambda s: 1.5 * np.tanh(s / 1.5) * by_head(1, 2, 3, -1)},
         "in each head: 1, 2, 3, -1 times, after softcap"),
        ({}, {}, scaled(np.sqrt(1 + T)), "of its own in each query: 1, 1.41, 1.73, 2, 2.24"),
        ({}, {}, scaled(np.reshape([1, 1.4], (2, 1, 1, 1))),
         "wrong scale (of its own in each sequence of the batch: 1, 1.4 times)"),
        ({}, {"attention_bias": BIAS}, {"bias": lambda s, b: s + by_head(1, 2, 0.5, 1) * b},
         "wrong attention bias (of its own in each head: 1, 2, 0.5, 1 times)"),
        ({"alibi": True}, {}, added(-by_head(0.5, 0.2, 0.1, 0.9) * np.abs(T - S)),
         "alibi of other slopes (measured: 0.5, 0.2, 0.1, 0.9)"),
        ({}, {}, of_heads(1.02, 0.98, 1.01, 1),
         "heads scaled (head 0 of 4 is 1.02 times as great, head 1 of 4 is 0.98 times"),
        ({}, {}, of_heads(0.51, 1.99, 0.26, -0.98), "heads scaled (head 0 of 4 is 0.51 times"),
    ],
)  # fmt: skip
def test_factors_of_each_head_are_measured(options, call, steps, words) -> None:
    assert words in named(report_of(steps, False, options, **call))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (scaled(by_head(1, 1.3, 0.7, 2)), "wrong scale (of its own in each head: 1, 1.3, 0.7, 2"),
        ({"cap": lambda s: 1.5 * np.tanh(s / 1.5) * by_head(1, 2, 3, -1)},
         "1, 2, 3, -1 times, after softcap"),
        (added(np.sin(9.0 * S)), "over key positions: 0, 0.412"),
    ],
)  # fmt: skip
def test_they_are_measured_where_stages_are_told(steps, words) -> None:
    assert words in named(report_of(steps, True, {"softcap": 1.5} if "cap" in steps else None))


@pytest.mark.parametrize(
    ("options", "call", "bias", "words"),
    [
        ({}, {"attention_mask": SEEN}, -0.3 * S, "over key positions: a ramp, -0.3 times the"),
        ({}, {}, np.sin(9.0 * S), "over key positions: 0, 0.412, -0.751, 0.956, -0.992, 0.851"),
        ({"softcap": 1.5}, {}, 2.0 * (S == 0), "over key positions: 2 at 0, 0 elsewhere"),
        ({}, {}, by_head(1, -1, 2, 0) * np.sin(9.0 * S), "over key positions in each head: 0, 0.4"),
        ({}, {}, by_head(0.1, 0.2, 0.4, -0.5) * S, "a ramp, 0.1, 0.2, 0.4, -0.5 times the"),
        ({}, {}, -0.2 * np.abs(T - S), "over the distance of query and key: -0.2 times the"),
        ({}, {}, -by_head(0.5, 0.2, 0.1, 0.9) * np.abs(T - S),
         "as ALiBi of slopes of its own: 0.5, 0.2, 0.1, 0.9"),
        ({}, {}, -np.log1p(np.abs(T - S)), "-1 times the logarithm of 1 + distance"),
        ({}, {}, -3.0 * (T == S), "over the distance of query and key: -3 at 0, 0 elsewhere"),
        ({}, {}, OF_DISTANCE[0][T - S + LENGTH - 1], "over the distance of query and key: 0, "),
        ({}, {"attention_mask": CAUSAL}, OF_DISTANCE[:, T - S + LENGTH - 1],
         "over the distance of query and key in each head: any, any, any, any, any, any, 0, "),
    ],
)  # fmt: skip
def test_biases_of_positions_are_measured(options, call, bias, words) -> None:
    found = named(report_of(added(bias), False, options, **call))
    assert found.startswith("positions added (to the logits, ")
    assert words in found


@pytest.mark.usefixtures("no_pairs")
def test_a_bias_that_no_form_has_is_not_named() -> None:
    report = report_of(added(RNG.standard_normal((HEADS, LENGTH, LENGTH))))
    assert not report.passed
    assert report.diagnosis is not None
    assert not report.diagnosis.causes


def test_log_softmax_of_filled_logits_is_named() -> None:
    def wrong(logits: np.ndarray) -> np.ndarray:
        filled = np.where(np.isneginf(logits), -1e4, logits)
        return filled - np.log(np.exp(filled).sum(-1, keepdims=True))

    found = named(report_of({"softmax": wrong}, attention_mask=SEEN))
    assert "log_softmax, hidden logits filled with -10000 before" in found


def test_a_softmax_of_projections_is_named() -> None:
    over_features, over_positions = (
        lambda x, axis=axis: (e := np.exp(x)) / e.sum(axis, keepdims=True) for axis in (-1, 1)
    )
    plain = {"scale": lambda s: s, "softmax": lambda s: s}
    both = {"query": over_features, "key": over_positions, **plain}
    words = "softmax of queries over the features, of keys over the positions"
    assert words in named(report_of(both))
    assert "softmax over the positions of key" in named(report_of({"key": over_positions}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_measured_in_half_precision_too(dtype: str) -> None:
    torch = need("torch")
    right = anymha.MultiHeadAttention(
        HEADS, WIDTH, backend="torch", query_features=FEATURES, dtype=dtype, seed=1
    )
    kind = getattr(torch, dtype)
    w = {n: torch.tensor(np.asarray(a, np.float32)).to(kind)
         for n, a in anymha.get_weights(right).items()}  # fmt: skip
    x = torch.tensor(np.asarray(X)).to(kind)

    def report(change: Any) -> Any:
        def port(query: Any) -> Any:
            q, k, v = (torch.einsum("btd,dhk->bthk", query, w[f"{n}.kernel"])
                       for n in ("query", "key", "value"))  # fmt: skip
            logits = change(torch.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5)
            shares = torch.softmax(logits.float(), -1).to(kind)
            context = torch.einsum("bhts,bshv->bthv", shares, v)
            return torch.einsum("bthv,hvo->bto", context, w["output.kernel"])

        return compare(right, port, x)

    factors = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(-1, 1, 1).to(kind)
    distance = torch.tensor(0.25 * np.abs(T - S)).to(kind)
    assert report(lambda logits: logits).passed
    assert "wrong scale (of its own in each head: " in named(report(lambda s: s * factors))
    assert "over the distance of query and key: -0.2" in named(report(lambda s: s - distance))


def dropping(rate: float, *shape: int) -> Any:
    """Dropout that draws the same numbers in each call."""
    kept = np.random.default_rng(2).random(shape) >= rate
    return lambda x: x * kept / (1 - rate)


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, HEADS, LENGTH, LENGTH), "as of a rate of 0.17)"),
        ((HEADS, LENGTH, LENGTH), "as of a rate of 0.17"),
        ((LENGTH, LENGTH), "as of a rate of 0.17"),
    ],
)
def test_dropout_with_fixed_numbers_is_measured(shape, words, told) -> None:
    drop = dropping(0.17, *shape)
    report = report_of({"softmax": lambda s: drop(softmax(s))}, told, attention_mask=SEEN)
    assert named(report).startswith("dropout left on (measured:"), report.to_text()
    assert words in named(report), report.to_text()
    assert report.first_divergence == ("probabilities" if told else "dropped_probabilities")


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize(
    ("shape", "rate", "words"),
    [
        ((2, HEADS, 12, 12), 0.1, "as of a rate of 0.1)"),
        ((12, 12), 0.13, "a rate of 0.13, the same for all heads)"),
    ],
)
def test_dropout_of_more_keys_than_features_is_measured(shape, rate, words) -> None:
    x = RNG.standard_normal((2, 12, FEATURES)).astype(np.float32)
    drop = dropping(rate, *shape)
    report = compare(layer(), port_of(layer(), {"softmax": lambda s: drop(softmax(s))}), x)
    assert named(report).startswith("dropout left on (measured:"), report.to_text()
    assert words in named(report), report.to_text()


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("place", ["context", "output"])
def test_dropout_of_another_place_is_measured(place) -> None:
    drop = dropping(0.3, 2, LENGTH, *((HEADS, WIDTH) if place == "context" else (FEATURES,)))
    step = (lambda p, v: drop(mixed(p, v))) if place == "context" else (lambda y, x: drop(y))
    report = report_of({place: step})
    assert named(report).startswith(f"dropout of the {place} left on (measured: "), named(report)


@pytest.mark.usefixtures("no_pairs")
def test_shares_that_are_lost_at_no_rate_are_no_dropout() -> None:
    lost = np.random.default_rng(2).random((2, HEADS, LENGTH, LENGTH)) < 0.3
    report = report_of({"softmax": lambda s: softmax(s) * ~lost}, attention_mask=SEEN)
    assert "dropout" not in named(report)
