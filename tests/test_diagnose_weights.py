"""Weights that are all changed alike, by a factor or a limit: told, or measured by the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare
from tests.test_diagnose_kinds import FEATURES, X, layer, named, report_of

pytestmark = pytest.mark.usefixtures("folded_once")


def cut_norms(w: np.ndarray, limit: float) -> np.ndarray:
    flat = w.reshape(FEATURES, -1)
    return (flat * np.minimum(1, limit / np.linalg.norm(flat, axis=0))).reshape(w.shape)


def changed(change: Any, *names: str) -> Any:
    """Weights whose names begin or end so, changed; all without names."""

    def weights(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ends = {n for n in w for name in names or ("",) if n.startswith(name) or n.endswith(name)}
        return {n: change(a) if n in ends else a for n, a in w.items()}

    return weights


WEIGHTS = (
    (changed(lambda w: 1.01 * w), "weights scaled (all weights are 1.01 times the reference's)"),
    (changed(lambda w: 0.999 * w, "kernel"), "(all kernels are 0.999 times the reference's)"),
    (changed(lambda w: 0.5 * w, "bias"), "(all biases are 0.5 times the reference's)"),
    (changed(lambda w: 1.05 * w, "q", "k", "v"), "(the weights of query, key and value are 1.05"),
    (changed(lambda w: 1.01 * w, "query.kernel"), "(query.kernel is 1.01 times the reference's)"),
    (changed(lambda w: np.clip(w, -0.2, 0.2)), "clipped (all kernels are cut at 0.2 and -0.2)"),
    (changed(lambda w: np.clip(w, -0.15, 0.15), "query.kernel"), "(query.kernel is cut at 0.15"),
    (changed(lambda w: cut_norms(w, 0.8), "kernel"),
     "weights clipped (all kernels are cut to a norm of 0.8 in each column)"),
    (changed(lambda w: np.where(np.abs(w) < 0.05, 0, w), "value.kernel"),
     "weights pruned (value.kernel is zero below 0.0"),
)  # fmt: skip


@pytest.mark.parametrize(("weights", "words"), WEIGHTS)
def test_weights_that_are_changed_alike_are_measured(weights, words) -> None:
    assert words in named(report_of({"weights": weights}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(lambda w: 1.01 * w), "all weights are 1.01 times the reference's"),
        (changed(lambda w: 1.01 * w, "query.kernel"), "query.kernel is 1.01 times the reference's"),
        (changed(lambda w: np.clip(w, -0.15, 0.15), "query.k", "key.k"),
         "query.kernel and key.kernel are cut at 0.15 and -0.15"),
        (changed(lambda w: cut_norms(w, 0.8), "output.kernel"),
         "output.kernel is cut to a norm of 0.8 in each column"),
        (changed(lambda w: np.where(np.abs(w) < 0.05, 0, w), "value.kernel"),
         "value.kernel is zero below 0.0"),
    ],
)  # fmt: skip
def test_how_told_weights_are_changed_is_told(change, words) -> None:
    own, right = layer(), layer()
    anymha.set_weights(own, change(anymha.get_weights(right)))
    report = compare(right, own, X)
    assert f"other weights ({words}" in named(report)


def whole_numbers(axis: int, by: int) -> Any:
    """The query's kernel as whole numbers of 8 bits with the scales of an axis, put along `by`."""

    def change(w: Any) -> Any:
        kernel = w["query.kernel"]
        matrix = kernel.reshape(FEATURES, -1) * np.linspace(1, 2, FEATURES)
        scale = np.abs(matrix).max(axis) / 127
        whole = np.round(matrix / np.expand_dims(scale, axis))
        right, wrong = (whole * np.expand_dims(scale, at) for at in (axis, by))
        return [
            w | {"query.kernel": m.reshape(kernel.shape).astype(np.float32)} for m in (right, wrong)
        ]

    return change


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (0, "whole numbers have the scale of each row, not of each column"),
        (1, "whole numbers have the scale of each column, not of each row"),
    ],
)
def test_scales_of_whole_numbers_along_the_other_axis(axis, words) -> None:
    own, right = layer(), layer()
    one, other = whole_numbers(axis, 1 - axis)(dict(anymha.get_weights(right)))
    anymha.set_weights(right, one)
    anymha.set_weights(own, other)
    assert f"other weights (query.kernel differs: {words})" in named(compare(right, own, X))


@pytest.mark.parametrize(("shape", "of"), [((FEATURES, 1), "row"), ((1, FEATURES), "column")])
def test_factors_of_rows_or_columns_of_a_kernel(shape, of) -> None:
    own, right = layer(), layer()
    w = dict(anymha.get_weights(right))
    factors = np.linspace(0.5, 2, FEATURES).astype(np.float32).reshape(shape)
    kernel = w["value.kernel"]
    w["value.kernel"] = (kernel.reshape(FEATURES, -1) * factors).reshape(kernel.shape)
    anymha.set_weights(own, w)
    words = f"other weights (value.kernel differs: each {of} has a factor of its own)"
    assert words in named(compare(right, own, X))
