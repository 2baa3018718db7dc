"""The matrix: each case makes its feature matter, and the truth about it is that of loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from anymha.parity.oracle.cases import MATRIX, MatrixCase, OracleProblem, make_problem, numpy_dtype
from anymha.parity.oracle.features import SECTIONS
from anymha.parity.oracle.truth import expected

BY_NAME = {case.name: case for case in MATRIX}
NAMES = list(BY_NAME)
SMALL = [name for name in NAMES if "2^20" not in name]


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(MATRIX)


OTHERS: dict[str, Any] = {
    "causal, offset": {"call": {"use_causal_mask": True}},
    "causal, offset per batch": {"call": {"use_causal_mask": True}},
    "window, causal": {"options": {}},
    "N-D, one axis of two": {"options": {"attention_axes": (2,)}},
    "N-D, negative axes": {"options": {"attention_axes": (-2,)}},
}
PLAIN = (
    "self", "cross", "value_dim", "grouped heads", "one key head", "output shape", "no bias",
)  # fmt: skip
"""Cases whose feature cannot be taken away: here the logits are."""


def without_its_feature(case: MatrixCase) -> dict[str, Any]:
    """The fields of the case without what it is named after."""
    options = {name: value for name, value in case.options.items() if name not in SECTIONS}
    if case.name in OTHERS:
        return OTHERS[case.name]
    if case.name in PLAIN:
        return {"options": {**options, "scale": 0.0}}
    if options != case.options and "dropout" not in options:
        return {"options": options}
    return {"inputs": {}} if case.inputs else {"call": {}} if case.call else {"options": {}}


@pytest.mark.parametrize("name", NAMES)
def test_case_without_its_feature_gives_another_output(name: str) -> None:
    case = BY_NAME[name]
    if name not in SMALL:  # its size has no part in it
        case = dataclasses.replace(case, query=(2, 8))
    other = dataclasses.replace(case, **without_its_feature(case))
    here, there = (expected(make_problem(one)) for one in (case, other))
    assert here.output.shape == there.output.shape
    apart = np.max(np.abs(here.output - there.output))
    assert apart > 0.05 * np.max(np.abs(here.output)), apart


@pytest.mark.parametrize("name", SMALL)
def test_every_quantity_of_a_case_matters(name: str) -> None:
    truth = expected(make_problem(BY_NAME[name]))
    silent = {name for name, array in truth.gradients.items() if np.max(np.abs(array)) < 1e-6}
    if name == "every row masked":
        assert silent == set(truth.gradients) - {"output.bias"}
        assert not truth.scores.any()
    else:  # to a softmax over the keys, what is added to all keys is nothing
        assert silent <= {"key.bias", *BY_NAME[name].config.without_gradient}
        named = BY_NAME[name].options.get("attention_axes")
        axes = len(named) if named else len(BY_NAME[name].query) - 1
        rows = truth.scores.sum(tuple(range(-axes, 0)))
        if BY_NAME[name].config.sinks:  # which take a part of each row
            assert np.all(rows < 1)
        else:
            assert np.all(np.isclose(rows, 1) | (rows == 0))
        assert np.mean(rows > 0) > 0.4


@pytest.mark.parametrize("name", ["self", "padding holds NaN", "bfloat16", "everything"])
def test_problem_is_the_same_each_time_and_another_with_another_seed(name: str) -> None:
    one, same, other = (make_problem(BY_NAME[name], seed) for seed in (3, 3, 4))
    for field in ("weights", "inputs", "masks"):
        for key, array in getattr(one, field).items():
            np.testing.assert_array_equal(array, getattr(same, field)[key])
            if key != "nan" and array.dtype != bool:
                assert np.any(array != getattr(other, field)[key])
    np.testing.assert_array_equal(one.d_output, same.d_output)
    np.testing.assert_array_equal(one.d_scores, same.d_scores)


@pytest.mark.parametrize("name", SMALL)
def test_problem_has_the_dtypes_and_shapes_of_its_config(name: str) -> None:
    problem = make_problem(BY_NAME[name])
    config = problem.case.config
    assert {n: w.shape for n, w in problem.weights.items()} == config.weight_shapes()
    dtypes = {a.dtype for a in (*problem.weights.values(), *problem.inputs.values())}
    assert dtypes == {numpy_dtype(config.dtype)}
    truth = expected(problem)
    assert truth.output.shape == problem.d_output.shape
    assert truth.scores.shape == problem.d_scores.shape
    for key, gradient in truth.gradients.items():
        assert gradient.shape == {**problem.weights, **problem.inputs}[key].shape
        assert truth.magnitudes[key].shape == gradient.shape


def test_excluded_positions_hold_nan_and_no_result_does() -> None:
    problem = make_problem(BY_NAME["padding holds NaN"])
    excluded = ~problem.masks["value_mask"]
    assert excluded.any()
    for name in ("value", "key"):
        np.testing.assert_array_equal(np.isnan(problem.inputs[name]).all(-1), excluded)
    truth = expected(problem)
    for array in (truth.output, truth.scores, *truth.gradients.values()):
        assert np.isfinite(array).all()
    for name in ("value", "key"):
        assert not truth.gradients[name][excluded].any()


def by_loops(problem: OracleProblem) -> tuple[np.ndarray, np.ndarray]:
    """Output and scores of inputs (B, T, D), one number at a time, in Python's own floats."""
    config, call, masks = problem.case.config, problem.case.call, problem.masks
    w = {n: a.astype(float) for n, a in problem.weights.items()}
    query = problem.inputs["query"].astype(float)
    value = problem.inputs.get("value", problem.inputs["query"]).astype(float)
    key = problem.inputs.get("key", problem.inputs["query"]).astype(float)
    heads, per = config.num_heads, config.num_heads // w["key.kernel"].shape[1]
    output, scores = np.zeros(problem.d_output.shape), np.zeros(problem.d_scores.shape)
    scale = 1 / math.sqrt(config.key_dim) if config.scale is None else config.scale

    def project(name: str, x: np.ndarray, head: int) -> np.ndarray:
        result = [sum(x[d] * column[d] for d in range(len(x))) for column in
                  w[f"{name}.kernel"][:, head].T]  # fmt: skip
        return np.array(result) + (w[f"{name}.bias"][head] if f"{name}.bias" in w else 0)

    def sees(b: int, h: int, t: int, s: int) -> bool:
        offset = int(np.broadcast_to(call.get("query_offset", 0), query.shape[0])[b])
        seen = not call.get("use_causal_mask") or s <= t + offset
        window = config.sliding_window
        seen = seen and (window is None or abs(t + offset - s) < window)
        for name, mask in masks.items():
            if name == "attention_mask":
                index = {2: (t, s), 3: (b, t, s), 4: (b, h, t, s)}[mask.ndim]
                size = zip(index, mask.shape, strict=True)
                seen = seen and bool(mask[tuple(0 if n == 1 else i for i, n in size)])
            else:
                seen = seen and bool(mask[b, t if name == "query_mask" else s])
        return seen

    for b, t in np.ndindex(query.shape[:2]):
        total = np.zeros(problem.d_output.shape[2:])
        for h in range(heads):
            q = project("query", query[b, t], h)
            parts = {}
            for s in range(value.shape[1]):
                if sees(b, h, t, s):
                    logit = scale * float(q @ project("key", key[b, s], h // per))
                    bias = problem.inputs.get("attention_bias")
                    if bias is not None:
                        full = np.broadcast_to(bias, problem.d_scores.shape)
                        logit += float(full[b, h, t, s])
                    parts[s] = math.exp(logit)
            for s, part in parts.items():
                scores[b, h, t, s] = part / sum(parts.values())
                v = project("value", value[b, s], h // per)
                total += scores[b, h, t, s] * np.tensordot(v, w["output.kernel"][h], axes=1)
        output[b, t] = total + w.get("output.bias", 0)
    return output, scores


@pytest.mark.parametrize(
    "name",
    [
        "cross", "causal, offset per batch", "window, causal", "padding", "padding holds NaN",
        "mask (B, T, S)", "every row masked", "bias (B, 1, 1, S)", "one key head", "output shape",
        "two biases of four", "everything",
    ],
)  # fmt: skip
def test_truth_is_that_of_plain_loops(name: str) -> None:
    problem = make_problem(BY_NAME[name])
    truth = expected(problem)
    output, scores = by_loops(problem)
    np.testing.assert_allclose(truth.scores, scores, rtol=0, atol=1e-13)
    np.testing.assert_allclose(truth.output, output, rtol=0, atol=1e-12)


def test_truth_of_several_axes_is_that_of_one_after_flattening() -> None:
    case = MatrixCase("flat", {"attention_axes": (1, 2)}, query=(2, 3, 4))
    problem = make_problem(case)
    truth = expected(problem)
    flat = dataclasses.replace(
        problem,
        case=dataclasses.replace(case, options={}, query=(2, 12)),
        inputs={"query": problem.inputs["query"].reshape(2, 12, 12)},
        d_output=problem.d_output.reshape(2, 12, 12),
        d_scores=problem.d_scores.reshape(2, 4, 12, 12),
    )
    other = expected(flat)
    np.testing.assert_array_equal(truth.output.reshape(2, 12, 12), other.output)
    np.testing.assert_array_equal(truth.scores.reshape(2, 4, 12, 12), other.scores)
    for name, gradient in truth.gradients.items():
        np.testing.assert_array_equal(gradient.reshape(other.gradients[name].shape),
                                      other.gradients[name])  # fmt: skip


def test_truth_rounds_weights_and_inputs_to_the_dtype_that_computes() -> None:
    case = BY_NAME["float32 in bfloat16"]
    problem = make_problem(case)
    options: dict[str, Any] = {**case.options, "compute_dtype": "float32"}
    bfloat16 = numpy_dtype("bfloat16")

    def rounded(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All but the bias, which is added in float32."""
        return {n: a if n == "attention_bias" else a.astype(bfloat16).astype(np.float32)
                for n, a in arrays.items()}  # fmt: skip

    other = dataclasses.replace(
        problem,
        case=dataclasses.replace(case, options=options),
        weights=rounded(problem.weights),
        inputs=rounded(problem.inputs),
    )
    np.testing.assert_array_equal(expected(problem).output, expected(other).output)
    assert np.any(
        expected(problem).output
        != expected(dataclasses.replace(other, weights=problem.weights)).output
    )
