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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotated_features_are_judged_by_the_sums_that_are_turned(layout: str, sign: int) -> None:
    """A turn by a right angle exchanges two features: one is great by its bias, one is small."""
    layer = anymha.MultiHeadAttention(
        1, 2, query_features=16, dtype="float16", backend="numpy", seed=1,
        rotary={"layout": layout},
    )  # fmt: skip
    weights = {name: np.array(array) for name, array in anymha.get_weights(layer).items()}
    for name in ("query", "key"):
        weights[f"{name}.kernel"][...] = 2.0**-12
        weights[f"{name}.bias"][...] = (2.0**-10, sign * 8.003)
    layer = anymha.set_weights(layer, weights) or layer
    w = {name: array.astype(np.float32) for name, array in weights.items()}
    places = np.array([0, 11, 33])  # 11 is 3.5 pi, nearly

    def port(query: Any, positions: Any, key_positions: Any, coarse: float = 1.0) -> Any:
        x = query.astype(np.float32)
        heads = {}
        for name, at in (("query", positions), ("key", key_positions)):
            flat = np.einsum("btd,dhk->bthk", x, w[f"{name}.kernel"])
            flat = (flat.astype(np.float16) + weights[f"{name}.bias"]).astype(np.float32)
            cos, sin = (turn(np.float32(at))[:, None] for turn in (np.cos, np.sin))
            a, b = flat[..., 0], flat[..., 1]
            heads[name] = np.stack([a * cos - b * sin, b * cos + a * sin], -1)
            heads[name] = (heads[name] * np.float32(coarse)).astype(np.float16)
        return {**heads, "output": layer(query, positions=positions, key_positions=key_positions)}

    query = X[:, :3].astype(np.float16)
    call = {"positions": places, "key_positions": places}
    right = compare(layer, port, query, **call)
    assert right.passed, right.to_text()
    wrong = compare(
        layer, lambda *arrays, **call: port(*arrays, **call, coarse=1.01), query, **call
    )
    assert {stage.name for stage in wrong.stages if not stage.passed} >= {"query", "key"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rows_that_are_nearly_all_sink_have_probabilities(dtype: str) -> None:
    options = {"query_features": 16, "dtype": dtype, "backend": "numpy", "seed": 1}
    layer = anymha.MultiHeadAttention(2, 8, sinks=True, **options)
    weights = {name: np.array(array) for name, array in anymha.get_weights(layer).items()}
    weights["sinks"][...] = (40.0, 60.0)
    layer = anymha.set_weights(layer, weights) or layer
    query = X.astype(weights["sinks"].dtype)
    report = compare(layer, layer, query)
    assert report.passed, report.to_text()
    _, scores = layer(query, return_attention_scores=True)
    scores = scores.astype(np.float64)
    assert 0 < scores.max() < 1e-15
    np.testing.assert_allclose(report.exact["probabilities"], scores, rtol=0.05)
    wrong = compare(layer, lambda query: (layer(query), np.zeros_like(scores)), query)
    assert not wrong.passed
