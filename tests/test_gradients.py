"""Gradients of every framework against finite differences of its own forward pass.

The oracle's gradients are held against finite differences in `test_oracle`, and the frameworks'
against the oracle's wherever a rule is tested; here no oracle stands between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from tests.support import Arrays, Problem, make, native, normal, run

pytestmark = pytest.mark.usefixtures("quick_programs")

B, T, S, H = 2, 5, 6, 4

RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "grouped heads": ({"num_key_value_heads": 2, "value_dim": 2}, {}),
    "output shape": ({"output_shape": (2, 3)}, {}),
    "scale": ({"scale": 0.8}, {}),
    "masks": (
        {},
        {
            "attention_mask": normal((B, H, T, S), "mask") > -0.4,
            "value_mask": np.arange(S) < np.array([[4], [6]]),
            "query_mask": np.arange(T) < np.array([[5], [2]]),
        },
    ),
    "causal": ({}, {"use_causal_mask": True, "query_offset": np.array([1, -1], np.int32)}),
    "window": ({"sliding_window": 2}, {}),
    "bias": ({}, {"attention_bias": normal((H, T, S), "bias")}),
    "dropout": ({"dropout": 0.4}, {"training": True, "seed": 5}),
}


def _gradients(backend: Backend, problem: Problem) -> Arrays:
    return run(backend, problem).gradients


def _loss(backend: Backend, problem: Problem) -> float:
    result = run(backend, problem, gradients=False)
    output, scores = (a.astype(np.float64) for a in (result.output, result.scores))
    return float((output * problem.d_output).sum() + (scores * problem.d_scores).sum())


def _slope(backend: Backend, problem: Problem, along: Arrays, step: float) -> float:
    """The derivative of the loss along a direction, by a central difference of fourth order."""

    def at(distance: float) -> float:
        def moved(arrays: Arrays) -> Arrays:
            return {n: a + distance * along[n] if n in along else a for n, a in arrays.items()}

        there = problem.but(weights=moved(problem.weights), inputs=moved(problem.inputs))
        return _loss(backend, there)

    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize(("options", "call"), RULES.values(), ids=RULES)
def test_gradient_is_that_of_finite_differences(
    backend: Backend, options: dict[str, Any], call: dict[str, Any]
) -> None:
    problem = make(dtype="float64", **options).calling(**call)
    gradients = _gradients(backend, problem)
    assert set(gradients) == {*problem.weights, *problem.inputs}
    for name, gradient in gradients.items():
        along = normal(gradient.shape, name, "along")
        # Errors: step^4 of truncation, and eps / step of rounding.
        slope = _slope(backend, problem, {name: along}, step=1e-3)
        assert slope == pytest.approx((gradient * along).sum(), rel=1e-8, abs=1e-9), name


def test_gradient_of_one_array_in_three_roles_is_their_sum(backend: Backend) -> None:
    problem = make(value=None, dtype="float64").calling(use_causal_mask=True)
    gradients = _gradients(backend, problem)
    assert "value" not in gradients
    along = normal(gradients["query"].shape, "along")
    slope = _slope(backend, problem, {"query": along}, step=1e-3)
    assert slope == pytest.approx((gradients["query"] * along).sum(), rel=1e-8)


# NumPy has no differentiation of functions of its arrays.
@pytest.mark.parametrize("backend", ["torch", "tensorflow", "jax"], indirect=True)
@pytest.mark.parametrize("scores", [False, True], ids=["output", "output and scores"])
def test_dot_product_attention_has_the_gradient_of_finite_differences(
    backend: Backend, scores: bool
) -> None:
    ops = backend.ops
    shapes = {"query": (B, T, H, 3), "key": (B, S, 2, 3), "value": (B, S, 2, 2), "bias": (T, S)}
    arrays = {name: normal(shape, name) for name, shape in shapes.items()}
    cotangents = (normal((B, T, H, 2), "output"), normal((B, H, T, S), "scores"))
    mask = np.arange(S) < np.array([[4], [6]])

    def function(given: dict[str, Any]) -> Any:
        return anymha.dot_product_attention(
            **given,
            value_mask=ops.from_numpy(mask), is_causal=True, query_offset=1, softcap=1.5,
            dropout=0.3, seed=2, return_scores=scores,
        )  # fmt: skip

    given = native(ops, arrays)
    wanted = (
        tuple(ops.from_numpy(c) for c in cotangents) if scores else ops.from_numpy(cotangents[0])
    )
    gradients = ops.capabilities.vjp(function, given, wanted)[1]

    def loss(name: str, moved: np.ndarray) -> float:
        found = function({**given, name: ops.from_numpy(moved)})
        parts = found if scores else (found,)
        pairs = zip(parts, cotangents, strict=False)
        return float(sum((ops.to_numpy(part) * c).sum() for part, c in pairs))

    for name, array in arrays.items():
        along, step = normal(array.shape, name, "along"), 1e-3
        near = loss(name, array + step * along) - loss(name, array - step * along)
        far = loss(name, array + 2 * step * along) - loss(name, array - 2 * step * along)
        slope = (8 * near - far) / (12 * step)
        exact = (ops.to_numpy(gradients[name]) * along).sum()
        assert slope == pytest.approx(exact, rel=1e-8, abs=1e-9), name


def test_gradients_have_the_dtype_of_their_arrays(backend: Backend) -> None:
    for options in ({"dtype": "bfloat16"}, {"compute_dtype": "float64"}, {"dtype": "float64"}):
        problem = make(**options)
        for name, gradient in _gradients(backend, problem).items():
            assert gradient.dtype == {**problem.weights, **problem.inputs}[name].dtype, name


@pytest.mark.as_users_compile
def test_key_bias_has_a_gradient_of_exactly_zero(backend: Backend) -> None:
    # It adds one number to all logits of a query, to which the softmax is indifferent.
    gradients = _gradients(backend, make())
    assert not gradients["key.bias"].any()
    assert gradients["query.bias"].any()
