"""The tape: gradients of NumPy, checked against differences, the oracle and other frameworks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anymha
import anymha_numpy.ops as ops
from anymha.framework.autodiff import vjp
from anymha.framework.registry import Backend, get_backend
from anymha.parity.matrix.judge import judge
from anymha.parity.matrix.run import run
from anymha.parity.oracle.cases import MATRIX, MatrixCase, make_problem
from anymha.parity.oracle.truth import expected
from anymha_numpy import MultiHeadAttention

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4))
Y = RNG.standard_normal((2, 4, 5))
M = RNG.standard_normal((4, 6))
LOW = RNG.standard_normal((3, 1))
SEEN = RNG.random((2, 3, 4)) < 0.5

FUNCTIONS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "add": lambda o, a: a["x"] + a["low"] + 1.0,
    "radd": lambda o, a: 2.0 + a["x"],
    "sub": lambda o, a: a["x"] - a["low"],
    "rsub": lambda o, a: 1.0 - a["x"],
    "mul": lambda o, a: a["x"] * a["low"] * 3.0,
    "array times traced": lambda o, a: SEEN.astype(float) * a["x"],
    "truediv": lambda o, a: a["x"] / a["low"],
    "exp": lambda o, a: o.exp(a["x"]),
    "tanh": lambda o, a: o.tanh(a["x"]),
    "sum": lambda o, a: o.sum(a["x"], axis=1, keepdims=False),
    "sum, axis kept": lambda o, a: o.sum(a["x"], axis=-1, keepdims=True),
    "max": lambda o, a: o.max(a["x"], axis=-1, keepdims=False),
    "max, axis kept": lambda o, a: o.max(a["x"], axis=1, keepdims=True),
    "where": lambda o, a: o.where(SEEN, a["x"], a["low"]),
    "where, scalar": lambda o, a: o.where(SEEN, 0.5, a["x"]),
    "matmul": lambda o, a: o.matmul(a["x"], a["y"]),
    "tensordot": lambda o, a: o.tensordot(a["x"], a["m"], axes=1),
    "reshape": lambda o, a: o.reshape(a["x"], (6, 4)),
    "permute_dims": lambda o, a: o.permute_dims(a["x"], (2, 0, 1)),
    "broadcast_to": lambda o, a: o.broadcast_to(a["low"], (2, 3, 4)),
    "used twice": lambda o, a: a["x"] * a["x"] + o.exp(a["x"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_of_each_function_is_its_difference_quotient(name: str) -> None:
    function = FUNCTIONS[name]
    arrays = {"x": X, "y": Y, "m": M, "low": LOW}
    value, pullback = vjp(ops, function, arrays)
    np.testing.assert_array_equal(value, function(ops, arrays))
    cotangent = RNG.standard_normal(value.shape)
    gradients = pullback(cotangent)
    step = 1e-6
    for key, array in arrays.items():
        assert gradients[key].shape == array.shape
        for index in itertools.islice(np.ndindex(array.shape), 0, None, 3):
            moved = []
            for sign in (1, -1):
                shifted = array.copy()
                shifted[index] += sign * step
                moved.append(function(ops, arrays | {key: shifted}))
            slope = np.sum(cotangent * (moved[0] - moved[1])) / (2 * step)
            np.testing.assert_allclose(gradients[key][index], slope, rtol=1e-6, atol=1e-7)


def test_stopped_gradient_is_zero_and_integers_have_none() -> None:
    arrays = {"x": X, "n": np.arange(3)}
    value, pullback = vjp(ops, lambda o, a: o.stop_gradient(a["x"]) * 2.0, arrays)
    gradients = pullback(np.ones_like(value))
    assert list(gradients) == ["x"]
    assert not gradients["x"].any()


@pytest.mark.parametrize("case", MATRIX[:-1], ids=lambda case: case.name)
def test_gradients_of_every_case_agree_with_the_oracle(case: MatrixCase) -> None:
    problem = make_problem(case)
    row = judge(problem, expected(problem), {"numpy": run(get_backend("numpy"), problem)})
    assert "query.kernel" in row.cells["numpy"].errors
    assert row.passed, row.cells["numpy"].faults


def test_reproducible_gradients_have_the_bits_of_every_framework(backend: Backend) -> None:
    if not hasattr(backend.ops, "vjp"):
        pytest.skip("the tape is what the others are compared with")
    problem = make_problem(next(case for case in MATRIX if case.name == "reproducible"))
    mine, other = run(get_backend("numpy"), problem), run(backend, problem)
    for name, gradient in mine.gradients.items():
        np.testing.assert_array_equal(gradient, other.gradients[name])


def test_vjp_of_the_layer_gives_its_call_and_gradients_of_what_was_passed() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, value_features=6, key_features=5, seed=0)
    rng = np.random.default_rng(1)
    query, value, key = (rng.standard_normal((2, 3, n)).astype("float32") for n in (8, 6, 5))
    bias = rng.standard_normal((3, 3)).astype("float32")
    call: dict[str, Any] = {"attention_bias": bias, "return_attention_scores": True}
    (output, scores), pullback = layer.vjp(query, value, key, **call)
    for got, wanted in zip((output, scores), layer(query, value, key, **call), strict=True):
        np.testing.assert_array_equal(got, wanted)
    gradients = pullback((np.ones_like(output), np.zeros_like(scores)))
    arrays = {**anymha.get_weights(layer), "query": query, "value": value, "key": key}
    shapes = {name: array.shape for name, array in {**arrays, "attention_bias": bias}.items()}
    assert {name: g.shape for name, g in gradients.items()} == shapes
    assert {g.dtype.name for g in gradients.values()} == {"float32"}


def test_vjp_of_self_attention_sums_the_three_parts_of_the_query() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0, dtype="float64")
    x = np.random.default_rng(1).standard_normal((2, 3, 8))
    output, together = layer.vjp(x)
    _, apart = layer.vjp(x, x.copy(), x.copy())
    g = np.random.default_rng(2).standard_normal(output.shape)
    parts = apart(g)
    total = parts["query"] + parts["value"] + parts["key"]
    np.testing.assert_allclose(together(g)["query"], total, rtol=1e-12, atol=1e-13)
    assert "value" not in together(g)


def test_vjp_makes_the_weights_at_a_first_call() -> None:
    layer = MultiHeadAttention(2, 4, seed=0)
    output, pullback = layer.vjp([np.ones((1, 3, 8), "float32"), np.ones((1, 5, 6), "float32")])
    assert pullback(np.ones_like(output))["value.kernel"].shape == (6, 2, 4)


def test_training_by_vjp_lowers_the_loss() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0, dropout=0.1)
    x = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")
    target = x[:, ::-1]
    losses = []
    for step in range(60):
        output, pullback = layer.vjp(x, training=True, seed=step)
        losses.append(float(np.mean((output - target) ** 2)))
        gradients = pullback(2 * (output - target) / output.size)
        layer.weights = {n: w - 2.0 * gradients[n] for n, w in layer.weights.items()}
    assert losses[-1] < 0.8 * losses[0]


def test_vjp_goes_through_a_dropout_mask_that_is_made_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = MultiHeadAttention(4, 4, query_features=8, seed=0, dropout=0.3)
    x = np.random.default_rng(0).standard_normal((2, 200, 8)).astype("float32")

    def found() -> tuple[Any, dict[str, Any]]:
        output, pullback = layer.vjp(x, training=True, seed=3)
        return output, pullback(np.ones_like(output))

    assert ops.chunk_size(None) < 2 * 4 * 100 * 200  # of so many words, one for two rows
    output, gradients = found()
    monkeypatch.setattr(ops, "capabilities", replace(ops.capabilities, chunk_size=None))
    whole, expected = found()
    np.testing.assert_array_equal(output, whole)
    for name, gradient in expected.items():
        np.testing.assert_array_equal(gradients[name], gradient)
