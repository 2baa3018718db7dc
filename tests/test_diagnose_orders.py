"""Axes, segments and distances in another order, sinks beside other maxima, quantised kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare, declare

pytestmark = pytest.mark.usefixtures("folded_once")

HEADS, WIDTH, FEATURES, LENGTH = 4, 8, 32, 9
RNG = np.random.default_rng(19)
X = 1.5 * RNG.standard_normal((2, LENGTH, FEATURES)).astype(np.float32)
BIAS = RNG.standard_normal((1, HEADS, LENGTH, LENGTH)).astype(np.float32)
PICTURE = 1.5 * RNG.standard_normal((2, 5, 5, FEATURES)).astype(np.float32)
OBLONG = 1.5 * RNG.standard_normal((2, 4, 6, FEATURES)).astype(np.float32)
IDS = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, -1]])
SEEN = RNG.random((2, LENGTH, LENGTH)) < 0.7
SEEN |= np.eye(LENGTH, dtype=bool)
TRIL = np.tri(LENGTH, dtype=bool)

Shares = Callable[..., np.ndarray]


def layer_of(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 8, **options}
    made = anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)
    weights = anymha.get_weights(made)
    if "sinks" in weights:
        weights["sinks"] = np.array([0.5, -1, 1.5, 0], np.float32)
    return anymha.set_weights(made, weights) or made


LAYER = layer_of()


def exponentials(masked: np.ndarray) -> np.ndarray:
    return np.exp(masked - masked.max(-1, keepdims=True))


def softmax(masked: np.ndarray) -> np.ndarray:
    shares = exponentials(masked)
    return shares / shares.sum(-1, keepdims=True)


def logits_of(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.einsum("...thk,...shk->...hts", q, k) / WIDTH**0.5


def attention(
    x: np.ndarray, masked: Callable[[np.ndarray], np.ndarray] = lambda logits: logits,
    shares: Shares = softmax, logits: Shares = logits_of,
) -> np.ndarray:  # fmt: skip
    """The layer as a port writes it out, over the last axis but one."""
    w = {name: array.astype(np.float64) for name, array in anymha.get_weights(LAYER).items()}
    q, k, v = (np.einsum("...td,dhk->...thk", x, w[f"{name}.kernel"]) + w[f"{name}.bias"]
               for name in ("query", "key", "value"))  # fmt: skip
    context = np.einsum("...hts,...shv->...thv", shares(masked(logits(q, k))), v)
    y = np.einsum("...thv,hvo->...to", context, w["output.kernel"]) + w["output.bias"]
    return y.astype(np.float32)


def named(report: Comparison, words: str) -> None:
    assert not report.passed
    assert words in str(report.diagnosis), report.to_text()


def test_the_ports_themselves_agree() -> None:
    assert compare(LAYER, lambda query: attention(query), X).passed
    right = compare(LAYER, lambda query, attention_bias: attention(
        query, lambda s: s + attention_bias), X, attention_bias=BIAS)  # fmt: skip
    assert right.passed
    axes = layer_of(attention_axes=1)
    assert compare(axes, lambda query: np.moveaxis(
        attention(np.moveaxis(query, 1, -2)), -2, 1), OBLONG).passed  # fmt: skip


MAXIMA: dict[str, tuple[Callable[[np.ndarray, np.ndarray], tuple[Any, Any]], str]] = {
    "joined": (lambda m, s: (np.maximum(m.max(-1, keepdims=True), s), 0.0),
               "(the maximum, which the sink may be, is taken off the logits alone)"),
    "all rows": (lambda m, s: (m.max(), 0.0),
                 "(the maximum of all rows is taken off the logits alone)"),
    "each head": (lambda m, s: (m.max((0, 2, 3), keepdims=True), 0.0),
                  "(the maximum of each head is taken off the logits alone)"),
    "sequence and head": (lambda m, s: (m.max((2, 3), keepdims=True), 0.0),
                          "(the maximum of each sequence and head is taken off the logits alone)"),
    "of the sink": (lambda m, s: (0.0, m.max(-1, keepdims=True)),
                    "(the maximum is taken off the sink alone)"),
    "joined, of the sink": (lambda m, s: (0.0, np.maximum(m.max(-1, keepdims=True), s)),
                            "(the maximum, which the sink may be, is taken off the sink alone)"),
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MAXIMA)
def test_sinks_beside_another_maximum(kind, causal) -> None:
    tops, words = MAXIMA[kind]
    right = layer_of(sinks=True)
    sinks = anymha.get_weights(right)["sinks"].astype(np.float64)[:, None, None]

    def shares(masked: np.ndarray) -> np.ndarray:
        of_logits, of_sink = tops(masked, sinks)
        weights, own = np.exp(masked - of_logits), np.exp(sinks - of_sink)
        return weights / (weights.sum(-1, keepdims=True) + own)

    def port(query: Any, use_causal_mask: bool = False) -> Any:
        seen = TRIL | (not use_causal_mask)
        return attention(query, lambda s: np.where(seen, s, -np.inf), shares)

    report = compare(right, port, X, **({"use_causal_mask": True} if causal else {}))
    named(report, f"sinks not shifted by the maximum {words}")


AXES = {
    "square": (PICTURE, lambda y: y, "(batch axis 0, positions, batch axis 1)"),
    "oblong, reshaped": (OBLONG, lambda y: y.reshape(2, 4, 6, -1),
                         "read as (batch axis 0, positions, batch axis 1)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", AXES)
def test_an_axis_that_is_not_moved_back(kind) -> None:
    x, back, words = AXES[kind]
    report = compare(layer_of(attention_axes=1), lambda query: back(
        attention(np.moveaxis(query, 1, -2))), x)  # fmt: skip
    named(report, "axes exchanged (of the output, not moved back: ")
    named(report, words)


def viewed(array: np.ndarray, *axes: int) -> np.ndarray:
    """What lies in memory in another order of the axes."""
    return np.ascontiguousarray(array.transpose(*axes)).reshape(array.shape)


@pytest.mark.parametrize(
    ("axes", "words"),
    [((0, 2, 3, 1), "(queries, keys, heads)"), ((0, 2, 1, 3), "(queries, heads, keys)"),
     ((0, 3, 2, 1), "(keys, queries, heads)")],
)  # fmt: skip
def test_a_bias_that_is_viewed_and_not_transposed(axes, words) -> None:
    report = compare(LAYER, lambda query, attention_bias: attention(
        query, lambda s: s + viewed(attention_bias, *axes)), X, attention_bias=BIAS)  # fmt: skip
    named(report, f"axes not transposed: written as {words}, read as (heads, queries, keys)")


def test_a_mask_that_is_viewed_and_not_transposed() -> None:
    """Of a layout (queries, keys, batch); an empty row is the mean of all it might see."""

    def port(query: Any, attention_mask: Any) -> Any:
        seen = viewed(attention_mask, 1, 2, 0)[:, None]
        return attention(query, lambda s: np.where(seen, s, -1e9))

    report = compare(LAYER, port, X, attention_mask=SEEN)
    named(report, "axes not transposed: written as (queries, keys, sequences), read as")


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_hides_everything(causal) -> None:
    def port(query: Any, attention_mask: Any, use_causal_mask: bool = False) -> Any:
        hidden = ~attention_mask.astype(np.uint8)[:, None]
        later = ~TRIL & use_causal_mask
        return attention(query, lambda s: np.where(later, -np.inf, np.where(hidden, -1e9, s)))

    call = {"use_causal_mask": True} if causal else {}
    report = compare(LAYER, port, X, attention_mask=SEEN, **call)
    named(report, "everything is hidden by a finite number, the probabilities of all keys are")


def packed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """A port that lays segments out by their lengths, those of padding last."""

    def port(query: Any, segment_ids: Any) -> Any:
        ids = np.full_like(segment_ids, -1)
        for row, own in zip(ids, segment_ids, strict=True):
            lengths = change(np.bincount(own[own >= 0]))
            laid = np.repeat(np.arange(len(lengths)), lengths)[: np.sum(own >= 0)]
            row[: len(laid)] = laid
        seen = ((ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None])[:, None]

        def shares(masked: np.ndarray) -> np.ndarray:
            weights = np.exp(masked) * seen
            total = weights.sum(-1, keepdims=True)
            return weights / np.where(total == 0, 1, total)

        return attention(query, shares=shares)

    return port


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda n: np.sort(n)[::-1], "(sorted, the longest first)"),
     (np.sort, "(sorted, the shortest first)"), (lambda n: n[::-1], "(in reverse)"),
     (lambda n: np.roll(n, 1), "(each that of the segment before"),
     (lambda n: np.full_like(n, n.max()), "(the longest for all)"),
     (lambda n: n + 1, "(each one longer)"),
     (lambda n: n - 1, "(each one shorter, what is left over is padding)")],
)  # fmt: skip
def test_segments_of_other_lengths(change, words) -> None:
    assert compare(LAYER, packed(lambda n: n), X, segment_ids=IDS).passed
    report = compare(LAYER, packed(change), X, segment_ids=IDS)
    named(report, f"segments of other lengths {words}")


def buckets(apart: np.ndarray, both: bool, count: int = 8, most: int = 10) -> np.ndarray:
    """T5's buckets of the position of the key less that of the query."""
    first = 0 * apart
    if both:
        count //= 2
        first, apart = np.where(apart > 0, count, 0), np.abs(apart)
    else:
        apart = np.maximum(-apart, 0)
    exact = count // 2
    far = np.log(np.maximum(apart, 1) / exact) / np.log(most / exact) * (count - exact)
    return first + np.where(apart < exact, apart, np.minimum(exact + far.astype(int), count - 1))


def test_the_bias_of_other_distances_is_measured() -> None:
    table = 1.5 * RNG.standard_normal((8, HEADS)).astype(np.float32)
    apart = np.arange(LENGTH) - np.arange(LENGTH)[:, None]
    right, wrong = (table[buckets(apart, both)].transpose(2, 0, 1)[None] for both in (True, False))
    report = compare(LAYER, lambda query, attention_bias: attention(
        query, lambda s: s + wrong), X, attention_bias=right)  # fmt: skip
    named(report, "attention bias of other positions (measured, by the position of the key less")
    named(report, "at 1 to 8 the bias of 0)")


def test_a_bias_of_its_own_is_not_that_of_other_distances() -> None:
    apart = np.arange(LENGTH) - np.arange(LENGTH)[:, None]
    right, other = (RNG.standard_normal((1, HEADS, 2 * LENGTH)).astype(np.float32)[..., apart]
                    for _ in range(2))  # fmt: skip
    report = compare(LAYER, lambda query, attention_bias: attention(
        query, lambda s: s + other), X, attention_bias=right)  # fmt: skip
    assert "attention bias of other positions" not in str(report.diagnosis)


def levels(groups: np.ndarray, bits: int, even: bool) -> np.ndarray:
    """The last axis at levels from the least to the greatest, or with zero as the middle one."""
    if even:
        step = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.round(groups / step) * step
    least = groups.min(-1, keepdims=True)
    step = np.ptp(groups, axis=-1, keepdims=True) / (2**bits - 1)
    return np.round((groups - least) / step) * step + least


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["output", "input", "16 inputs"])
def test_told_kernels_at_few_levels(group, bits, even) -> None:
    if even and bits == 2:
        pytest.skip("three levels")
    weights = anymha.get_weights(LAYER)
    for name in ("key.kernel", "query.kernel"):
        kernel = weights[name].astype(np.float64).reshape(FEATURES, -1)
        if group == "input":
            kernel = levels(kernel, bits, even)
        else:
            size = FEATURES if group == "output" else 16
            kernel = levels(kernel.T.reshape(-1, size), bits, even).reshape(-1, FEATURES).T
        weights[name] = kernel.reshape(FEATURES, HEADS, WIDTH).astype(np.float32)
    other = anymha.MultiHeadAttention(HEADS, WIDTH, query_features=FEATURES, backend="numpy")
    anymha.set_weights(other, weights)
    report = compare(LAYER, declare(lambda query: other(query), weights, "anymha"), X)
    named(report, f"quantised to {bits} bits")
    named(report, f"each {group}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("query", "key", "words"),
    [(-0.5, 0.0, "scaled queries"), (0.0, -0.5, "scaled keys"),
     (-0.25, -0.25, "both scaled by the root")],
)  # fmt: skip
def test_factors_that_are_scaled_before_they_are_rounded(query, key, words, dtype) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def logits(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        q, k = ((x * WIDTH**power).astype(kind).astype(np.float64)
                for x, power in ((q, query), (k, key)))  # fmt: skip
        return np.einsum("bthk,bshk->bhts", q, k).astype(kind).astype(np.float64)

    report = compare(LAYER, lambda query: attention(query, logits=logits), X)
    named(report, f"rounded to {dtype} (factors of logits with {words} and logits)")
