"""The option `sinks` of the layer, in every framework and by every path."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig
from anymha.errors import ConfigError, LayoutError
from anymha.framework.registry import Backend
from anymha.parity import compare
from tests.peer_layers import need
from tests.support import native, normal

pytestmark = pytest.mark.usefixtures("quick_programs")

OPTIONS = {
    "num_heads": 4,
    "num_key_value_heads": 2,
    "key_dim": 4,
    "query_features": 8,
    "seed": 0,
    "sinks": True,
}
SINKS = np.array([-1.0, 0.5, 3.0, 100.0], np.float32)


def with_sinks(backend: str, sinks: np.ndarray = SINKS, **options: Any) -> Any:
    layer = anymha.MultiHeadAttention(**OPTIONS, **options, backend=backend)
    weights = anymha.get_weights(layer)
    weights["sinks"] = sinks.astype(weights["sinks"].dtype)
    return anymha.set_weights(layer, weights) or layer


def by_hand(weights: dict[str, np.ndarray], x: np.ndarray, mask: np.ndarray) -> Any:
    """Output and probabilities of causal self-attention, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"][:, None]
        for n in ("query", "key", "value")
    )
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    logits = np.einsum("bhtk,bhsk->bhts", q, k) / 2  # sqrt(d_k) is 2
    seen = np.tri(x.shape[1], dtype=bool) & mask[:, None, None]
    logits = np.where(seen, logits, -np.inf)
    sinks = np.broadcast_to(w["sinks"][:, None, None], (*logits.shape[:3], 1))
    every = np.concatenate([logits, sinks], axis=-1)
    every = np.exp(every - every.max(-1, keepdims=True))
    scores = (every / every.sum(-1, keepdims=True))[..., :-1]
    return np.einsum("bhts,bhsv,hvo->bto", scores, v, w["output.kernel"]) + w["output.bias"], scores


@pytest.mark.parametrize("budget", [None, 64])
def test_a_sink_joins_each_row_whole_and_by_tiles(backend: Backend, budget: int | None) -> None:
    layer = with_sinks(backend.name, memory_budget=budget)
    x, mask = normal((2, 6, 8), "x") * 3, np.arange(6) >= np.array([[0], [2]])
    arrays = native(backend.ops, {"x": x, "mask": mask})
    call = {"use_causal_mask": True, "value_mask": arrays["mask"]}
    output, scores = layer(arrays["x"], return_attention_scores=True, **call)
    x = np.where(mask[..., None], x, 0.0)
    expected, probabilities = by_hand(anymha.get_weights(layer), x, mask)
    np.testing.assert_allclose(backend.ops.to_numpy(scores), probabilities, atol=2e-6)
    hidden = np.cumsum(mask, axis=1) == 0  # rows that see no key give the bias alone
    np.testing.assert_allclose(
        np.where(hidden[..., None], 0.0, backend.ops.to_numpy(output) - expected), 0.0, atol=1e-5
    )
    assert hidden[1, 0]
    bias = anymha.get_weights(layer)["output.bias"]
    assert np.array_equal(backend.ops.to_numpy(output)[1, 0], bias)
    without = with_sinks(backend.name, SINKS - 1e4, memory_budget=budget)  # of no weight
    other = backend.ops.to_numpy(without(arrays["x"], **call))
    assert np.max(np.abs(backend.ops.to_numpy(output) - other)) > 1e-2


@pytest.mark.as_users_compile
def test_gradients_and_bits_are_those_of_the_definition(backend: Backend) -> None:
    name, ops = backend.name, backend.ops
    x = normal((2, 6, 8), "x")
    report = compare(with_sinks("numpy"), with_sinks(name), x, use_causal_mask=True)
    assert report.passed, report
    exact, other = (with_sinks(b, compute_dtype="float64") for b in ("numpy", name))
    assert np.array_equal(exact(x), ops.to_numpy(other(ops.from_numpy(x))))


def test_gradients_are_the_slopes() -> None:
    layer = with_sinks("numpy", SINKS[:4] / 50, dtype="float64")
    x = normal((1, 4, 8), "x").astype(np.float64)
    output, pullback = layer.vjp(x)
    cotangent = normal(output.shape, "cotangent").astype(np.float64)
    gradients = pullback(cotangent)
    assert gradients["key.bias"].any()  # a sink tells a constant in all logits
    for head in range(4):
        step = np.zeros(4)
        step[head] = 1e-6
        up, down = (with_sinks("numpy", SINKS / 50 + s, dtype="float64") for s in (step, -step))
        slope = np.sum((up(x) - down(x)) * cotangent) / 2e-6
        np.testing.assert_allclose(gradients["sinks"][head], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.as_users_compile
def test_great_logits_do_not_overflow(backend: Backend) -> None:
    layer = with_sinks(backend.name, SINKS * 1e4)
    x = native(backend.ops, {"x": normal((1, 3, 8), "x") * 1e3})["x"]
    assert np.all(np.isfinite(backend.ops.to_numpy(layer(x))))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's compiler does so
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_takes_its_kernel_in_float32(compiled: bool) -> None:
    """Its values and its first and second derivatives are those of float64 by the formula."""
    torch = need("torch")
    x = normal((2, 7, 8), "x")
    cotangent = torch.from_numpy(normal((2, 7, 8), "cotangent"))
    found = {}
    for dtype in ("float32", "float64"):
        layer = with_sinks("torch", SINKS.clip(-1, 3), dtype=dtype, sliding_window=3)
        given = torch.from_numpy(x).to(layer.query.weight.dtype).requires_grad_()
        call = {"use_causal_mask": True}
        told = anymha.explain(layer, given, **call)
        assert told.startswith("fused") == (dtype == "float32")
        run = (
            torch.compile(layer, fullgraph=True, backend="aot_eager")
            if compiled and dtype == "float32"
            else layer
        )
        output = run(given, **call)
        parameters = [given, *layer.parameters()]
        again = run is layer  # a program cannot be differentiated twice
        first = torch.autograd.grad(
            output, parameters, cotangent.to(output.dtype), create_graph=again
        )
        arrays = [output, *first]
        if again:
            lengths = sum((one**2).sum() for one in first)
            arrays += torch.autograd.grad(lengths, parameters, materialize_grads=True)
        found[dtype] = [array.detach().double().numpy() for array in arrays]
    for got, expected in zip(found["float32"], found["float64"], strict=False):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_it_is_that_of_gpt_oss() -> None:
    torch: Any = need("torch")
    need("transformers")
    gpt_oss: Any = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    layer = with_sinks("torch", SINKS / 10)
    x = torch.from_numpy(normal((2, 5, 8), "x")).float()
    q, k, v = (
        project(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        for project in (layer.query, layer.key, layer.value)
    )

    class Module(torch.nn.Module):
        sinks = layer.sinks
        num_key_value_groups = 2

    context, _ = gpt_oss.eager_attention_forward(Module(), q, k, v, None, scaling=0.5)
    torch.testing.assert_close(layer(x), layer.output(context.flatten(2)))


def test_layers_with_and_without_sinks_are_told_apart() -> None:
    ours = with_sinks("numpy", SINKS / 50)
    plain = anymha.MultiHeadAttention(**{**OPTIONS, "sinks": False}, backend="numpy")
    with pytest.raises(LayoutError, match="sinks"):
        anymha.set_weights(plain, anymha.get_weights(ours))


def test_they_are_saved_and_loaded(tmp_path: Any) -> None:
    layer = with_sinks("numpy")
    anymha.save(tmp_path / "layer.safetensors", layer)
    loaded = anymha.load(tmp_path / "layer.safetensors", backend="numpy")
    assert np.array_equal(anymha.get_weights(loaded)["sinks"], SINKS)
    assert AttentionConfig.from_dict(layer.config.to_dict()) == layer.config


@pytest.mark.parametrize("value", ["yes", 1.0, [1.0]])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="`sinks` must be True or False"):
        AttentionConfig(2, 4, sinks=value)  # pyright: ignore[reportArgumentType]
