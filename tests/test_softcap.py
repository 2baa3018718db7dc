"""The option `softcap` of the layer, in every framework and by every path."""

from __future__ import annotations

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig
from anymha.errors import ConfigError, LayoutError
from anymha.framework.registry import Backend
from anymha.parity import compare
from tests.support import native, normal

OPTIONS = {"num_heads": 2, "key_dim": 4, "query_features": 8, "seed": 0}


def _by_hand(weights: dict[str, np.ndarray], x: np.ndarray, cap: float) -> np.ndarray:
    """Causal self-attention with capped logits, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"][:, None]
        for n in ("query", "key", "value")
    )
    logits = cap * np.tanh(np.einsum("bhtk,bhsk->bhts", q, k) / 2 / cap)  # sqrt(d_k) is 2
    logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhts,bhsv,hvo->bto", scores, v, w["output.kernel"]) + w["output.bias"]


@pytest.mark.parametrize("budget", [None, 64])
def test_logits_are_capped_whole_and_by_tiles(backend: Backend, budget: int | None) -> None:
    layer = anymha.MultiHeadAttention(
        **OPTIONS, softcap=0.5, backend=backend.name, bias_initializer="ones", memory_budget=budget
    )
    x = normal((2, 6, 8), "x") * 3
    arrays = native(backend.ops, {"x": x})
    got = backend.ops.to_numpy(layer(arrays["x"], use_causal_mask=True))
    weights = anymha.get_weights(layer)
    np.testing.assert_allclose(got, _by_hand(weights, x, 0.5), atol=1e-5)
    assert np.max(np.abs(got - _by_hand(weights, x, 50.0))) > 1e-2


def test_the_key_bias_has_a_gradient_where_logits_are_capped() -> None:
    x = normal((2, 6, 8), "x") * 3
    for cap, is_zero in ((None, True), (0.5, False)):
        layer = anymha.MultiHeadAttention(**OPTIONS, softcap=cap, backend="numpy")
        output, pullback = layer.vjp(x)
        gradient = pullback(normal(output.shape, "cotangent"))["key.bias"]
        assert (not gradient.any()) == is_zero


def test_layers_with_and_without_a_cap_are_told_apart() -> None:
    capped, plain = (
        anymha.MultiHeadAttention(**OPTIONS, softcap=cap, backend="numpy") for cap in (0.5, None)
    )
    report = compare(capped, plain, normal((2, 6, 8), "x") * 3)
    assert not report.passed
    assert "softcap" in str(report.diagnosis)
    with pytest.raises(LayoutError, match="softcap"):
        anymha.set_weights(plain, anymha.get_weights(capped))
    with pytest.raises(LayoutError, match="softcap"):
        anymha.convert(capped, to="torch.MultiheadAttention")


def test_the_option_is_saved_and_loaded(tmp_path) -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, softcap=0.5, backend="numpy")
    anymha.save(tmp_path / "layer.safetensors", layer)
    assert anymha.load(tmp_path / "layer.safetensors", backend="numpy").config.softcap == 0.5
    assert AttentionConfig.from_dict(layer.config.to_dict()) == layer.config


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "5", True])
def test_a_cap_that_is_no_number_above_zero_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="`softcap` must be a finite number above 0"):
        AttentionConfig(2, 4, softcap=value)
