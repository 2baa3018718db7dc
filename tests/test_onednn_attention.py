"""PyTorch's attention by oneDNN's products, as on a processor where they are faster."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import anymha
from anymha_torch import MultiHeadAttention, onednn_attention, products
from tests.frameworks import required

required("torch")

NOTE = onednn_attention.NOTE


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn_attention.is_right():
        pytest.skip("this torch has no products of oneDNN's")
    monkeypatch.setattr(products, "preferred", True)
    monkeypatch.setattr(onednn_attention, "LEAST_OF_THREAD", 1 << 16)


def heads(batch: int, heads: int, length: int, width: int, seed: int, dtype: Any = None) -> Any:
    """(B, H, T, d), which lies in memory as projections give it."""
    x = np.random.default_rng(seed).standard_normal((batch, length, heads, width))
    return torch.from_numpy(x).to(dtype or torch.float32).transpose(1, 2).requires_grad_()


def mask_of(kind: str, batch: int, heads: int, queries: int, keys: int) -> Any:
    rng = np.random.default_rng(9)
    if kind == "bias":
        return torch.from_numpy(rng.standard_normal((1, heads, queries, keys))).float()
    seen: Any = {
        "padding": np.arange(keys) < rng.integers(1, keys, (batch, 1, 1, 1)),
        "few": rng.random((batch, 1, queries, keys)) < 0.005,
        "empty": np.arange(batch)[:, None, None, None] > 0,
    }.get(kind)
    return None if seen is None else torch.where(torch.from_numpy(seen), 0.0, -math.inf)


def written(scale: float, causal: bool, mask: Any, *arrays: Any) -> tuple[Any, Any]:
    """The context in the arrays' dtype by the formula, and the rows that see nothing."""
    query, key, value = arrays
    group = query.shape[1] // key.shape[1]
    logits = scale * query @ key.repeat_interleave(group, 1).transpose(2, 3)
    logits = logits if mask is None else logits + mask
    if causal:
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    empty = logits.amax(-1, keepdim=True) == -math.inf
    shares = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return shares @ value.repeat_interleave(group, 1), empty.expand(*logits.shape[:3], 1)


SIZES = (
    (2, 4, 2, 300, 333, 48, 40),  # rows computed twice, keys filled up, grouped heads
    (1, 2, 2, 128, 700, 64, 64),
    (1, 2, 1, 701, 300, 64, 64),
    (2, 3, 3, 300, 300, 48, 64),
    (1, 2, 1, 1024, 1024, 32, 32),
    (2, 1, 1, 641, 641, 64, 64),
    (1, 1, 1, 64, 2500, 64, 64),
)


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "few", "empty", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(sizes: tuple[int, ...], kind: str) -> None:
    batch, own, shared, queries, keys, width, other = sizes
    if kind == "causal" and queries != keys:
        pytest.skip("where lengths differ it is no case of the kernel's own causality")
    arrays = [
        heads(batch, own, queries, width, 0), heads(batch, shared, keys, width, 1),
        heads(batch, shared, keys, other, 2),
    ]  # fmt: skip
    mask, causal = mask_of(kind, batch, own, queries, keys), kind == "causal"
    found = onednn_attention.attention(0.3, causal, mask, *arrays)
    wide = [x.detach().double().requires_grad_() for x in arrays]
    expected, empty = written(0.3, causal, mask, *wide)
    assert empty.any() or kind != "empty"
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[empty[..., 0]].any()  # zeros, not NaN
    above = heads(batch, own, queries, other, 3).detach()
    gradients = torch.autograd.grad(found, arrays, above)
    for got, exact in zip(
        gradients, torch.autograd.grad(expected, wide, above.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(onednn_attention.attention(0.3, causal, mask, *arrays), found)


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "few"])
def test_bfloat16_is_rounded_where_it_may_be(kind: str) -> None:
    arrays = [heads(2, 2, 300, 64, seed, torch.bfloat16) for seed in range(3)]
    mask, causal = mask_of(kind, 2, 2, 300, 300), kind == "causal"
    found = onednn_attention.attention(0.125, causal, mask, *arrays)
    assert found.dtype == torch.bfloat16
    wide = [x.detach().double().requires_grad_() for x in arrays]
    expected, _ = written(0.125, causal, mask, *wide)
    above = heads(2, 2, 300, 64, 3, torch.bfloat16).detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    for got, exact in zip(
        torch.autograd.grad(found, arrays, above),
        torch.autograd.grad(expected, wide, above.double()), strict=True,
    ):  # fmt: skip
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["causal", "few"])
def test_gradients_can_be_differentiated(kind: str) -> None:
    arrays = [heads(1, 1, 256, 64, seed) for seed in range(3)]
    mask = mask_of(kind, 1, 1, 256, 256)

    def of(function: Any, arrays: Any) -> Any:
        first = torch.autograd.grad(function(arrays).square().sum(), arrays, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), arrays)

    got = of(lambda given: onednn_attention.attention(0.2, kind == "causal", mask, *given), arrays)
    wide = [x.detach().double().requires_grad_() for x in arrays]
    exact = of(lambda given: written(0.2, kind == "causal", mask, *given)[0], wide)
    for one, other in zip(got, exact, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_calls_of_many_lengths_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, product = set(), products.product
    monkeypatch.setattr(
        products, "product",
        lambda x, weight: (shapes.add((*x.shape, *weight.shape)), product(x, weight))[1],
    )  # fmt: skip
    with torch.no_grad():
        for length in range(256, 600, 7):
            x = heads(1, 1, length, 64, 0)
            onednn_attention.attention(0.1, False, None, x, x, x)
    assert len(shapes) <= 2 * 11 * 5  # two products, eleven widths, five heights


@pytest.mark.parametrize("length", [256, 264])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_by_either_is_the_same(
    length: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, product = [], products.product
    monkeypatch.setattr(
        products, "product", lambda x, weight: (made.append(x), product(x, weight))[1]
    )
    layer = MultiHeadAttention(2, 32, query_features=32, dropout=0.2, seed=0)
    x = inputs(length).repeat(24, 1, 1)
    mask = torch.arange(length)[None] < torch.arange(48)[:, None] * 6 if masked else None

    def results() -> list[Any]:
        own = x.clone().requires_grad_()
        y = layer(own, training=True, seed=4, value_mask=mask)
        return [y, *torch.autograd.grad(y.square().sum(), [own, *layer.parameters()])]

    found = results()
    assert bool(made) == (length == 256)  # of other lengths it would keep code
    monkeypatch.setattr(products, "preferred", False)
    for one, other in zip(found, results(), strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max() + 1e-4


def _under_autocast(context: Any, x: Any, above: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.autograd.grad(context, x, above)[0]


def _under_a_mode(context: Any, x: Any, above: Any) -> Any:
    with FlopCounterMode(display=False):
        return torch.autograd.grad(context, x, above)[0]


def _several(context: Any, x: Any, above: Any) -> Any:
    both = torch.stack([above, 2 * above])
    one, other = torch.autograd.grad(context, x, both, is_grads_batched=True)[0]
    torch.testing.assert_close(other, 2 * one)
    return one


def _vmapped_gradients(context: Any, x: Any, above: Any) -> Any:
    of = lambda a: torch.autograd.grad(context, x, a, retain_graph=True)[0]  # noqa: E731
    return torch.func.vmap(of)(above[None])[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's kernel has
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "way",
    [_under_autocast, _under_a_mode, _several, _vmapped_gradients],
    ids=lambda way: way.__name__.strip("_").replace("_", " "),
)
def test_gradients_are_asked_for_in_other_ways(way: Any, dropout: float) -> None:
    layer = MultiHeadAttention(
        4, 64, query_features=32, num_key_value_heads=2, dropout=dropout, seed=0
    )
    x = inputs().repeat(24 if dropout else 1, 1, 1).requires_grad_()  # so many as tiles are for
    y = layer(x, training=True, seed=3, use_causal_mask=True)
    above = torch.ones_like(y)
    (expected,) = torch.autograd.grad(y, x, above, retain_graph=True)
    found = way(y, x, above)
    assert not found.requires_grad
    if way is _under_autocast:  # which rounds the projections' gradients
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_threads_give_the_same_bits_wherever_they_are(threads: int) -> None:
    x = heads(2, 2, 400, 64, 0).detach()
    expected = onednn_attention.attention(0.1, False, None, x, x, x)
    torch.set_num_threads(3 - threads)
    assert torch.equal(onednn_attention.attention(0.1, False, None, x, x, x), expected)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        assert torch.equal(onednn_attention.attention(0.1, False, None, x, x, x), expected)
    found: list[Any] = []
    others = [
        threading.Thread(
            target=lambda: found.append(onednn_attention.attention(0.1, False, None, x, x, x))
        )
        for _ in range(4)
    ]
    for one in others:
        one.start()
    for one in others:
        one.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
    assert torch.get_num_threads() == threads


def test_heads_that_threads_cannot_share_are_torchs(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = layer_of(num_key_value_heads=1)
    with torch.no_grad():
        assert (NOTE in anymha.explain(one, inputs()[:1])) == (threads == 1)
        assert NOTE in anymha.explain(one, inputs())
        monkeypatch.setattr(onednn_attention, "LEAST_OF_THREAD", 1 << 23)
        assert (NOTE in anymha.explain(one, inputs())) == (threads == 1)


# --- in a layer ----------------------------------------------------------------------------------


def layer_of(**options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(4, 64, query_features=32, seed=0, **options)


def inputs(length: int = 384) -> Any:
    return torch.from_numpy(np.random.default_rng(5).standard_normal((2, length, 32))).float()


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "grouped": ({"num_key_value_heads": 2}, {}),
    "window": ({"sliding_window": 40}, {"use_causal_mask": True}),
    "padding": ({}, {"value_mask": torch.arange(384)[None] < torch.tensor([[384], [370]])}),
    "pairs": ({}, {"attention_mask": torch.ones(2, 384, 384, dtype=torch.bool).tril(-1)}),
    "bias": ({}, {"attention_bias": torch.linspace(-1, 1, 384 * 384).reshape(1, 384, 384)}),
    "rotary": ({"rotary": anymha.Rotary()}, {"use_causal_mask": True}),
    "alibi": ({"alibi": True}, {"use_causal_mask": True}),
    "narrow values": ({"value_dim": 48}, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_gives_the_values_of_float64(name: str) -> None:
    options, call = CALLS[name]
    layer, x = layer_of(**options), inputs()
    exact = layer_of(**options, compute_dtype="float64")
    anymha.set_weights(exact, anymha.get_weights(layer))
    with torch.no_grad():
        found = layer(x, **call)
        torch.testing.assert_close(found, exact(x, **call), rtol=1e-4, atol=1e-5)
        told = NOTE in anymha.explain(layer, x, **call)
    assert told == (name not in ("window", "alibi", "narrow values"))  # small tiles; no kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_values_have_no_influence(dtype: str) -> None:
    layer, x = layer_of(dtype=dtype), inputs().to(getattr(torch, dtype))
    mask = torch.arange(384)[None] < torch.tensor([[370], [384]])
    other = x.clone()
    other[0, 370:] = math.nan
    keys = torch.where(mask[..., None], x, 7.0)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            one = layer(x, x, value_mask=mask)
            assert torch.equal(layer(x, other, value_mask=mask), one)
            assert torch.equal(layer(x, keys, value_mask=mask), one)


def test_scores_beside_it_change_no_bit() -> None:
    layer, x = layer_of(), inputs()
    with torch.no_grad():
        assert torch.equal(layer(x, return_attention_scores=True)[0], layer(x))


def _vmapped(layer: Any, x: Any) -> Any:
    return torch.func.vmap(layer)(x[None])[0]


def _watched(layer: Any, x: Any) -> Any:
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    with Watching():
        return layer(x)


def _autocast(layer: Any, x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def _switched_off(layer: Any, x: Any) -> Any:
    torch._C._set_mkldnn_enabled(False)
    try:
        return layer(x)
    finally:
        torch._C._set_mkldnn_enabled(True)


OTHERS = {
    "vmap": _vmapped,
    "a mode": _watched,
    "autocast": _autocast,
    "oneDNN is off": _switched_off,
    "few logits": lambda layer, x: layer(x[:, :350]),
    "few queries": lambda layer, x: layer(x[:, :255], x),
    "float64": lambda layer, x: layer.double()(x.double()),
    "compiled": lambda layer, x: torch.compile(layer, backend="eager")(x),
}


@pytest.mark.parametrize("way", OTHERS)
def test_other_calls_are_torchs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise AssertionError("oneDNN's products were taken")

    layer, x = layer_of(), inputs()
    with torch.no_grad():
        layer(x)
        monkeypatch.setattr(onednn_attention, "attention", refuses)
        torch._dynamo.reset()
        OTHERS[way](layer, x)
        with pytest.raises(AssertionError, match="were taken"):
            layer_of()(x)
