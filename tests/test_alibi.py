"""The option `alibi` of the layer, in every framework and by every path."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig
from anymha.attention.features.alibi import alibi_slopes
from anymha.errors import ConfigError, LayoutError
from anymha.framework.registry import Backend
from anymha.parity import compare
from tests.peer_layers import need
from tests.support import native, normal

pytestmark = pytest.mark.usefixtures("quick_programs")

OPTIONS = {"num_heads": 2, "key_dim": 4, "query_features": 8, "seed": 0}


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2.0**-8]),
        (4, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]),
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
    ],
)
def test_slopes_are_those_of_the_paper(heads: int, slopes: list[float]) -> None:
    assert list(alibi_slopes(heads)) == slopes
    assert list(alibi_slopes(32)) == [2.0 ** (-h / 4) for h in range(1, 33)]


def test_slopes_are_those_of_bloom() -> None:
    torch: Any = need("torch")
    need("transformers")
    bloom: Any = importlib.import_module("transformers.models.bloom.modeling_bloom")
    for heads in (1, 3, 8, 12, 71):
        built = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        np.testing.assert_allclose(built[:, 0, 1], alibi_slopes(heads), rtol=1e-6)


def biases(places: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(B, H, T, S), by hand, for two heads."""
    distance = np.abs(places[:, None, :, None] - keys[:, None, None, :])
    return (-np.array([2.0**-4, 2.0**-8])[:, None, None] * distance).astype(np.float32)


@functools.cache
def layers(backend: str, budget: int | None) -> tuple[Any, Any]:
    """A layer with alibi and one without."""
    options = {**OPTIONS, "sliding_window": 4, "memory_budget": budget, "backend": backend}
    return (
        anymha.MultiHeadAttention(**options, alibi=True),
        anymha.MultiHeadAttention(**options),
    )


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("call", ["indices", "offset", "positions"])
def test_it_is_a_bias_whole_and_by_tiles(backend: Backend, call: str, budget: int | None) -> None:
    ours, plain = layers(backend.name, budget)
    x = normal((2, 6, 8), "x") * 3
    places = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    keys, arrays, offset = places, {"x": x}, 0
    if call == "offset":
        places, offset = places + 2, 2
    elif call == "positions":
        places = np.array([[0, 1, 2, 0, 1, 2], [9, 7, 5, 3, 1, 0]], np.int32)
        keys = places[::-1].copy()
        arrays |= {"positions": places, "key_positions": keys}
    arrays = native(backend.ops, arrays | {"bias": biases(places, keys)})
    x, bias = arrays.pop("x"), arrays.pop("bias")
    options = {"use_causal_mask": True, "query_offset": offset}
    got = backend.ops.to_numpy(ours(x, **arrays, **options))
    expected = backend.ops.to_numpy(plain(x, attention_bias=bias, **options))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert np.max(np.abs(got - backend.ops.to_numpy(plain(x, **options)))) > 1e-3


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"sliding_window": 30}, {"dropout": 0.5}])
def test_torch_takes_its_kernel_by_tiles(options: dict[str, Any], heads: int) -> None:
    """Its results are those of float64 by the formula; with dropout no kernel has a bias."""
    torch = need("torch")
    places = np.stack([np.arange(150), np.arange(150)[::-1]]).astype(np.int32)
    arrays = {"query": normal((2, 150, 8), "x"), "positions": places, "key_positions": places}
    mask = np.ones((2, 150), bool)
    mask[1, 70:] = False
    found = {}
    for dtype in ("float32", "float64"):
        layer = anymha.MultiHeadAttention(
            **OPTIONS, **options, num_key_value_heads=heads, alibi=True, dtype=dtype,
            memory_budget=1 << 15, backend="torch",
        )  # fmt: skip
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        given["query"] = given["query"].to(layer.query.weight.dtype).requires_grad_()
        call = {**given, "use_causal_mask": True, "value_mask": torch.from_numpy(mask)}
        call |= {"training": True, "seed": 3} if "dropout" in options else {}
        told = anymha.explain(layer, **call)
        assert told.startswith("fused") == (dtype == "float32" and "dropout" not in options)
        assert "tiles" in told
        output = layer(**call)
        gradients = torch.autograd.grad((output**2).sum(), [given["query"], *layer.parameters()])
        found[dtype] = [array.detach().double().numpy() for array in (output, *gradients)]
    for got, expected in zip(found["float32"], found["float64"], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_half_precision_does_not_round_the_bias() -> None:
    """Slope times distance, up to 200 here, has an error of 0.5 in bfloat16."""
    torch = need("torch")
    x = torch.from_numpy(normal((1, 400, 8), "x"))
    options = {**OPTIONS, "alibi": [1.0, 0.5], "backend": "torch"}
    half = anymha.MultiHeadAttention(**options, dtype="bfloat16")
    wide = anymha.MultiHeadAttention(**options, dtype="bfloat16", compute_dtype="float32")
    anymha.set_weights(wide, anymha.get_weights(half))
    x = x.bfloat16()
    mask = torch.ones(400, 400, dtype=torch.bool).triu(200)  # far keys alone
    got, expected = (layer(x, attention_mask=mask).float() for layer in (half, wide))
    assert (got - expected).abs().max() <= 0.03 * expected.abs().max()


def test_the_gradient_of_the_key_bias_stays_zero() -> None:
    layer = anymha.MultiHeadAttention(**OPTIONS, alibi=True, backend="numpy")
    output, pullback = layer.vjp(normal((2, 6, 8), "x"))
    assert not pullback(normal(output.shape, "cotangent"))["key.bias"].any()


def test_layers_with_and_without_it_are_told_apart() -> None:
    biased, plain = (
        anymha.MultiHeadAttention(**OPTIONS, alibi=a, backend="numpy") for a in ([1.0, 2.0], False)
    )
    report = compare(biased, plain, normal((2, 6, 8), "x") * 3)
    assert "alibi left out" in str(report.diagnosis)
    with pytest.raises(LayoutError, match="alibi"):
        anymha.set_weights(plain, anymha.get_weights(biased))


def test_the_option_is_saved_and_loaded(tmp_path: Any) -> None:
    for value in (True, [0.5, 0.25]):
        layer = anymha.MultiHeadAttention(**OPTIONS, alibi=value, backend="numpy")
        anymha.save(tmp_path / "layer.safetensors", layer)
        loaded = anymha.load(tmp_path / "layer.safetensors", backend="numpy")
        assert loaded.config.alibi == layer.config.alibi
        assert AttentionConfig.from_dict(layer.config.to_dict()) == layer.config


@pytest.mark.parametrize("value", ["yes", 1.0, [1.0], [1.0, float("nan")], {"a": 1}, []])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="`alibi` must"):
        AttentionConfig(2, 4, alibi=value)  # pyright: ignore[reportArgumentType]
