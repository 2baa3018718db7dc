"""Large projections in PyTorch: oneDNN's products are torch's, and are taken where they may be.

What is computed by oneDNN here, whatever the processor, is skipped where torch lacks it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from tests.frameworks import required

torch = required("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.functional import linear  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from anymha_torch import MultiHeadAttention, products  # noqa: E402

D, W = 264, 320
INTEL = "vendor_id\t: GenuineIntel\ncpu family\t: 26\nmodel\t\t: 207\n"
ZEN_4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
ZEN_5 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"
WINDOWS = "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD"


def numbers(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def weights(dtype: Any = torch.float32) -> tuple[Any, Any]:
    return numbers(W, D, seed=1, dtype=dtype) / D**0.5, numbers(W, seed=2, dtype=dtype)


@pytest.fixture
def products_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of oneDNN's products; projections take it as on a processor that it is for."""
    if not products.is_right():
        pytest.skip("this torch has no product of oneDNN's")
    made: list[tuple[int, ...]] = []
    product = products.product

    def counted(x: Any, weight: Any, bias: Any = None) -> Any:
        made.append((*x.shape, weight.shape[0]))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "product", counted)
    monkeypatch.setattr(products, "linear", products.by_size)
    monkeypatch.setattr(products, "preferred", False)  # whose products are others
    return made


def large_layer(**options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(4, 68, query_features=272, seed=0, **options)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "processor", "capability", "mkl", "preferred"),
    [
        (None, ZEN_5, "AVX512", True, True),
        (None, WINDOWS, "AVX512", True, True),
        (None, ZEN_4, "AVX512", True, False),
        (None, INTEL, "AVX512", True, False),
        (None, ZEN_5, "AVX2", True, False),
        (None, ZEN_5, "AVX512", False, False),
        (None, "arm", "DEFAULT", False, False),
        (None, "", "AVX512", True, False),
        ("0", ZEN_5, "AVX512", True, False),
        ("1", INTEL, "AVX512", True, True),
        ("perhaps", INTEL, "AVX512", True, False),
    ],
)
def test_processors_for_which_onednn_is_preferred(
    switch: str | None,
    processor: str,
    capability: str,
    mkl: bool,
    preferred: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(products.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(products.SWITCH, switch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "processor", lambda: processor)
    assert products.is_preferred() is preferred


def test_this_processor_is_asked() -> None:
    expected = products.by_size if products.is_preferred() else linear
    assert products.linear is expected


@pytest.mark.parametrize("fault", ["missing", "other arguments", "wrong"])
def test_torch_computes_where_onednn_is_missing_or_wrong(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise AttributeError

    def other_arguments(*_: Any) -> Any:
        raise RuntimeError

    def wrong(x: Any, weight: Any, bias: Any = None) -> Any:
        return linear(x, weight, bias) + 1

    faults = {"missing": missing, "other arguments": other_arguments, "wrong": wrong}
    monkeypatch.setattr(products, "product", faults[fault])
    monkeypatch.setattr(products, "linear", products.by_size)
    products.is_right.cache_clear()
    try:
        x, (weight, bias) = numbers(512, D), weights()
        assert torch.equal(products.by_size(x, weight, bias), linear(x, weight, bias))
        report = anymha.explain(large_layer(), numbers(2, 256, 272))
        assert products.NOTE not in report
    finally:
        products.is_right.cache_clear()


def test_explain_names_onednn_once(products_made: Any) -> None:
    layer, x = large_layer(), numbers(2, 256, 272)
    lines = anymha.explain(layer, x).splitlines()
    assert lines == ["fused: the framework's kernel has the written meaning", products.NOTE]
    assert len(products_made) == 4
    assert products.NOTE not in anymha.explain(layer, x[:, :8])


def test_sizes_of_blocks_are_few_whatever_the_lengths() -> None:
    sizes = set()
    for count in range(products.ROWS, 5000):
        blocks = list(products._blocks(count))
        starts, stops = zip(*[(rows.start, rows.stop) for rows, _ in blocks], strict=True)
        assert starts == (0, *stops[:-1])
        assert stops[-1] == count
        sizes |= {rows.stop - rows.start for rows, product in blocks if product is not linear}
        assert all(rows.stop - rows.start < products.ROWS for rows, p in blocks if p is linear)
    assert sizes == {256, 512, 1024, 2048, 4096}


@pytest.mark.parametrize(
    "shape", [(255, D), (0, D), (4, 63, D), (1, D)], ids=["255", "0", "252", "1"]
)
def test_few_rows_are_torchs(products_made: Any, shape: tuple[int, ...]) -> None:
    x, (weight, bias) = numbers(*shape), weights()
    assert torch.equal(products.by_size(x, weight, bias), linear(x, weight, bias))
    assert not products_made


@pytest.mark.parametrize("widths", [(256, 256), (1024, 127), (64, 4096)], ids=str)
def test_small_and_narrow_weights_are_torchs(products_made: Any, widths: tuple[int, int]) -> None:
    x, weight = numbers(512, widths[0]), numbers(widths[1], widths[0])
    assert torch.equal(products.by_size(x, weight), linear(x, weight))
    assert not products_made


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_torchs(products_made: Any, dtype: Any) -> None:
    x, (weight, bias) = numbers(512, D, dtype=dtype), weights(dtype)
    assert torch.equal(products.by_size(x, weight, bias), linear(x, weight, bias))
    assert not products_made


@pytest.mark.parametrize(
    ("shape", "wide"), [((512, D + 1), 0), ((512, D), 1)], ids=["features", "bias"]
)
def test_errors_are_torchs(products_made: Any, shape: tuple[int, int], wide: int) -> None:
    weight, bias = weights()
    bias = torch.cat([bias, bias[:wide]])
    with pytest.raises(RuntimeError) as expected:
        linear(numbers(*shape), weight, bias)
    with pytest.raises(RuntimeError) as error:
        products.by_size(numbers(*shape), weight, bias)
    assert str(error.value) == str(expected.value)


# --- values --------------------------------------------------------------------------------------


def near(got: Any, expected: Any, length: int) -> None:
    """Within the rounding of sums of `length` terms, of which the greatest is of order one."""
    got, expected = got.double(), expected.double()
    size = expected.abs().max().clamp(min=1)
    bound = 4 * torch.finfo(torch.float32).eps * length**0.5 * size
    assert (got - expected).abs().max() <= bound


@pytest.mark.parametrize("rows", [256, 300, 511, 512, 1000, 1024])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_are_those_of_linear(
    products_made: Any, rows: int, biased: bool
) -> None:
    weight, bias = weights()
    arrays = [numbers(rows, D), weight, *([bias] if biased else [])]
    cotangent = numbers(rows, W, seed=3)

    def of(function: Any, dtype: Any) -> list[Any]:
        own = [array.to(dtype).requires_grad_() for array in arrays]
        y = function(*own)
        return [y.detach(), *torch.autograd.grad(y, own, cotangent.to(dtype))]

    got, expected = of(products.by_size, torch.float32), of(linear, torch.float64)
    assert products_made
    for one, other, length in zip(got, expected, [D, W, rows, rows], strict=False):
        assert one.shape == other.shape
        near(one, other, length)


@pytest.mark.parametrize(
    "case", ["rows in batches", "strided rows", "strided weight", "turned weight", "one cotangent"]
)
def test_any_strides(products_made: Any, case: str) -> None:
    x, (weight, bias) = numbers(4, 100, D), weights()
    if case == "strided rows":
        x = numbers(100, 4, 2 * D).transpose(0, 1)[..., ::2]
    if case == "strided weight":
        weight = torch.cat([weight, weight], 1)[:, :D]
    if case == "turned weight":
        weight = weight.t().contiguous().t()
    own = [array.requires_grad_() for array in (x, weight, bias)]
    y, expected = products.by_size(*own), linear(*[a.double() for a in own])
    assert products_made
    near(y, expected, D)
    assert y.shape == expected.shape
    cotangent = torch.ones(()).expand(y.shape) if case == "one cotangent" else numbers(*y.shape)
    got = torch.autograd.grad(y, own, cotangent)
    for one, other in zip(got, torch.autograd.grad(expected, own, cotangent.double()), strict=True):
        near(one, other, 400)


@pytest.mark.parametrize("deterministic", [False, True])
def test_values_of_a_view_are_repeated(products_made: Any, deterministic: bool) -> None:
    x, (weight, bias) = torch.complex(numbers(512, D), numbers(512, D)).conj(), weights()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        y = products.by_size(x.imag, weight, bias)  # negative only by a flag
        assert torch.equal(products.by_size(x.imag, weight, bias), y)
    finally:
        torch.use_deterministic_algorithms(before)
    near(y, linear(-numbers(512, D), weight, bias), D)
    assert len(products_made) == 2


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_sparse_and_flat_weights_are_torchs(products_made: Any) -> None:
    x, (weight, _) = numbers(512, D), weights()
    sparse = weight.to_sparse_csr()
    assert torch.equal(products.by_size(x, sparse), linear(x, sparse))
    flat, wide = numbers(1 << 17), numbers(256, 1 << 17)
    assert torch.equal(products.by_size(wide, flat), linear(wide, flat))
    assert not products_made


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_arrays_get_no_gradient(products_made: Any, frozen: int) -> None:
    x, (weight, bias) = numbers(512, D), weights()
    own = [array.requires_grad_(i != frozen) for i, array in enumerate((x, weight, bias))]
    products.by_size(*own).sum().backward()
    assert [array.grad is None for array in own] == [i == frozen for i in range(3)]
    assert products_made


def test_gradients_can_be_differentiated(products_made: Any) -> None:
    x, (weight, bias) = numbers(300, D), weights()

    def second(function: Any) -> Any:
        own = [array.clone().requires_grad_() for array in (x, weight, bias)]
        first = torch.autograd.grad(function(*own).tanh().sum(), own, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), own)

    for one, other in zip(second(products.by_size), second(linear), strict=True):
        near(one / other.abs().max(), other / other.abs().max(), 300)
    assert products_made


def test_gradients_of_a_batch_of_cotangents(products_made: Any) -> None:
    x, (weight, bias) = numbers(300, D).requires_grad_(), weights()
    cotangents = numbers(3, 300, W)
    y = products.by_size(x, weight, bias)
    (got,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True)
    near(got, cotangents @ weight, W)
    assert products_made


def test_output_may_be_changed_in_place(products_made: Any) -> None:
    x, (weight, bias) = numbers(2, 256, D), weights()
    weight.requires_grad_()
    y = products.by_size(x, weight, bias).relu_()
    y.sum().backward()
    expected = (y.reshape(-1, W) > 0).float().t() @ x.reshape(-1, D)
    near(weight.grad, expected, 512)
    assert products_made


# --- what watches or transforms torch's functions ------------------------------------------------


def test_switched_off_by_torchs_own_flag(products_made: Any) -> None:
    x, (weight, bias) = numbers(512, D), weights()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of other flags
    try:
        assert torch.equal(products.by_size(x, weight, bias), linear(x, weight, bias))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not products_made


class Watching(TorchFunctionMode):
    """Collects the functions of torch's that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_linear(products_made: Any) -> None:
    x, (weight, bias) = numbers(512, D), weights()
    with Watching() as mode:
        products.by_size(x, weight, bias)
    assert linear in mode.seen
    assert not products_made


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_transforms(products_made: Any) -> None:
    x, (weight, bias) = numbers(3, 300, D), weights()

    def function(x: Any) -> Any:
        return products.by_size(x, weight, bias)

    def total(x: Any) -> Any:
        return function(x).square().sum()

    expected = linear(x, weight, bias)
    near(torch.func.vmap(function)(x), expected, D)
    near(torch.func.jvp(function, (x,), (x,))[1], linear(x, weight), D)
    near(torch.func.grad(total)(x), 2 * expected @ weight, W)
    assert torch.equal(make_fx(function)(x)(x), expected)
    assert torch.equal(torch.jit.trace(function, x, check_trace=False)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x).dtype == torch.bfloat16
    assert not products_made


def test_fake_tensors(products_made: Any) -> None:
    with FakeTensorMode():
        y = products.by_size(torch.empty(2, 300, D), torch.empty(W, D), torch.empty(W))
    assert y.shape == (2, 300, W)
    assert not products_made


def test_compiled_and_exported_layers(products_made: Any) -> None:
    layer, x = large_layer(), numbers(1, 300, 272)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(x)
        assert len(products_made) == 4
        made = len(products_made)
        near(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected, 272)
        length = torch.export.Dim("length", min=2, max=4096)
        program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
        near(program.module()(x), expected, 272)
    torch._dynamo.reset()
    assert len(products_made) == made


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}], ids=["full", "causal"])
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
def test_layer_gives_the_values_of_torchs_products(
    products_made: Any, call: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, cotangent = numbers(2, 300, 272), numbers(2, 300, 272, seed=1)

    def result(layer: Any) -> list[Any]:
        if mode == "train":
            y = layer(x, **call)
            return [y.detach(), *torch.autograd.grad(y, list(layer.parameters()), cotangent)]
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            return [layer(x, **call).clone()]

    layer = large_layer()
    results = [result(layer) for _ in range(3)]
    assert products_made
    monkeypatch.setattr(products, "linear", linear)
    for *ours, expected in zip(*results, result(large_layer()), strict=True):
        assert all(torch.equal(one, ours[0]) for one in ours)
        near(ours[0], expected, 600)


def test_a_layer_without_weights_repeats_its_first_call(products_made: Any) -> None:
    layer, x = MultiHeadAttention(4, 68, seed=0), numbers(2, 256, 272)
    assert torch.equal(layer(x), layer(x))
    assert len(products_made) == 8


def test_hidden_keys_change_no_bit(products_made: Any) -> None:
    layer, x = large_layer(), numbers(2, 300, 272)
    mask = torch.arange(300) < torch.tensor([[250], [0]])
    y = layer(x, numbers(2, 300, 272, seed=1), value_mask=mask)
    values = torch.where(mask[..., None], numbers(2, 300, 272, seed=1), torch.nan)
    assert torch.equal(layer(x, values, value_mask=mask), y)
    assert torch.equal(y[1], layer.output.bias.expand(300, -1))  # sees nothing
    assert products_made


def test_dropout_and_scores(products_made: Any) -> None:
    layer, x = large_layer(dropout=0.3), numbers(2, 300, 272)
    calls = [layer(x, training=True, seed=5) for _ in range(2)]
    assert torch.equal(*calls)
    output, scores = layer(x, training=False, return_attention_scores=True)
    assert torch.equal(output, layer(x, training=False))
    near(scores.sum(-1), torch.ones(2, 4, 300), 300)
    assert products_made


def test_reproducible_mode_keeps_its_bits(products_made: Any) -> None:
    layer = large_layer(compute_dtype="float64")
    x = numbers(1, 300, 272)
    other = anymha.MultiHeadAttention(
        4, 68, query_features=272, seed=0, compute_dtype="float64", backend="numpy"
    )
    assert np.array_equal(layer(x).detach().numpy(), other(x.numpy()))
    assert not products_made


def test_hooks_of_a_projection_act(products_made: Any) -> None:
    layer, x = large_layer(), numbers(2, 256, 272)
    y, seen = layer(x), []
    layer.value.register_forward_hook(lambda module, args, value: seen.append(value.shape))
    near(layer(x), y, 600)
    assert seen == [(2, 256, 272)]


def test_arrays_in_the_place_of_a_layer(products_made: Any) -> None:
    layer, x = large_layer(), numbers(2, 256, 272)
    output = anymha.multi_head_attention(layer.canonical_weights(), x, config=layer.config)
    assert len(products_made) == 4
    assert torch.equal(output, layer(x))
