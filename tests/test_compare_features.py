"""Each feature of the output is judged by its own sum: a great one hides no other."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import compare

RNG = np.random.default_rng(5)
X = RNG.standard_normal((2, 7, 16)).astype(np.float32)


def layer_with(dtype: str, great: float, at: str) -> Any:
    """A layer that has one great feature in its output, by its bias or its kernel."""
    layer = anymha.MultiHeadAttention(
        2, 8, query_features=16, dtype=dtype, backend="numpy", seed=1,
        bias_initializer="random_normal",
    )  # fmt: skip
    weights = {name: np.array(array) for name, array in anymha.get_weights(layer).items()}
    weights["output.bias" if at == "bias" else "output.kernel"][..., 3] *= great
    if at == "bias":
        weights["output.bias"][3] = great
    return anymha.set_weights(layer, weights) or layer


def wide(layer: Any, **call: Any) -> Any:
    """A function that computes the layer in float32, and rounds its output."""
    weights = {n: np.asarray(a, np.float32) for n, a in anymha.get_weights(layer).items()}
    config = {"query_features": 16, "backend": "numpy"}
    port = anymha.MultiHeadAttention(2, 8, **config)
    port = anymha.set_weights(port, weights) or port

    def function(query: Any, use_causal_mask: bool = False) -> Any:
        return port(query.astype(np.float32), **call).astype(query.dtype)

    return function


@pytest.mark.parametrize("known", ["known", "unknown"])
@pytest.mark.parametrize("at", ["bias", "kernel"])
@pytest.mark.parametrize(
    ("dtype", "great"), [("float32", 1e5), ("bfloat16", 300.0), ("float16", 1500.0)]
)
def test_mistake_shows_beside_a_great_feature(
    dtype: str, great: float, at: str, known: str
) -> None:
    layer = layer_with(dtype, great, at)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    query = X.astype(kind)
    reference = layer if known == "known" else wide(layer, use_causal_mask=True)
    right = compare(reference, wide(layer, use_causal_mask=True), query, use_causal_mask=True)
    assert right.passed, right.to_text()
    wrong = compare(reference, wide(layer), query, use_causal_mask=True)
    assert not wrong.passed
    if known == "known":
        assert str(wrong.diagnosis) == "causal mask ignored"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_right_ports_of_random_sizes_pass(dtype: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        heads, width = int(rng.choice([1, 2, 4])), int(rng.choice([2, 8, 16]))
        layer = anymha.MultiHeadAttention(
            heads, width, query_features=heads * width, dtype=dtype, backend="numpy", seed=seed
        )
        weights = {n: np.asarray(a, np.float64) for n, a in anymha.get_weights(layer).items()}
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        size = float(rng.choice([0.1, 1.0, 8.0]))
        x = (size * rng.standard_normal((2, 6, heads * width))).astype(kind)

        def port(query: Any, weights: Any = weights, width: int = width) -> Any:
            """Rounds its inputs' products once, at the end."""
            x = query.astype(np.float64)
            q, k, v = (np.einsum("btd,dhk->bthk", x, weights[f"{n}.kernel"])
                       for n in ("query", "key", "value"))  # fmt: skip
            logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(width)
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            context = np.einsum("bhts,bshk->bthk", shares / shares.sum(-1, keepdims=True), v)
            return np.einsum("bthv,hvo->bto", context, weights["output.kernel"]).astype(query.dtype)

        report = compare(layer, port, x)
        assert report.passed, report.to_text()
