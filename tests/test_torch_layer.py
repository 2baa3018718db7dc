"""The PyTorch layer is a module like any other: state, modes, compilation, export, transforms."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import inspect
import io
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError, WeightsError
from tests.frameworks import required

torch = required("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from anymha_torch import MultiHeadAttention, fused, ops  # noqa: E402

NAMES = [
    f"{projection}.{part}"
    for projection in ("query", "key", "value", "output")
    for part in ("weight", "bias")
]


def make(**options):
    return MultiHeadAttention(2, 4, **{"query_features": 8, "seed": 0, **options})


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@pytest.fixture
def x():
    return numbers(2, 5, 8)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def counter():
    """A compiler that counts the programs that it is given."""
    torch._dynamo.reset()
    yield importlib.import_module("torch._dynamo.testing").CompileCounter()
    torch._dynamo.reset()


# --- state ---------------------------------------------------------------------------------------


def test_state_dict_has_the_canonical_names():
    layer = make()
    assert list(layer.state_dict()) == NAMES
    assert [name for name, _ in layer.named_parameters()] == NAMES
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert list(layer.buffers()) == []


def test_absent_biases_are_absent():
    layer = make(use_bias=("query", "value", "output"))
    assert "key.bias" not in layer.state_dict()


@pytest.mark.parametrize("built", [True, False])
def test_load_state_dict(x, built):
    source = make()
    target = make(seed=1) if built else make(query_features=None)
    assert target.built == built
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(target(x), source(x))


def test_load_state_dict_inside_another_module(x):
    source = torch.nn.ModuleDict({"attention": make()})
    target = torch.nn.ModuleDict({"attention": make(query_features=None)})
    target.load_state_dict(source.state_dict())
    assert torch.equal(target["attention"](x), source["attention"](x))


@pytest.mark.parametrize("built", [True, False])
def test_load_state_dict_by_assignment(x, built):
    source = make()
    target = make(seed=1) if built else make(query_features=None)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), source(x))


def test_load_state_dict_of_wrong_shape_leaves_an_unbuilt_layer_unbuilt():
    target = MultiHeadAttention(2, 5)
    with pytest.raises(RuntimeError, match=r"`query\.weight` must have shape \(10, 8\)\. Rec"):
        target.load_state_dict(make().state_dict())
    assert not target.built


def test_load_state_dict_without_a_weight_says_which():
    state = make().state_dict()
    del state["output.bias"]
    target = make(query_features=None)
    with pytest.raises(RuntimeError, match=r"`output\.bias` must have shape \(8,\)"):
        target.load_state_dict(state)
    assert not target.built
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"output\.bias\""):
        make().load_state_dict(state)


def test_saved_file_loads(x):
    source, file = make(), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = make(query_features=None)
    target.load_state_dict(torch.load(file))
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("built", [True, False])
def test_copies_are_independent(x, clone, built):
    layer = make() if built else make(query_features=None)
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.query.weight.add_(1)
    assert not torch.equal(other(x), layer(x))


# --- dtypes and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.float64), torch.float64),
    ],
    ids=["half", "bfloat16", "double", "to"],
)
def test_casting_the_module_changes_what_it_computes_in(x, change, dtype, built):
    layer = change(make() if built else make(query_features=None))
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    exact = make().double()(x.double())
    error = (output.double() - exact).abs().max()
    assert error < {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    if dtype == torch.float64:
        wide = make(dtype="float64").double()
        wide.load_state_dict(layer.state_dict())
        assert torch.equal(wide(x.double()), output)


def test_autocast_gives_its_dtype_and_keeps_the_softmax_in_float32(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, scores = make()(x, return_attention_scores=True)
        linear = make().query(x)
    exact, exact_scores = make()(x, return_attention_scores=True)
    assert output.dtype == scores.dtype == linear.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < (output - exact).abs().max() < 4 * eps * exact.abs().max()
    assert (scores.float().sum(-1) - 1).abs().max() < 2 * eps  # each is rounded once
    assert (scores - exact_scores).abs().max() < 0.02


def in_a_region(function: Any, *regions: Any) -> Any:
    for kind, dtype, enabled in regions:
        function = torch.autocast(kind, dtype, enabled)(function)
    return function()


def test_autocast_of_another_device_and_one_that_is_off_change_nothing(x):
    layer = make()
    outside = ("cpu", torch.bfloat16, True)
    off = in_a_region(lambda: layer(x), ("cpu", torch.bfloat16, False), outside)
    assert torch.equal(off, layer(x))
    if not torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no such device
            other = in_a_region(lambda: layer(x), ("cuda", torch.float16, True))
        assert torch.equal(other, layer(x))


def test_autocast_leaves_float64_and_the_reproducible_mode_alone(x):
    moved = make().double()  # whose options still say float32
    for layer in (make(dtype="float64"), moved, make(compute_dtype="float64")):
        given = x.to(layer.query.weight.dtype)
        exact = layer(given)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(given)
        assert found.dtype == exact.dtype
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    weights = dict(make().canonical_weights())
    exact = anymha.AttentionConfig(2, 4, query_features=8, compute_dtype="float64")
    with torch.autocast("cpu", torch.bfloat16):
        assert anymha.multi_head_attention(weights, x, config=exact).dtype == torch.float32


def test_functions_under_autocast_give_its_dtype_as_the_layer_does(x):
    layer, config = make(), anymha.AttentionConfig(2, 4, query_features=8)
    weights = layer.canonical_weights()
    heads = x.reshape(2, 5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        of_function = anymha.multi_head_attention(weights, x, config=config)
        context = anymha.dot_product_attention(heads, heads, heads)
        of_torch = torch.nn.functional.scaled_dot_product_attention(
            *[heads.transpose(1, 2)] * 3
        ).transpose(1, 2)
    assert output.dtype == of_function.dtype == context.dtype == of_torch.dtype == torch.bfloat16
    torch.testing.assert_close(of_function, output, rtol=0, atol=0.02)
    torch.testing.assert_close(context, of_torch, rtol=0, atol=0.02)


def test_training_under_autocast_gives_float32_gradients_and_another_config_is_seen(x):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert not layer.key.bias.grad.any()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(expected[name], parameter.grad, rtol=0, atol=0.05 * size + 1e-6)
    layer.config = dataclasses.replace(layer.config, scale=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = layer(x, return_attention_scores=True)[1]
    assert bool((scores == scores[..., :1]).all())


@pytest.mark.parametrize("lazy", [False, True], ids=["built", "built by the call"])
def test_autocast_compiles_as_one_graph(x, lazy):
    layer = make(query_features=None) if lazy else make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(x)
        torch.testing.assert_close(found, layer(x), rtol=0, atol=0.05)
    assert found.dtype == torch.bfloat16
    assert compiled(x).dtype == torch.float32


def test_meta_device_makes_shapes_only():
    layer = make(device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(2, 5, 8, device="meta")).shape == (2, 5, 8)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make().parameters())
    lazy = make(query_features=None)
    assert lazy(torch.empty(2, 5, 8, device="meta"), use_causal_mask=True).is_meta


def test_meta_layer_comes_alive(x):
    layer = make(device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer(x), make()(x))
    loaded = make(device="meta", seed=1)
    loaded.load_state_dict(make().state_dict(), assign=True)
    assert torch.equal(loaded(x), make()(x))
    filled = anymha.set_weights(make(device="meta", seed=1), anymha.get_weights(make()))
    assert torch.equal(filled(x), make()(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(x):
    layer = make(dropout=0.5).to("cuda")
    mask = (x[..., 0] > 0).cuda()
    output = layer(x.cuda(), value_mask=mask, use_causal_mask=True, seed=3)
    near = make(dropout=0.5)(x, value_mask=mask.cpu(), use_causal_mask=True, seed=3)
    assert torch.allclose(output.cpu(), near, atol=1e-5)
    assert make(query_features=None)(x.cuda()).is_cuda


# --- lazily built --------------------------------------------------------------------------------


def test_weights_come_at_the_first_call(x):
    layer = MultiHeadAttention(2, 4, seed=0)
    assert not layer.built
    assert all(map(torch.nn.parameter.is_lazy, layer.parameters()))
    assert layer.state_dict() == {}
    value, key = numbers(2, 6, 7), numbers(2, 6, 3)
    layer(x, value, key).sum().backward()
    assert layer.built
    assert layer.value.weight.shape == (8, 7)
    assert layer.key.weight.shape == (8, 3)
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: ((x[0],), {}), ShapeError),
        (lambda x: ((x, x[:1]), {}), ShapeError),
        (lambda x: (([],), {}), ArgumentError),
        (lambda x: ((x.numpy(),), {}), MixedBackendsError),
        (lambda x: ((x.int(),), {}), DtypeError),
        (lambda x: ((x,), {"attention_mask": torch.ones(5, 5)}), DtypeError),
        (lambda x: ((x,), {"value_mask": torch.ones(2, 4, dtype=torch.bool)}), ShapeError),
        (lambda x: ((x,), {"query_offset": 0.5}), ArgumentError),
        (lambda x: ((x,), {"seed": "one"}), ArgumentError),
    ],
    ids=["rank", "batch", "empty", "numpy", "int", "float mask", "mask", "offset", "seed"],
)
def test_bad_first_call_leaves_the_layer_unbuilt(x, call, error):
    layer = MultiHeadAttention(2, 4)
    state = torch.get_rng_state()
    args, options = call(x)
    with pytest.raises(error):
        layer(*args, **options)
    assert not layer.built
    assert list(layer.state_dict()) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_arrays_of_another_framework_are_refused(x):
    with pytest.raises(MixedBackendsError) as caught:
        make()(x, value_mask=np.ones((2, 5), bool))
    assert str(caught.value) == (
        "`value_mask` must be an array of torch, the framework of this call. Received: "
        "numpy.ndarray. Convert it first: one call takes arrays of one framework."
    )


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_mode_decides_dropout(x, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    plain = make()(x)
    assert layer.training
    assert not torch.equal(layer(x, seed=1), plain)
    assert torch.equal(layer(x, seed=1, training=False), plain)
    layer.eval()
    assert torch.equal(layer(x, seed=1), plain)
    assert not torch.equal(layer(x, seed=1, training=True), plain)


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_manual_seed_decides_dropout_where_there_is_no_seed(x, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_seed_may_be_a_tensor(x, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    assert torch.equal(layer(x, seed=torch.tensor(3)), layer(x, seed=3))
    assert torch.equal(layer(x, seed=np.int64(3)), layer(x, seed=3))
    assert torch.equal(layer(x, seed=torch.tensor(-3)), layer(x, seed=-3))


def test_manual_seed_decides_the_first_weights():
    torch.manual_seed(3)
    first = make(seed=None)
    torch.manual_seed(3)
    second = make(seed=None)
    assert torch.equal(first.query.weight, second.query.weight)
    assert not torch.equal(first.query.weight, make(seed=None).query.weight)


def test_gradcheck():
    layer = MultiHeadAttention(2, 3, query_features=4, seed=0, dtype="float64", dropout=0.25)
    parameters = dict(layer.named_parameters())

    def call(x, mask_free, *values):
        weights = dict(zip(parameters, values, strict=True))
        options = {"use_causal_mask": True, "attention_bias": mask_free, "seed": 5}
        return torch.func.functional_call(layer, weights, (x,), options)

    x = numbers(1, 3, 4, dtype=torch.float64).requires_grad_()
    bias = numbers(3, 3, dtype=torch.float64).requires_grad_()
    others = [p for name, p in parameters.items() if name != "key.bias"]
    assert torch.autograd.gradcheck(
        lambda x, b, *o: call(x, b, *o[:3], parameters["key.bias"], *o[3:]), (x, bias, *others)
    )
    assert torch.autograd.gradgradcheck(lambda x: call(x, None, *parameters.values()), (x,))


def test_parametrized_weights_are_used(x):
    class Doubled(torch.nn.Module):
        def forward(self, kernel):
            return 2 * kernel

    layer, doubled = make(), make()
    torch.nn.utils.parametrize.register_parametrization(doubled.query, "weight", Doubled())
    with torch.no_grad():
        layer.query.weight.mul_(2)
    assert torch.equal(doubled(x), layer(x))


# --- torch.func ----------------------------------------------------------------------------------


def test_functional_call_and_grad(x):
    layer = make()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.grad(
        lambda p: torch.func.functional_call(layer, p, (x,), {"use_causal_mask": True}).sum()
    )(parameters)
    layer(x, use_causal_mask=True).sum().backward()
    for name, parameter in layer.named_parameters():  # torch.func cannot take the fused kernel
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_vmap(x):
    layer, xs = make(), torch.stack([x, x + 1, -x])
    masks = xs[..., 0] > 0
    batched = torch.func.vmap(lambda x, m: layer(x, value_mask=m, use_causal_mask=True))(xs, masks)
    for one, a, m in zip(batched, xs, masks, strict=True):
        assert torch.allclose(one, layer(a, value_mask=m, use_causal_mask=True), atol=1e-6)


def test_vmap_over_seeds_is_each_seed(x):
    layer = make(dropout=0.5)
    batched = torch.func.vmap(lambda s: layer(x, seed=s))(torch.arange(3))
    for seed, one in enumerate(batched):
        assert torch.allclose(one, layer(x, seed=seed), atol=1e-6)


# torch itself scripts its rules for forward mode the first time that they are needed.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_jvp(x):
    layer, tangent = make(), numbers(2, 5, 8, seed=1)
    output, forward = torch.func.jvp(layer, (x,), (tangent,))
    _, pullback = torch.func.vjp(layer, x)
    cotangent = numbers(*output.shape, seed=2)
    there, back = (forward * cotangent).sum(), (pullback(cotangent)[0] * tangent).sum()
    assert torch.allclose(there, back, rtol=1e-4)


# --- torch.compile -------------------------------------------------------------------------------

CALLS = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "scores": {"return_attention_scores": True},
    "masks": {
        "value_mask": numbers(2, 5) > 0,
        "query_mask": numbers(2, 5, seed=1) > 0,
        "attention_mask": numbers(2, 5, 5) > 0,
        "attention_bias": numbers(2, 2, 5, 5),
    },
    "seed": {"seed": 3, "training": True},
    "tensor seed": {"seed": torch.tensor(3), "training": True},
    "offset": {"use_causal_mask": True, "query_offset": torch.tensor([0, 1])},
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_gives_the_same(x, compiled, name):
    layer = make(dropout=0.5).eval()
    outputs = [f(x, **CALLS[name]) for f in (layer, compiled(layer))]
    eager, fast = (o[0] if isinstance(o, tuple) else o for o in outputs)
    assert torch.allclose(fast, eager, atol=1e-6)
    gradients = [torch.autograd.grad(o.sum(), list(layer.parameters())) for o in (eager, fast)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_compiled_reproducible_mode_is_equal_bit_for_bit(x, compiled):
    layer = make(compute_dtype="float64")
    assert torch.equal(compiled(layer)(x, use_causal_mask=True), layer(x, use_causal_mask=True))


def test_compiled_for_any_length_traces_once(x, counter):
    layer = make()
    fast = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 6, 9):
        inputs = numbers(3, length, 8)
        assert torch.allclose(
            fast(inputs, use_causal_mask=True), layer(inputs, use_causal_mask=True)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("window", [None, 3])
def test_compiled_steps_with_a_cache_trace_once(counter, window):
    layer, inputs = make(rotary=True, sliding_window=window), numbers(2, 6, 8)
    fast = torch.compile(layer, fullgraph=True, backend=counter)
    cache, outputs = layer.make_cache(2, np.int64(6)), []
    with torch.no_grad():
        for i in range(6):
            output, cache = fast(inputs[:, i : i + 1], cache=cache)
            outputs.append(output)
    assert counter.frame_count == 1
    expected = layer(inputs, use_causal_mask=True)
    assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-6)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint32(3), np.array([3])], ids=repr)
@pytest.mark.parametrize("rng", ["portable", "native"])
def test_compiled_integers_of_numpy_are_ints(x, compiled, rng, seed):
    layer = make(dropout=0.5, dropout_rng=rng)
    assert torch.allclose(compiled(layer)(x, seed=seed), layer(x, seed=3), atol=1e-6)
    moved = compiled(make())(x, use_causal_mask=True, query_offset=seed)
    assert torch.allclose(moved, make()(x, use_causal_mask=True, query_offset=3), atol=1e-6)


@pytest.mark.parametrize("seed", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_compiled_native_dropout_is_the_same(x, compiled, seed):
    layer = make(dropout=0.5, dropout_rng="native")
    assert torch.allclose(compiled(layer)(x, seed=seed), layer(x, seed=seed), atol=1e-6)


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_compiled_dropout_without_seed_follows_manual_seed(x, compiled, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    fast = compiled(layer)
    torch.manual_seed(3)
    first, second = fast(x), fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)


def test_compiled_functions(compiled):
    q = numbers(2, 5, 2, 4)

    def heads(q):
        return anymha.dot_product_attention(q, q, q, is_causal=True, dropout=0.5, seed=3)

    assert torch.allclose(compiled(heads)(q), heads(q), atol=1e-6)
    layer, x = make(), numbers(2, 5, 8)

    def whole(weights, x):
        return anymha.multi_head_attention(weights, x, config=layer.config)

    weights = {name: w.detach() for name, w in layer.canonical_weights().items()}
    assert torch.allclose(compiled(whole)(weights, x), layer(x), atol=1e-6)


def test_compiled_function_is_the_first_thing_a_program_does():
    """The import of the backend then happens while torch traces."""
    code = """
    import sys, warnings
    warnings.simplefilter("error")
    import torch, anymha
    f = torch.compile(
        lambda q: anymha.dot_product_attention(q, q, q), fullgraph=True, backend="eager"
    )
    assert "anymha_torch" not in sys.modules
    q = torch.arange(24.0).reshape(1, 3, 2, 4)
    assert torch.equal(f(q), anymha.dot_product_attention(q, q, q))
    """
    paths = [path for path in sys.path if path]
    source = f"import sys; sys.path[:0] = {paths!r}\n{textwrap.dedent(code)}"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()


# Of torch itself, when it imports its compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_inductor(x):
    torch._dynamo.reset()
    layer = make(dropout=0.5)
    fast = torch.compile(layer, fullgraph=True)
    call = {"seed": 3, "use_causal_mask": True, "value_mask": x[..., 0] > -1}
    outputs = [f(x, **call) for f in (layer, fast)]
    assert torch.allclose(*outputs, atol=1e-5)
    gradients = [torch.autograd.grad(o.sum(), layer.query.weight)[0] for o in outputs]
    assert torch.allclose(*gradients, atol=1e-4)


# --- torch.export --------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("call", ["plain", "causal", "value mask"])
def test_export_with_any_batch_and_length(call, strict):
    layer = make().eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}

    def options(x):
        mask = {"value_mask": x[..., 0] > 0} if call == "value mask" else {}
        return mask | ({"use_causal_mask": True} if call == "causal" else {})

    x = numbers(2, 5, 8)
    shapes = {"query": sizes, **({"value_mask": sizes} if call == "value mask" else {})}
    shapes |= {"use_causal_mask": None} if call == "causal" else {}
    program = torch.export.export(layer, (x,), options(x), dynamic_shapes=shapes, strict=strict)
    assert set(program.state_dict) == set(NAMES)
    for size in ((3, 9), (1, 1), (4, 2)):
        x = numbers(*size, 8)
        result = program.module()(x, **options(x))
        assert torch.allclose(result, layer(x, **options(x)), atol=1e-6)


def test_export_saves_and_loads(x, tmp_path):
    layer = make().eval()
    program = torch.export.export(layer, (x,), {"use_causal_mask": True})
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(x, use_causal_mask=True), layer(x, use_causal_mask=True))


def test_signature_shows_the_arguments_of_the_call():
    names = list(inspect.signature(make().forward).parameters)
    assert names[:4] == ["query", "value", "key", "attention_mask"]
    assert "seed" in names
    assert "observe" not in names


# --- weights -------------------------------------------------------------------------------------


def test_set_weights_keeps_the_parameters(x):
    layer = make()
    before = dict(layer.named_parameters())
    anymha.set_weights(layer, anymha.get_weights(make(seed=1)))
    assert all(before[name] is parameter for name, parameter in layer.named_parameters())
    assert torch.equal(layer(x), make(seed=1)(x))


def test_set_weights_of_another_width_leaves_the_layer(x):
    layer = make()
    with pytest.raises(WeightsError, match=r"`query\.kernel` must have shape \(8, 2, 4\)\. Rec"):
        anymha.set_weights(layer, anymha.get_weights(make(query_features=6)))
    assert torch.equal(layer(x), make()(x))


def test_gradients_flow_through_a_program_and_depend_on_who_asks_for_them():
    layer, query, value = make(), numbers(2, 3, 8), numbers(2, 5, 8, seed=1)
    gradients = []
    for _ in range(3):
        with torch.no_grad():
            assert not layer(query, value).requires_grad
        layer.zero_grad()
        layer(query, value).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[2][name])
    assert not gradients[2]["key.bias"].any()
    bias = torch.zeros(3, 5, requires_grad=True)
    for _ in range(3):
        (own,) = torch.autograd.grad(layer(query, value, attention_bias=bias).square().sum(), bias)
        assert own.any()


def test_autocast_and_transforms_do_not_get_another_calls_program():
    layer, query, value = make(), numbers(2, 3, 8), numbers(2, 5, 8, seed=1)
    *_, expected = (layer(query, value) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, half = (layer(query, value) for _ in range(3))
    assert half.dtype == torch.bfloat16
    assert torch.equal(layer(query, value), expected)
    mapped = torch.func.vmap(lambda q: layer(q, value))(torch.stack([query, 2 * query]))
    torch.testing.assert_close(mapped[0], expected)


def test_a_second_pass_back_drops_the_same_elements():
    layer = make(dropout=0.5, memory_budget=1024)
    x = numbers(2, 40, 8).requires_grad_()
    output = layer(x, training=True, seed=3)
    gradients = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def kept() -> tuple[Any, Any]:
    """A layer that has kept its projections, and an input."""
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8)).astype("float32"))
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    return layer, x


def without_plans(layer: Any, x: Any) -> Any:
    return copy.deepcopy(layer)(x)  # plans are not copied


CHANGES = {
    "turned": lambda m: setattr(m.weight, "data", m.weight.data.t()),
    "turned in place": lambda m: m.weight.t_(),
    "in place": lambda m: m.weight.data.mul_(2),
    "replaced": lambda m: setattr(m, "weight", torch.nn.Parameter(2 * m.weight.detach())),
    "other dtype": lambda m: m.double().float().weight.data.mul_(3),
    "no bias": lambda m: m.register_parameter("bias", None),
    "bias in place": lambda m: m.bias.data.add_(1),
    "hook": lambda m: m.register_forward_hook(lambda module, args, output: 2 * output),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["query", "key", "output"])
def test_a_kept_projection_is_the_one_that_is_there(name: str, change: Any) -> None:
    layer, x = kept()
    with torch.no_grad():
        before = layer(x)
        change(getattr(layer, name))
        after = layer(x)
        torch.testing.assert_close(after, without_plans(layer, x), rtol=0, atol=1e-6)
    # A bias of zeros, and that of the key, change nothing.
    if change not in (CHANGES["no bias"], CHANGES["bias in place"]):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("width", [8, None], ids=["built", "built by the call"])
def test_training_after_inference_mode(width: int | None) -> None:
    layer = MultiHeadAttention(2, 4, query_features=width, seed=0, softcap=2.0)
    x = torch.ones(1, 3, 8)
    with torch.inference_mode():
        for _ in range(3):
            layer(x, use_causal_mask=True)
    layer(x, use_causal_mask=True).sum().backward()
    assert layer.query.weight.grad is not None


def test_a_moved_weight_does_not_stay_in_memory() -> None:
    layer, _ = kept()
    weight = weakref.ref(layer.query.weight)
    layer.query.weight = torch.nn.Parameter(layer.query.weight.detach().clone())
    gc.collect()
    assert weight() is None


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of each shape it reads
def test_a_trace_takes_the_weights_that_it_is_given() -> None:
    layer, x = kept()
    traced = torch.jit.trace(layer, x, check_trace=False)
    with torch.no_grad():
        layer.query.weight.mul_(2)
        torch.testing.assert_close(traced(x), layer(x))


def test_symbolic_lengths_are_traced() -> None:
    layer, x = kept()
    with torch.no_grad():
        traced = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("frozen", [(), ("value",), ("query", "key")])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({}, {"use_causal_mask": True}),
        ({"num_key_value_heads": 1}, {"use_causal_mask": True}),
        ({"sliding_window": 2}, {"value_mask": torch.tensor([[True] * 4 + [False], [True] * 5])}),
        ({}, {"attention_mask": torch.eye(5, dtype=torch.bool) & (torch.arange(5) > 0)}),
        ({}, {"attention_bias": torch.linspace(-1, 1, 25).reshape(5, 5)}),
        ({"dropout": 0.5}, {"training": True, "seed": 3}),
        ({"value_dim": 3, "softcap": 2.0}, {}),
        ({"memory_budget": 32}, {"use_causal_mask": True}),
    ],
)
def test_gradients_are_differentiable_in_float32(options, call, frozen):
    """As a gradient penalty needs it."""

    def second(dtype: Any) -> list[Any]:
        layer = MultiHeadAttention(2, 4, query_features=8, seed=0, **options).to(dtype)
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        torch.manual_seed(0)
        x = torch.randn(2, 5, 8, dtype=torch.float64).to(dtype).requires_grad_()
        memory = torch.randn(2, 5, 8, dtype=torch.float64).to(dtype)
        output = layer(x, memory, **call)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [p.grad.double() for p in (x, *layer.parameters()) if p.grad is not None]

    for got, wanted in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_a_hook_for_second_gradients_keeps_nothing_in_memory():
    query = torch.randn(1, 3, 2, 4, requires_grad=True)
    heads = query * 1
    kept = weakref.ref(heads)
    output = anymha.dot_product_attention(heads, heads, heads)
    del heads
    output.sum().backward()
    assert kept() is None


def test_gradients_of_a_checkpoint_may_be_recorded(x):
    layer = make(query_features=8)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({}, {"use_causal_mask": True, "query_offset": 1}),
        ({"sliding_window": 2, "num_key_value_heads": 1, "value_dim": 3, "output_shape": 5}, {}),
        ({"compute_dtype": "float64", "memory_budget": 32}, {}),
    ],
)
def test_a_trace_serves_other_lengths(x, options, call):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make(**options)

        def forward(self, x):
            return self.attention(x, **call)

    model = Model()
    traced = torch.jit.trace(model, x)
    other = numbers(3, 7, 8)
    torch.testing.assert_close(traced(other), model(other))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_default_dtype_of_torch_is_followed_unless_one_is_passed(dtype, tmp_path):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        layers = make(), make(query_features=None), make(dtype=None)
        single = make(dtype="float32")
        for layer in layers:
            assert layer.config.dtype == dtype
            assert layer(torch.randn(2, 5, 8)).dtype == getattr(torch, dtype)
        assert single.config.dtype == "float32"
        assert anymha.convert(single, to="torch").query.weight.dtype == torch.float32
        anymha.save(tmp_path / "layer.safetensors", single)
        loaded = anymha.load(tmp_path / "layer.safetensors", backend="torch")
        assert loaded.query.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(usual)
    assert layers[0].query.weight.dtype == getattr(torch, dtype)
    assert make().config.dtype == "float32"


@pytest.mark.parametrize(
    "how", ["call", "copy", "pickle", "bfloat16", "load_state_dict", "compile", "compiled model"]
)
def test_an_optimizer_made_before_the_first_call_trains(x, how):
    torch._dynamo.reset()  # shapes of other tests are no reason to compile for any
    layer = run = make(query_features=None)
    if how == "copy":
        layer = copy.deepcopy(layer)
        run = layer
    elif how == "pickle":
        run = layer = pickle.loads(pickle.dumps(layer))
    elif how == "bfloat16":
        x = x.bfloat16()
        layer.bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    if how == "load_state_dict":
        layer.load_state_dict(make(seed=1).state_dict())
    if how.startswith("compile"):
        run = layer if how == "compile" else torch.nn.Sequential(layer, torch.nn.ReLU())
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    run(x)
    before = anymha.get_weights(layer)
    assert all(type(p) is torch.nn.Parameter for p in layer.parameters())
    run(x).square().sum().backward()
    optimizer.step()
    after = anymha.get_weights(layer)
    assert [n for n in after if np.array_equal(after[n], before[n])] in ([], ["key.bias"])


def test_what_is_said_of_weights_before_the_first_call_holds_afterwards(x):
    layer = make(query_features=None).double().requires_grad_(False)
    with pytest.raises(ShapeError):
        torch.compile(layer, backend="eager")(x[0].double())
    assert not layer.built
    layer(x.double())
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.query.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"dropout": 0.1}, {"use_causal_mask": True, "training": True, "seed": 1}),
        ({"softcap": 5.0}, {"use_causal_mask": True, "return_attention_scores": True}),
        ({"value_dim": 3}, {"return_attention_scores": True}),
        ({"sliding_window": 2}, {"return_attention_scores": True}),
    ],
)
def test_calls_under_autocast_are_all_alike(x, options, call, stored, dtype):
    layer = make(**options).to(getattr(torch, stored))
    with torch.autocast("cpu", getattr(torch, dtype)):
        found = [layer(x.to(getattr(torch, stored)), **call) for _ in range(4)]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    if "return_attention_scores" in call:
        sums = found[-1][1].float().sum(-1)
        rounding = 2 * torch.finfo(getattr(torch, dtype)).eps
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=rounding)


def test_what_inference_mode_made_is_not_kept_for_training(x):
    config = anymha.AttentionConfig(2, 4, query_features=8, softcap=3.0)
    weights = {n: torch.from_numpy(w) for n, w in anymha.get_weights(make(softcap=3.0)).items()}
    for _ in range(3):
        with torch.inference_mode():
            anymha.multi_head_attention(weights, x, config=config, use_causal_mask=True)
    x.requires_grad_()
    anymha.multi_head_attention(weights, x, config=config, use_causal_mask=True).sum().backward()
    assert x.grad is not None


def test_what_a_fake_tensor_mode_made_is_not_kept(x):
    layer = make(softcap=3.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(3):
            layer(x, use_causal_mask=True)
    assert type(layer(x, use_causal_mask=True)) is torch.Tensor


@pytest.mark.parametrize("name", ["query", "output"])
def test_a_bias_that_the_options_do_not_have_is_refused(x, name):
    layer, other = make(use_bias=False), make(use_bias=False, seed=1)
    weights = anymha.get_weights(other)
    getattr(layer, name).bias = torch.nn.Parameter(torch.ones(8))
    for act in (anymha.get_weights, lambda one: anymha.set_weights(one, weights)):
        with pytest.raises(WeightsError, match=f"`{name}.bias` must not be there"):
            act(layer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_replica_of_data_parallel_computes_the_same(x, dtype):
    layer = make().to(getattr(torch, dtype))
    replica = layer._replicate_for_data_parallel()
    for name, module in layer.named_children():  # as `torch.nn.parallel.replicate` does
        copy_of = module._replicate_for_data_parallel()
        for part, parameter in module.named_parameters():
            setattr(copy_of, part, parameter.detach().clone())
        replica._modules[name] = copy_of
    x = x.to(getattr(torch, dtype))
    rounding = 2e-2 if dtype == "bfloat16" else 1e-6
    torch.testing.assert_close(replica(x), layer(x), rtol=0, atol=rounding)
    with pytest.raises(RuntimeError, match="DataParallel"):
        make(query_features=None)._replicate_for_data_parallel()


# --- Half precision ------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=HALF, ids=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest) -> Any:
    if not fused.multiplies(request.param, torch.device("cpu")):
        pytest.skip(f"the processor has no products of {request.param}")
    return request.param


def half_layer(dtype: Any, **options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(4, 16, query_features=64, seed=0, dtype=str(dtype)[6:], **options)


def by_hand(layer: MultiHeadAttention, x: Any, causal: bool) -> Any:
    """The layer as one writes it in torch."""
    batch, length, width = x.shape
    linear, attention = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    q, k, v = (
        linear(x, p.weight, p.bias).view(batch, length, 4, 16).transpose(1, 2)
        for p in (layer.query, layer.key, layer.value)
    )
    context = attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(batch, length, width)
    return linear(context, layer.output.weight, layer.output.bias)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("calls", [1, 3])
def test_half_precision_is_that_of_torch_itself(half, causal, calls) -> None:
    layer = half_layer(half)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).to(half)
    with torch.no_grad():
        output = [layer(x, use_causal_mask=causal) for _ in range(calls)][-1]
        wanted = by_hand(layer, x, causal)
    assert output.dtype == half
    torch.testing.assert_close(output, wanted, rtol=0, atol=4 * torch.finfo(half).eps)


def test_half_precision_is_told_by_explain(half) -> None:
    layer, x = half_layer(half), torch.ones(2, 5, 64, dtype=half)
    assert "fused" in anymha.explain(layer, x)
    assert "in half precision" in anymha.explain(layer, x)
    heads = torch.ones(2, 5, 4, 16, dtype=half)
    told = anymha.explain(anymha.dot_product_attention, heads, heads, heads)
    assert "in half precision" in told
    exact = half_layer(half, compute_dtype="float32")
    assert "in half precision" not in anymha.explain(exact, x)
    assert exact(x).dtype == half


def test_output_in_half_precision_is_the_same_with_the_scores(half) -> None:
    layer = half_layer(half)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(half)
    output, scores = layer(x, use_causal_mask=True, return_attention_scores=True)
    assert scores.dtype == half
    torch.testing.assert_close(output, layer(x, use_causal_mask=True), rtol=0, atol=0)
    total = scores.float().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=0.02)


def test_hidden_positions_in_half_precision_change_no_bit(half) -> None:
    layer = half_layer(half)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(half)
    other = x.clone()
    other[0, 5:], other[1] = torch.nan, torch.inf
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:], mask[1] = False, False
    call = {"query_mask": mask, "value_mask": mask}
    one, two = layer(x, **call), layer(other, **call)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    bias = layer.output.bias.detach().expand(9, 64)
    torch.testing.assert_close(one[1], bias, rtol=0, atol=0)


def test_rows_that_see_nothing_are_zero_whatever_the_kernel_gives(half, monkeypatch) -> None:
    """As cuDNN's, which leaves them other numbers; `is_cpu` alone tells that it is not there."""
    spec = AttentionSpec(0.25, (), position_mask(False, None, 0))
    query = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(half)
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    seen[0, 0, 1] = False
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    right = fused.scaled_dot_product_attention

    class OnGPU(torch.Tensor):
        is_cpu = False

    def kernel(*arguments: Any, **options: Any) -> Any:
        context = right(*arguments, **options)
        context[:, :, 1] += 0.4
        return context.as_subclass(OnGPU)

    monkeypatch.setattr(fused, "scaled_dot_product_attention", kernel)
    for given in ({"mask": seen}, {"bias": bias}, {"mask": seen, "bias": torch.zeros(3)}):
        arrays = {"query": query, "key": query, "value": query, **given}
        context = fused.fused_attention(spec, arrays, causal=False)
        assert torch.equal(context[:, :, 1], torch.zeros(1, 2, 8, dtype=half))
        assert bool((context[:, :, 0] != 0).any())


def test_gradients_of_gradients_in_half_precision(half) -> None:
    layer, exact = half_layer(half), half_layer(half, compute_dtype="float32")
    found = []
    for each in (layer, exact):
        x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).to(half)
        x.requires_grad_()
        (slope,) = torch.autograd.grad(each(x).float().square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(slope.float().square().sum(), x)
        found.append(again.float())
    size = found[1].abs().max().item()
    torch.testing.assert_close(*found, rtol=0, atol=32 * torch.finfo(half).eps * size)


def test_half_precision_compiles_as_one_graph(half) -> None:
    layer, x = half_layer(half), torch.ones(2, 5, 64, dtype=half)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, value_mask=mask), layer(x, value_mask=mask), rtol=0, atol=0.05
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_rows_are_kept_by_their_bits(dtype: str) -> None:
    x = torch.randn(4, 64, 64).to(getattr(torch, dtype))
    x[0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    x[1, 1, :2] = torch.tensor([math.nan, math.inf])
    rows = torch.rand(4, 64, 1) > 0.3
    rows[0, 0], rows[1, 1] = True, False
    expected = torch.where(rows, x, torch.zeros((), dtype=x.dtype))
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.itemsize]

    def same(y: Any) -> bool:
        return torch.equal(y.view(bits), expected.view(bits))

    def select(x: Any, rows: Any) -> Any:
        return ops.where(rows, x, 0.0)

    assert ops._rows_kept(rows, x) is not None  # of small arrays it would be slower
    assert same(select(x, rows))
    assert same(select(x.mT.contiguous().mT, rows))  # in any order in memory
    assert same(torch.jit.trace(select, (x, rows))(x, rows))
    assert same(torch.compile(select, backend="eager", fullgraph=True)(x, rows))
    assert same(torch.vmap(select)(x, rows))
    trained = x.clone().requires_grad_()
    y = select(trained, rows)
    y.backward(torch.ones_like(y))
    assert torch.equal(trained.grad, rows.to(x.dtype).expand_as(x))
    _, tangent = torch.func.jvp(lambda x: select(x, rows), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, rows.to(x.dtype).expand_as(x))
