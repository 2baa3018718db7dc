"""Mistakes in many forms, told by the output or by stages: each is named as what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare, declare
from anymha.parity.diagnose.distance_bias import without_rows

pytestmark = pytest.mark.usefixtures("folded_once")

BATCH, LENGTH, HEADS, WIDTH, FEATURES = 2, 7, 4, 8, 32
RNG = np.random.default_rng(3)
X = 2 * RNG.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
BIAS = RNG.standard_normal((BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)
SEEN = RNG.random((BATCH, LENGTH, LENGTH)) < 0.7
SEEN |= np.eye(LENGTH, dtype=bool)

Steps = dict[str, Callable[..., Any]]


def layer(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 4, **options}
    return anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)


WEIGHTS = anymha.get_weights(layer())


def softmax(logits: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def port_of(right: Any, steps: Steps, told: bool = False) -> Callable[..., Any]:
    """The layer as a port writes it out; `steps` replaces steps of it, `told`: with its stages."""
    w = {name: array.astype(np.float64) for name, array in anymha.get_weights(right).items()}
    w = steps.get("weights", lambda w: w)(w)
    times, cap = HEADS // right.config.key_value_heads, right.config.softcap

    def step(name: str, usual: Callable[..., Any], *arrays: Any) -> Any:
        return steps.get(name, usual)(*arrays)

    def port(query: Any, attention_mask: Any = None, attention_bias: Any = None) -> Any:
        three = step("inputs", lambda x: (x, x, x), query.astype(np.float64))
        q, k, v = (
            step(name, lambda y: y, np.einsum("btd,dhk->bthk", x, w[f"{name}.kernel"])
                 + w[f"{name}.bias"])
            for name, x in zip(("query", "key", "value"), three, strict=True)
        )  # fmt: skip
        keys = step("key heads", lambda k: np.repeat(k, times, 2), k)
        values = step("value heads", lambda v: np.repeat(v, times, 2), v)
        logits = step("scale", lambda s: s / WIDTH**0.5, np.einsum("bthk,bshk->bhts", q, keys))
        logits = step("cap", lambda s: s if cap is None else cap * np.tanh(s / cap), logits)
        bias = 0.0 if attention_bias is None else attention_bias.astype(np.float64)
        masked = step("bias", lambda s, b: s + b, logits, bias)
        if attention_mask is not None:
            masked = np.where(attention_mask[:, None], masked, -np.inf)
        shares = step("softmax", softmax, masked)
        context = step("context", lambda p, v: np.einsum("bhts,bshv->bthv", p, v), shares, values)
        y = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        output = step("output", lambda y, x: y, y, query).astype(np.float32)
        stages = {"query": q, "key": k, "value": v, "logits": logits, "probabilities": shares,
                  "context": context, "output": output}  # fmt: skip
        return stages if told else output

    return port


def report_of(steps: Steps, told: bool = False, options: Any = None, **call: Any) -> Comparison:
    right = layer(**options or {})
    return compare(right, port_of(right, steps, told), X, **call)


def named(report: Comparison) -> str:
    assert not report.passed
    return str(report.diagnosis)


def above(shares: np.ndarray, least: Any) -> np.ndarray:
    return np.where(shares >= least, shares, 0.0)


def until(shares: np.ndarray, least: float) -> np.ndarray:
    """The greatest of each row, until they add up to a number."""
    order = np.argsort(-shares, -1)
    falling = np.take_along_axis(shares, order, -1)
    kept = np.where(np.cumsum(falling, -1) - falling < least, falling, 0.0)
    return np.take_along_axis(kept, np.argsort(order, -1), -1)


def mixed(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("bhts,bshv->bthv", shares, values)


def heads(order: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x[:, :, list(order)]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("options", "call"), [
    ({}, {}), ({"num_key_value_heads": 2}, {"attention_mask": SEEN}),
    ({"softcap": 1.5}, {"attention_bias": BIAS}),
])  # fmt: skip
def test_the_port_itself_agrees(options, call, told) -> None:
    assert report_of({}, told, options, **call).passed


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("cap", "steps", "words"),
    [
        (1.5, {"cap": lambda s: 2.7 * np.tanh(s / 2.7)}, "another softcap (2.7 in place of 1.5)"),
        (1.5, {"cap": lambda s: np.clip(s, -0.8, 0.8)},
         "another softcap (0.8 in place of 1.5, by clipping)"),
        (1.5, {"cap": lambda s: 1.5 * np.tanh(np.tanh(s / 1.5))},
         "another softcap (1.5, tanh twice)"),
        (None, {"cap": lambda s: 3 * np.tanh(s / 3)}, "another softcap (3 in place of none)"),
        (None, {"cap": lambda s: np.clip(s, -1, 1)},
         "another softcap (1 in place of none, by clipping)"),
    ],
)  # fmt: skip
def test_any_cap_is_measured(cap, steps, words, told) -> None:
    assert named(report_of(steps, told, {"softcap": cap})).startswith(words)


@pytest.mark.parametrize("names", [("key",), ("value",), ("key", "value"), ("query",)])
def test_heads_folded_in_the_batch_in_another_order(names) -> None:
    def folded(x: np.ndarray) -> np.ndarray:
        heads_first = x.transpose(2, 0, 1, 3).reshape(BATCH, HEADS, LENGTH, WIDTH)
        return heads_first.transpose(0, 2, 1, 3)

    words = "batch and heads not exchanged: written as (H, B, T, d), read as (B, H, T, d)"
    cause = named(report_of(dict.fromkeys(names, folded)))
    assert cause.startswith(f"heads split wrongly (of {' and '.join(names)}, {words})")


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("softmax", lambda s: softmax(s) / 0.9,
         "probabilities scaled (multiplied by 1.11, the 1/(1 - rate) of dropout at 0.1, with"),
        ("context", lambda p, v: mixed(p, v) / LENGTH,
         "context scaled (multiplied by 0.143, as divided by the number of keys or"),
        ("context", lambda p, v: 1.7 * mixed(p, v), "context scaled (multiplied by 1.7)"),
    ],
)  # fmt: skip
def test_a_factor_of_a_told_stage_is_measured(stage, change, words) -> None:
    assert named(report_of({stage: change}, told=True)).startswith(words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: softmax(s, (2, 3)), "over another axis (over the queries and keys jointly)"),
        (lambda s: softmax(softmax(s)), "softmax twice"),
        (lambda s: np.logaddexp(0, s) / np.logaddexp(0, s).sum(-1, keepdims=True),
         "softplus, divided by their sum"),
        (lambda s: s / s.sum(-1, keepdims=True), "the logits themselves, divided by their sum"),
        (lambda s: np.log(softmax(s)), "another softmax (log_softmax)"),
        (lambda s: -np.log(softmax(s)), "the negative log_softmax"),
        (lambda s: softmax(softmax(softmax(s))), "softmax three times"),
        (lambda s: softmax(softmax(s) / WIDTH**0.5), "softmax twice, scaled before the second"),
        (lambda s: softmax(softmax(s, 2)), "softmax over the queries, then over the keys"),
        (lambda s: softmax(s, (1, 2)), "(over the heads and queries jointly)"),
        (lambda s: (p := softmax(s, 1)) / p.sum(-1, keepdims=True),
         "softmax over the heads, divided by the sum over the keys"),
        (lambda s: np.maximum(s, 0) ** 2, "squared relu, not divided by their sum"),
        (lambda s: np.tanh(s), "tanh, not divided by their sum"),
        (lambda s: softmax(s) + 0.02, "0.02 added to each probability"),
        (lambda s: (softmax(s) + 0.02) / (1 + 0.02 * LENGTH), "and divided by the sum again"),
        (lambda s: softmax(s) ** 1.5, "to the power of 1.5"),
        (lambda s: softmax(s) * WIDTH**-0.5, "before and after the softmax"),
        (lambda s: softmax(s * WIDTH**0.5) * WIDTH**-0.5, "after the softmax, not before it"),
        (lambda s: above(softmax(s), np.sort(softmax(s))[..., -3, None]),
         "the 3 greatest probabilities of a row alone kept)"),
        (lambda s: (p := above(softmax(s), np.sort(softmax(s))[..., -2, None]))
         / p.sum(-1, keepdims=True),
         "the 2 greatest probabilities of a row alone kept, divided by their sum"),
        (lambda s: above(softmax(s), 0.08), "probabilities below 0.08 set to zero)"),
        (lambda s: (p := above(softmax(s), 0.08)) / p.sum(-1, keepdims=True),
         "probabilities below 0.08 set to zero, the others divided by their sum"),
        (lambda s: above(softmax(s), 0.3 * softmax(s).max(-1, keepdims=True)),
         "probabilities below 0.3 times a row's greatest set to zero)"),
        (lambda s: (p := until(softmax(s), 0.8)) / p.sum(-1, keepdims=True),
         "until they add up to 0.8, the others divided by their sum"),
        (lambda s: np.maximum(softmax(s), 0.03), "probabilities clamped to at least 0.03"),
        (lambda s: (p := np.minimum(softmax(s), 0.2)) / p.sum(-1, keepdims=True),
         "probabilities clamped to at most 0.2, and divided by their sum"),
        (lambda s: softmax(s) / 0.8, "the 1/(1 - rate) of dropout at 0.2, with nothing dropped"),
    ],
)  # fmt: skip
def test_other_functions_in_place_of_the_softmax_are_told_apart(change, words) -> None:
    assert words in named(report_of({"softmax": change}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, b: s + b.swapaxes(2, 3), "transposed, queries and keys exchanged"),
        (lambda s, b: s + b[:, ::-1], "in reverse along the heads"),
        (lambda s, b: s + b[:, [2, 0, 3, 1]], "heads permuted, to 2, 0, 3, 1"),
        (lambda s, b: s + b[:, :1], "that of the first head for all"),
        (lambda s, b: s + b[::-1], "in reverse along the sequences"),
        (lambda s, b: s + b.mean(1, keepdims=True), "averaged over the heads"),
        (lambda s, b: s + np.roll(b, 1, 3), "shifted by one of the keys"),
        (lambda s, b: s + 1.7 * b, "multiplied by 1.7"),
        (lambda s, b: s - b, "subtracted"),
        (lambda s, b: s * b, "multiplied, not added"),
        (lambda s, b: s + b / WIDTH**0.5, "scaled"),
    ],
)
def test_wrong_attention_biases_are_told_apart(change, words) -> None:
    assert words in named(report_of({"bias": change}, attention_bias=BIAS))


@pytest.mark.parametrize(
    ("grouped", "steps", "words"),
    [
        (2, {"key heads": heads([0] * 4), "value heads": heads([0] * 4)},
         "one head for all (key and value: that of head 0)"),
        (2, {"key heads": heads([1, 1, 0, 0]), "value heads": heads([1, 1, 0, 0])},
         "heads of others (the heads read those of the key and value 1, 1, 0, 0, in reverse)"),
        (2, {"value heads": heads([0, 1, 0, 1])}, "grouped heads tiled (of the values alone)"),
        (2, {"key heads": lambda k: k.mean(2, keepdims=True) + np.zeros((1, 1, HEADS, 1))},
         "heads averaged (key: mean of all heads)"),
        (4, {"query": heads([1, 0, 3, 2])}, "heads permuted (of query, in the order 1, 0, 3, 2)"),
        (4, {"context": lambda p, v: np.einsum("bhts,bshv->bthv", p[:, [2, 1, 0, 3]], v)},
         "heads permuted (of probabilities, in the order 2, 1, 0, 3)"),
        (4, {"context": lambda p, v: np.einsum("bhts,bshv->bthv", p * np.reshape(
            [1, 1, 0, 1], (4, 1, 1)), v)}, "heads left out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("told", [False, True])
def test_which_head_reads_which_is_measured(grouped, steps, words, told) -> None:
    assert words in named(report_of(steps, told, {"num_key_value_heads": grouped}))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"key": lambda k: np.roll(k, 1, 1)}, "the input of key, 1 position later"),
        ({"key": lambda k: k[:, ::-1]}, "the input of key, flipped"),
        ({"value": lambda v: v[..., ::-1]}, "value: the features of each head in reverse"),
        ({"weights": lambda w: {**w, "value.bias": -w["value.bias"]}},
         "bias subtracted or elsewhere (value)"),
        ({"weights": lambda w: {**w, "output.bias": w["output.bias"] @ w["output.kernel"].reshape(
            FEATURES, FEATURES)}}, "that of the output before its projection"),
        ({"output": lambda y, x: y @ WEIGHTS["output.kernel"].reshape(FEATURES, FEATURES)
          + WEIGHTS["output.bias"]}, "output, applied twice"),
        ({"inputs": lambda x: (x, x, x), "query": lambda q: X.reshape(q.shape)},
         "projection twice or left out (query, left out)"),
        ({"output": lambda y, x: (z := y + x - (y + x).mean(-1, keepdims=True))
          / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)}, "of the output and the query added"),
    ],
)  # fmt: skip
def test_positions_biases_and_projections_elsewhere_are_named(steps, words) -> None:
    assert words in named(report_of(steps))


def placed(x: np.ndarray) -> np.ndarray:
    angle = np.arange(LENGTH)[:, None] / 1e4 ** (np.arange(0, FEATURES, 2) / FEATURES)
    return x + np.concatenate([np.sin(angle), np.cos(angle)], -1)


def by_steps(logits: np.ndarray) -> np.ndarray:
    """A softmax that rounds each of its steps to bfloat16."""
    f = to("bfloat16")
    shares = f(np.exp(f(f(logits) - f(logits).max(-1, keepdims=True))))
    return f(shares / f(shares.sum(-1, keepdims=True)))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"key": lambda k: np.maximum(k, 0)}, "activation too many (relu of key)"),
        ({"output": lambda y, x: np.tanh(y)}, "activation too many (tanh of output)"),
        ({"inputs": lambda x: (3 * x,) * 3}, "input scaled (multiplied by 3)"),
        ({"inputs": lambda x: (placed(x), placed(x), x)},
         "positions added (to the inputs of query and key, sines before cosines)"),
        ({"scale": lambda s: np.clip(s / WIDTH**0.5, -2, 2)}, "2 in place of none, by clipping"),
        ({"softmax": lambda s: (e := np.exp(s - s.max(-1, keepdims=True)))
          / e.sum((2, 3), keepdims=True)}, "queries and keys, less the maximum of each row"),
        ({"softmax": by_steps}, "computed in bfloat16 (the softmax)"),
        ({"context": lambda p, v: np.einsum("bhts,bshv->bthv", p, v) + v},
         "residual added (the value, as projected, to the context)"),
        ({"weights": lambda w: {**w, "output.kernel": w["value.kernel"].reshape(
            HEADS, WIDTH, FEATURES), "output.bias": w["value.bias"].ravel()}},
         "output has those of the value"),
    ],
)  # fmt: skip
def test_functions_and_weights_that_do_not_belong_there_are_named(steps, words) -> None:
    assert words in named(report_of(steps))


def test_what_is_exchanged_behind_the_projections_is_named() -> None:
    right, rng = layer(), np.random.default_rng(5)
    three = [rng.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32) for _ in range(3)]

    def port(query: Any, value: Any, key: Any) -> Any:
        q, v, k = (
            np.einsum("btd,dhk->bthk", x, WEIGHTS[f"{n}.kernel"]) + WEIGHTS[f"{n}.bias"]
            for n, x in (("query", query), ("value", value), ("key", key))
        )
        shares = softmax(np.einsum("bthk,bshk->bhts", q, v) / WIDTH**0.5)
        y = np.einsum("bhts,bshv,hvo->bto", shares, k, WEIGHTS["output.kernel"])
        return (y + WEIGHTS["output.bias"]).astype(np.float32)

    told = named(compare(right, port, dict(zip(("query", "value", "key"), three, strict=True))))
    assert told.startswith("inputs exchanged (after the projections key and value exchanged)")


def test_queries_and_context_that_are_exchanged_are_named() -> None:
    right, rng = layer(), np.random.default_rng(5)
    x, y = (rng.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32) for _ in range(2))
    told = named(compare(right, lambda query, value: right(value, query), (x, y)))
    assert told == "inputs exchanged (queries and context exchanged)"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (lambda k: turned(k, sign=-1), "in the other direction for the key alone"),
        (lambda k: turned(np.pad(k, ((0, 0), (2, 0), (0, 0), (0, 0))))[:, 2:],
         "the positions of queries begin -2 after those of keys"),
    ],
)  # fmt: skip
def test_rotary_positions_of_queries_beside_those_of_keys_are_told(keys, words) -> None:
    def ported(of_keys: Callable[..., Any]) -> Any:
        return port_of(layer(), {"query": turned, "key": of_keys})

    told = named(compare(declare(ported(turned), WEIGHTS, "anymha"), ported(keys), X))
    assert words in told


def turned(x: np.ndarray, base: float = 1e4, factor: float = 1.0, sign: int = 1) -> np.ndarray:
    angle = (
        np.arange(x.shape[1])[:, None] / factor * base ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    )
    cos, sin = np.cos(angle)[:, None], sign * np.sin(angle)[:, None]
    a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"query": turned}, "of query alone"),
        ({n: lambda x: turned(x, factor=2.0) for n in ("query", "key")}, "positions divided by 2"),
        ({n: lambda x: turned(x, 5e5) for n in ("query", "key")}, "base 500000"),
        ({"query": turned, "key": lambda x: turned(x, sign=-1)}, "keys in the other direction"),
    ],
)
def test_rotary_positions_in_other_forms_are_named(steps, words) -> None:
    told = named(report_of(steps))
    assert told.startswith("rotary positions, by halves")
    assert words in told


def to(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return lambda x: x.astype(kind).astype(np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (lambda f: {"weights": lambda w: {**w, "value.kernel": f(w["value.kernel"])}},
         "weights rounded to {} (value.kernel)"),
        (lambda f: {"key": f, "value": f}, "rounded to {} (key and value)"),
        (lambda f: {"context": lambda p, v: np.einsum("bhts,bshv->bthv", f(p), v)},
         "rounded to {} (probabilities)"),
        (lambda f: {"scale": lambda s: f(s) / WIDTH**0.5}, "rounded to {} (logits before the bias"),
        (lambda f: {"inputs": lambda x: (x, x, f(x)), "weights": lambda w: {
            **w, "value.kernel": f(w["value.kernel"])}}, "(factors of value)"),
    ],
)  # fmt: skip
def test_what_is_rounded_is_told(dtype, steps, words) -> None:
    assert words.format(dtype) in named(report_of(steps(to(dtype))))


TURNED: Steps = {"query": turned, "key": turned}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tile", "words"), [(1, "key"), (2, "tile of 2 keys"), (4, "tile of 4 keys")]
)
def test_running_sums_that_are_rounded_are_told(dtype, tile, words) -> None:
    def context(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
        so_far = np.zeros(())
        for start in range(0, LENGTH, tile):
            own = slice(start, start + tile)
            so_far = to(dtype)(so_far + mixed(shares[..., own], values[:, own]))
        return so_far

    told = f"rounded to {dtype} (the sum of values by their probabilities, after each {words})"
    assert named(report_of({"context": context})) == told


@pytest.mark.parametrize("tile", [2, 4])
def test_a_running_sum_by_running_maxima_that_is_rounded_is_told(tile) -> None:
    """The maxima are those of the tiles before: another sum is rounded than that of all keys."""
    sums: dict[str, np.ndarray] = {}

    def softmax_of(logits: np.ndarray) -> np.ndarray:
        sums["logits"] = logits
        return softmax(logits)

    def context(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
        logits, so_far, total = sums["logits"], np.zeros(()), np.zeros(())
        top = np.full((*logits.shape[:3], 1), -np.inf)
        for start in range(0, LENGTH, tile):
            own = logits[..., start : start + tile]
            new = np.maximum(top, own.max(-1, keepdims=True))
            old, weights, top = np.exp(top - new), np.exp(own - new), new
            more = np.einsum("bhts,bshv->bhtv", weights, values[:, start : start + tile])
            so_far = to("bfloat16")(old * so_far + more)
            total = old * total + weights.sum(-1, keepdims=True)
        return (so_far / total).swapaxes(1, 2)

    told = f"rounded to bfloat16 (the running sum of the context, after each tile of {tile} keys)"
    assert named(report_of({"softmax": softmax_of, "context": context})) == told


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (lambda f: {"key": lambda k: f(turned(k))}, "rounded to {} (key)"),
        (lambda f: {"context": lambda p, v: np.einsum("bhts,bshv->bthv", f(p), v)},
         "rounded to {} (probabilities)"),
        (lambda f: {"inputs": lambda x: (x, x, f(x)), "weights": lambda w: {
            **w, "value.kernel": f(w["value.kernel"])}}, "rounded to {} (factors of value)"),
    ],
)  # fmt: skip
def test_what_is_rounded_beside_an_option_is_told(dtype, steps, words) -> None:
    options = {"rotary": True, "softcap": 1.5}
    report = report_of({**TURNED, **steps(to(dtype))}, False, options)
    assert words.format(dtype) in named(report)
    assert 0 < report.diagnosis.remaining <= 1


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"rotary": True}, {**TURNED, "query": lambda q: turned(turned(q))}),
        ({"rotary": True}, {n: lambda x: turned(x.swapaxes(1, 2)).swapaxes(1, 2) for n in TURNED}),
        ({"rotary": True}, {n: lambda x: turned(x, 37.0) for n in TURNED}),
        ({"softcap": 1.5}, {"cap": lambda s: np.tanh(np.tanh(s))}),
    ],
)
def test_great_errors_are_no_rounding(options, steps, told) -> None:
    words = named(report_of(steps, told, {**options, "num_key_value_heads": 2}))
    assert not any(of in words for of in ("rounded", "computed in", "quantised")), words


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({n: lambda x: turned(x, 100.0) for n in TURNED},
         ("rotary of another base (100 in place of 10000)", "other exponents (i/8 in place")),
        ({n: lambda x: turned(x.swapaxes(1, 2)).swapaxes(1, 2) for n in TURNED},
         ("rotary along another axis (over the heads)",)),
        ({}, ("rotary left out",)),
    ],
)  # fmt: skip
def test_mistakes_with_rotary_positions_are_told_in_plain_words(steps, words) -> None:
    told = named(report_of(steps, False, {"rotary": True, "num_key_value_heads": 2}))
    assert told.startswith(words[0])
    assert all(word in told for word in words), told
    assert "{" not in told


@pytest.mark.parametrize(
    ("steps", "options", "call", "words"),
    [
        ({"key heads": heads([0, 1, 0, 1]), "value heads": heads([0, 1, 0, 1]),
          "bias": lambda s, b: s - b}, {"num_key_value_heads": 2}, {"attention_bias": BIAS},
         ("grouped heads tiled", "subtracted")),
        ({"scale": lambda s: 1.3 * s / WIDTH**0.5, "output": lambda y, x: y + x}, {}, {},
         ("1.3 times", "residual added")),
        ({"softmax": lambda s: 1 / (1 + np.exp(-s)), "context": lambda p, v: np.einsum(
            "bhts,bshv->bthv", p, v)[:, :, ::-1]}, {}, {}, ("sigmoid", "heads permuted")),
    ],
)  # fmt: skip
def test_two_mistakes_of_these_kinds_are_both_named(steps, options, call, words) -> None:
    told = named(report_of(steps, False, options, **call))
    assert all(word in told for word in words), told


@pytest.mark.parametrize("right", [True, False])
def test_another_dtype_is_the_cause_only_of_right_numbers(right) -> None:
    one = layer()
    factor = 1.0 if right else 1.1
    report = compare(one, lambda query: factor * one(query).astype(np.float64), X)
    assert (str(report.diagnosis) == "returned in float64") == right


def test_nested_lists_are_one_output() -> None:
    one = layer()
    assert compare(one, lambda query: one(query).tolist(), X).passed


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("of", [slice(None), slice(1)])
def test_logits_that_are_told_with_the_bias(of) -> None:
    right = layer()

    def port(query: Any, attention_bias: Any) -> Any:
        stages = port_of(right, {"bias": lambda s, b: s + b[:, of]}, told=True)(
            query, attention_bias=attention_bias)  # fmt: skip
        both = stages["logits"] + attention_bias[:, of]
        return stages | {"logits": both, "masked_logits": both}

    report = compare(right, port, X, attention_bias=BIAS)
    words = "the logits are reported with the attention bias in them"
    if of == slice(1):
        words = "attention bias of other positions (that of the first head for all)"
    assert named(report) == words


@pytest.mark.parametrize(
    ("bias_of", "words"),
    [
        (lambda d: -d, "mirrored, its sign reversed"),
        (abs, "without its sign: keys before a query have what those after it"),
        (lambda d: d - 1, "of a distance that is less by 1"),
        (lambda d: np.minimum(d, 0), "of no distance for all keys after a query"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_bias_over_another_distance(bias_of, words, told) -> None:
    right = layer()
    table = RNG.standard_normal((HEADS, 2 * LENGTH + 1))
    apart = np.arange(LENGTH) - np.arange(LENGTH)[:, None]
    own, other = (table[:, np.clip(d, 1 - LENGTH, LENGTH - 1) + LENGTH][None].astype(np.float32)
                  for d in (apart, bias_of(apart)))  # fmt: skip
    port = port_of(right, {"bias": lambda s, b: s + other}, told=told)
    report = compare(right, port, X, attention_bias=own)
    assert named(report).startswith("attention bias of other positions (")
    assert words in named(report), report.to_text()


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_operation_in_half_precision_is_told_by_the_numbers_of_the_output(dtype) -> None:
    """Product, sum with the bias, scale and steps of the softmax are rounded one by one."""
    right = layer()
    w = {
        name: array.astype(dtype).astype(np.float32)
        for name, array in anymha.get_weights(right).items()
    }

    def half(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype).astype(np.float32)

    def port(query: Any) -> Any:
        q, k, v = (half(half(np.einsum("btd,dhk->bhtk", half(query), w[f"{n}.kernel"]))
                        + w[f"{n}.bias"][:, None]) for n in ("query", "key", "value"))  # fmt: skip
        logits = half(half(q @ k.swapaxes(-1, -2)) * np.float32(half(np.array(WIDTH**-0.5))))
        weights = half(np.exp(half(logits - logits.max(-1, keepdims=True))))
        context = half(half(weights / half(weights.sum(-1, keepdims=True))) @ v)
        return half(
            half(np.einsum("bhtv,hvo->bto", context, w["output.kernel"])) + w["output.bias"]
        )

    assert named(compare(right, port, X)) == f"computed in {dtype}"


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize(("axis", "words"), [(0, "row, not of each column"),
                                             (1, "column, not of each row")])  # fmt: skip
def test_scales_of_quantised_kernels_on_the_other_axis(axis, words) -> None:
    right = layer()
    weights = anymha.get_weights(right)
    kernel = weights["query.kernel"].reshape(len(weights["query.kernel"]), -1)
    scales = np.abs(kernel).max(axis, keepdims=True) / 127
    whole, shape = np.round(kernel / scales).astype(np.int8), weights["query.kernel"].shape
    kernels = ((whole * factors).reshape(shape) for factors in (scales, scales.T))
    one, other = (layer().with_canonical_weights(weights | {"query.kernel": k}) for k in kernels)
    told = named(compare(one, lambda query: other(query), X))
    words = f"whole numbers have the scale of each {words}, query"
    assert told == f"quantised weights scaled on the other axis ({words})"


def relative_index(rows: int, columns: int, lookup: Any) -> np.ndarray:
    """Swin's, of a window whose places are read row by row."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return lookup(row[:, None] - row, column[:, None] - column, rows, columns)


def rightly(down: Any, right: Any, rows: int, columns: int) -> Any:
    return (down + rows - 1) * (2 * columns - 1) + right + columns - 1


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("before", [0, 1], ids=["", "after a class token"])
@pytest.mark.parametrize(
    ("rows", "columns", "lookup", "words"),
    [
        (3, 3, lambda d, r, R, C: (d + R - 1) * C + r + C - 1, "rows of 5, taken for rows of 3"),
        (2, 4, lambda d, r, R, C: (d + R - 1) * (2 * R - 1) + r + C - 1, "taken for rows of 3"),
        (2, 3, lambda d, r, R, C: (d + R - 1) * (2 * C - 1) + r, "columns of the table counted"),
        (3, 3, lambda d, r, R, C: rightly(r, d, R, C), "rows and columns exchanged"),
        (2, 3, lambda d, r, R, C: rightly(-d, r, R, C), "distances up and down exchanged"),
        (3, 2, lambda d, r, R, C: rightly(abs(d), abs(r), R, C), "without their signs"),
    ],
)
def test_a_bias_at_other_places_of_a_window(rows, columns, lookup, words, before) -> None:
    right, count = layer(), rows * columns + before
    table = RNG.standard_normal((HEADS, (2 * rows - 1) * (2 * columns - 1)))
    own = RNG.standard_normal((1, HEADS, count, count)).astype(np.float32)
    other = own.copy()
    for bias, way in ((own, rightly), (other, lookup)):
        bias[..., before:, before:] = table[:, relative_index(rows, columns, way)]
    port = port_of(right, {"bias": lambda s, b: s + other})
    x = RNG.standard_normal((2, count, X.shape[-1])).astype(np.float32)
    report = compare(right, port, x, attention_bias=own)
    told = f"attention bias of other positions (in a window of {rows} x {columns}, "
    assert named(report).startswith(told), report.to_text()
    assert words in named(report)


def test_a_bias_of_distances_is_found_without_the_numbers_of_rows() -> None:
    own = RNG.standard_normal((1, HEADS, 9))
    exact = own[..., np.arange(4) - np.arange(6)[:, None] + 5]
    seen = np.tri(6, 4, 2, bool)
    found = without_rows(np.where(seen, exact + RNG.standard_normal((1, HEADS, 6, 1)), 0.0), seen)
    apart = np.where(seen, found - exact, np.nan)
    assert np.nanmax(np.abs(apart - np.nanmean(apart, (-2, -1), keepdims=True))) < 1e-9
    noise = RNG.standard_normal((1, HEADS, 6, 4))
    assert without_rows(noise, seen) is noise


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize(
    ("follow", "stage", "words"),
    [
        (lambda s: {"probabilities": softmax(s["logits"])},
         "probabilities", "ignored mask (`attention_mask`"),
        (lambda s: {"probabilities": softmax(np.where(SEEN[:, None], 3 * s["logits"], -np.inf))},
         "probabilities", "wrong scale (3 times"),
        (lambda s: {"context": mixed(softmax(2 * s["masked_logits"]), s["value"])},
         "context", "the logits that are told are right, the context made of others"),
    ],
)  # fmt: skip
def test_a_stage_that_is_told_but_not_what_the_next_is_made_of(follow, stage, words) -> None:
    right = layer()
    w = {name: a.astype(np.float64) for name, a in anymha.get_weights(right).items()}

    def port(query: Any, attention_mask: Any) -> Any:
        s = {n: np.einsum("btd,dhk->bthk", query, w[f"{n}.kernel"]) + w.get(f"{n}.bias", 0.0)
             for n in ("query", "key", "value")}  # fmt: skip
        s["logits"] = np.einsum("bthk,bshk->bhts", s["query"], s["key"]) / WIDTH**0.5
        s["masked_logits"] = np.where(attention_mask[:, None], s["logits"], -np.inf)
        s["probabilities"] = softmax(s["masked_logits"])
        s |= follow(s)
        s["context"] = s.get("context", mixed(s["probabilities"], s["value"]))
        y = np.einsum("bthv,hvo->bto", s["context"], w["output.kernel"])
        s["output"] = y + w.get("output.bias", 0.0)
        return {name: array.astype(np.float32) for name, array in s.items()}

    report = compare(right, port, X, attention_mask=SEEN)
    assert report.first_divergence == stage
    assert words in named(report), report.to_text()
    assert "told" in named(report), report.to_text()


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("rate", [0.25, 0.3])
@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda keep, own: keep / own, "not scaled by 1/(1 - rate)"),
        (lambda keep, own: 1 / keep / own, "scaled by 1/(1 - rate) twice"),
        (lambda keep, own: keep, "scaled by 1 - rate, not by 1/(1 - rate)"),
        (lambda keep, own: 1 / (1 - keep), "scaled by 1/rate, not by 1/(1 - rate)"),
    ],
)
def test_another_factor_of_dropout(factor, words, rate, told) -> None:
    """A factor of the rate as it is given, or of what the generator keeps of 65536."""
    right = layer(dropout=rate)
    w, own = anymha.get_weights(right), 1 - round(rate * 65536) / 65536

    def port(query: Any, training: bool, seed: int) -> Any:
        q, k, v = (np.einsum("btd,dhk->bthk", query, w[f"{n}.kernel"]) + w[f"{n}.bias"]
                   for n in ("query", "key", "value"))  # fmt: skip
        context = anymha.dot_product_attention(q, k, v, dropout=rate, seed=seed)
        context = np.float32(own * factor(1 - rate, own)) * context
        output = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        return {"context": context, "output": output} if told else output

    report = compare(right, port, X, training=True, seed=7)
    of = ", of a rate of 0.3" * (rate == 0.3)
    assert named(report) == f"wrong dropout (kept probabilities are {words}{of})"


def test_a_factor_of_what_dropout_keeps_of_whole_numbers() -> None:
    right = layer(dropout=0.3)
    w = anymha.get_weights(right)

    def port(query: Any, training: bool, seed: int) -> Any:
        q, k, v = (np.einsum("btd,dhk->bthk", query, w[f"{n}.kernel"]) + w[f"{n}.bias"]
                   for n in ("query", "key", "value"))  # fmt: skip
        context = anymha.dot_product_attention(q, k, v, dropout=0.3, seed=seed)
        context = np.float32(45875 / 65536) * context
        return np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]

    report = compare(right, port, X, training=True, seed=7)
    assert named(report) == "wrong dropout (kept probabilities are not scaled by 1/(1 - rate))"
