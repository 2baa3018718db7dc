"""`compare` compares gradients wherever both sides have them, and says why where one has none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, declare
from anymha.parity.stages.stagewise import compare_gradients
from anymha.parity.stages.trace import Trace
from tests.conftest import usable

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 5, 8)).astype(np.float32)
Y = RNG.standard_normal((2, 6, 8)).astype(np.float32)
LAYER = anymha.MultiHeadAttention(
    2, 4, query_features=8, backend="numpy", seed=0, bias_initializer="random_normal"
)
WEIGHTS = anymha.get_weights(LAYER)


def framework(name: str) -> Any:
    """The framework, where it is installed; else the test is skipped."""
    usable(name)
    return importlib.import_module(name)


def attention(xp: Any, softmax: Callable[[Any], Any], weights: Any, q: Any, v: Any, cut: Any):
    """Attention in any framework; `cut` is applied to the keys and to the output."""
    query, key, value = (
        xp.einsum("btd,dhk->bthk", x, weights[f"{name}.kernel"]) + weights[f"{name}.bias"]
        for x, name in ((q, "query"), (v, "key"), (v, "value"))
    )
    shares = softmax(xp.einsum("bthk,bshk->bhts", query, cut("key", key)) / 2)
    context = xp.einsum("bhts,bshk->bthk", shares, value)
    output = xp.einsum("bthv,hvo->bto", context, weights["output.kernel"])
    return cut("output", output + weights["output.bias"])


def torch_port(where: str = "") -> Callable[..., Any]:
    torch: Any = framework("torch")
    weights = {name: torch.tensor(np.array(array)) for name, array in WEIGHTS.items()}

    def cut(place: str, array: Any) -> Any:
        return array.detach() if place == where else array

    def port(query: Any, value: Any = None) -> Any:
        value = query if value is None else value
        return attention(torch, lambda x: x.softmax(-1), weights, query, value, cut)

    return port


def jax_port(where: str = "") -> Callable[..., Any]:
    jax: Any = framework("jax")

    def cut(place: str, array: Any) -> Any:
        return jax.lax.stop_gradient(array) if place == where else array

    def port(query: Any, value: Any = None) -> Any:
        value = query if value is None else value
        weights = {name: jax.numpy.asarray(array) for name, array in WEIGHTS.items()}
        return attention(jax.numpy, jax.nn.softmax, weights, query, value, cut)

    return port


def module(where: str = "") -> Any:
    torch: Any = framework("torch")

    class Port(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(1, 1)
            self.port = torch_port(where)

        def forward(self, query: Any, value: Any = None) -> Any:
            return self.port(query, value)

    return Port()


def given(kind: str, arrays: Any) -> Any:
    if kind == "torch":
        torch: Any = framework("torch")
        return [torch.tensor(a) for a in arrays]
    if kind == "jax":
        jax: Any = framework("jax")
        return [jax.numpy.asarray(a) for a in arrays]
    return arrays


@pytest.mark.parametrize("inputs", [(X,), (X, Y)], ids=["self", "cross"])
@pytest.mark.parametrize("kind", ["torch", "jax", "numpy"])
def test_gradients_of_functions_are_compared(kind: str, inputs: Any) -> None:
    make = torch_port if kind == "torch" else jax_port
    arrays = given(kind, inputs)
    right = compare(LAYER, make(), arrays)
    assert right.passed, right.to_text()
    names = {stage.name for stage in right.stages}
    assert names >= {"gradient of query", *(["gradient of value"] if len(inputs) > 1 else [])}
    assert any("Gradients of the weights are not compared" in note for note in right.notes)
    wrong = compare(LAYER, make("key"), arrays)
    assert str(wrong.first_divergence).startswith("gradient of"), wrong.to_text()
    alone = compare(make(), make("key"), arrays)
    assert str(alone.first_divergence).startswith("gradient of"), alone.to_text()
    assert compare(make(), make(), arrays).passed


@pytest.mark.parametrize("reference", ["layer", "own"])
@pytest.mark.parametrize("where", ["key", "output"])
def test_detached_module_fails(reference: str, where: str) -> None:
    usable("torch")
    wanted = LAYER if reference == "layer" else module()
    assert compare(wanted, module(), [X, Y]).passed
    report = compare(wanted, module(where), [X, Y])
    assert not report.passed
    assert report.first_divergence == "gradient of query" or where == "key"
    assert str(report.first_divergence).startswith("gradient of")
    stages = {stage.name: stage.passed for stage in report.stages}
    assert stages["output"]
    assert stages["gradient of query"] == (False if where == "output" else stages[
        "gradient of query"])  # fmt: skip


def test_functions_that_leave_the_framework_are_told_apart() -> None:
    torch: Any = framework("torch")
    port = torch_port()

    def leaves(query: Any) -> Any:
        return LAYER(query)

    def by_numpy(query: Any) -> Any:
        return torch.tensor(np.asarray(LAYER(query.numpy())))

    def without(query: Any) -> Any:
        with torch.no_grad():
            return port(query)

    def copies(query: Any) -> Any:
        return port(torch.tensor(query)).detach().numpy()

    for function, arrays, words in (
        (leaves, X, "leaves: its output is of numpy, which does not differentiate"),
        (by_numpy, torch.tensor(X), "by_numpy: RuntimeError"),
        (without, torch.tensor(X), "without: its output is detached from its inputs"),
        (copies, X, "copies: its output is of numpy"),
    ):
        report = compare(LAYER, function, arrays)
        assert report.passed, report.to_text()
        (note,) = [note for note in report.notes if "radients are not compared" in note]
        assert words in note
        assert note in report.to_text()


def test_training_and_a_silent_reference_are_told() -> None:
    report = compare(LAYER, LAYER, X, training=True, seed=3)
    assert any("dropout acts in training" in note for note in report.notes)
    report = compare(lambda query: LAYER(query), LAYER, X)
    assert any("does not differentiate" in note for note in report.notes)


def test_declared_function_has_the_gradients_of_its_inputs() -> None:
    usable("jax")
    report = compare(LAYER, declare(jax_port("key"), WEIGHTS, "anymha"), X)
    assert report.first_divergence == "gradient of query"


def test_tensorflow_functions_have_gradients() -> None:
    tf: Any = framework("tensorflow")

    def port(query: Any, stop: bool = False) -> Any:
        weights = {name: tf.constant(array) for name, array in WEIGHTS.items()}

        def cut(place: str, array: Any) -> Any:
            return tf.stop_gradient(array) if stop and place == "key" else array

        return attention(tf, tf.nn.softmax, weights, query, query, cut)

    assert compare(LAYER, port, tf.constant(X)).passed
    report = compare(LAYER, lambda query: port(query, stop=True), tf.constant(X))
    assert report.first_divergence == "gradient of query"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("where", ["", "key"])
def test_in_half_precision_a_detached_key_is_no_rounding(dtype: str, where: str) -> None:
    torch: Any = framework("torch")
    narrow = getattr(torch, dtype)
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch", dtype=dtype)
    anymha.set_weights(layer, WEIGHTS)
    weights = {name: torch.tensor(np.array(array)).to(narrow) for name, array in WEIGHTS.items()}

    def port(query: Any) -> Any:
        def cut(place: str, array: Any) -> Any:
            return array.detach() if place == where else array

        return attention(torch, lambda x: x.softmax(-1), weights, query, query, cut)

    report = compare(layer, port, torch.tensor(X).to(narrow))
    assert report.passed == (not where)
    if where:
        assert "gradient detached (no gradient flows through the key)" in str(report.diagnosis)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize(
    ("how", "rows", "words"),
    [
        ("where", True, "NaN in the backward pass (where rows that see nothing are shown all keys"),
        ("exponential", False, "NaN in the backward pass (without `attention_mask` it gives"),
        ("always", False, "the gradients alone differ"),
    ],
)
def test_nan_of_gradients_alone_is_told_by_other_calls(name, how, rows, words) -> None:
    """What stands behind a `where` is not in the output, but 0 times NaN is in the gradient."""
    torch, jax = (framework(name) if name == one else None for one in ("torch", "jax"))
    xp: Any = torch if torch is not None else jax.numpy
    softmax = (lambda s: s.softmax(-1)) if torch is not None else jax.nn.softmax
    weights = {n: xp.asarray(np.array(array)) for n, array in WEIGHTS.items()}
    seen = np.tril(np.ones((2, 5, 5), bool))
    seen[0, 3] &= not rows

    def port(query: Any, attention_mask: Any = None) -> Any:
        mask = seen | True if attention_mask is None else np.asarray(attention_mask)
        mask = xp.asarray(mask[:, None] | np.zeros((2, 2, 5, 5), bool))

        def shares(logits: Any) -> Any:
            if how == "where":
                masked = xp.where(mask, logits, -xp.inf + 0 * logits)
                return xp.where(mask, softmax(masked), 0 * logits)
            hidden = xp.where(mask, 0 * logits, 0 * logits + 1e3)
            weights = xp.where(mask, xp.exp(logits + hidden), 0 * logits)
            if how == "always":
                weights = weights + xp.where(mask, 0 * logits, xp.sqrt(0 * logits))
                weights = xp.where(weights < 0, xp.sqrt(0 * logits), weights)
            return weights / weights.sum(-1)[..., None]

        return attention(xp, shares, weights, query, query, lambda _, array: array)

    report = compare(LAYER, port, xp.asarray(X), attention_mask=xp.asarray(seen))
    assert report.first_divergence == "gradient of query", report.to_text()
    assert str(report.diagnosis).startswith(words), report.to_text()


def two_ways(torch: Any, detach: bool = False) -> tuple[Any, Any]:
    """Attention with a softmax of its own, and as torch's function has it."""

    class Module(torch.nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.packed, self.last, self.own = (
                torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), own)  # fmt: skip

        def forward(self, x: Any) -> Any:
            q, k, v = self.packed(x).chunk(3, -1)
            if detach and not self.own:
                v = v.detach()
            if self.own:
                return self.last(torch.softmax(q @ k.mT / 4, -1) @ v)
            whole = (a[:, None] for a in (q, k, v))
            return self.last(torch.nn.functional.scaled_dot_product_attention(*whole)[:, 0])

    return Module(True), Module(False)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "scale", "length"),
    [("float32", 100, 5), ("float32", 1e6, 1), ("float64", 1e3, 5), ("float64", 1e6, 12)],
)
def test_gradients_of_a_saturated_softmax_cancel_on_either_side(
    dtype, scale, length, order
) -> None:
    torch = framework("torch")
    x = torch.tensor(scale * np.random.default_rng(1).standard_normal((2, length, 16)))
    x = x.to(getattr(torch, dtype))
    report = compare(*[one.to(x.dtype) for one in two_ways(torch)][::order], x)
    assert report.passed, report.to_text()


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_saturated_softmax_lost_gradients_are_told(order) -> None:
    torch = framework("torch")
    x = 100 * torch.tensor(np.random.default_rng(1).standard_normal((2, 5, 16))).float()
    report = compare(*two_ways(torch, detach=True)[::order], x)
    assert str(report.first_divergence).startswith("gradient of")


def test_gradients_that_differ_in_each_call_are_no_rounding() -> None:
    torch = framework("torch")

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return gradient * torch.rand_like(gradient)

    one, other = two_ways(torch)
    x = torch.tensor(np.random.default_rng(1).standard_normal((2, 5, 16))).float()
    report = compare(one, lambda query: other(Noisy.apply(query)), x)
    assert str(report.first_divergence).startswith("gradient of")


@pytest.mark.parametrize(("off", "passes"), [(0.6, True), (3.0, False)])
def test_gradients_that_agree_to_a_rounding_agree_whatever_those_of_float64_are(
    off, passes
) -> None:
    """With logits of 1e12 torch's kernel gives 1e17 times as great ones."""
    one = 1e20 * RNG.standard_normal((2, 5, 8)).astype(np.float32)
    other = one + np.float32(off * np.finfo(np.float32).eps * np.abs(one).max())
    traces = tuple(Trace("port", X, gradients={"query": array}) for array in (one, other))
    (stage,) = compare_gradients(traces, {"query": 1e-17 * one.astype(np.float64)}, {"query": 1e6})
    assert stage.passed is passes
