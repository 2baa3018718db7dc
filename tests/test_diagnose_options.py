"""Mistakes with rotary positions, norms, sinks, ALiBi and masks: each kind has its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare

pytestmark = pytest.mark.usefixtures("folded_once")

BATCH, LENGTH, HEADS, SHARED, WIDTH, FEATURES = 2, 9, 4, 2, 8, 32
RNG = np.random.default_rng(8)
X = 1.5 * RNG.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
GAPS = np.cumsum(RNG.integers(1, 4, (BATCH, LENGTH)), axis=1)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
ROTARY = {"rotary": True}
LOG2 = np.log(2.0)
Steps = dict[str, Callable[..., Any]]


def layer_of(**options: Any) -> Any:
    """A layer whose weights are no ones and zeros."""
    made = anymha.MultiHeadAttention(
        HEADS, WIDTH, num_key_value_heads=SHARED, query_features=FEATURES, backend="numpy", seed=2,
        **options,
    )  # fmt: skip
    rng, weights = np.random.default_rng(5), anymha.get_weights(made)
    for name, array in weights.items():
        more = rng.standard_normal(array.shape) * (0.05 if name.endswith("kernel") else 0.5)
        weights[name] = (array + more).astype(array.dtype)
    anymha.set_weights(made, weights)
    return made


def port_of(layer: Any, steps: Steps) -> Callable[..., Any]:
    """The layer as a port writes it out; `steps` replaces steps of it."""
    config = layer.config
    w = {name: array.astype(np.float64) for name, array in anymha.get_weights(layer).items()}
    w = steps.get("weights", lambda w: w)(w)

    def step(name: str, usual: Callable[..., Any], *arrays: Any) -> Any:
        return steps.get(name, usual)(*arrays)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = w.get(f"{name}_norm.scale", np.ones(1))
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.query_key_norm.eps) * scale

    def turned(x: np.ndarray, name: str, places: np.ndarray) -> np.ndarray:
        pairs = np.arange(x.shape[-1] // 2)
        plain = 1e4 ** (-2 * pairs / x.shape[-1])
        own = step("frequencies", lambda plain, name: plain, plain, name)
        turns = np.exp(1j * step("angles", lambda a, name: a, places[..., None] * own, name))
        half = x.shape[-1] // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turns[:, :, None]
        return np.concatenate([z.real, z.imag], -1)

    def prepared(query: np.ndarray, name: str, places: np.ndarray | None) -> np.ndarray:
        x = np.einsum("btd,dhk->bthk", query, w[f"{name}.kernel"])
        if config.query_key_norm is None:
            x = x + w[f"{name}.bias"]
        else:
            x = step("norm", lambda x, b, f: f(x + b), x, w[f"{name}.bias"],
                     lambda x: norm(x, name))  # fmt: skip
        right = np.arange(LENGTH)[None] if places is None else places
        if not config.rotary:
            return x
        places = step("places", lambda p, name: p, right, name)
        return step("rotated", lambda f, x, name: f(x, name), lambda x, name: turned(
            x, name, places), x, name)  # fmt: skip

    def port(
        query: Any, use_causal_mask: bool = False, positions: Any = None, key_positions: Any = None
    ) -> Any:
        q, k = prepared(query, "query", positions), prepared(query, "key", key_positions)
        v = np.einsum("btd,dhk->bthk", query, w["value.kernel"]) + w["value.bias"]
        keys, values = (np.repeat(x, HEADS // SHARED, 2) for x in (k, v))
        logits = step("scale", lambda s: s, np.einsum("bthk,bshk->bhts", q, keys) / WIDTH**0.5)
        slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)[:, None, None]
        i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
        bias = -slopes * np.abs(i - j) if config.alibi else 0.0
        cap = config.softcap
        logits = step("capped", lambda s, b, f: f(s) + b, logits, bias,
                      lambda s: s if cap is None else cap * np.tanh(s / cap))  # fmt: skip
        rule = step("rule", lambda i, j: j <= i if use_causal_mask else i == i, i, j)
        masked = np.where(rule, logits, -np.inf)
        sinks = w.get("sinks", np.full(HEADS, -np.inf))[:, None, None]
        weights, own = np.exp(masked), np.exp(sinks) + 0 * logits[..., :1]
        shares = step("softmax", lambda e, s, b: e / (e.sum(-1, keepdims=True) + s), weights, own,
                      sinks)  # fmt: skip
        context = np.einsum("bhts,bshv->bthv", shares, values)
        y = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        output = y.astype(np.float32)
        told = {"query": q, "key": k, "value": v, "logits": logits, "output": output}
        return told if "told" in steps else output

    return port


def report_of(steps: Steps, options: Any, **call: Any) -> Comparison:
    layer = layer_of(**options)
    return compare(layer, port_of(layer, steps), X, use_causal_mask=True, **call)


RIGHT = ({}, ROTARY, {"query_key_norm": "rms"}, {"sinks": True}, {"alibi": True, "softcap": 1.5})


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_the_port_itself_agrees(options) -> None:
    assert report_of({}, options).passed


def alone(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda array, own: change(array) if own == name else array


def low_rank(w: Any) -> Any:
    rng = np.random.default_rng(1)
    more = np.einsum("dr,rhk->dhk", rng.standard_normal((FEATURES, 2)),
                     rng.standard_normal((2, HEADS, WIDTH)))  # fmt: skip
    return w | {"query.kernel": w["query.kernel"] + 0.1 * more}


def ramp(plain: np.ndarray, low: float, high: float) -> np.ndarray:
    """The frequencies of `LLAMA3` with other factors."""
    share = np.clip((64 * plain / (2 * np.pi) - low) / (high - low), 0, 1)
    return share * plain + (1 - share) * plain / 8


def before_the_split(turned: Callable[..., Any], x: np.ndarray, name: str) -> np.ndarray:
    """All heads turned as one."""
    return turned(x.reshape(*x.shape[:2], 1, -1), name).reshape(x.shape)


def as_pairs(x: np.ndarray) -> np.ndarray:
    """Columns in halves written in pairs."""
    return np.stack(np.split(x, 2, axis=-1), -1).reshape(x.shape)


def with_tables_of_pairs(x: np.ndarray) -> np.ndarray:
    """Halves turned by cosines and sines that are doubled by `repeat`, as of pairs."""
    angles = np.arange(LENGTH)[:, None] * 1e4 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    angles = np.repeat(angles, 2, axis=-1)[:, None]
    one, two = np.split(x, 2, axis=-1)
    return x * np.cos(angles) + np.concatenate([-two, one], -1) * np.sin(angles)


def permuted_back(w: Any) -> Any:
    """Columns of the keys brought to pairs as of all query heads, and back as of their own."""
    changed = {}
    for name in ("key.kernel", "key.bias"):
        own = w[name]
        wide = as_pairs(own.reshape(*own.shape[:-2], HEADS, -1)).reshape(own.shape)
        changed[name] = wide.reshape(*own.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(own.shape)
    return w | changed


def in_two(weights: np.ndarray, merge: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Two parts of the keys, each divided by its own sum."""
    parts = np.array_split(weights, 2, axis=-1)
    sums = [part.sum(-1, keepdims=True) for part in parts]
    tops = np.stack([part.max(-1, keepdims=True) for part in parts])
    shares = merge(tops) * np.ones_like(tops)
    return np.concatenate([p / np.where(s > 0, s, 1) * share for p, s, share in zip(
        parts, sums, shares, strict=True)], -1)  # fmt: skip


def beside(weights: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """The sink in the last column, of which the first is dropped."""
    every = np.concatenate([weights, sink], -1)
    return (every / every.sum(-1, keepdims=True))[..., 1:]


KINDS = {
    "base": ({"frequencies": lambda w, n: w**1.1}, ROTARY,
             "rotary of another base (2.51e+04 in place of 10000)"),
    "angles": ({"angles": lambda a, n: 0.37 * a}, ROTARY, "rotary angles multiplied (by 0.37)"),
    "to the end": ({"frequencies": lambda w, n: w ** (8 / 6)}, ROTARY,
                   "rotary of other exponents (i/3, from 1 down to 1/base, in place of 2i/8"),
    "pairs": ({"frequencies": lambda w, n: w[::-1]}, ROTARY,
              "rotary of other exponents (in the reverse order of pairs)"),
    "direction": ({"angles": alone("key", lambda a: -a)}, ROTARY,
                  "rotary of the query unlike that of the key (the key alone: turned the other"),
    "one base": ({"frequencies": alone("query", lambda w: 500_000.0 ** (np.log(w) / np.log(1e4)))},
                 ROTARY, "rotary of the query unlike that of the key (the query alone: of another"),
    "low and high": ({"frequencies": lambda w, n: ramp(w, 4.0, 1.0)}, {"rotary": {
        "scaling": LLAMA3}}, "rotary of another scaling (low_freq_factor and high_freq_factor"),
    "ramp": ({"frequencies": lambda w, n: np.where(
                (64 * w > 2 * np.pi) & (64 * w < 8 * np.pi), 9 / 8 * w - ramp(w, 1.0, 4.0),
                ramp(w, 1.0, 4.0))},
             {"rotary": {"scaling": LLAMA3}},
             "rotary of another scaling (the blend of divided and plain ones exchanged"),
    "linear": ({"angles": lambda a, n: a / 8}, {"rotary": {"scaling": LLAMA3}},
               "rotary of another scaling (all frequencies divided by 8, as by a linear"),
    "twice": ({"norm": lambda x, b, f: f(f(x + b))}, {"query_key_norm": "rms"},
              "query_key_norm twice (queries and keys)"),
    "no gain of keys": ({"weights": lambda w: w | {"key_norm.scale": np.ones(WIDTH)}},
                        {"query_key_norm": "rms"},
                        "query_key_norm by another weight (that of the key left out)"),
    "bare": ({"norm": lambda x, b, f: f(x) + b}, {"query_key_norm": "rms"},
             "query_key_norm before the bias (of query and key)"),
    "plain sinks": ({"softmax": lambda e, s, b: e / (e.sum(-1, keepdims=True) + b)},
                    {"sinks": True}, "sinks not exponentiated (itself in the sum)"),
    "sinks and powers of 2": (
        {"softmax": lambda e, s, b: e**LOG2 / ((e**LOG2).sum(-1, keepdims=True) + s**LOG2)},
        {"sinks": True}, "another softmax (powers of 2 in place of e, `exp2` for `exp`)"),
    "powers of 2 for the sinks alone": (
        {"softmax": lambda e, s, b: e / (e.sum(-1, keepdims=True) + s**LOG2)}, {"sinks": True},
        "sinks of another function (powers of 2 in place of e, of the sinks alone)"),
    "positive sinks": ({"softmax": lambda e, s, b: e / (e.sum(-1, keepdims=True) + abs(b))},
                       {"sinks": True}, "sinks not exponentiated (its absolute value in the sum)"),
    "other layout": ({"rotated": lambda f, x, n: as_pairs(f(x, n)) if n == "key" else f(x, n)},
                     ROTARY, "rotary written in another layout (the key alone)"),
    "tables": ({"rotated": lambda f, x, n: with_tables_of_pairs(x)}, ROTARY,
               "rotary layout swapped (halves with the cosines and sines of interleaved pairs)"),
    "whole width": ({"rotated": before_the_split}, ROTARY,
                    "rotary before the split into heads (halves of the whole width)"),
    "permuted back": ({"weights": permuted_back}, ROTARY,
                      "rotary columns of weights permuted (key, from halves to pairs, as of 4 "
                      "heads, and back as of 2"),
    "powers of 2": ({"softmax": lambda e, s, b: e ** np.log(2) / (e ** np.log(2)).sum(
                        -1, keepdims=True)}, {"alibi": True},
                    "another softmax (powers of 2 in place of e, `exp2` for `exp`)"),
    "averaged": ({"softmax": lambda e, s, b: in_two(e, lambda tops: np.array(0.5))}, {},
                 "another softmax (the keys in 2 parts, each divided by its own sum, averaged)"),
    "by maxima": ({"softmax": lambda e, s, b: in_two(e, lambda tops: tops / tops.sum(0))}, {},
                  "another softmax (the keys in 2 parts, each divided by its own sum, weighed by "
                  "the softmax of their maxima)"),
    "padding": ({"rule": lambda i, j: (j <= i) & (i - j < 3), "softmax": lambda e, s, b: e / (
                    e.sum(-1, keepdims=True) + np.maximum(2 - np.arange(LENGTH), 0)[:, None])},
                {"sliding_window": 3},
                "padding beside the keys seen (keys and values of zeros)"),
    "groups": ({"weights": lambda w: w | {"sinks": w["sinks"].reshape(2, 2).T.ravel()}},
               {"sinks": True}, "sinks of the other heads (laid out as"),
    "column": ({"softmax": lambda e, s, b: beside(e, s)}, {"sinks": True},
               "sinks in the column of a key (the sink is the last column, the first is dropped)"),
    "capped": ({"capped": lambda s, b, f: f(s + b)}, {"alibi": True, "softcap": 1.5},
               "alibi before the softcap"),
    "growth": ({"scale": lambda s: s * np.maximum(
                np.log(np.arange(1, LENGTH + 1)) / np.log(5), 1)[:, None]}, {},
               "scale that grows with the position (log(position) / log(5), or 1)"),
    "window": ({"rule": lambda i, j: (j <= i) & (i - j < 3)}, {}, "window not asked for (of 3)"),
    "blocks": ({"rule": lambda i, j: (j <= i) & (i // 3 == j // 3)}, {},
               "window not asked for (blocks of 3)"),
    "prefix": ({"rule": lambda i, j: (j <= i) | (j < 4)}, {},
               "first keys seen by all (the first 4 keys, a prefix that every query sees)"),
    "either": ({"rule": lambda i, j: (j <= i) | (np.abs(i - j) < 3)}, {"sliding_window": 3},
               "mask of other positions (masks joined by or, not by and: the causal mask and the "
               "window)"),
    "first": ({"rule": lambda i, j: (j <= i) & ((i - j < 3) | (j < 2))}, {"sliding_window": 3},
              "first keys seen by all (the first 2 keys, beside the window)"),
    "rank": ({"weights": low_rank, "told": bool}, {},
             "other weights (query.kernel differs by a matrix of rank 2"),
    "bias": ({"weights": lambda w: w | {"key.bias": w["key.bias"] ** 2}, "told": bool}, {},
             "other weights (key.bias differs)"),
    "sinks joined": ({"softmax": lambda e, s, b: e / (e.sum(-1, keepdims=True) + (
                          np.abs(b) * np.maximum(e.max(-1, keepdims=True), s)))},
                     {"sinks": True}, "sinks not exponentiated (its absolute value in the sum, "
                     "beside those of logits less the maximum, which the sink may be)"),
    "multiplied": ({"frequencies": lambda w, n: 3 * w}, {"rotary": {
                       "max_position_embeddings": 64, "scaling": {
                           "rope_type": "longrope", "short_factor": [3.0] * 4,
                           "long_factor": [9.0] * 4, "factor": 1.0,
                           "original_max_position_embeddings": 64}}},
                   "rotary of another scaling (multiplied, not divided)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_named(kind) -> None:
    steps, options, words = KINDS[kind]
    report = report_of(steps, options)
    assert not report.passed
    assert str(report.diagnosis).startswith(words), str(report.diagnosis)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (lambda p, n: np.arange(LENGTH)[None], "not those of the call"),
        (alone("key", lambda p: np.arange(LENGTH)[None]), "not those of the call, the key alone"),
        (lambda p, n: p[:1], "those of the first sequence for all"),
        (lambda p, n: p[-1:], "those of the last sequence for all"),
        (lambda p, n: np.roll(p, 1, 0), "those of the sequence before"),
        (alone("query", lambda p: p[:1]), "those of the first sequence for all, the query alone"),
    ],
)
def test_positions_of_the_call_that_are_not_used(places, words) -> None:
    report = report_of({"places": places}, ROTARY, positions=GAPS, key_positions=GAPS)
    assert str(report.diagnosis) == f"rotary of other positions ({words})"


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (lambda p, n: np.minimum(p, 7), "none beyond 7"),
        (alone("query", lambda p: np.minimum(p, 5)), "none beyond 5, the query alone"),
        (lambda p, n: p % 11, "they begin again after 11"),
        (alone("key", lambda p: p % 4), "they begin again after 4, the key alone"),
    ],
)
def test_positions_beyond_a_table(places, words) -> None:
    report = report_of({"places": places}, ROTARY, positions=GAPS, key_positions=GAPS)
    assert str(report.diagnosis).startswith(f"rotary of other positions ({words})")


def test_positions_of_pieces_of_queries_are_measured() -> None:
    places = alone("query", lambda p: np.array([[0, 1, 2, 0, 0, 1, 2, 3, 0]]))
    report = report_of({"places": places}, ROTARY)
    words = "rotary of other positions (measured: query 3 at 0, not 3, query 4 at 0, not 4, query"
    assert str(report.diagnosis).startswith(words)


@pytest.mark.parametrize("options", [ROTARY, {"alibi": True}], ids=str)
def test_query_offset_that_is_left_out(options) -> None:
    layer = layer_of(**options)

    def port(query: Any, value: Any, query_offset: int) -> Any:
        places = np.arange(value.shape[1])
        return layer(query, value, positions=places[: query.shape[1]], key_positions=places)

    report = compare(layer, port, [X[:, :4], X], query_offset=3)
    (option,) = options
    assert str(report.diagnosis) == f"{option} of other positions (the query offset left out)"


def test_positions_in_bfloat16() -> None:
    far = GAPS + 500
    report = report_of({"places": lambda p, n: p.astype(ml_dtypes.bfloat16).astype(float)},
                       ROTARY, positions=far, key_positions=far)  # fmt: skip
    words = "rotary angles in half precision (positions in bfloat16)"
    assert str(report.diagnosis).startswith(words), str(report.diagnosis)


def test_positions_of_queries_in_bfloat16_for_the_keys_too() -> None:
    """All are one in bfloat16, as where nothing is turned: both are told."""
    far = np.arange(3000, 3000 + LENGTH)[None].repeat(BATCH, 0)

    def places(own: np.ndarray, name: str) -> np.ndarray:
        return far.astype(ml_dtypes.bfloat16).astype(float)

    told = str(report_of({"places": places}, ROTARY, positions=far).diagnosis)
    words = "(frequencies and angles in bfloat16, those of the queries for the keys too)"
    assert told.startswith("rotary left out"), told
    assert f"(or: rotary angles in half precision {words}" in told, told


def test_positions_of_the_first_sequence_for_the_keys_too() -> None:
    report = report_of({"places": lambda p, n: GAPS[:1]}, ROTARY, positions=GAPS)
    words = "those of the first sequence for all, those of the queries for the keys too"
    assert str(report.diagnosis) == f"rotary of other positions ({words})"


@pytest.mark.parametrize("causal", [False, True])
def test_distances_of_another_sequence(causal) -> None:
    layer, places = layer_of(alibi=True), {"positions": GAPS, "key_positions": GAPS}

    def port(query: Any, **call: Any) -> Any:
        return layer(query, **call | {name: x[:1] for name, x in places.items()})

    report = compare(layer, port, X, use_causal_mask=causal, **places)
    told = "alibi of other positions (those of the first sequence for all)"
    assert str(report.diagnosis) == told
