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
    told = f"quantised weights scaled on the other axis ({words}, query)"
    assert named(compare(right, own, X)) == told


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


FEW = np.random.default_rng(0).standard_normal((2, 10, 64)).astype(np.float32)
"""Fewer positions than features: some kernel gives any projection."""


def told_port(own: Any, change: Any = lambda name, x: x) -> Any:
    """A function that tells its projections, which are changed by name before they are used."""
    w = anymha.get_weights(own)

    def port(query: Any) -> dict[str, Any]:
        told = {
            name: change(name, np.einsum("btd,dhk->bthk", query, w[f"{name}.kernel"])
                         + w[f"{name}.bias"]).astype(np.float32)
            for name in ("query", "key", "value")
        }  # fmt: skip
        logits = np.einsum("bthk,bshk->bhts", told["query"], told["key"]) * own.config.scale_value
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        output = np.einsum("bhts,bshv,hvo->bto", shares, told["value"], w["output.kernel"])
        return told | {"output": (output + w["output.bias"]).astype(np.float32)}

    return port


def few_layer() -> Any:
    return anymha.MultiHeadAttention(
        4, 16, query_features=64, seed=0, bias_initializer="random_normal", backend="numpy"
    )


def with_rows(name: str, rows: Any, other: Any) -> Any:
    """A projection with other numbers at some positions."""

    def change(own: str, x: np.ndarray) -> np.ndarray:
        if own == name:
            x = x.copy()
            x[rows] = other(x)
        return x

    return change


EVERY = (slice(None), slice(None))
NOT_OF_WEIGHTS = {
    "noise at one position": with_rows("key", (1, 2), lambda x: x[1, 2] + np.sin(np.arange(64)
                                       ).reshape(4, 16)),
    "a row copied": with_rows("value", (0, 5), lambda x: x[0, 4]),
    "the last keys lost": with_rows("key", (slice(None), -1), lambda x: 0.0),
    "the last values lost": with_rows("value", (slice(None), -1), lambda x: 0.0),
    "the first queries lost": with_rows("query", (slice(None), 0), lambda x: 0.0),
    "one head at one position": with_rows("key", (slice(None), 3, 1), lambda x: 0.0),
    "keys centred": with_rows("key", EVERY, lambda x: x - x.mean(1, keepdims=True)),
    "values centred": with_rows("value", EVERY, lambda x: x - x.mean(1, keepdims=True)),
    "the mean of queries added": with_rows("query", EVERY, lambda x: x + x.mean(1, keepdims=True)),
    "the mean of all queries lost": with_rows("query", EVERY, lambda x: x - x.mean((0, 1))),
}  # fmt: skip


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("kind", NOT_OF_WEIGHTS)
def test_what_positions_alone_show_is_no_mistake_of_weights(kind) -> None:
    right = few_layer()
    report = compare(right, told_port(right, NOT_OF_WEIGHTS[kind]), FEW)
    assert not report.passed
    told = named(report)
    assert not any(word in told for word in ("weights", "kernel", "bias", "softmax")), told


OF_WEIGHTS = {
    "low rank": ("query.kernel", lambda a: a + 0.1 * np.outer(
        np.sin(np.arange(64)), np.cos(np.arange(64))).reshape(a.shape),
        "query.kernel differs by a matrix of rank 1, as of a low-rank update (LoRA)"),
    "another kernel": ("key.kernel", lambda a: np.sin(40 * a), "key.kernel differs"),
    "another bias": ("value.bias", lambda a: np.sin(40 * a), "value.bias differs"),
    "one head": ("key.kernel", lambda a: np.where(np.arange(4)[:, None] == 3, np.sin(40 * a), a),
                 "key.kernel differs in head 3"),
}  # fmt: skip


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("kind", OF_WEIGHTS)
def test_of_few_positions_further_calls_tell_other_weights(kind) -> None:
    name, change, words = OF_WEIGHTS[kind]
    right, own = few_layer(), few_layer()
    weights = anymha.get_weights(right)
    anymha.set_weights(own, weights | {name: change(weights[name]).astype(np.float32)})
    assert named(compare(right, told_port(own), FEW)) == f"other weights ({words})"


def test_keys_that_change_no_output_are_told_so() -> None:
    right = few_layer()
    told = named(compare(right, told_port(right, NOT_OF_WEIGHTS["keys centred"]), FEW))
    assert told == "another key that gives the same output"
