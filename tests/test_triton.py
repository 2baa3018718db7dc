"""Triton's kernels with dropout, by its interpreter; where they are taken; seeds on any device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.dropout import Dropout, keep_mask
from anymha.attention.masks import PositionMask, TileOrigin, position_mask
from anymha.attention.spec import AttentionSpec
from anymha.errors import ArgumentError, ShapeError
from anymha.execution.attend import written
from anymha.execution.path import choose_path
from anymha.testing import fused
from anymha.testing.arithmetic import eps
from anymha.testing.calls import values
from anymha.testing.fused import LONG, WHOLE, AttentionCase, general
from tests.frameworks import required, skip_or_fail

torch = required("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from anymha_torch import MultiHeadAttention, ops, triton_attention  # noqa: E402
from anymha_torch.autograd import vjp  # noqa: E402
from anymha_torch.fused import fused_attention  # noqa: E402
from anymha_torch.seeds import on_device  # noqa: E402

SMALL = {
    kind: {256: dict.fromkeys(("forward", "queries", "keys"), (4, 16, 4))}
    for kind in ("half", "tf32", "ieee")
}
"""Tiles of eight queries and sixteen keys, so that short sequences have several."""

HEADS = ("query", "key", "value")
LENGTHS = (11, 20)
"""T and S in the place of those that take the interpreter minutes."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's kernels, to which the CPU's tensors go."""
    if importlib.util.find_spec("triton") is None:
        skip_or_fail("triton", "triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip_or_fail("triton", "TRITON_INTERPRET=1 is not set, as `nox -s triton` sets it")
    found = importlib.import_module("anymha_torch.triton_kernels")
    monkeypatch.setattr(triton_attention, "on_cpu", True)
    monkeypatch.setattr(found, "TILES", SMALL)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, _as_numbers(interpreter, a), _as_numbers(interpreter, b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return found


def _as_numbers(interpreter: Any, x: Any) -> Any:
    """An operand in float32 if it is in bfloat16, whose bits the interpreter would multiply."""
    language = importlib.import_module("triton.language")
    if x.dtype.scalar != language.bfloat16:
        return x
    wide = (x.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, language.float32)


def _case(case: AttentionCase) -> AttentionCase:
    """A case of the conformance tests with dropout, and short."""
    case = replace(case, dropout=case.dropout or 20000, budget=None)
    if case.lengths != LONG:
        return case
    return replace(case, lengths=LENGTHS, mask=case.mask and LENGTHS, heads=(2, 1), window=(9, 4))


CHOSEN = (
    *("long", "one query and key", "one key head", "other width of the value", "mask of queries"),
    *("mask, grouped heads", "bias that hides", "bias and mask", "causal, more queries"),
    *("causal, grouped heads", "long window in tiles", "causal, nothing to see"),
    *("window with offsets", "dropout, mask", "dropout, bias, window"),
)
CASES = [_case(case) for case in fused.CASES if case.name in CHOSEN]

WINDOWS = [
    AttentionCase("causal", lengths=(19, 19), window=(4, 0)),
    AttentionCase("both sides, grouped heads", lengths=(11, 37), heads=(4, 2), window=(3, 5)),
    AttentionCase("offset", lengths=(9, 20), window=(2, 1), offset=3),
    AttentionCase("mask of queries", lengths=(9, 20), mask=(1, 1, 9, 20), window=(6, 0), offset=4),
    AttentionCase("offsets, bias", lengths=(9, 20), bias=(1, 4, 9, 20), window=(5, 0),
                  offset=(0, 40)),
]  # fmt: skip
"""Windows without dropout; nobody sees some queries' keys, some lie in tiles that are left out."""


def _computed(
    case: AttentionCase, dtype: str, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Context and gradients by the kernels, and in float64 by the written formula."""
    arrays = replace(case, dtype=dtype).arrays()
    cotangent = values(2, case.lengths[0], case.heads[0], case.widths[1], dtype=dtype, seed=4)
    shape = case.shape(ops)._replace(
        narrow=None if dtype == "float32" else ops.dtype(dtype), device=torch.device(device)
    )
    path = choose_path(ops, case.spec(ops), shape, observed=False, with_scores=False)
    assert (path.kernel, path.narrow) == ("fused", dtype != "float32"), path
    both = []
    for own, way, kind in ((ops, path, dtype), (general(ops), WHOLE, "float64")):
        place = device if own is ops else "cpu"
        native = {n: ops.from_numpy(x).to(place) for n, x in arrays.items()}
        heads = {n: native.pop(n).to(ops.dtype(kind)) for n in ("query", "key", "value")}
        if "bias" in native:
            native["bias"] = native["bias"].to(torch.float64 if own is not ops else torch.float32)
        context, gradients = vjp(
            lambda given, own=own, way=way, kind=kind, native=native: fused.context(
                own, way, replace(case, dtype=kind), {**given, **native}
            ),
            heads,
            ops.from_numpy(cotangent).to(place, ops.dtype(kind)),
        )
        assert context.dtype == ops.dtype(kind)
        found = {"context": context.detach(), **gradients}
        both.append({n: x.cpu().to(torch.float64).numpy() for n, x in found.items()})
    return both[0], both[1]


def _is_near(found: Any, expected: Any, dtype: str, factor: float) -> None:
    """Near everywhere, and zero where nobody sees anything."""
    for name, exact in expected.items():
        allowed = factor * eps(dtype) * max(1, np.max(np.abs(exact)))
        assert np.all(np.abs(found[name] - exact) <= allowed), name
    for name in ("context", "value"):
        assert np.all(found[name][expected[name] == 0] == 0), name
    blind = np.all(expected["context"] == 0, axis=-1)
    assert np.all(found["query"][blind] == 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_context_and_gradients(kernels: Any, case: AttentionCase) -> None:
    _is_near(*_computed(case, "float32"), "float32", 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dropout, mask", "causal, grouped heads"])
def test_half_precision_within_the_written_bound(kernels: Any, name: str, dtype: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    _is_near(*_computed(case, dtype), dtype, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_window_without_dropout(
    kernels: Any, case: AttentionCase, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "why_not_on", lambda *kind: None)
    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: False)
    shape = case.shape(ops)._replace(narrow=ops.dtype(dtype))
    path = choose_path(ops, case.spec(ops), shape, observed=False, with_scores=False)
    assert (path.kernel, path.causal_kernel, path.tiles) == ("fused", True, ()), path
    _is_near(*_computed(case, dtype), dtype, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_window_without_dropout_on_a_gpu(
    case: AttentionCase, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "FEWEST_HIDDEN", 1)
    _is_near(*_computed(case, dtype, "cuda"), dtype, 4)


def test_windows_are_left_to_the_kernels_where_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_why_not_on", lambda device: None)
    monkeypatch.setattr(triton_attention, "_why_wrong", lambda *kind: None)

    def taken(keys: int = 4096, dtype: Any = torch.bfloat16, **options: Any) -> bool:
        case = AttentionCase("window", lengths=(keys, keys), **{"window": (255, 0), **options})
        shape = case.shape(ops)._replace(device=torch.device("cuda:0"), narrow=dtype)
        path = choose_path(ops, case.spec(ops), shape, observed=False, with_scores=False)
        return path.causal_kernel and not path.tiles

    assert taken()
    assert taken(mask=(1, 1, 1, 4096), offset=(0, 3))
    assert not taken(keys=512)
    assert not taken(dtype=None)  # in float32
    assert not taken(window=(None, 5))
    assert not taken(window=(5, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(case: AttentionCase, dtype: str) -> None:
    """The same, compiled, with tiles and lengths of their own."""
    if case.lengths == LENGTHS:
        case = replace(case, lengths=LONG, mask=case.mask and LONG)
    _is_near(*_computed(case, dtype, "cuda"), dtype, 32 if dtype == "float32" else 4)


@pytest.mark.parametrize("seed", [0, -7, 2**40 + 5])
def test_the_bits_are_those_of_the_cpu(kernels: Any, seed: int) -> None:
    """Even weights over an identity as the values: what is not zero in the context is kept."""
    batch, heads, queries, keys = shape = (2, 2, 11, 21)
    zeros, eye = torch.zeros(batch, heads, queries, 4), torch.eye(keys).expand(batch, 2, keys, keys)
    spec = AttentionSpec(1.0, (), position_mask(False, None, 0), Dropout(20000, seed))
    arrays = {"query": zeros, "key": torch.zeros(batch, heads, keys, 4), "value": eye}
    context = fused_attention(spec, arrays, causal=False)
    kept = keep_mask(ops, seed, 20000, shape)
    assert torch.equal(context != 0, kept)
    torch.testing.assert_close(context, kept * (spec.dropout.factor / keys))


def test_the_mask_alone_has_the_bits_of_the_cpu(kernels: Any) -> None:
    for shape, place in (((2, 3, 9, 35), (0, 0, 0, 0)), ((1, 2, 5, 7), (3, 1, 2, 130))):
        origin = TileOrigin(*place)
        expected = keep_mask(ops, -5, 20000, shape, origin)
        assert torch.equal(ops.keep_mask(-5, 20000, shape, origin, device=None), expected)
    assert ops.keep_mask(1, 20000, (1, 2, 0, 3), device="cpu").shape == (1, 2, 0, 3)


def test_inputs_that_lie_otherwise_in_memory(kernels: Any) -> None:
    spec = AttentionSpec(0.5, (), position_mask(True, None, 0), Dropout(20000, 3))
    named = {n: torch.from_numpy(values(1, 2, 5, 8, seed=i)) for i, n in enumerate("qkv")}
    plain = dict(zip(("query", "key", "value"), named.values(), strict=True))
    turned = {n: x.mT.contiguous().mT for n, x in plain.items()}
    assert torch.equal(
        fused_attention(spec, turned, causal=True), fused_attention(spec, plain, causal=True)
    )


def make(**options: Any) -> Any:
    options = {"query_features": 8, "seed": 0, "dropout": 0.25} | options
    return MultiHeadAttention(2, 4, **options)


@pytest.fixture
def x() -> Any:
    return torch.from_numpy(values(2, 9, 8))


def test_a_layer_takes_the_kernels_and_explains_it(kernels: Any, x: Any) -> None:
    told = anymha.explain(make(sliding_window=3), x, use_causal_mask=True, training=True, seed=5)
    assert told == f"fused: the backend's own kernel with dropout\n{triton_attention.NOTE}"
    assert "softcap" in anymha.explain(make(softcap=5.0), x, training=True, seed=5)


def test_a_layer_in_half_precision_takes_them_for_its_window(kernels: Any, x: Any) -> None:
    layer = make(sliding_window=3, dtype="bfloat16", compute_dtype="bfloat16", dropout=0.0)
    told = anymha.explain(layer, x.bfloat16(), use_causal_mask=True)
    multiplies: Any = ops.capabilities.multiplies
    multiplied = multiplies(torch.bfloat16, torch.device("cpu"))
    assert (triton_attention.NOTE_OF_WINDOW in told) == multiplied, told


def test_second_derivatives(kernels: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()

    def penalty() -> list[Any]:
        given = x.clone().requires_grad_()
        output = layer(given, training=True, seed=5, use_causal_mask=True)
        (gradient,) = torch.autograd.grad(output.square().sum(), given, create_graph=True)
        weights = [layer.query.weight, layer.value.weight]
        return list(torch.autograd.grad(gradient.square().sum(), [given, *weights]))

    found = penalty()
    monkeypatch.setattr(triton_attention, "on_cpu", False)
    for got, expected in zip(found, penalty(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_second_derivatives_of_a_window(kernels: Any) -> None:
    spec = AttentionSpec(0.5, (), PositionMask(3, 0, 0))
    arrays = {n: torch.from_numpy(values(1, 2, 9, 8, seed=i)) for i, n in enumerate(HEADS)}

    def twice(attend: Any) -> list[Any]:
        given = {n: x.clone().requires_grad_() for n, x in arrays.items()}
        first = torch.autograd.grad(
            attend(given).square().sum(), list(given.values()), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), given.values()))

    found = twice(lambda given: triton_attention.attention(spec, given))
    expected = twice(lambda given: written(ops, spec, None, given)["context"])
    for got, other in zip(found, expected, strict=True):
        torch.testing.assert_close(got, other, atol=1e-3, rtol=1e-4)


def test_transformed_calls_take_another_path(kernels: Any, x: Any) -> None:
    layer = make()
    weights = dict(layer.named_parameters())

    def loss(weights: Any) -> Any:
        call = {"training": True, "seed": 5}
        return torch.func.functional_call(layer, weights, x, call).square().sum()

    found = torch.func.grad(loss)(weights)
    loss(weights).backward()
    torch.testing.assert_close(found["query.weight"], layer.query.weight.grad)


@pytest.mark.parametrize("seed", [5, None], ids=["traced", "drawn"])
def test_training_compiles_as_one_graph(kernels: Any, x: Any, seed: int | None) -> None:
    layer = make()
    torch._dynamo.reset()

    def loss(x: Any, seed: Any) -> Any:
        return layer(x, training=True, seed=seed, use_causal_mask=True).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    given = x.clone().requires_grad_()
    if seed is None:
        torch.manual_seed(0)
        first = compiled(given, None)
        assert first != compiled(given, None)
        torch.manual_seed(0)
        assert first == compiled(given, None)
        return
    traced = torch.tensor(seed)
    (found,) = torch.autograd.grad(compiled(given, traced), given)
    (expected,) = torch.autograd.grad(loss(given, seed), given)
    torch.testing.assert_close(found, expected)


def test_the_kernels_compile_for_gpus() -> None:
    if importlib.util.find_spec("triton") is None:
        skip_or_fail("triton", "triton is not installed")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.triton_compiled", "bf16", "64", "80"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" bytes\n") == 9


# --- where they are taken, and seeds; without Triton ----------------------------------------------
def _why(**options: Any) -> str | None:
    case = AttentionCase("dropout", dropout=20000, native=options.pop("native", False))
    shape = case.shape(ops)._replace(device=torch.device("cuda:0"), **options)
    why_not_fused: Any = ops.capabilities.why_not_fused
    return why_not_fused(case.spec(ops), shape)


def test_on_gpus_triton_must_be_installed_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_attention._why_not_on.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _why() == "Triton is not installed"
    triton_attention._why_not_on.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert _why() == "Triton does not support a GPU so old"
    triton_attention._why_not_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_attention, "keep_mask", lambda *_: torch.zeros(2, 3, 7, 5) > 0)
    assert _why() == "Triton computes other masks here"
    triton_attention._why_not_on.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_call_is_compared_first(
    kernels: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    why_wrong: Any = triton_attention._why_wrong.__wrapped__
    assert why_wrong("cpu", dtype, 8, 5, 20000) is None
    assert why_wrong("cpu", dtype, 8, 5, None) is None
    backward = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: [g * 1.2 for g in backward(*args)])
    for threshold in (20000, None):
        assert why_wrong("cpu", dtype, 8, 5, threshold) == "Triton computes other numbers here"
    monkeypatch.setattr(kernels, "forward", lambda *args: 1 // 0)
    assert "ZeroDivisionError" in why_wrong("cpu", dtype, 8, 5, None)


def test_on_gpus_every_width_and_dtype_has_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_why_not_on", lambda device: None)
    monkeypatch.setattr(triton_attention, "_why_wrong", lambda *kind: None)
    assert _why() is None
    assert _why(dtype=torch.bfloat16, key_dim=256) is None
    assert _why(key_dim=256) == "the kernels with dropout take heads of up to 128 features"
    assert "float64" in str(_why(dtype=torch.float64))
    assert _why(native=True, dtype=torch.bfloat16) is None
    assert "half precision on CUDA alone" in str(_why(native=True))


@pytest.mark.parametrize("place", ["cpu", "cuda", "int", "none"])
def test_a_seed_of_any_device_beside_cuda(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and devices, and refuse to be mixed; no GPU is needed."""
    monkeypatch.setattr(triton_attention, "_why_not_on", lambda device: None)
    monkeypatch.setattr(triton_attention, "_why_wrong", lambda *kind: None)
    with FakeTensorMode():
        x = torch.empty(2, 9, 2, 8, device="cuda")
        seed: Any = {"int": 2**40 + 5, "none": None}.get(place, place)
        if isinstance(seed, str):
            seed = torch.full((), 5, device=seed)
        context = anymha.dot_product_attention(x, x, x, dropout=0.25, seed=seed)
    assert context.is_cuda
    assert context.shape == x.shape


def test_seeds_without_a_value_or_with_several_are_refused(x: Any) -> None:
    layer = make()
    with pytest.raises(ArgumentError, match="a tensor on the meta device"):
        layer(x, training=True, seed=torch.empty((), dtype=torch.int64, device="meta"))
    with pytest.raises(ShapeError, match="`seed` must be one integer"):
        layer(x, training=True, seed=torch.tensor([1, 2]))


def test_seeds_beside_arrays_without_values() -> None:
    """Arrays of the meta device refuse others, too; there no kernel of Triton's is taken."""
    layer = make(device="meta")
    x = torch.empty(2, 9, 8, device="meta")
    for seed in (3, torch.tensor(3), None):
        assert layer(x, training=True, seed=seed).shape == x.shape
    assert on_device(2**64 - 1, torch.device("cpu")).item() == -1


def test_native_dropout_of_the_kernel() -> None:
    """Torch's kernel drops by its generator, seeded or not, and leaves the generator as it was."""
    drop = Dropout(2**15, None, native=True)
    spec = AttentionSpec(1.0, (), position_mask(False, None, 0), drop)
    arrays = {
        "query": torch.zeros(1, 1, 64, 4),
        "key": torch.zeros(1, 1, 64, 4),
        "value": torch.eye(64).reshape(1, 1, 64, 64),
    }

    def kept(seed: int | None = None) -> Any:
        own = replace(spec, dropout=replace(drop, seed=seed))
        return fused_attention(own, arrays, causal=False) != 0

    torch.manual_seed(1)
    first = kept()
    assert abs(first.float().mean() - 0.5) < 0.05
    assert not torch.equal(first, kept())
    torch.manual_seed(1)
    seeded = kept(3)
    assert torch.equal(seeded, kept(3))
    assert torch.equal(first, kept())
    assert not torch.equal(first, seeded)
