"""The option `gate` of the layer, in every framework and by every path."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig
from anymha.attention.features.gate import Gate
from anymha.errors import ConfigError, LayoutError, WeightsError
from anymha.framework.registry import Backend
from anymha.interchange.layers import from_canonical, to_canonical
from anymha.layer.weights import initial_weights
from anymha.parity import compare
from tests.peer_layers import need
from tests.support import native, normal

pytestmark = pytest.mark.usefixtures("quick_programs")

OPTIONS = {
    "num_heads": 4,
    "num_key_value_heads": 2,
    "key_dim": 4,
    "value_dim": 3,
    "query_features": 8,
    "seed": 0,
}
KINDS = ("elementwise", "head")


def gated(backend: str, gate: str = "elementwise", **options: Any) -> Any:
    """A layer with a gate whose weights, biases too, are not zero."""
    layer = anymha.MultiHeadAttention(**{**OPTIONS, **options}, gate=gate, backend=backend)
    weights = {
        name: (normal(w.shape, name) / 2).astype(w.dtype)
        for name, w in anymha.get_weights(layer).items()
    }
    return anymha.set_weights(layer, weights) or layer


def by_hand(weights: dict[str, np.ndarray], x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Output of causal self-attention in float64; `seen` (B, T) hides keys."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"][:, None]
        for n in ("query", "key", "value")
    )
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    logits = np.einsum("bhtk,bhsk->bhts", q, k) / 2  # sqrt(d_k) is 2
    mask = np.tri(x.shape[1], dtype=bool) & seen[:, None, None]
    weight = np.where(mask, np.exp(logits), 0.0)
    context = np.einsum("bhts,bhsv->bthv", weight, v)
    context /= np.maximum(weight.sum(-1), 1e-300).transpose(0, 2, 1)[..., None]
    gate = 1 / (1 + np.exp(-np.tensordot(x, w["gate.kernel"], 1) - w["gate.bias"]))
    gate = gate if gate.ndim == 4 else gate[..., None]
    return np.einsum("bthv,hvo->bto", context * gate, w["output.kernel"]) + w["output.bias"]


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("gate", KINDS)
def test_a_gate_multiplies_what_the_heads_give(
    backend: Backend, gate: str, budget: int | None
) -> None:
    layer = gated(backend.name, gate, memory_budget=budget)
    x, mask = normal((2, 6, 8), "x"), np.arange(6) >= np.array([[0], [2]])
    arrays = native(backend.ops, {"x": x, "mask": mask})
    call = {"use_causal_mask": True, "value_mask": arrays["mask"]}
    weights = anymha.get_weights(layer)
    expected = by_hand(weights, x, mask)
    for _ in range(2):  # the third call takes what the first two have prepared
        first = backend.ops.to_numpy(layer(arrays["x"], **call))
        np.testing.assert_allclose(first, expected, atol=2e-6)
    output = backend.ops.to_numpy(layer(arrays["x"], **call))
    np.testing.assert_allclose(output, expected, atol=2e-6)
    assert np.array_equal(output[1, 0], weights["output.bias"])  # a row that sees no key
    scores = backend.ops.to_numpy(layer(arrays["x"], return_attention_scores=True, **call)[1])
    open_gate = weights | {"gate.bias": weights["gate.bias"] + 100}
    plain = anymha.set_weights(layer, open_gate) or layer
    other, same = map(
        backend.ops.to_numpy, plain(arrays["x"], return_attention_scores=True, **call)
    )
    assert np.max(np.abs(other - output)) > 1e-2
    assert np.array_equal(scores, same)  # which a gate does not touch


@pytest.mark.as_users_compile
@pytest.mark.parametrize("gate", KINDS)
def test_gradients_and_bits_are_those_of_the_definition(backend: Backend, gate: str) -> None:
    name, ops = backend.name, backend.ops
    x = normal((2, 6, 8), "x")
    report = compare(gated("numpy", gate), gated(name, gate), x, use_causal_mask=True)
    assert report.passed, report
    exact, other = (gated(b, gate, compute_dtype="float64") for b in ("numpy", name))
    assert np.array_equal(exact(x), ops.to_numpy(other(ops.from_numpy(x))))


@pytest.mark.parametrize("gate", KINDS)
def test_gradients_are_the_slopes(gate: str) -> None:
    layer = gated("numpy", gate, dtype="float64")
    x = normal((1, 4, 8), "x").astype(np.float64)
    output, pullback = layer.vjp(x)
    cotangent = normal(output.shape, "cotangent").astype(np.float64)
    gradients, weights = pullback(cotangent), anymha.get_weights(layer)
    assert not gradients["key.bias"].any()  # a gate does not tell a constant in all logits

    def loss(name: str, place: tuple[int, ...], step: float) -> float:
        shift = np.zeros(weights[name].shape)
        shift[place] = step
        anymha.set_weights(layer, weights | {name: weights[name] + shift})
        return float(np.sum(layer(x) * cotangent))

    for name in ("gate.kernel", "gate.bias", "query.kernel"):
        for place in itertools.islice(np.ndindex(*weights[name].shape), 0, None, 5):
            slope = (loss(name, place, 1e-6) - loss(name, place, -1e-6)) / 2e-6
            np.testing.assert_allclose(gradients[name][place], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.as_users_compile
def test_great_numbers_make_no_nan_forward_or_backward() -> None:
    layer = gated("numpy")
    x = normal((1, 3, 8), "x") * 1e4
    output, pullback = layer.vjp(x)
    assert np.all(np.isfinite(output))
    assert all(np.all(np.isfinite(g)) for g in pullback(np.ones_like(output)).values())


@pytest.mark.as_users_compile
def test_a_query_that_is_hidden_gives_the_bias(backend: Backend) -> None:
    layer = gated(backend.name)
    x = normal((1, 3, 8), "x")
    x[0, 1] = np.nan
    seen = np.array([[True, False, True]])
    arrays = native(backend.ops, {"x": x, "seen": seen})
    output = layer(arrays["x"], query_mask=arrays["seen"], value_mask=arrays["seen"])
    output = backend.ops.to_numpy(output)
    assert np.all(np.isfinite(output))
    assert np.array_equal(output[0, 1], anymha.get_weights(layer)["output.bias"])


def test_kernels_of_the_frameworks_stay() -> None:
    assert Gate("elementwise").why_not_fused(None) is None
    torch: Any = need("torch")
    options: dict[str, Any] = {"num_heads": 4, "key_dim": 16, "query_features": 64, "seed": 0}
    x = torch.zeros(2, 256, 64)
    told = [
        anymha.explain(anymha.MultiHeadAttention(**options, gate=gate, backend="torch"), x)
        for gate in (None, "head")
    ]
    assert str(told[0]) == str(told[1])
    assert "fused" in str(told[1])


# --- Weights -------------------------------------------------------------------------------------


def test_weights_start_as_those_of_a_projection() -> None:
    config = AttentionConfig(4, 16, query_features=32, gate="elementwise")
    values = initial_weights(config, config.weight_shapes(), seed=3)
    limit = np.sqrt(6 / (32 + 64))
    assert 0.9 * limit < np.abs(values["gate.kernel"]).max() <= limit
    assert not values["gate.bias"].any()
    assert not np.allclose(values["gate.kernel"], values["query.kernel"])
    plain = AttentionConfig(4, 16, query_features=32)
    same = initial_weights(plain, plain.weight_shapes(), seed=3)
    assert all(np.array_equal(values[name], same[name]) for name in same)


def test_a_gate_is_penalised_constrained_and_seen() -> None:
    options = dict.fromkeys(
        ("kernel_regularizer", "bias_regularizer", "activity_regularizer"), "l1"
    )
    options["kernel_constraint"] = "non_neg"
    layer = gated("numpy", "head", **options)
    weights, x = anymha.get_weights(layer), normal((2, 5, 8), "x")
    total = 0.01 * sum(np.abs(w.astype(np.float64)).sum() for w in weights.values())
    np.testing.assert_allclose(layer.regularization_loss(), total, rtol=1e-5)
    _, loss = layer(x, return_activity_loss=True)
    closed = weights | {"gate.bias": weights["gate.bias"] - 100}
    closed |= {n: 0 * w for n, w in weights.items() if n.startswith("output")}
    silent = anymha.set_weights(layer, closed)
    _, without = silent(x, return_activity_loss=True)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    share = 1 / (1 + np.exp(-x @ w["gate.kernel"] - w["gate.bias"]))
    output = gated("numpy", "head")(x)
    wanted = 0.01 * (share.sum() + np.abs(output).sum()) / 2
    np.testing.assert_allclose(loss - without, wanted, rtol=1e-4)
    anymha.set_weights(layer, weights).apply_constraints()
    constrained = anymha.get_weights(layer)
    assert np.array_equal(constrained["gate.kernel"], np.maximum(weights["gate.kernel"], 0))


def test_use_bias_may_name_the_gate() -> None:
    def names(use_bias: Any, gate: Any = "head") -> list[str]:
        config = AttentionConfig(2, 4, query_features=8, gate=gate, use_bias=use_bias)
        return [name for name in config.weight_shapes() if name.endswith(".bias")]

    four = ["query.bias", "key.bias", "value.bias", "output.bias"]
    assert names(True) == [*four, "gate.bias"]
    assert names(False) == []
    assert names(("gate",)) == ["gate.bias"]
    assert names(("query", "key", "value", "output")) == four
    every = ("query", "key", "value", "output", "gate")
    assert AttentionConfig(2, 4, gate="head", use_bias=every).use_bias is True
    assert AttentionConfig(2, 4, use_bias=every[:4]).use_bias is True
    with pytest.raises(ConfigError, match="names out of 'query', 'key', 'value', 'output'"):
        AttentionConfig(2, 4, use_bias=("gate",))


@pytest.mark.parametrize("gate", KINDS)
def test_they_go_from_framework_to_framework_and_to_files(
    backend: Backend, gate: str, tmp_path: Any
) -> None:
    layer = gated(backend.name, gate, use_bias=("query", "gate"))
    weights = anymha.get_weights(layer)
    assert list(weights)[-2:] == ["gate.kernel", "gate.bias"]
    there = anymha.convert(layer, to="numpy")
    for other in (there, anymha.convert(there, to=backend.name)):
        found = anymha.get_weights(other)
        assert all(np.array_equal(found[name], weights[name]) for name in weights)
    anymha.save(tmp_path / "layer.safetensors", layer)
    loaded = anymha.load(tmp_path / "layer.safetensors", backend=backend.name)
    assert np.array_equal(anymha.get_weights(loaded)["gate.kernel"], weights["gate.kernel"])
    assert AttentionConfig.from_dict(layer.config.to_dict()) == layer.config


@pytest.mark.parametrize("gate", KINDS)
def test_names_of_anymha_are_a_layout_of_layers_with_a_gate(gate: str) -> None:
    layer = gated("numpy", gate)
    weights = anymha.get_weights(layer)
    arrays = from_canonical(weights, "anymha", config=layer.config)
    back, config = to_canonical(arrays, "anymha")
    assert config.gate == gate
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    lacking = {name: array for name, array in arrays.items() if name != "gate.kernel"}
    with pytest.raises(WeightsError, match=r"gate\.kernel"):
        to_canonical(lacking, "anymha")
    wrong = {**arrays, "gate.kernel": arrays["gate.kernel"][:, :2]}
    with pytest.raises(WeightsError, match=r"`gate\.kernel` has shape"):
        to_canonical(wrong, "anymha")


def test_what_has_no_gate_refuses_the_weights() -> None:
    ours = gated("numpy", num_key_value_heads=4)
    plain = anymha.MultiHeadAttention(**{**OPTIONS, "num_key_value_heads": 4}, backend="numpy")
    with pytest.raises(LayoutError, match="gate"):
        anymha.set_weights(plain, anymha.get_weights(ours))
    with pytest.raises(LayoutError, match="no option for gate='elementwise'"):
        from_canonical(anymha.get_weights(ours), "equinox.MultiheadAttention")
    zero = {**anymha.get_weights(ours)}
    zero |= {name: 0 * zero[name] for name in ("gate.kernel", "gate.bias")}
    with pytest.raises(LayoutError, match=r"has no `gate\.kernel`"):  # one half is no one
        from_canonical(zero, "equinox.MultiheadAttention")
    by_head = gated("numpy", "head", num_key_value_heads=4)
    with pytest.raises(LayoutError, match="one for each head"):
        from_canonical(anymha.get_weights(by_head), "keras.MultiHeadAttention")


@pytest.mark.parametrize("value", ["yes", True, 1.0, ["head"]])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="`gate` must be 'elementwise', 'head', or None"):
        AttentionConfig(2, 4, gate=value)  # pyright: ignore[reportArgumentType]


def test_a_call_that_does_not_exercise_a_gate_is_told() -> None:
    layer = gated("numpy")
    weights = anymha.get_weights(layer)
    shut = {n: 0 * w if n.startswith("value") else w for n, w in weights.items()}
    anymha.set_weights(layer, shut)
    found = compare(layer, layer, normal((2, 6, 8), "x")).not_exercised
    assert "`gate`" in found
    assert "`gate.bias`: it changes nothing" in found


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "rows"), [("elementwise", 12), ("head", 4)])
def test_in_torch_it_is_a_linear_that_is_called(gate: str, rows: int) -> None:
    torch: Any = need("torch")
    layer = gated("torch", gate)
    state = layer.state_dict()
    assert tuple(state["gate.weight"].shape) == (rows, 8)
    assert tuple(state["gate.bias"].shape) == (rows,)
    assert type(layer.gate) is torch.nn.Linear
    x = torch.from_numpy(normal((2, 5, 8), "x"))
    before, seen = layer(x), []
    handle = layer.gate.register_forward_hook(lambda *args: seen.append(tuple(args[2].shape)))
    torch.testing.assert_close(layer(x), before)
    assert seen == [(2, 5, rows)]
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(layer.gate)
    torch.testing.assert_close(layer(x), before)
    lazy = anymha.MultiHeadAttention(
        **{**OPTIONS, "query_features": None}, gate=gate, backend="torch"
    )
    lazy.load_state_dict(state)
    torch.testing.assert_close(lazy(x), before)
    layer.gate = torch.nn.Linear(8, rows + 1)
    with pytest.raises(anymha.errors.ShapeError, match="`gate` must give"):
        layer(x)


def test_gradients_in_torch_are_those_of_numpy_call_after_call() -> None:
    torch: Any = need("torch")
    layer, plain = gated("torch"), gated("numpy")
    x = normal((2, 5, 8), "x")
    output, pullback = plain.vjp(x)
    wanted = pullback(np.ones_like(output))
    for _ in range(3):
        layer.zero_grad()
        layer(torch.from_numpy(x)).sum().backward()
        found = layer.gate.weight.grad.numpy().T.reshape(wanted["gate.kernel"].shape)
        np.testing.assert_allclose(found, wanted["gate.kernel"], atol=1e-5)


def test_it_is_that_of_qwen3_next() -> None:
    torch: Any = need("torch")
    need("transformers")
    qwen: Any = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    configuration: Any = importlib.import_module(
        "transformers.models.qwen3_next.configuration_qwen3_next"
    )
    config = configuration.Qwen3NextConfig(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        attn_implementation="eager", num_hidden_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = qwen.Qwen3NextAttention(config, layer_idx=0).double()
    q, gate = theirs.q_proj.weight.detach().unflatten(0, (4, 2, 4)).unbind(1)
    layer = anymha.MultiHeadAttention(
        num_heads=4, num_key_value_heads=2, key_dim=4, query_features=8, use_bias=False,
        gate="elementwise", dtype="float64", backend="torch",
        query_key_norm={"scale": "one_plus_weight", "eps": config.rms_norm_eps},
    )  # fmt: skip
    state = {
        "query.weight": q.flatten(0, 1),
        "gate.weight": gate.flatten(0, 1),
        "key.weight": theirs.k_proj.weight,
        "value.weight": theirs.v_proj.weight,
        "output.weight": theirs.o_proj.weight,
        "query_norm.weight": theirs.q_norm.weight,
        "key_norm.weight": theirs.k_norm.weight,
    }
    layer.load_state_dict(state)
    x = torch.from_numpy(normal((2, 5, 8), "x")).double()
    still = torch.ones(2, 5, 4).double(), torch.zeros(2, 5, 4).double()  # no rotation
    mask = torch.full((5, 5), -np.inf).triu(1)[None, None].double()
    torch.testing.assert_close(layer(x, use_causal_mask=True), theirs(x, still, mask)[0])
