"""A bias in float32 beside half precision: it is added as it is, in every framework and way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution.path import AttentionShape
from anymha.framework.registry import Backend
from anymha.parity import compare
from tests.frameworks import required
from tests.support import check, make, native, normal, np_dtype

HALF = ("bfloat16", "float16")
MODES = {f"{name} {dtype}": {name: dtype} for name in ("dtype", "compute_dtype") for dtype in HALF}
B, T, H = 2, 6, 2
# Numbers that half precision cannot tell apart, and whose differences matter.
BIAS = (1500 + normal((1, H, T, T), "bias")).astype("float32")
LOWEST = np.finfo("float32").min
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
half = pytest.mark.parametrize("dtype", HALF)


def layers(backend: str, **mode: str) -> tuple[Any, Any]:
    """A layer, and the same in float32."""
    options: Any = {"query_features": 16, "seed": 0, "backend": backend}
    layer = anymha.MultiHeadAttention(H, 8, **options, **mode)
    exact = anymha.MultiHeadAttention(H, 8, **options)
    weights = {n: np.asarray(w, "f4") for n, w in anymha.get_weights(layer).items()}
    anymha.set_weights(exact, weights)
    return layer, exact


def inputs(mode: dict[str, str]) -> np.ndarray:
    """A query (B, T, 16) in the dtype of the weights, of numbers that half precision has."""
    narrow = np_dtype(next(iter(mode.values())))
    dtype = np_dtype(mode.get("dtype", "float32"))
    return normal((B, T, 16), "x").astype(narrow).astype(dtype)


def near(ops: Any, got: Any, want: Any, mode: dict[str, str]) -> None:
    """Fail unless they differ by some roundings to half precision alone."""
    got, want = (np.asarray(ops.to_numpy(x), "f8") for x in (got, want))
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[next(iter(mode.values()))]
    np.testing.assert_allclose(got, want, rtol=0, atol=6 * eps * np.abs(want).max())


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "mask": {"value_mask": np.arange(T) < np.array([[4], [6]])},
    "scores": {"return_attention_scores": True},
}


@pytest.mark.usefixtures("quick_programs")
@modes
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_are_those_of_float32(
    backend: Backend, mode: dict[str, str], call: dict[str, Any]
) -> None:
    ops, x = backend.ops, inputs(mode)
    layer, exact = layers(backend.name, **mode)
    call = native(ops, {**call, "attention_bias": BIAS})
    found = layer(ops.from_numpy(x), **call)
    wanted = exact(ops.from_numpy(x.astype("f4")), **call)
    if not isinstance(found, tuple):
        found, wanted = (found,), (wanted,)
    for got, want in zip(found, wanted, strict=True):
        near(ops, got, want, mode)


@pytest.mark.usefixtures("quick_programs")
@modes
def test_gradients_are_those_of_the_oracle(backend: Backend, mode: dict[str, str]) -> None:
    """That of the bias too, in float32."""
    problem = make(**mode)
    bias = (1500 + normal((2, 4, 5, 6), "bias")).astype("float32")
    result = check(backend, problem.but(inputs={**problem.inputs, "attention_bias": bias}))
    assert result.gradients["attention_bias"].dtype == np.float32


@pytest.mark.usefixtures("quick_programs")
@half
def test_cached_calls_are_those_of_float32(backend: Backend, dtype: str) -> None:
    ops, mode = backend.ops, {"dtype": dtype}
    x = inputs(mode)
    layer, exact = layers(backend.name, **mode)
    want = exact(
        ops.from_numpy(x.astype("f4")), attention_bias=ops.from_numpy(BIAS), use_causal_mask=True
    )
    cache, parts = layer.make_cache(B, T), []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        bias = ops.from_numpy(np.ascontiguousarray(BIAS[:, :, first:last]))
        part = ops.from_numpy(np.ascontiguousarray(x[:, first:last]))
        output, cache = layer(part, cache=cache, attention_bias=bias)
        parts.append(output)
    near(ops, ops.concat(parts, axis=1), want, mode)


@pytest.mark.usefixtures("quick_programs")
@half
def test_function_adds_it_in_float32(backend: Backend, dtype: str) -> None:
    ops, mode = backend.ops, {"dtype": dtype}
    heads = inputs(mode).reshape(B, T, H, 8)
    bias = ops.from_numpy(BIAS)
    narrow, wide = ops.from_numpy(heads), ops.from_numpy(heads.astype("f4"))
    found = anymha.dot_product_attention(narrow, narrow, narrow, bias=bias)
    near(ops, found, anymha.dot_product_attention(wide, wide, wide, bias=bias), mode)


BEYOND = {
    "7e4": np.where(np.arange(T) == 0, 7e4, 0.0),
    "lowest in some": np.where(np.arange(T) < 3, LOWEST, 0.0),
    "lowest everywhere": np.full(T, LOWEST),
    "-1e9 everywhere": np.full(T, -1e9),
}


@pytest.mark.usefixtures("quick_programs")
@half
@pytest.mark.parametrize("row", BEYOND.values(), ids=BEYOND)
def test_numbers_beyond_float16_stay_finite(backend: Backend, dtype: str, row: np.ndarray) -> None:
    """Rows of the lowest number alone are the mean of the values, as in float32."""
    ops, mode = backend.ops, {"dtype": dtype}
    x = inputs(mode)
    layer, exact = layers(backend.name, **mode)
    bias = ops.from_numpy(np.broadcast_to(row.astype("f4"), (T, T)).copy())
    found = layer(ops.from_numpy(x), attention_bias=bias)
    near(ops, found, exact(ops.from_numpy(x.astype("f4")), attention_bias=bias), mode)


@pytest.mark.usefixtures("quick_programs")
@half
def test_a_bias_in_half_precision_is_what_it_is(backend: Backend, dtype: str) -> None:
    """Of the other half-precision dtype too, which is not rounded to the layer's."""
    ops, mode = backend.ops, {"dtype": dtype}
    x = inputs(mode)
    layer, exact = layers(backend.name, **mode)
    for name in HALF:
        bias = BIAS.astype(np_dtype(name))
        if name == "bfloat16":
            bias[..., 0] = np.float32(1e5)
        found = layer(ops.from_numpy(x), attention_bias=ops.from_numpy(bias))
        wide = ops.from_numpy(bias.astype("f4"))
        near(ops, found, exact(ops.from_numpy(x.astype("f4")), attention_bias=wide), mode)


# --- PyTorch -------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_round_it(
    dtype: str, multiplies: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, fused = required("torch"), required("anymha_torch.fused")
    if not multiplies:
        monkeypatch.setattr(fused, "_OF_PROCESSOR", set())
    mode = {"compute_dtype": dtype}
    _, layer = layers("torch", **mode)
    layer, ops = layer.eval(), layer.ops
    x, bias = torch.from_numpy(inputs(mode)), torch.from_numpy(BIAS)
    heads = x.reshape(B, T, H, 8)
    function: Any = anymha.dot_product_attention
    if compiled:
        layer, function = (
            torch.compile(each, fullgraph=True, backend="aot_eager") for each in (layer, function)
        )
    with torch.no_grad():
        want = layer(x, attention_bias=bias), function(heads, heads, heads, bias=bias)
        with torch.autocast("cpu", getattr(torch, dtype)):
            found = layer(x, attention_bias=bias), function(heads, heads, heads, bias=bias)
    for got, wanted in zip(found, want, strict=True):
        assert got.dtype == getattr(torch, dtype)
        near(ops, got, wanted, mode)


@half
def test_kernel_of_torch_is_taken_where_it_does_not_round(dtype: str) -> None:
    torch, fused = required("torch"), required("anymha_torch.fused")
    spec, narrow = AttentionSpec(0.5, (), PositionMask()), getattr(torch, dtype)
    shape = AttentionShape(
        2, 4, 4, 8, 8, 16, 16, narrow, torch.device("cpu"), narrow, has_bias=True, wide_bias=True
    )
    assert fused.why_not_fused(spec, shape) is None
    on_gpu = shape._replace(device=torch.device("cuda"))
    assert "round the bias" in str(fused.why_not_fused(spec, on_gpu))
    assert fused.why_not_fused(spec, on_gpu._replace(wide_bias=False)) is None
    assert fused.why_not_fused(spec, on_gpu._replace(dtype=torch.float32)) is None


# --- Comparisons ---------------------------------------------------------------------------------


def test_a_port_gets_it_unrounded() -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(
        H, 8, query_features=16, seed=0, dtype="bfloat16", backend="torch"
    )

    class Port(torch.nn.Module):
        def __init__(self, rounds: bool) -> None:
            super().__init__()
            self.inner, self.rounds = layer, rounds

        def forward(self, query: Any, attention_bias: Any) -> Any:
            bias = attention_bias.to(query.dtype) if self.rounds else attention_bias
            return self.inner(query, attention_bias=bias)

    x = torch.from_numpy(inputs({"compute_dtype": "bfloat16"})).bfloat16()
    errors = [
        compare(layer, Port(rounds), x, attention_bias=BIAS).stages[0].error
        for rounds in (False, True)
    ]
    assert errors[0] == 0 < 0.1 < errors[1]
