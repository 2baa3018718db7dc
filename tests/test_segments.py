"""Packed sequences: `segment_ids` in every home and every framework, whole and by tiles."""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

import anymha
from anymha import AttentionConfig
from anymha.attention.segments import LARGE
from anymha.errors import ArgumentError, DtypeError, ShapeError
from anymha.framework.registry import Backend
from anymha.layer.forward import multi_head_attention
from anymha.parity import compare
from anymha.parity.stages.layer_call import gradients_of
from tests.peer_layers import need
from tests.support import native, normal

pytestmark = pytest.mark.usefixtures("quick_programs")

HEADS = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 4, "query_features": 8, "seed": 0}
IDS = np.array([[0, 0, 0, 1, 1, 2, 2, -1], [5, 3, 3, 5, 5, -7, 3, 3]], np.int32)
SAME = (IDS[:, :, None] == IDS[:, None, :]) & (IDS >= 0)[:, :, None]
X = normal((2, 8, 8), "x").astype(np.float32)
OTHER = [(0, 3), (0, 4)]
"""The positions of segment 1 of the first row."""


def layer_of(name: str, **options: Any) -> Any:
    return anymha.MultiHeadAttention(**HEADS, **options, backend=name)


def rest_of(array: np.ndarray) -> np.ndarray:
    """What is not of segment 1 of the first row, of (B, T, ..)."""
    keep = np.ones(IDS.shape, bool)
    keep[tuple(zip(*OTHER, strict=True))] = False
    return array[keep]


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_they_hide_as_a_mask_does(backend: Backend, causal: bool, budget: int | None) -> None:
    options = {"sliding_window": 3} if causal else {}
    layer = layer_of(backend.name, memory_budget=budget, **options)
    arrays = native(backend.ops, {"x": X, "ids": IDS, "mask": SAME})
    call = {"use_causal_mask": causal, "return_attention_scores": True}
    got = layer(arrays["x"], segment_ids=arrays["ids"], **call)
    expected = layer(arrays["x"], attention_mask=arrays["mask"], **call)
    for one, other in zip(got, expected, strict=True):
        one, other = map(backend.ops.to_numpy, (one, other))
        # What a negative id hides, its bias included, influences no matter what it holds.
        np.testing.assert_allclose(one, other, atol=2e-6)
    plain = layer(arrays["x"], **call)[0]
    assert np.max(np.abs(backend.ops.to_numpy(plain) - backend.ops.to_numpy(got[0]))) > 1e-2
    alone = layer(arrays["x"], segment_ids=arrays["ids"], use_causal_mask=causal)
    assert np.array_equal(*map(backend.ops.to_numpy, (alone, got[0])))
    bias = anymha.get_weights(layer)["output.bias"]
    assert np.array_equal(backend.ops.to_numpy(alone)[0, 7], bias)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_they_compose_with_masks_in_cross_attention(backend: Backend, dropout: float) -> None:
    layer = layer_of(backend.name, dropout=dropout, value_features=8, memory_budget=64)
    y = normal((2, 5, 8), "y").astype(np.float32)
    ids = np.array([[0, 0, 1, 2, 3], [3, 5, 3, 9, 5]], np.int32)
    same = (ids[:, :, None] == IDS[:, None, :]) & (ids >= 0)[:, :, None]
    padding = np.arange(8) < np.array([[7], [6]])
    mask = normal((2, 5, 8), "mask") > -0.5
    arrays = native(backend.ops, {"query": y, "value": X, "value_mask": padding})
    call: dict[str, Any] = {"training": True, "seed": 3, "return_attention_scores": True}
    ours = native(backend.ops, {"attention_mask": mask, "segment_ids": ids, "key_segment_ids": IDS})
    theirs = native(backend.ops, {"attention_mask": mask & same})
    for one, other in zip(
        layer(**arrays, **call, **ours), layer(**arrays, **call, **theirs), strict=True
    ):
        np.testing.assert_allclose(*map(backend.ops.to_numpy, (one, other)), atol=2e-6)


@pytest.mark.as_users_compile
@pytest.mark.parametrize("held", [100.0, np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": "float64"}, {"memory_budget": 64}],
                         ids=str)  # fmt: skip
def test_a_segment_changes_no_bit_of_another(
    backend: Backend, options: dict[str, Any], held: float
) -> None:
    before, after = (_of_packed(backend, (*options.items(),), x) for x in (None, held))
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(rest_of(one), rest_of(other))
    output, scores, _ = after
    at = tuple(zip(*OTHER, strict=True))
    assert not np.array_equal(output[at], before[0][at])
    if not np.isfinite(held):  # it is not hidden where it belongs
        assert np.isnan(output[at]).all()
        assert np.isnan(scores[at]).all()


@cache
def _of_packed(
    backend: Backend, options: tuple[tuple[str, Any], ...], held: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, scores (B, T, H, S) and gradient, where segment 1 holds a number, or its own."""
    config = AttentionConfig(**{n: v for n, v in HEADS.items() if n != "seed"}, **dict(options))
    weights = {n: normal(s, n).astype(np.float32) for n, s in config.weight_shapes().items()}
    x = X.copy()
    if held is not None:
        x[tuple(zip(*OTHER, strict=True))] = held
        x[0, 7] = np.nan  # padding
    ops = backend.ops
    ids, own = ops.from_numpy(IDS), native(ops, weights)

    def function(ops: Any, arrays: Any) -> Any:
        return multi_head_attention(
            ops, config, own, arrays["x"], segment_ids=ids, return_attention_scores=True
        )

    to = native(ops, {"output": normal((2, 8, 8), "d").astype(np.float32),
                      "scores": normal((2, 4, 8, 8), "s").astype(np.float32)})  # fmt: skip
    arrays = {"x": ops.from_numpy(x)}
    cotangents = to["output"], to["scores"]
    with np.errstate(invalid="ignore"):  # of infinities that are projected
        if backend.name == "jax":  # operation by operation it would compile for longer
            jit: Any = importlib.import_module("jax").jit
            pulled = jit(partial(ops.capabilities.vjp, partial(function, ops)))(arrays, cotangents)
            (output, scores), gradient = pulled[0], ops.to_numpy(pulled[1]["x"])
        else:
            output, scores = function(ops, arrays)
            gradient = gradients_of(ops, function, arrays, cotangents)["x"]
    return ops.to_numpy(output), ops.to_numpy(scores).swapaxes(1, 2), gradient


@pytest.mark.as_users_compile
def test_nan_is_found_in_long_rows(backend: Backend) -> None:
    length = 2100  # more pairs than are compared at a time, and no even number of parts
    assert length**2 > LARGE
    ops = backend.ops
    ids = np.arange(length, dtype=np.int32)[None] // 70
    x = normal((1, length, 1, 2), "x").astype(np.float32)
    y = x.copy()
    y[0, 700], y[0, 2099] = np.nan, np.inf
    arrays = native(ops, {"x": x, "y": y, "ids": ids})
    before, after = (
        ops.to_numpy(anymha.dot_product_attention(z, z, z, segment_ids=arrays["ids"]))
        for z in (arrays["x"], arrays["y"])
    )
    lost = np.isin(ids, (10, 29))
    assert np.array_equal(before[~lost], after[~lost])
    assert np.isnan(after[lost]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_get_the_mask_of_a_tile(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    need("torch")
    fused: Any = importlib.import_module("anymha_torch.fused")
    kernel, sizes = fused.scaled_dot_product_attention, []

    def recorded(query: Any, key: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        sizes.append(mask.numel())
        return kernel(query, key, value, mask, *args, **options)

    monkeypatch.setattr(fused, "scaled_dot_product_attention", recorded)
    layer, whole = layer_of("torch", memory_budget=256), layer_of("torch")
    ops = layer.ops
    call = {"segment_ids": ops.from_numpy(IDS), "use_causal_mask": causal}
    results = []
    for one in (layer, whole):
        x = ops.from_numpy(X).requires_grad_()
        output = one(x, **call)
        (output * output).sum().backward()
        results.append((ops.to_numpy(output.detach()), ops.to_numpy(x.grad)))
    assert max(sizes[:-1]) <= 256 / 4  # no array of all queries and keys
    assert sizes[-1] == IDS.size * 8
    for ours, expected in zip(*results, strict=True):
        most = np.max(np.abs(expected))  # whose terms are summed up in another order
        np.testing.assert_allclose(ours, expected, atol=8 * np.finfo(np.float32).eps * most)


def test_gradients_of_gradients_pass_through_tiles() -> None:
    torch: Any = need("torch")
    results = []
    for budget in (256, None):
        layer = layer_of("torch", memory_budget=budget)
        x = torch.from_numpy(X).requires_grad_()
        output = layer(x, segment_ids=torch.from_numpy(IDS))
        (first,) = torch.autograd.grad((output**2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), x)[0].numpy())
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def test_comparisons_know_segments(backend: Backend) -> None:
    exact, other = layer_of("numpy"), layer_of(backend.name)
    anymha.set_weights(other, anymha.get_weights(exact))
    report = compare(exact, other, X, segment_ids=IDS)
    assert report.passed, report
    assert not any("segment_ids" in words for words in report.not_exercised)
    same = compare(exact, other, X, segment_ids=np.zeros_like(IDS))
    assert "`segment_ids`: it excludes nothing that the others leave" in same.not_exercised


def test_numpy_pulls_gradients_back() -> None:
    layer = layer_of("numpy", dtype="float64")
    x = X.astype(np.float64)
    output, pullback = layer.vjp(x, segment_ids=IDS)
    cotangent = normal(output.shape, "cotangent")
    slopes = pullback(cotangent)["query"]
    for at in ((0, 0, 1), (0, 4, 2), (1, 6, 0), (0, 7, 3)):
        step = np.zeros_like(x)
        step[at] = 1e-6
        up, down = (layer(x + s, segment_ids=IDS) for s in (step, -step))
        np.testing.assert_allclose(slopes[at], np.sum((up - down) * cotangent) / 2e-6, atol=1e-7)
    assert not slopes[0, 7].any()


def test_they_are_of_several_axes_too(backend: Backend) -> None:
    layer = layer_of(backend.name)
    arrays = native(backend.ops, {"x": X.reshape(2, 2, 4, 8), "ids": IDS.reshape(2, 2, 4),
                                  "flat": X, "row": IDS})  # fmt: skip
    got = backend.ops.to_numpy(layer(arrays["x"], segment_ids=arrays["ids"]))
    expected = backend.ops.to_numpy(layer(arrays["flat"], segment_ids=arrays["row"]))
    assert np.array_equal(got.reshape(2, 8, 8), expected)


@pytest.mark.parametrize("home", ["keras", "flax", "equinox", "jax"])
def test_every_home_takes_them(home: str) -> None:
    jax = need("jax")
    if home != "jax":
        need(home)
    layer = layer_of(home)
    expected = layer_of("numpy")
    anymha.set_weights(expected, anymha.get_weights(layer))
    got = np.asarray(layer(jax.numpy.asarray(X), segment_ids=jax.numpy.asarray(IDS)))
    np.testing.assert_allclose(got, expected(X, segment_ids=IDS), atol=2e-6)


def test_ever_new_lengths_of_a_compiled_layer_hide_what_is_added() -> None:
    jax = need("jax")
    layer, expected = layer_of("jax"), layer_of("numpy")
    anymha.set_weights(expected, anymha.get_weights(layer))
    for length in (9, 11, 12, 13, 14):
        x = normal((1, length, 8), length).astype(np.float32)
        ids = (np.arange(length, dtype=np.int32) // 4)[None] * 0
        got = layer(jax.numpy.asarray(x), segment_ids=jax.numpy.asarray(ids))
        np.testing.assert_allclose(got, expected(x), atol=2e-6)


def test_the_function_takes_them_too(backend: Backend) -> None:
    q, k = (normal((2, n, 4, 4), n).astype(np.float32) for n in (5, 8))
    ids = np.array([[0, 0, 1, 2, 3], [3, 5, 3, 9, 5]], np.int64 if backend.name != "jax" else "i4")
    own = IDS.astype(ids.dtype)
    same = (ids[:, :, None] == own[:, None, :]) & (ids >= 0)[:, :, None]
    arrays = native(backend.ops, {"q": q, "k": k, "ids": ids, "own": own, "same": same[:, None]})
    call = partial(anymha.dot_product_attention, arrays["q"], arrays["k"], arrays["k"])
    got = call(segment_ids=arrays["ids"], key_segment_ids=arrays["own"])
    expected = call(mask=arrays["same"])
    np.testing.assert_allclose(*map(backend.ops.to_numpy, (got, expected)), atol=2e-6)
    with pytest.raises(ArgumentError, match=r"where T is S .* Received: no `key_segment_ids`"):
        call(segment_ids=arrays["ids"])


def test_wrong_ids_are_refused(backend: Backend) -> None:
    layer = layer_of(backend.name, value_features=8)
    arrays = native(backend.ops, {
        "x": X, "y": X[:, :5].copy(), "ids": IDS, "real": X[..., 0].copy(), "row": IDS[0],
        "short": IDS[:, :7].copy(), "unsigned": IDS.astype(np.uint8), "other": IDS.astype(np.int16),
    })  # fmt: skip
    x, ids = arrays["x"], arrays["ids"]
    with pytest.raises(DtypeError, match="`segment_ids` must be signed integers"):
        layer(x, segment_ids=arrays["real"])
    with pytest.raises(
        DtypeError, match=r"`segment_ids` must be signed integers. Received: .*uint8"
    ):
        layer(x, segment_ids=arrays["unsigned"])
    with pytest.raises(DtypeError, match=r"must have one dtype. Received: int32 and int16"):
        layer(x, segment_ids=ids, key_segment_ids=arrays["other"])
    for wrong in ("row", "short"):
        with pytest.raises(ShapeError, match="`segment_ids`"):
            layer(x, segment_ids=arrays[wrong])
    with pytest.raises(ArgumentError, match=r"Received: no `key_segment_ids`. Pass it"):
        layer(x, arrays["y"], segment_ids=ids)
    with pytest.raises(ArgumentError, match=r"Received: no `segment_ids`. Pass it"):
        layer(x, key_segment_ids=ids)
