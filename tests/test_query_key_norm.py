"""The option `query_key_norm` of the layer, in every framework and by every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig, QueryKeyNorm
from anymha.errors import ConfigError, LayoutError, WeightsError
from anymha.framework.registry import BUILT_IN, LAYERS, Backend, get_layer
from anymha.parity import compare
from tests.frameworks import skip_or_fail
from tests.peer_layers import need
from tests.support import native, normal

HOMES = {home.name: home for home in (*BUILT_IN, *LAYERS)}


def _need_home(name: str) -> None:
    if not HOMES[name].installed:
        skip_or_fail(name, f"{HOMES[name].framework} is not installed")


OPTIONS: dict[str, Any] = {
    "num_heads": 4, "key_dim": 4, "num_key_value_heads": 2, "query_features": 8, "seed": 0,
    "bias_initializer": "ones",
}  # fmt: skip
NORMS = {
    "rms": QueryKeyNorm(),
    "one plus weight, each head": QueryKeyNorm(over="heads", scale="one_plus_weight"),
    "layer, width": QueryKeyNorm("layer", "width", use_bias=True, eps=1e-2),
    "l2": QueryKeyNorm("l2", eps=1.5),
    "no weight": QueryKeyNorm(scale="none"),
}
X = normal((2, 6, 8), "x") * 3


def _normed(x: np.ndarray, norm: QueryKeyNorm, scale: Any, bias: Any) -> np.ndarray:
    """One sequence's heads (T, H, d_k), number by number."""
    result = np.empty_like(x)
    for t in range(len(x)):
        parts = [x[t]] if norm.over == "width" else list(x[t][:, None])
        for h, part in enumerate(parts):
            numbers = part.reshape(-1)
            if norm.kind == "layer":
                numbers = numbers - sum(numbers) / len(numbers)
            squares = sum(number * number for number in numbers)
            by = (squares / len(numbers) + norm.eps) ** 0.5
            by = max(squares**0.5, norm.eps) if norm.kind == "l2" else by
            weight, added = (
                array[h] if array is not None and norm.over == "heads" else array
                for array in (scale, bias)
            )
            weight = np.ones(1) if weight is None else weight
            weight = 1 + weight if norm.scale == "one_plus_weight" else weight
            own = numbers / by * weight + (0 if added is None else added)
            result[t, h : h + len(part)] = own.reshape(part.shape)
    return result


def _by_hand(weights: dict[str, np.ndarray], x: np.ndarray, norm: QueryKeyNorm) -> np.ndarray:
    """Causal self-attention with normalised queries and keys, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = (
        np.einsum("btd,dhk->bthk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"]
        for n in ("query", "key", "value")
    )
    q, k = (
        np.stack([_normed(one, norm, w.get(f"{n}_norm.scale"), w.get(f"{n}_norm.bias"))
                  for one in heads])
        for n, heads in (("query", q), ("key", k))
    )  # fmt: skip
    k, v = (np.repeat(heads, 2, axis=2) for heads in (k, v))
    logits = np.einsum("bthk,bshk->bhts", q, k) / 2  # sqrt(d_k) is 2
    logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhts,bshv,hvo->bto", scores, v, w["output.kernel"]) + w["output.bias"]


def _random(layer: Any) -> dict[str, np.ndarray]:
    """The layer's weights, those of the norm moved away from their start."""
    return {
        name: array + (normal(array.shape, name) / 2).astype(array.dtype)
        if "norm" in name
        else array
        for name, array in anymha.get_weights(layer).items()
    }


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("name", NORMS)
def test_queries_and_keys_are_normalised_whole_and_by_tiles(
    backend: Backend, name: str, budget: int | None
) -> None:
    norm = NORMS[name]
    layer = anymha.MultiHeadAttention(
        **OPTIONS, query_key_norm=norm, backend=backend.name, memory_budget=budget
    )
    weights = _random(layer)
    layer = anymha.set_weights(layer, weights)
    x = native(backend.ops, {"x": X})["x"]
    got, scores = layer(x, use_causal_mask=True, return_attention_scores=True)
    got, scores = backend.ops.to_numpy(got), backend.ops.to_numpy(scores)
    np.testing.assert_allclose(got, _by_hand(weights, X, norm), atol=2e-5)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    other = QueryKeyNorm(**{**norm.to_dict(), "kind": "l2" if norm.kind != "l2" else "rms"})
    assert np.max(np.abs(got - _by_hand(weights, X, other))) > 1e-3


@pytest.mark.parametrize("home", HOMES)
def test_every_home_holds_sets_and_converts_the_weights(home: str) -> None:
    _need_home(home)
    options = {**OPTIONS, "query_key_norm": QueryKeyNorm("layer", "heads", use_bias=True)}
    source = anymha.MultiHeadAttention(**options, backend="numpy")
    started = anymha.get_weights(anymha.MultiHeadAttention(**options, backend=home))
    shapes = {name: array.shape for name, array in started.items()}
    assert shapes == source.config.weight_shapes()
    assert list(started)[8:] == [
        "query_norm.scale", "query_norm.bias", "key_norm.scale", "key_norm.bias",
    ]  # fmt: skip
    assert (shapes["query_norm.scale"], shapes["key_norm.bias"]) == ((4, 4), (2, 4))
    assert all((started[f"{n}_norm.scale"] == 1).all() for n in ("query", "key"))
    assert all((started[f"{n}_norm.bias"] == 0).all() for n in ("query", "key"))
    weights = _random(source)
    layer = anymha.convert(anymha.set_weights(source, weights), to=home)
    back = anymha.get_weights(layer)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
    x = layer.ops.from_numpy(X.astype(np.float32))
    np.testing.assert_allclose(
        layer.ops.to_numpy(layer(x, use_causal_mask=True)),
        _by_hand(weights, X, options["query_key_norm"]),
        atol=2e-5,
    )


@pytest.mark.parametrize("home", HOMES)
def test_a_file_keeps_the_norm_and_its_weights(home: str, tmp_path: Any) -> None:
    _need_home(home)
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm="layer", backend="numpy")
    weights = _random(layer)
    anymha.save(tmp_path / "layer.safetensors", anymha.set_weights(layer, weights))
    loaded = anymha.load(tmp_path / "layer.safetensors", backend=home)
    assert loaded.config.query_key_norm == QueryKeyNorm("layer")
    for name, array in anymha.get_weights(loaded).items():
        np.testing.assert_array_equal(array, weights[name])


def test_weights_that_start_as_zeros_are_added_to_one() -> None:
    option = {"scale": "one_plus_weight", "over": "width"}
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm=option, backend="numpy")
    assert layer.weights["query_norm.scale"].shape == (16,)
    assert layer.weights["key_norm.scale"].shape == (8,)
    assert not layer.weights["query_norm.scale"].any()


def test_options_of_training_leave_the_norm_alone() -> None:
    options = {
        **OPTIONS, "kernel_regularizer": "l2", "bias_regularizer": "l2",
        "bias_constraint": "non_neg",
    }  # fmt: skip
    norm = QueryKeyNorm("layer", "heads", use_bias=True)
    plain, normed = (
        anymha.MultiHeadAttention(**options, query_key_norm=one, backend="numpy")
        for one in (None, norm)
    )
    for name, array in plain.weights.items():  # what other weights start as does not change
        np.testing.assert_array_equal(normed.weights[name], array)
    assert normed.regularization_loss() == plain.regularization_loss()
    normed.weights["key_norm.bias"][...] = -3
    normed.apply_constraints()
    assert (normed.weights["key_norm.bias"] == -3).all()


def _gradients(norm: QueryKeyNorm | None, dtype: str = "float64") -> dict[str, np.ndarray]:
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm=norm, dtype=dtype, backend="numpy")
    layer = anymha.set_weights(layer, _random(layer))
    output, pullback = layer.vjp(X.astype(dtype), use_causal_mask=True)
    return pullback(normal(output.shape, "cotangent").astype(dtype))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    norm = NORMS[name]
    layer = anymha.MultiHeadAttention(
        **OPTIONS, query_key_norm=norm, dtype="float64", backend="numpy"
    )
    weights = _random(layer)
    cotangent = normal((2, 6, 8), "cotangent")
    found = _gradients(norm)
    assert found.keys() == {*weights, "query"}
    for key, array in weights.items():
        for place in list(np.ndindex(*array.shape))[:: max(array.size // 4, 1)]:
            losses = []
            for step in (1e-6, -1e-6):
                moved = {**weights, key: array.copy()}
                moved[key][place] += step
                losses.append(float((_by_hand(moved, X, norm) * cotangent).sum()))
            slope = (losses[0] - losses[1]) / 2e-6
            assert found[key][place] == pytest.approx(slope, abs=2e-6, rel=1e-6), (key, place)


def test_key_bias_matters_but_what_is_added_to_all_keys_has_no_gradient() -> None:
    norm = QueryKeyNorm("layer", use_bias=True)
    assert not _gradients(None)["key.bias"].any()
    found = _gradients(norm)
    assert found["key.bias"].any()
    assert not found["key_norm.bias"].any()
    assert found["query_norm.bias"].any()
    capped = AttentionConfig(2, 4, softcap=2.0, query_key_norm=norm)
    assert not capped.without_gradient  # which softcap does not ignore


def test_kernels_of_frameworks_are_still_taken() -> None:
    torch = need("torch")
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm="rms", backend="torch")
    assert anymha.explain(layer, torch.ones(1, 6, 8)).startswith("fused")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_are_taken_in_float32(backend: Backend, dtype: str) -> None:
    if not _has(backend, dtype):
        pytest.skip(f"{backend.name} has no {dtype}")
    options = {**OPTIONS, "dtype": dtype, "query_key_norm": QueryKeyNorm(eps=1e-6)}
    layer = anymha.MultiHeadAttention(**options, backend=backend.name)
    ops = backend.ops
    x = ops.astype(ops.from_numpy((X * 200).astype(np.float32)), ops.dtype(dtype))
    got = ops.to_numpy(layer(x, use_causal_mask=True)).astype(np.float64)
    weights = anymha.get_weights(layer)
    exact = _by_hand(weights, ops.to_numpy(x).astype(np.float64), options["query_key_norm"])
    assert np.all(np.isfinite(got))  # squares of 600 are too large for float16
    scale = np.max(np.abs(exact))
    assert np.max(np.abs(got - exact)) < scale * (2e-2 if dtype == "bfloat16" else 3e-3)


def _has(backend: Backend, dtype: str) -> bool:
    try:
        backend.ops.dtype(dtype)
    except Exception:  # each framework has its own
        return False
    return True


def _modules() -> dict[str, tuple[Callable[[Any], Any], QueryKeyNorm]]:
    """The norms of transformers' models: what makes a module of a width, and ours."""

    def of(module: str, name: str) -> Callable[..., Any]:
        return getattr(need(f"transformers.models.{module}.modeling_{module}"), name)

    return {
        "qwen3": (
            lambda width: of("qwen3", "Qwen3RMSNorm")(width, eps=1e-5),
            QueryKeyNorm(eps=1e-5),
        ),
        "olmo2": (
            lambda width: of("olmo2", "Olmo2RMSNorm")(width, eps=1e-5),
            QueryKeyNorm(over="width", eps=1e-5),
        ),
        "gemma3": (
            lambda width: of("gemma3", "Gemma3RMSNorm")(width, eps=1e-5),
            QueryKeyNorm(scale="one_plus_weight", eps=1e-5),
        ),
        "cohere": (
            lambda shape: of("cohere", "CohereLayerNorm")(hidden_size=shape, eps=1e-5),
            QueryKeyNorm("layer", "heads", eps=1e-5),
        ),
    }


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3", "cohere"])
def test_norms_are_those_of_transformers(family: str) -> None:
    torch = need("torch")
    make, norm = _modules()[family]
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm=norm, backend="torch")
    weights = _random(layer)
    layer = anymha.set_weights(layer, weights)
    x = torch.from_numpy(X.astype(np.float32))
    heads = []
    for name, count in (("query", 4), ("key", 2)):
        module = make({"head": 4, "width": count * 4, "heads": (count, 4)}[norm.over])
        module.weight.data = torch.from_numpy(weights[f"{name}_norm.scale"])
        y = getattr(layer, name)(x)
        heads.append(module(y if norm.over == "width" else y.reshape(2, 6, count, 4)))
    query, key = (y.reshape(2, 6, -1, 4).transpose(1, 2) for y in heads)
    value = layer.value(x).reshape(2, 6, 2, 4).transpose(1, 2)
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    expected = layer.output(context.transpose(1, 2).reshape(2, 6, 16))
    got = layer(x, use_causal_mask=True)
    np.testing.assert_allclose(got.detach(), expected.detach(), atol=2e-5)


def test_torch_names_and_lazy_layers() -> None:
    torch = need("torch")
    make = get_layer("torch")
    options = {**OPTIONS, "query_key_norm": QueryKeyNorm("layer", use_bias=True)}
    layer = make(**options)
    state = layer.state_dict()
    names = ["query_norm.weight", "query_norm.bias", "key_norm.weight", "key_norm.bias"]
    assert [name for name in state if "norm" in name] == names
    lazy = make(**{**options, "query_features": None})
    assert {name for name, _ in lazy.named_parameters()} == set(state)
    lazy.load_state_dict(state)
    x = torch.from_numpy(X.astype(np.float32))
    assert torch.equal(lazy(x), layer(x))
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    anymha.set_weights(make(**options), arrays)
    called = make(**{**options, "query_features": None})
    called(x)
    assert called.query_norm.weight.shape == (4,)
    wrong = {**state, "key_norm.weight": torch.ones(5)}
    with pytest.raises(RuntimeError, match=r"`key_norm\.weight` must have shape \(4,\)"):
        make(**{**options, "query_features": None}).load_state_dict(wrong)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_config_and_names(tmp_path: Any) -> None:
    keras = need("keras")
    layer = get_layer("keras")(2, 4, query_key_norm=QueryKeyNorm("layer", use_bias=True), seed=0)
    again = type(layer).from_config(layer.get_config())
    assert again.config.query_key_norm == layer.config.query_key_norm
    model = keras.Sequential([keras.Input((3, 8)), layer])
    layer.query_norm.scale.assign(np.full(4, 2.0, np.float32))
    paths = ["/".join(w.path.split("/")[-2:]) for w in layer.weights]
    assert [path for path in paths if "norm" in path] == [
        "query_norm/scale", "query_norm/bias", "key_norm/scale", "key_norm/bias",
    ]  # fmt: skip
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.ones((1, 3, 8), np.float32)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_layers_with_and_without_a_norm_are_told_apart() -> None:
    normed, plain = (
        anymha.MultiHeadAttention(**OPTIONS, query_key_norm=one, backend="numpy")
        for one in ("rms", None)
    )
    report = compare(normed, plain, X)
    assert "query_key_norm left out" in str(report.diagnosis)
    with pytest.raises(LayoutError, match="query_key_norm"):
        anymha.set_weights(plain, anymha.get_weights(normed))
    with pytest.raises(LayoutError, match="query_key_norm"):
        anymha.convert(normed, to="torch.MultiheadAttention")
    with pytest.raises(WeightsError, match=r"Missing: query_norm\.scale, key_norm\.scale"):
        anymha.set_weights(normed, dict(anymha.get_weights(plain)))
    with pytest.raises(WeightsError, match=r"`weights` must have .*query_norm\.scale"):
        anymha.multi_head_attention(dict(plain.weights), X, config=normed.config)


def test_forms_of_the_option_are_one() -> None:
    norm = QueryKeyNorm("layer", eps=1e-5)
    configs = [
        AttentionConfig(2, 4, query_key_norm=value)
        for value in (norm, norm.to_dict(), {"kind": "layer", "eps": 1e-5})
    ]
    assert configs[0] == configs[1] == configs[2] == AttentionConfig.from_dict(configs[0].to_dict())
    assert AttentionConfig(2, 4, query_key_norm="rms").query_key_norm == QueryKeyNorm()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "`query_key_norm` must be None, an anymha.QueryKeyNorm"),
        ("batch", "`query_key_norm` must be None, an anymha.QueryKeyNorm"),
        ({"kind": "batch"}, "`query_key_norm`: `kind` must be one of 'rms', 'layer', 'l2'"),
        ({"over": "all"}, "`query_key_norm`: `over` must be one of"),
        ({"scale": 2.0}, "`query_key_norm`: `scale` must be one of"),
        ({"use_bias": 1}, "`query_key_norm`: `use_bias` must be True or False. Received: 1"),
        ({"eps": 0}, "`query_key_norm`: `eps` must be a finite number of at least 1e-30"),
        ({"eps": float("nan")}, "`eps` must be a finite number"),
        (
            {"epsilon": 1e-6},
            "`query_key_norm`: `QueryKeyNorm` takes no `epsilon`. Received: epsilon=1e-06. Pass `e",
        ),
    ],
)
def test_wrong_values_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        AttentionConfig(2, 4, query_key_norm=value)
    assert words in str(raised.value)


def test_compiled_and_traced_calls_are_the_same() -> None:
    torch = need("torch")
    layer = anymha.MultiHeadAttention(**OPTIONS, query_key_norm=NORMS["l2"], backend="torch")
    layer = anymha.set_weights(layer, _random(layer))
    x = torch.from_numpy(X.astype(np.float32))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x)
    for _ in range(3):  # kept projections too
        expected = layer(x)
        torch.testing.assert_close(compiled(x), expected)
        expected.sum().backward()
    assert torch.any(layer.key_norm.weight.grad != 0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer.query_norm.weight.zero_()  # a weight that moves is seen by kept projections
        assert not torch.allclose(layer(x), expected)
