"""Half precision in JAX: products as they are, and cuDNN's kernel, by one that stands in for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.dropout import Dropout
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution.path import AttentionShape
from tests.frameworks import required
from tests.test_jax_layer import python

jax: Any = required("jax")

import jax.numpy as jnp  # noqa: E402

from anymha_jax import MultiHeadAttention, cudnn, products  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_programs")

GPU = cudnn.Accelerator("cuda", (9, 0))
BF16 = jnp.dtype("bfloat16")
EPS = float(jnp.finfo(BF16).eps)


def numbers(*shape: int, seed: int = 0, dtype: Any = BF16) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X = numbers(2, 10, 64)

quick: Any = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling takes far longer than what is compiled; bits are compared as users compile."""


def make(dtype: str = "bfloat16", **options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(4, 16, query_features=64, seed=0, dtype=dtype, **options)


def near(tree: Any, other: Any, eps: float = 4 * EPS) -> None:
    """Of equal dtypes, and as near as roundings of every stage leave them."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=eps * max(1, np.abs(b).max()))


def same(one: Any, two: Any) -> None:
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


# --- Products ------------------------------------------------------------------------------------


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies in half precision, whichever this one is."""
    monkeypatch.setattr(products, "_is_multiplied_on_cpu", lambda dtype: True)


@pytest.mark.as_users_compile
def test_processor_multiplies_what_its_program_does_not_cast(monkeypatch) -> None:
    decide = products._is_multiplied_on_cpu.__wrapped__
    assert decide(jnp.dtype("float32"))

    def cast_first(x: Any, y: Any) -> Any:
        return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32))

    monkeypatch.setattr(products, "_wide", cast_first)
    assert not decide(BF16)
    assert not decide(jnp.dtype("float16"))


@pytest.mark.parametrize(
    ("platform", "number", "wanted"),
    [
        ("gpu", "9.0", (True, True)),
        ("gpu", "7.5", (False, True)),
        ("gpu", "gfx942", (True, True)),
        ("tpu", "", (False, False)),
    ],
)
def test_devices_that_multiply(platform, number, wanted, monkeypatch) -> None:
    device = SimpleNamespace(compute_capability=number)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = tuple(products.multiplies(jnp.dtype(n), None) for n in ("bfloat16", "float16"))
    assert found == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_derivatives_of_products_of_half_precision(dtype) -> None:
    x, y = numbers(2, 3, 5, 6, dtype=dtype), numbers(2, 3, 6, 4, seed=1, dtype=dtype)
    wide = [array.astype("float32") for array in (x, y)]
    eps = 4 * float(jnp.finfo(dtype).eps)

    def f(x: Any, y: Any) -> Any:
        return (products.wide_matmul(x, y) ** 2).sum()

    def g(x: Any, y: Any) -> Any:
        return (jnp.matmul(x, y, precision="highest") ** 2).sum()

    def narrow(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype), tree)

    one, both = jax.grad(f), jax.grad(f, (0, 1))
    both, one = jax.jit(both), jax.jit(one)
    near(both(x, y), narrow(jax.grad(g, (0, 1))(*wide)), eps)
    near(one(x, y), narrow(jax.grad(g)(*wide)), eps)
    near(jax.jvp(f, (x, y), (x, y)), jax.jvp(g, wide, wide), eps)
    second = narrow(jax.jvp(jax.grad(g, (0, 1)), wide, wide)[1])
    near(quick(lambda x, y: jax.jvp(both, (x, y), (x, y))[1])(x, y), second, 2 * eps)
    again = quick(jax.grad(lambda x, y: (one(x, y) * x).astype("float32").sum(), 1))(x, y)
    wanted = jax.grad(lambda x, y: (jax.grad(g)(x, y) * wide[0]).sum(), 1)(*wide)
    near(again, narrow(wanted), 2 * eps)
    for axes in ((0, 0), (1, 0), (None, 2)):
        many = jnp.stack([x, 2 * x], axes[0] or 0) if axes[0] is not None else x
        others = jnp.stack([y, 3 * y], axes[1])
        mapped = quick(jax.vmap(both, axes))(many, others)
        factor = 1 if axes[0] is None else 2
        near(jax.tree.map(lambda a: a[1], mapped), both(factor * x, 3 * y), eps)
        total = quick(jax.grad(lambda m, o, axes=axes: jax.vmap(f, axes)(m, o).sum(), (0, 1)))(
            many, others
        )
        wanted = jax.vmap(both, axes, axes if axes[0] is not None else (0, axes[1]))(many, others)
        if axes[0] is None:
            wanted = wanted[0].astype("float32").sum(0).astype(dtype), wanted[1]
        near(total, wanted, eps)


def test_products_of_half_precision_are_not_widened_in_either_direction() -> None:
    def f(x: Any, y: Any) -> Any:
        return (products.wide_matmul(x, y) ** 2).sum()

    x = jnp.ones((4, 8), BF16)
    text = jax.jit(jax.grad(f, (0, 1))).lower(x, x.T).as_text()
    found = re.findall(r"dot_general.*: \(tensor<\w+x(\w+)>, tensor<\w+x(\w+)>\)", text)
    assert found == [("bf16", "bf16")] * 3


@pytest.mark.parametrize("home", ["jax", "flax", "equinox"])
def test_explain_says_half_precision(home, multiplied) -> None:
    if home != "jax":
        required(home)
    options: dict[str, Any] = {"query_features": 64, "seed": 0, "backend": home}
    layer = anymha.MultiHeadAttention(4, 16, dtype="bfloat16", **options)
    x = numbers(2, 5, 64)
    assert "in half precision" in anymha.explain(layer, x)
    exact = anymha.MultiHeadAttention(4, 16, dtype="bfloat16", compute_dtype="float32", **options)
    assert "in half precision" not in anymha.explain(exact, x)
    assert layer(x).dtype == exact(x).dtype == BF16
    near(layer(x), exact(x))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "padding": {"value_mask": np.arange(10) < np.array([[7], [0]])},
    "mask": {"attention_mask": np.random.default_rng(3).random((2, 4, 10, 10)) < 0.4},
    "mask and bias": {
        "attention_mask": np.random.default_rng(3).random((10, 10)) < 0.2,
        "attention_bias": np.random.default_rng(4).standard_normal((4, 10, 10)).astype(BF16),
        "use_causal_mask": True,
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "heads": {},
    "grouped": {"num_key_value_heads": 2},
    "window": {"sliding_window": 3},
    "tiles": {"memory_budget": 4000},
    "softcap": {"softcap": 2.0},
}
PAIRS = [
    *((call, "heads") for call in CALLS),
    ("mask and bias", "grouped"),
    ("padding", "window"),
    ("causal", "window"),
]
MORE = [("mask and bias", "tiles"), ("causal", "tiles"), ("mask", "softcap")]


def arrays_of(call: dict[str, Any]) -> dict[str, Any]:
    return {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}


def loss(layer: Any, x: Any, **call: Any) -> Any:
    """Its gradients are of order one, so that `near` tells them from zero."""
    return 100 * (layer(x, **call).astype("float32") ** 2).mean()


def differentiated(layer: Any, x: Any, call: dict[str, Any]) -> Any:
    return quick(jax.grad(partial(loss, **call), (0, 1)))(layer, x)


def told_of(layer: Any, x: Any, **call: Any) -> str:
    """What `explain` tells of a call that is traced: without a program for each operation."""
    return anymha.explain(jax.eval_shape, partial(layer, **call), x)


@cache
def by_float32(call: str, options: str) -> Any:
    """Output and scores, and gradients, of the layer that computes in float32."""
    arrays, exact = arrays_of(CALLS[call]), make(compute_dtype="float32", **OPTIONS[options])

    def both(layer: Any, x: Any) -> Any:
        output, scores = layer(x, return_attention_scores=True, **arrays)
        return 100 * (output.astype("float32") ** 2).mean(), (output, scores)

    gradients, results = quick(jax.grad(both, (0, 1), has_aux=True))(exact, X)
    return results, gradients


def check(name: str, options: str) -> None:
    """A layer in half precision is as one that computes in float32, forward and backward."""
    call, layer, x = arrays_of(CALLS[name]), make(**OPTIONS[options]), X
    output, scores = layer(x, return_attention_scores=True, **call)
    same(layer(x, **call), output)
    assert output.dtype == scores.dtype == BF16
    wanted, gradient = by_float32(name, options)
    near((output, scores), wanted)
    near(differentiated(layer, x, call), gradient, 8 * EPS)
    hidden = ~(np.asarray(wanted[1], np.float32) > 0).any((1, 3))
    bias = np.broadcast_to(np.asarray(layer.weights["output.bias"], np.float32), output.shape)
    same(np.asarray(output, np.float32)[hidden], bias[hidden])


@pytest.mark.parametrize(("call", "options"), [*PAIRS, *MORE])
def test_half_precision_is_float32_rounded_at_each_stage(call, options, multiplied) -> None:
    check(call, options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dropout_in_half_precision_drops_the_same(dtype, multiplied) -> None:
    for rate in (0.25, 0.9999):  # kept values are scaled by 4, and by more than float16 holds
        layer = make(dtype, dropout=rate)
        exact = make(dtype, dropout=rate, compute_dtype="float32")
        x = numbers(2, 10, 64, dtype=dtype)
        call = {"training": True, "seed": 5}
        near(layer(x, **call), exact(x, **call), 8 * float(jnp.finfo(dtype).eps))


@pytest.mark.as_users_compile
@pytest.mark.parametrize("call", ["plain", "mask and bias"])  # with padding, as all
def test_hidden_positions_change_no_bit(call, multiplied) -> None:
    hidden_positions(CALLS[call])


def hidden_positions(call: dict[str, Any]) -> None:
    layer, x = make(), numbers(2, 10, 64)
    mask = jnp.arange(10) < jnp.asarray([[6], [0]])
    call = {"query_mask": mask, **arrays_of(call), "value_mask": mask}
    other = x.at[0, 6:].set(jnp.nan).at[1].set(jnp.inf)

    def both(layer: Any, x: Any) -> Any:
        output = layer(x, **call)
        return 100 * (output.astype("float32") ** 2).mean(), output

    gradient = jax.jit(jax.grad(both, 1, has_aux=True))
    for one, two in zip(gradient(layer, x), gradient(layer, other), strict=True):
        same(one, two)


# --- The choice of cuDNN's kernel ----------------------------------------------------------------

OPEN, CAUSAL, WINDOW = PositionMask(), PositionMask(None, 0), PositionMask(3, 0)
SHAPE = AttentionShape(2, 8, 8, 64, 64, 64, 64, BF16, None)
HALF_SHAPE = SHAPE._replace(dtype=jnp.dtype("float16"))
TAKEN: dict[str, Any] = {
    "plain": (SHAPE, OPEN),
    "float16": (HALF_SHAPE, OPEN),
    "causal": (SHAPE, CAUSAL),
    "causal, float16": (HALF_SHAPE, CAUSAL),
    "window": (HALF_SHAPE, WINDOW),
    "grouped": (SHAPE._replace(key_heads=2), OPEN),
    "mask": (SHAPE._replace(has_mask=True, per_query=True), CAUSAL),
    "bias": (SHAPE._replace(has_bias=True), OPEN),
    "offset": (SHAPE, PositionMask(None, 0, 3)),
    "window of both sides": (SHAPE, PositionMask(2, 2)),
    "other lengths": (SHAPE._replace(queries=7, keys=9, has_mask=True), CAUSAL),
    "Ampere": (SHAPE._replace(key_dim=128, value_dim=128), OPEN, GPU._replace(capability=(8, 0))),
    "wide": (SHAPE._replace(key_dim=256, value_dim=256), OPEN),
}
REFUSED: dict[str, Any] = {
    "CPU": (SHAPE, OPEN, cudnn.Accelerator(), "no kernel here"),
    "AMD": (SHAPE, OPEN, cudnn.Accelerator("rocm", (9, 0)), "no kernel here"),
    "TPU": (SHAPE, OPEN, cudnn.Accelerator("tpu"), "no kernel here"),
    "Turing": (SHAPE, OPEN, GPU._replace(capability=(7, 5)), "compute capability"),
    "several": (SHAPE, OPEN, GPU._replace(is_shared=True), "devices"),
    "float32": (SHAPE._replace(dtype=jnp.dtype("float32")), OPEN, GPU, "half precision"),
    "float64": (SHAPE._replace(dtype=jnp.dtype("float64")), OPEN, GPU, "half precision"),
    "width": (SHAPE._replace(key_dim=60, value_dim=60), OPEN, GPU, "multiple of 8"),
    "widths": (SHAPE._replace(value_dim=32), OPEN, GPU, "one width"),
    "too wide": (SHAPE._replace(key_dim=264, value_dim=264), OPEN, GPU, "up to 256"),
    "too wide for Ampere": (
        SHAPE._replace(key_dim=136, value_dim=136), OPEN, GPU._replace(capability=(8, 6)), "to 128"
    ),
    "one query": (SHAPE._replace(queries=1), OPEN, GPU, "two queries"),
    "one key": (SHAPE._replace(keys=1), OPEN, GPU, "two queries"),
    "symbols": (SHAPE._replace(queries="T"), OPEN, GPU, "not known"),
    "mask in float16": (HALF_SHAPE._replace(has_mask=True), OPEN, GPU, "float16"),
    "bias in float32": (SHAPE._replace(has_bias=True, wide_bias=True), OPEN, GPU, "round the bias"),
    "bias in float16": (HALF_SHAPE._replace(has_bias=True), OPEN, GPU, "float16"),
    "offset in float16": (HALF_SHAPE, PositionMask(None, 0, 3), GPU, "float16"),
    "other lengths in float16": (HALF_SHAPE._replace(queries=7), CAUSAL, GPU, "float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
def test_kernel_is_taken(case) -> None:
    shape, positions, on = (*case, GPU)[:3]
    assert cudnn.why_not_fused(AttentionSpec(0.5, (), positions), shape, on) is None


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_kernel_is_refused(case) -> None:
    shape, positions, on, reason = case
    assert reason in cudnn.why_not_fused(AttentionSpec(0.5, (), positions), shape, on)


@pytest.mark.parametrize("native", [True, False])
def test_kernel_is_refused_with_dropout(native) -> None:
    spec = AttentionSpec(0.5, (), OPEN, Dropout(9, 3, native))
    assert "dropout" in (cudnn.why_not_fused(spec, SHAPE, GPU) or "")


def test_rule_asks_this_machine_by_default() -> None:
    wanted = cudnn.accelerator()
    spec = AttentionSpec(0.5, (), OPEN)
    assert cudnn.why_not_fused(spec, SHAPE) == cudnn.why_not_fused(spec, SHAPE, wanted)
    assert wanted.platform in (jax.default_backend(), "cuda", "rocm")


# --- A kernel that stands in for cuDNN's ---------------------------------------------------------


def softmax_of_all(query: Any, key: Any, value: Any, bias: Any, call: cudnn.Call) -> Any:
    """Attention that gives rows without a visible key other numbers."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    wide = [x.astype("float32") for x in (query, key, value)]
    logits = jnp.einsum("bthd,bshd->bhts", wide[0], wide[1], precision="highest") * call.scale
    t, s = logits.shape[2:]
    distance = jnp.arange(s) - jnp.arange(t)[:, None]
    if call.positions.right == 0:
        logits = jnp.where(distance <= 0, logits, -jnp.inf)
    if call.positions.left is not None:
        logits = jnp.where(distance >= -call.positions.left, logits, -jnp.inf)
    if bias is not None:
        logits = logits + bias.astype("float32")
    weights = jax.nn.softmax(logits)
    context = jnp.einsum("bhts,bshd->bthd", weights, wide[2], precision="highest")
    if bias is not None:
        wrong = (bias <= cudnn.HIDDEN).all(-1)  # [b, h, T]
        context = context + 0.4 * jnp.swapaxes(wrong, 1, 2)[..., None]
    return context.astype(query.dtype)


def exact_heads(*arrays: Any, **call: Any) -> Any:
    wide = [x.astype("float32") for x in arrays]
    return anymha.dot_product_attention(*wide, **call).astype(BF16)


@jax.custom_jvp
def underivable(x: Any) -> Any:
    return x


@underivable.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("cuDNN's gradients have no derivative")


class Kernel:
    """As cuDNN's: gradients, and no derivative of them, no forward mode, and one batch axis."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, call: cudnn.Call, query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        assert query.shape[1] > 1
        assert key.shape[1] > 1
        assert query.ndim == key.ndim == value.ndim == 4
        assert query.dtype == key.dtype == value.dtype == BF16
        if bias is not None:
            assert bias.dtype == BF16
            assert bias.shape[2:] == (query.shape[1], key.shape[1])
            assert bias.shape[0] in (1, query.shape[0])
            assert bias.shape[1] in (1, query.shape[2])
            assert not query.shape[1] % 2
            assert not key.shape[1] % 2
        arrays = (query, key, value) if bias is None else (query, key, value, bias)

        def written(*arrays: Any) -> Any:
            q, k, v, *rest = map(unbatched, arrays)
            return softmax_of_all(q, k, v, rest[0] if rest else None, call)

        @jax.custom_vjp
        def attention(*arrays: Any) -> Any:
            self.forward += 1
            return written(*arrays)

        def backward(arrays: Any, cotangent: Any) -> Any:
            self.backward += 1
            return jax.tree.map(underivable, jax.vjp(written, *arrays)[1](unbatched(cotangent)))

        attention.defvjp(lambda *arrays: (attention(*arrays), arrays), backward)
        return attention(*arrays)


@jax.custom_batching.custom_vmap
def _unbatched(x: Any) -> Any:
    return x


@_unbatched.def_vmap
def _(size: int, batched: Any, x: Any) -> Any:
    raise NotImplementedError("cuDNN's kernel has one batch axis")


@jax.custom_jvp
def unbatched(x: Any) -> Any:
    return _unbatched(x)


@unbatched.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return unbatched(*primals), tangents[0]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, multiplied: None) -> Iterator[Kernel]:
    """The stand-in, where cuDNN would be called; with one call of it at least."""
    kernel = Kernel()
    monkeypatch.setattr(cudnn, "PLATFORM", "cpu")
    monkeypatch.setattr(cudnn, "accelerator", lambda: GPU._replace(platform="cpu"))
    monkeypatch.setattr(cudnn, "kernel", kernel)
    cudnn._compiled.clear_cache()
    yield kernel
    cudnn._compiled.clear_cache()
    assert kernel.forward


@pytest.mark.parametrize(("call", "options"), PAIRS)
def test_kernel_gives_the_written_meaning(call, options, kernel) -> None:
    check(call, options)
    assert kernel.backward
    told = told_of(make(**OPTIONS[options]), X, **arrays_of(CALLS[call]))
    assert "fused" in told
    assert "in half precision" in told


@pytest.mark.as_users_compile
@pytest.mark.parametrize("call", ["causal", "mask", "mask and bias"])
def test_hidden_positions_change_no_bit_of_the_kernels(call, kernel) -> None:
    hidden_positions(CALLS[call])


@pytest.mark.parametrize("lengths", [(9, 9), (2, 3), (9, 4)], ids=str)
def test_kernel_gets_even_lengths_where_there_is_a_mask(lengths, kernel) -> None:
    layer, exact = make(), make(compute_dtype="float32")
    x, memory = (numbers(2, n, 64, seed=n) for n in lengths)

    def f(layer: Any, x: Any, memory: Any, mask: Any) -> Any:
        output = layer(x, memory, value_mask=mask, use_causal_mask=True)
        return 100 * (output.astype("float32") ** 2).mean(), output

    gradient = quick(jax.grad(f, (0, 1, 2), has_aux=True))
    for mask in (np.arange(lengths[1]) < 2, np.zeros(lengths[1], bool)):
        mask = jnp.asarray(mask[None].repeat(2, 0))
        own, wanted = (gradient(each, x, memory, mask) for each in (layer, exact))
        near(own, wanted)


@pytest.mark.as_users_compile
def test_key_that_nobody_sees_may_hold_any_number(kernel) -> None:
    q, k, v = (numbers(2, 10, 4, 16, seed=n) for n in range(3))
    mask = jnp.arange(10) < 7
    other = k.at[:, 7:].set(1e30)
    attention = jax.jit(lambda keys: anymha.dot_product_attention(q, keys, v, mask=mask))
    same(attention(other), attention(k))


def test_bias_that_hides_and_its_gradient(kernel) -> None:
    q, k, v = (numbers(2, 10, 4, 16, seed=n) for n in range(3))
    for shape in ((2, 4, 10, 10), (10, 10)):
        bias = numbers(*shape, seed=5)
        hides = jnp.where(numbers(*shape, seed=6) > 0, bias, -jnp.inf).at[..., -1:, :].set(-jnp.inf)

        def f(bias: Any, q: Any, k: Any, v: Any) -> Any:
            output = anymha.dot_product_attention(q, k, v, bias=bias).astype("float32")
            return (output**2).sum(), output

        gradient = quick(jax.grad(f, has_aux=True))
        for each in (bias, hides):
            wide = [x.astype("float32") for x in (each, q, k, v)]
            (own, found), (right, wanted) = gradient(each, q, k, v), gradient(*wide)
            near(found, wanted)
            near(own, right.astype(BF16), 8 * EPS)


def doubly(f: Any) -> Any:
    return jax.grad(lambda x: (jax.grad(f)(x).astype("float32") ** 2).sum())


def total(*tree: Any) -> Any:
    return sum(x.astype("float32").sum() for x in tree)


class Exact:
    """Values and derivatives of the layer in float32, of which each transformation is made."""

    def __init__(self, f: Any) -> None:
        self.value, self.grad = quick(f), quick(jax.grad(f))
        self.along = quick(lambda x, v: jax.jvp(jax.grad(f), (x,), (v,))[1])

    def ones(self, x: Any) -> Any:
        return self.along(x, jnp.ones_like(x))

    def twice(self, x: Any) -> Any:
        return 2 * self.along(x, self.grad(x))

    def __call__(self, x: Any, *others: Any) -> Any:
        return jnp.stack([self.value(each) for each in (x, *others)])

    def grads(self, *several: Any) -> Any:
        return jnp.stack([self.grad(x) for x in several])


# What is done to a function, and what that gives of one with these values and derivatives.
Transform = Callable[[Any], Callable[[Any], Any]]
TRANSFORMS: dict[str, tuple[Transform, Callable[[Exact, Any], Any]]] = {
    "jvp": (
        lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)),
        lambda e, x: (e.value(x), total(e.grad(x))),
    ),
    "grad": (jax.grad, lambda e, x: e.grad(x)),
    "forward over reverse": (
        lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),)),
        lambda e, x: (e.grad(x), e.ones(x)),
    ),
    "reverse over reverse": (doubly, lambda e, x: e.twice(x)),
    "reverse over forward": (
        lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]),
        lambda e, x: e.ones(x),
    ),
    "vmap": (
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x + 1])), lambda e, x: e(x, x + 1),
    ),
    "vmap of vmap": (
        lambda f: lambda x: jax.vmap(jax.vmap(f))(jnp.stack([x, -x] * 3).reshape(2, 3, *x.shape)),
        lambda e, x: e(*[x, -x] * 3).reshape(2, 3),
    ),
    "vmap of grad": (
        lambda f: lambda x: jax.vmap(jax.grad(f), 1)(jnp.stack([x, x + 1], 1)),
        lambda e, x: e.grads(x, x + 1),
    ),
    "grad of vmap": (
        lambda f: lambda x: jax.grad(lambda x: jax.vmap(f, 2)(x).sum())(jnp.stack([x, x + 1], 2)),
        lambda e, x: jnp.moveaxis(e.grads(x, x + 1), 0, 2),
    ),
    "vmap of the second": (
        lambda f: jax.vmap(doubly(f), (None,), axis_size=2),
        lambda e, x: jnp.stack([e.twice(x)] * 2),
    ),
    "scan": (
        lambda f: lambda x: jax.lax.scan(
            lambda c, x: (c, jax.grad(f)(x)), 0, jnp.stack([x, x + 1])
        )[1],
        lambda e, x: e.grads(x, x + 1),
    ),
    "checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), lambda e, x: e.grad(x)),
    "linearize": (
        lambda f: lambda x: jax.linearize(f, x)[1](jnp.ones_like(x)),
        lambda e, x: total(e.grad(x)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def exactly() -> Exact:
    exact, call = make(compute_dtype="float32"), arrays_of(CALLS["padding"])
    return Exact(lambda x: loss(exact, x, **call))


@pytest.mark.parametrize(("transform", "wanted"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_kernel_is_transformed(transform, wanted, exactly, kernel) -> None:
    layer, call = make(), arrays_of(CALLS["padding"])
    own = quick(transform(lambda x: loss(layer, x, **call)))(X)
    near(own, wanted(exactly, X), 8 * EPS)


def test_kernel_without_a_compiler(kernel) -> None:
    layer, exact, x = make(), make(compute_dtype="float32"), numbers(2, 10, 64)
    near(jax.grad(loss, 1)(layer, x), jax.grad(loss, 1)(exact, x))
    traced = kernel.forward, kernel.backward
    q = numbers(2, 10, 4, 16)
    for n in range(3):
        near(anymha.dot_product_attention(q, q * n, q), exact_heads(q, q * n, q))
    assert kernel.forward == traced[0]


def test_many_cotangents_of_one_pass(kernel) -> None:
    layer, exact, x = make(), make(compute_dtype="float32"), numbers(2, 10, 64)
    cotangents = numbers(3, 2, 10, 64, seed=2)
    own, wanted = (
        quick(jax.vmap(jax.vjp(lambda x, layer=each: layer(x), x)[1]))(cotangents)
        for each in (layer, exact)
    )
    near(own, wanted, 8 * EPS)


def test_lengths_that_the_kernel_refuses_take_another_way(kernel) -> None:
    layer, exact = make(), make(compute_dtype="float32")
    for length in (10, 1, 9, 10, 1):
        x = numbers(2, length, 64)
        near(layer(x, use_causal_mask=True), exact(x, use_causal_mask=True))
        told = told_of(layer, x, use_causal_mask=True)
        assert told.startswith("fused" if length > 1 else "whole")


def test_kernel_of_cudnn_is_in_the_program_for_cuda_and_nothing_else(
    multiplied, monkeypatch
) -> None:
    """The program is made here, for CUDA; the layer that is called here takes the formula."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "accelerator", lambda: GPU)
    x, kinds = numbers(2, 10, 64), {"plain": "NO_MASK", "causal": "CAUSAL", "padding": "NO_MASK"}
    for name, kind in kinds.items():
        layer, call = make(), arrays_of(CALLS[name])
        bias = "ScaleBias" if name == "padding" else ""
        for function, kernels in (
            (loss, [f"{bias}Softmax"]),
            (jax.grad(loss), [f"{bias}Softmax", f"{bias}SoftmaxBackward"]),
        ):
            traced = jax.jit(partial(function, **call)).trace(layer, x)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert re.findall(r"__cudnn\$fmha(\w+)", text) == kernels
            assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {kind}
            assert "exponential" not in text
        assert "fused" in anymha.explain(layer, x, **call)
        near(layer(x, **call), make(compute_dtype="float32")(x, **call))
    layer = make(sliding_window=3)
    traced = jax.jit(lambda layer, x: layer(x, use_causal_mask=True)).trace(layer, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == ["3"]


def test_half_precision_is_shared_out() -> None:
    code = """
    import warnings; warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from anymha_jax import MultiHeadAttention, cudnn, products
    from tests.test_jax_half import GPU, Kernel
    products._is_multiplied_on_cpu = lambda dtype: True
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 64)), "bfloat16")
    make = lambda **o: MultiHeadAttention(4, 16, query_features=64, seed=0, dtype="bfloat16", **o)
    exact = make(compute_dtype="float32")
    def loss(layer, x):
        return (layer(x, use_causal_mask=True).astype("float32") ** 2).sum()
    wanted = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(exact, x))
    kernel = Kernel()
    for taken in (False, True):
        layer = make()
        if taken:
            cudnn.PLATFORM, cudnn.kernel = "cpu", kernel
            on = GPU._replace(platform="cpu")
            cudnn.accelerator = lambda: on._replace(is_shared=not cudnn._is_manual())
        def check(found):
            for a, b in zip(jax.tree.leaves(found), wanted, strict=True):
                a, b = (np.asarray(z, "float32") for z in (a, b))
                np.testing.assert_allclose(a, b, rtol=0, atol=0.04 * max(1, np.abs(b).max()))
        for spec in (P("d"), P(None, "d")):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            check(jax.jit(jax.grad(loss, (0, 1)))(layer, placed))
        assert not kernel.forward
        share = jax.shard_map(lambda layer, x: jax.lax.psum(loss(layer, x), "d"),
                              mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        check(jax.jit(jax.grad(share, (0, 1)))(layer, x))
        assert bool(kernel.forward and kernel.backward) == taken
    """
    flags = "--xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false"
    python(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
