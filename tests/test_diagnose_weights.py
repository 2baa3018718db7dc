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
