"""Half precision in TensorFlow: products by programs of XLA, which add in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anymha.interchange.layers import get_weights
from tests.frameworks import required

tf: Any = required("tensorflow")

from anymha_tensorflow import MultiHeadAttention, products  # noqa: E402

EPS = 2.0**-7  # of bfloat16


@pytest.fixture(params=["compiled", "float32"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products as XLA's programs, whichever processor this is and however small, and without."""
    monkeypatch.setattr(products, "_is_multiplied", lambda dtype: request.param == "compiled")
    monkeypatch.setattr(products, "LEAST", 0)
    return request.param


def numbers(*shape: int, seed: int = 0, dtype: Any = tf.bfloat16) -> Any:
    return tf.cast(np.random.default_rng(seed).standard_normal(shape), dtype)


def near(found: Any, wanted: Any, eps: float = EPS, size: float = 0.0) -> None:
    found, wanted = (np.asarray(tf.cast(x, tf.float64)) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=eps * (size or np.abs(wanted).max()))


def derivatives(function: Callable[..., Any], *arrays: Any) -> list[Any]:
    """The gradients of the sum of squares, and those of the sum of their squares."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(arrays)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            total = tf.reduce_sum(tf.cast(function(*arrays), tf.float32) ** 2)
        first = tape.gradient(total, arrays)
        squares = tf.add_n([tf.reduce_sum(tf.cast(g, tf.float32) ** 2) for g in first])
    return [*first, *outer.gradient(squares, arrays)]


def test_processor_multiplies_what_its_program_does_not_cast(monkeypatch) -> None:
    decide = products._is_multiplied.__wrapped__
    assert decide(tf.float32)

    @tf.function(jit_compile=True, autograph=False)
    def cast_first(x: Any, y: Any) -> Any:
        return tf.matmul(tf.cast(x, tf.float32), tf.cast(y, tf.float32))

    monkeypatch.setattr(products, "_product", cast_first)
    assert not decide(tf.bfloat16)

    @tf.function(autograph=False)
    def not_compiled(x: Any, y: Any) -> Any:
        return tf.matmul(x, y)

    monkeypatch.setattr(products, "_product", not_compiled)
    assert not decide(tf.bfloat16)


@pytest.mark.usefixtures("form")
def test_products_and_their_derivatives_are_those_of_float32() -> None:
    x, y = numbers(2, 3, 5, 6), numbers(2, 3, 6, 4, seed=1)
    wide = [tf.cast(each, tf.float32) for each in (x, y)]
    found = products.wide_matmul(x, y)
    assert found.dtype == tf.float32
    near(found, tf.matmul(*wide), 1e-6)
    pairs = zip(derivatives(products.wide_matmul, x, y), derivatives(tf.matmul, *wide), strict=True)
    for got, wanted in pairs:
        assert got.dtype == tf.bfloat16
        near(got, wanted, 2 * EPS)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("with_bias", [True, False])
def test_projections_are_rounded_once(with_bias) -> None:
    x, matrix, bias = numbers(7, 64), numbers(64, 3, seed=1), 40 * numbers(3, seed=2)
    arrays = [x, matrix, bias] if with_bias else [x, matrix]
    wide = [tf.cast(each, tf.float32) for each in arrays]

    def ours(x: Any, matrix: Any, bias: Any = None) -> Any:
        return products.linear(x, matrix, bias)

    def plain(x: Any, matrix: Any, bias: Any = 0.0) -> Any:
        return tf.matmul(x, matrix) + bias

    exact, found = plain(*wide), ours(*arrays)
    assert found.dtype == tf.bfloat16
    excess = np.abs(np.asarray(tf.cast(found, tf.float32) - exact)) / np.abs(np.asarray(exact))
    assert excess.max() <= EPS / 2 * 1.01
    for got, wanted in zip(derivatives(ours, *arrays), derivatives(plain, *wide), strict=True):
        near(got, wanted, 2 * EPS)


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"training": True}])
def test_layer_gives_what_it_gives_in_float32(call, form) -> None:
    options = {"query_features": 32, "dropout": 0.25 if "training" in call else 0.0}
    x = numbers(2, 9, 32)
    layer = MultiHeadAttention(4, 8, dtype="bfloat16", seed=0, **options)
    other = MultiHeadAttention(4, 8, dtype="bfloat16", compute_dtype="float32", seed=0, **options)
    call = call | ({"seed": 3} if "training" in call else {})

    def run(layer: Any, x: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            y = layer(x, x, **call)
            total = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
        return y, tape.gradient(total, layer.trainable_variables)

    traced = tf.function(lambda x: run(layer, x), autograph=False)
    wanted, slopes = run(other, x)
    for found, gradients in (run(layer, x), traced(x)):
        assert found.dtype == tf.bfloat16
        near(found, wanted, 4 * EPS)
        size = max(float(tf.reduce_max(tf.abs(slope))) for slope in slopes)
        for got, expected in zip(gradients, slopes, strict=True):
            near(got, expected, 8 * EPS, size)
    assert len(get_weights(layer)) == 8


def test_lengths_that_are_not_known_need_no_program(monkeypatch) -> None:
    monkeypatch.setattr(products, "_is_multiplied", lambda dtype: True)
    monkeypatch.setattr(products, "LEAST", 0)

    def refuse(*arrays: Any) -> Any:
        raise AssertionError("a program is compiled for each length")

    monkeypatch.setattr(products, "_product", refuse)
    monkeypatch.setattr(products, "_rows", refuse)
    layer = MultiHeadAttention(4, 8, query_features=32, dtype="bfloat16", seed=0)
    spec = tf.TensorSpec((None, None, 32), tf.bfloat16)
    program = tf.function(lambda x: layer(x, x), input_signature=[spec], autograph=False)
    x = numbers(2, 9, 32)
    assert program(x).shape == x.shape
