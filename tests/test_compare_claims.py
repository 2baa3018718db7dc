"""What rounding may explain, and what is said of a cause: no more than the numbers show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare, declare, decoding
from anymha.parity.oracle.oracle import evaluate
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.oracle.rounding import rounding_errors

HEADS, WIDTH, FEATURES = 2, 16, 32
RNG = np.random.default_rng(3)
PLACES = np.array([[0, 1, 2, 5, 6, 9, 10, 11], [3, 4, 5, 6, 8, 9, 12, 13]])
X = RNG.standard_normal((2, 8, FEATURES)).astype(np.float32)
SEEN = np.arange(8) < [[8], [5]]

Numbers = np.ndarray
Angles = Callable[[Numbers, float], Numbers]


def layer(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 2, **options}
    return anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)


def exponents() -> Numbers:
    return np.arange(0, WIDTH, 2, dtype=np.float32) / np.float32(WIDTH)


def in_float64(places: Numbers, base: float) -> Numbers:
    return places[..., None] * base ** -exponents().astype(np.float64)


def by_a_negative_power(places: Numbers, base: float) -> Numbers:
    return places.astype(np.float32)[..., None] * np.float32(base) ** -exponents()


def by_an_exponential(places: Numbers, base: float) -> Numbers:
    own = np.exp(exponents() * np.float32(-np.log(base)))
    return places.astype(np.float32)[..., None] * own


HONEST = (in_float64, by_a_negative_power, by_an_exponential)
WRONG: dict[str, Angles] = {
    "backwards": lambda places, base: -in_float64(places, base),
    "another base": lambda places, base: in_float64(places, 5e5),
    "half the exponents": lambda places, base: in_float64(places, base**0.5),
    "not turned": lambda places, base: in_float64(0 * places, base),
    "halved": lambda places, base: in_float64(places / 2, base),
    "in bfloat16": lambda places, base: in_float64(places.astype(ml_dtypes.bfloat16), base),
}


def softmax(logits: Numbers) -> Numbers:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def port_of(right: Any, angles: Angles = in_float64, **steps: Any) -> Callable[..., Any]:
    """The layer as a port writes it out in float32; `steps` replaces steps of it."""
    w, rotary = anymha.get_weights(right), right.config.rotary

    def turn(x: Numbers, places: Numbers) -> Numbers:
        if rotary is None:
            return x
        angle = angles(places, rotary.base)[:, :, None]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def port(query: Any, value_mask: Any = None, positions: Any = None,
             key_positions: Any = None, use_causal_mask: bool = False) -> Any:  # fmt: skip
        places = np.arange(query.shape[1])[None]
        q, k, v = (
            np.einsum("btd,dhk->bthk", query, w[f"{name}.kernel"]) + w[f"{name}.bias"]
            for name in ("query", "key", "value")
        )
        norm = steps.get("norm", lambda x, name: x)
        q, k = norm(q, "query"), norm(k, "key")
        q = turn(q, places if positions is None else positions)
        k = turn(k, places if key_positions is None else key_positions)
        logits = np.einsum("bthk,bshk->bhts", q, k) / np.float32(WIDTH**0.5)
        seen = np.ones(logits.shape[-2:], bool)
        seen = np.tril(seen) if use_causal_mask else seen
        seen = seen if value_mask is None else seen & value_mask[:, None, None]
        seen = np.broadcast_to(seen, logits.shape)
        masked = steps.get("mask", lambda s, m: np.where(m, s, -np.inf))(logits, seen)
        shares = steps.get("softmax", softmax)(masked)
        context = np.einsum("bhts,bshv->bthv", shares, v)
        output = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        output = output.astype(query.dtype)
        stages = {"query": q, "key": k, "logits": logits, "masked_logits": masked,
                  "probabilities": shares, "context": context, "output": output}  # fmt: skip
        return stages if steps.get("told") else output

    return port


def report_of(right: Any, port: Any, x: Any = X, **call: Any) -> Comparison:
    with np.errstate(all="ignore"):
        return compare(right, port, x, **call)


# Great positions


@pytest.mark.parametrize("offset", [0, 3000, 30_000, 300_000])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_angles_of_great_positions_may_be_rounded_as_people_round_them(offset, base) -> None:
    right = layer(rotary=anymha.Rotary(base=base))
    call = {"positions": PLACES + offset, "key_positions": PLACES + offset}
    for angles in HONEST:
        report = report_of(right, port_of(right, angles), **call)
        assert report.passed, f"{angles.__name__}: {report.to_text()}"


@pytest.mark.parametrize("offset", [3000, 30_000, 300_000])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rotation_is_caught_at_great_positions(wrong, offset, monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right = layer(rotary=True)
    call = {"positions": PLACES + offset, "key_positions": PLACES + offset}
    (stage,) = report_of(right, port_of(right, WRONG[wrong]), **call).stages
    assert stage.units > 3 * stage.budget


NOTHING = anymha.parity.diagnose.causes.Diagnosis()


def test_what_rounding_explains_grows_as_positions_do() -> None:
    right, budgets = layer(rotary=True), []
    for offset in (30_000, 300_000):
        call = {"positions": PLACES + offset, "key_positions": PLACES + offset}
        stage = report_of(right, port_of(right), **call).stages[-1]
        budgets.append(stage.budget)
    assert 5 < budgets[1] / budgets[0] < 20


def test_long_sequences_may_round_their_angles_and_may_not_turn_them_otherwise() -> None:
    right = layer(rotary=True)
    x = 3 * RNG.standard_normal((1, 1200, FEATURES)).astype(np.float32)
    for angles in (in_float64, by_a_negative_power):
        report = report_of(right, port_of(right, angles), x, use_causal_mask=True)
        assert report.stages[-1].name == "output at full length"
        assert report.passed, report.to_text()

    def wraps(places: Numbers, base: float) -> Numbers:
        return in_float64(places % 600, base)

    report = report_of(right, port_of(right, wraps), x, use_causal_mask=True)
    assert report.first_divergence == "output at full length"


# NaN and infinity


def no_maximum(logits: Numbers) -> Numbers:
    shares = np.exp(logits)
    return shares / shares.sum(-1, keepdims=True)


def zero_times_infinity(logits: Numbers, seen: Numbers) -> Numbers:
    return logits + (1 - seen) * -np.inf


def where_something_is_hidden(logits: Numbers, seen: Numbers) -> Numbers:
    return logits if seen.all() else zero_times_infinity(logits, seen)


@pytest.mark.parametrize("rows", ["all", "some"])
def test_overflow_is_told_by_smaller_inputs(rows) -> None:
    right, x = layer(), 40 * X
    if rows == "some":
        x = np.where(np.arange(2)[:, None, None] == 1, x, X)
    report = report_of(right, port_of(right, softmax=no_maximum), x)
    assert report.first_divergence == "probabilities"
    assert str(report.diagnosis).startswith("overflow (exponentials of logits up to")
    assert "of inputs 64 times smaller it gives numbers, and they are right" in report.to_text()


def test_overflow_of_products_before_the_scale_is_told_where_float16_is_left() -> None:
    right = layer(dtype="float16")
    w = {name: a.astype(np.float32) for name, a in anymha.get_weights(right).items()}

    def port(query: Any) -> Any:
        q, k, v = (
            np.einsum("btd,dhk->bthk", query.astype(np.float32), w[f"{n}.kernel"]) + w[f"{n}.bias"]
            for n in ("query", "key", "value")
        )
        products = np.einsum("bthk,bshk->bhts", q, k).astype(np.float16)
        shares = softmax(products.astype(np.float32) / WIDTH**0.5)
        y = np.einsum("bhts,bshv,hvo->bto", shares, v, w["output.kernel"]) + w["output.bias"]
        return y.astype(np.float16)

    report = report_of(right, port, (150 * X).astype(np.float16))
    assert report.first_divergence == "logits"
    assert "products before the scale" in str(report.diagnosis)
    assert not any("it is zero" in words for words in report.not_exercised)
    assert not any("about equal" in words for words in report.not_exercised)


def test_a_mask_that_makes_nan_is_told_by_a_call_without_it() -> None:
    right = layer()
    report = report_of(right, port_of(right, mask=where_something_is_hidden), value_mask=SEEN)
    assert report.first_divergence == "masked_logits"
    assert str(report.diagnosis) == (
        "NaN of the mask (without `value_mask` it gives numbers, and they are right)")  # fmt: skip

    told = port_of(right, mask=zero_times_infinity, told=True)
    report = report_of(right, told, value_mask=SEEN)
    assert report.first_divergence == "masked_logits"
    assert "as 0 times -inf gives" in str(report.diagnosis)


def test_a_mistake_beside_nan_is_told_by_the_numbers_alone() -> None:
    right = layer()

    def scaled(x: Numbers, name: str) -> Numbers:
        return 2 * x if name == "query" else x

    port = port_of(right, norm=scaled, mask=where_something_is_hidden)
    report = report_of(right, port, value_mask=SEEN)
    assert str(report.diagnosis).startswith("wrong scale")
    assert "and NaN of the mask" in str(report.diagnosis)


@pytest.mark.parametrize("constant", [1e9, 0.0])
def test_a_constant_beyond_float16_is_told_by_float32(constant) -> None:
    """(1 - mask) * -1e9 is 0 times infinity where keys are seen; so is what is divided by zero."""
    right = layer(dtype="float16")
    w = {name: a.astype(np.float32) for name, a in anymha.get_weights(right).items()}

    def port(query: Any, value_mask: Any) -> Any:
        dtype = query.dtype
        q, k, v = (np.einsum("btd,dhk->bthk", query.astype(np.float32), w[f"{n}.kernel"])
                   + w[f"{n}.bias"] for n in ("query", "key", "value"))  # fmt: skip
        logits = (np.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5).astype(dtype)
        hidden = 1 - value_mask[:, None, None].astype(dtype)
        with np.errstate(all="ignore"):
            if constant:
                logits = logits - hidden * np.array(constant, np.float32).astype(dtype)
            else:
                tiny = np.array(1e-9, np.float32).astype(dtype)
                logits = np.where(hidden, -np.inf, logits * tiny / tiny)
            shares = softmax(logits.astype(np.float32))
        y = np.einsum("bhts,bshv,hvo->bto", shares, v, w["output.kernel"]) + w["output.bias"]
        return y.astype(dtype)

    report = report_of(right, port, X.astype(np.float16), value_mask=SEEN)
    assert str(report.diagnosis).startswith(
        "constant beyond float16 (of the same inputs in float32 it gives numbers, and they are"
    )
    assert "and they are right" in report.to_text()


@pytest.mark.parametrize("every", [True, False])
def test_nan_without_a_reason_has_no_cause(every) -> None:
    right = layer()

    def broken(query: Any, value_mask: Any) -> Any:
        output = right(query, value_mask=value_mask)
        output[slice(None) if every else (1, 3)] = np.nan
        return output

    report = report_of(right, broken, value_mask=SEEN)
    assert not report.passed
    assert report.diagnosis is not None
    assert not report.diagnosis.causes
    assert "NaN or infinity, of smaller inputs and without masks too" in report.to_text()


def test_rows_that_see_nothing_are_the_known_places_of_nan() -> None:
    right, mask = layer(), np.ones((2, 8, 8), bool)
    mask[0, 3] = False

    def port(query: Any, attention_mask: Any) -> Any:
        output = right(query, attention_mask=attention_mask)
        output[~attention_mask.any(-1)] = np.nan
        return output

    report = report_of(right, port, attention_mask=mask)
    assert str(report.diagnosis) == "fully masked rows give NaN"


# Scales and norms


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_variance_by_one_less_is_no_scale(kind, told) -> None:
    right = layer(query_key_norm=anymha.QueryKeyNorm(kind))
    scales = {n: anymha.get_weights(right)[f"{n}_norm.scale"] for n in ("query", "key")}

    def norm(x: Numbers, name: str) -> Numbers:
        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        spread = np.sum(x**2, -1, keepdims=True) / (WIDTH - 1)
        return x / np.sqrt(spread + right.config.query_key_norm.eps) * scales[name]

    report = report_of(right, port_of(right, norm=norm, told=told))
    assert report.first_divergence == "query"
    assert str(report.diagnosis).startswith("query_key_norm with another variance")


def test_a_scale_is_not_asserted_where_queries_themselves_are_wrong() -> None:
    right = layer(query_key_norm="rms")
    scales = {n: anymha.get_weights(right)[f"{n}_norm.scale"] for n in ("query", "key")}

    def norm(x: Numbers, name: str) -> Numbers:
        spread = np.mean(x**2, -1, keepdims=True)
        return x / np.sqrt(spread + right.config.query_key_norm.eps) * scales[name] * 0.83

    report = report_of(right, port_of(right, norm=norm, told=True))
    assert report.first_divergence == "query"
    assert report.diagnosis is not None
    scaled = any(cause.name == "wrong scale" for cause in report.diagnosis.causes)
    assert not (scaled and report.diagnosis.explained)


def test_explanations_that_give_equal_numbers_are_all_told() -> None:
    right = layer(rotary=True)
    report = report_of(
        right, lambda query: port_of(right)(query, np.ones((2, 8), bool), np.arange(8)[None] + 1)
    )
    told = str(report.diagnosis)
    assert "rotary positions off by one (query +1)" in told
    assert "rotary positions off by one (key -1)" in told


# Half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_probabilities_in_float8_are_seen_in_half_precision(dtype, monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right = layer(dtype=dtype)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    w = {name: a.astype(np.float32) for name, a in anymha.get_weights(right).items()}

    def port(query: Any, form: Any) -> Any:
        def stored(x: Numbers, to: Any = kind) -> Numbers:
            return x.astype(to).astype(np.float32)

        q, k, v = (
            stored(np.einsum("btd,dhk->bthk", query.astype(np.float32), w[f"{n}.kernel"])
                   + w[f"{n}.bias"])
            for n in ("query", "key", "value")
        )  # fmt: skip
        shares = softmax(np.einsum("bthk,bshk->bhts", q, k) / np.float32(WIDTH**0.5))
        context = stored(np.einsum("bhts,bshv->bthv", stored(shares, form), v))
        y = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        return y.astype(kind)

    by_the_median = 0
    for seed in range(3):
        x = (2 * np.random.default_rng(seed).standard_normal(X.shape)).astype(kind)
        assert report_of(right, lambda query: port(query, kind), x).passed
        report = report_of(right, lambda query: port(query, ml_dtypes.float8_e4m3fn), x)
        assert not report.passed
        (stage,) = report.stages
        by_the_median += (
            stage.units <= stage.budget and "times those of rounding" in stage.faults[0]
        )
    assert by_the_median or dtype == "float16", "the greatest error alone does not show it"


def test_gradients_of_half_precision_may_underflow() -> None:
    """Probabilities near 0 are multiples of the smallest number, and their gradients with them."""
    weights = {f"{name}.kernel": np.ones((1, 1, 1)) for name in ("query", "key", "value", "output")}
    x = {"query": np.ones((1, 1, 1)), "key": np.array([[[0.0], [-14.0]]]),
         "value": np.array([[[0.0], [8.0]]])}  # fmt: skip
    recipe = Recipe(weights, x, 1.0)
    errors = rounding_errors(recipe, np.ones((1, 1, 1)), np.zeros((1, 1, 1, 2)), "float16")
    small = evaluate(recipe).scores[0, 0, 0, 1]
    assert small < np.finfo(np.float16).tiny
    assert errors["output"].max() > np.finfo(np.float16).smallest_subnormal


def turning(dtype: Any, base: float = 1e4, scores: bool = False) -> Any:
    """A port of unknown weights, whose angles are computed in a dtype; it may return its scores."""
    kernels = np.random.default_rng(5).standard_normal((4, 16, 16)).astype("f4") / 4

    def port(x: Any, positions: Any) -> Any:
        frequencies = (dtype(base) ** (-np.arange(0, 8, 2, dtype=dtype) / dtype(8))).astype(dtype)
        angles = positions[..., None].astype(dtype) * frequencies
        cos, sin = (f(angles)[..., None, :].astype("f4") for f in (np.cos, np.sin))

        def turned(y: Any) -> Any:
            one, two = y[..., :4], y[..., 4:]
            return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

        q, k, v = ((x @ kernel).reshape(*x.shape[:2], 2, 8) for kernel in kernels[:3])
        logits = np.einsum("bthd,bshd->bhts", turned(q), turned(k)) / np.float32(8**0.5)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ kernels[3]
        return (y, weights) if scores else y

    return port


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("far", [100, 10_000, 1_000_000])
def test_angles_of_ports_of_unknown_weights_are_rounded_too(far, scores) -> None:
    x = np.random.default_rng(6).standard_normal((2, 9, 16)).astype("f4")
    positions = (far + 37 * np.arange(18)).reshape(2, 9)
    exact, rounded = (turning(dtype, scores=scores) for dtype in (np.float64, np.float32))
    wrong = turning(np.float64, 9e3, scores)
    assert compare(exact, rounded, x, positions=positions).passed
    assert compare(rounded, exact, x, positions=positions).passed
    assert not compare(exact, wrong, x, positions=positions).passed


def test_a_wrong_scale_shows_in_one_output_feature_of_half_precision() -> None:
    x = np.random.default_rng(8).standard_normal((2, 9, 6)).astype(np.float16)
    kernels = np.random.default_rng(9).standard_normal((4, 6, 6)).astype(np.float16)

    def port(dtype: Any, scale: float = 1.0) -> Any:
        def call(x: Any) -> Any:
            q, k, v = ((x.astype(dtype) @ w.astype(dtype)) for w in kernels[:3])
            logits = q @ k.swapaxes(-1, -2) * dtype(scale / 6**0.5)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True, dtype=dtype)
            y = weights @ v @ kernels[3, :, :1].astype(dtype)
            return (y - y.astype(np.float64).mean(1, keepdims=True).astype(dtype)).astype(x.dtype)

        return call

    assert compare(port(np.float32), port(np.float16), x).passed
    assert not compare(port(np.float32), port(np.float16, 1.1), x).passed


def test_positions_stay_within_the_tables_of_a_port() -> None:
    """What is called again, to see what rounding changes, gets no position that was not given."""
    x = np.random.default_rng(6).standard_normal((1, 9, 16)).astype("f4")
    places = np.arange(9)[None]

    def within(port: Any) -> Any:
        def call(x: Any, positions: Any) -> Any:
            assert np.asarray(positions).min() >= 0
            assert np.asarray(positions).max() <= 8
            return port(x, np.asarray(positions))

        return call

    one, other = within(turning(np.float64)), within(turning(np.float64, 9e3))
    for positions in (places, places.tolist()):
        assert not compare(one, other, x, positions=positions).passed


def test_scores_of_unknown_weights_are_off_by_what_rounding_changes() -> None:
    """Probabilities are off as their logits are, which are great here; sinks take nearly all."""
    bias = 1e3 + RNG.standard_normal((1, HEADS, 8, 8))
    rounded = layer(sinks=True)
    weights = {**anymha.get_weights(rounded), "sinks": np.full(HEADS, 1e3 + 15, np.float32)}
    rounded = anymha.set_weights(rounded, weights)
    exact, wrong = (
        anymha.set_weights(layer(dtype="float64", scale=scale, sinks=True), weights)
        for scale in (None, 1.01 * WIDTH**-0.5)
    )

    def port(of: Any) -> Any:
        def call(x: Any, **call: Any) -> Any:
            return tuple(a.astype("f4") for a in of(x, return_attention_scores=True, **call))

        return call

    for one, other in ((rounded, exact), (exact, rounded)):
        report = compare(port(one), port(other), X, attention_bias=bias)
        assert report.passed, report.to_text()
    assert not compare(port(exact), port(wrong), X, attention_bias=bias).passed


def test_padding_of_a_port_of_unknown_weights_hides_no_mistake() -> None:
    right, wrong = layer(), layer(scale=1.02 * WIDTH**-0.5)

    def by(made: Any) -> Any:
        def step(x: Any, cache: Any, value_mask: Any) -> Any:
            y, cache = made(x, cache=cache or made.make_cache(2, 8), value_mask=value_mask)
            return y + np.float32(3), cache

        return decoding(step)

    assert compare(by(right), by(right), X, value_mask=SEEN).passed
    assert not compare(by(right), by(wrong), X, value_mask=SEEN).passed


def test_numbers_whose_squares_underflow_are_off_by_rounding_too() -> None:
    made = layer(dtype="float64", sinks=True)
    weights = {**anymha.get_weights(made), "sinks": np.full(HEADS, 560.0)}
    made = anymha.set_weights(made, weights)
    report = compare(made, made, 40 * X.astype(np.float64))
    assert report.passed
    assert not [note for note in report.notes if "not plain attention" in note]


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_norm_makes_the_roundings_of_small_numbers_great(size) -> None:
    """A projection of float16 that is near its smallest number is rounded before it is normed."""
    norm = anymha.QueryKeyNorm(kind="l2", eps=1e-12)
    made = layer(dtype="float16", query_key_norm=norm, bias_initializer="zeros")
    x = (size * X).astype(np.float16)
    weights = {name: 2e-2 * array if name in ("query.kernel", "key.kernel") else array
               for name, array in anymha.get_weights(made).items()}  # fmt: skip
    made = anymha.set_weights(made, weights)

    def port(x: Any, wrong: float = 1.0) -> dict[str, Any]:
        q, k, v = (np.einsum("btd,dhk->bthk", x, made.weights[f"{name}.kernel"])
                   for name in ("query", "key", "value"))  # fmt: skip
        q, k = (wrong * a / np.sqrt((a.astype("f4") ** 2).sum(-1, keepdims=True)) for a in (q, k))
        q, k = q.astype("f2"), k.astype("f2")
        logits = np.einsum("bthd,bshd->bhts", q, k).astype("f4") / WIDTH**0.5
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = (shares / shares.sum(-1, keepdims=True)).astype("f2")
        context = np.einsum("bhts,bshd->bthd", shares, v)
        return {"query": q, "output": np.einsum("bthd,hdo->bto", context,
                                                made.weights["output.kernel"])}  # fmt: skip

    report = compare(made, declare(port, made), x)
    assert report.passed, report.to_text()
    assert not compare(made, declare(lambda x: port(x, 1.2), made), x).passed
