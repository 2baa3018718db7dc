"""Caches as users of each framework treat values: compiled, mapped, looped, kept, copied."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import get_layer
from tests.frameworks import required, skip_or_fail
from tests.support import normal

HOMES = ("numpy", "torch", "tensorflow", "jax")
LENGTH, WIDTH = 6, 8
RING = {"sliding_window": 3, "rotary": True}
CAUSAL = {"use_causal_mask": True}


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> str:
    """A home of each framework; `keras_cache_checks.py` is about Keras."""
    try:
        get_layer(request.param)
    except anymha.AnymhaError as error:
        skip_or_fail(request.param, str(error))
    return request.param


class Case:
    """A layer, a sequence, and what a causal call over all of it gives.

    Args:
        home: The layer's home.
        **options: The layer's options.
    """

    def __init__(self, home: str, **options: Any) -> None:
        sizes: dict[str, Any] = {"num_heads": 4, "key_dim": 4, "query_features": WIDTH, "seed": 0}
        self.layer: Any = get_layer(home)(**sizes, num_key_value_heads=2, **options)
        self.ops = self.layer.ops
        self.x = self.ops.from_numpy(normal((2, LENGTH, WIDTH), "x").astype("float32"))
        self.expected = self.plain(self.layer(self.x, **CAUSAL))

    def plain(self, x: Any) -> np.ndarray:
        return np.asarray(self.ops.to_numpy(x))

    def cache(self, most: int = LENGTH) -> anymha.Cache:
        return self.layer.make_cache(2, most)

    def steps(self, step: Callable[[Any, Any], Any], cache: Any = None) -> Any:
        """Check the outputs of ``step(x, cache)`` position by position; the last cache."""
        cache = self.cache() if cache is None else cache
        found = []
        for i in range(LENGTH):
            output, cache = step(self.x[:, i : i + 1], cache)
            found.append(self.plain(output))
        self.check(np.concatenate(found, axis=1))
        return cache

    def check(self, output: Any, begin: int = 0, end: int = LENGTH) -> None:
        np.testing.assert_allclose(output, self.expected[:, begin:end], atol=2e-6)


def test_a_copy_goes_on_alone(home: str) -> None:
    case = Case(home, **RING)
    layer, x = case.layer, case.x
    if home == "torch":  # which copies no tensors that are differentiated
        layer.requires_grad_(False)
    _, cache = layer(x[:, :3], cache=case.cache())
    copies = [
        copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)),
        dataclasses.replace(cache), cache.copy(),
    ]  # fmt: skip
    assert all(kept._sharing is not cache._sharing for kept in copies[1:3] + copies[4:])
    for _ in range(3):  # what the original writes is not theirs
        _, cache = layer(-x[:, :1], cache=cache)
    for kept in copies:
        case.check(case.plain(layer(x[:, 3:], cache=kept)[0]), begin=3)
    assert case.plain(cache.lengths).tolist() == [LENGTH, LENGTH]


def test_a_copy_of_a_truncated_cache_holds_nothing_of_what_is_gone(home: str) -> None:
    case = Case(home)
    layer, x = case.layer, case.x
    if home == "torch":
        layer.requires_grad_(False)
    bad = case.ops.from_numpy(np.full((2, 3, WIDTH), np.nan, "float32"))
    _, cache = layer(x[:, :2], cache=case.cache())
    _, cache = layer(bad, cache=cache)
    cache = cache.truncate(2)
    copies = [copy.copy(cache), copy.deepcopy(cache), cache.copy(), dataclasses.replace(cache)]
    for kept in (*copies, cache.truncate(2), anymha.convert(cache, home)):
        case.check(case.plain(layer(x[:, 2:4], cache=kept)[0]), begin=2, end=4)


def test_arrays_of_one_cache_in_another_are_left_alone(home: str) -> None:
    case = Case(home)
    layer, x = case.layer, case.x
    if home == "torch":
        layer.requires_grad_(False)
    _, cache = layer(x[:, :3], cache=case.cache())
    arrays = {name: getattr(cache, name) for name in ("keys", "values", "lengths", "previous")}
    other = dataclasses.replace(case.cache(), **arrays)
    part = dataclasses.replace(cache, values=cache.copy().values)
    for one in (other, part, cache):  # each goes on with something else
        layer(-x[:, 3:], cache=one)
    for one in (cache, other, part):
        case.check(case.plain(layer(x[:, 3:], cache=one)[0]), begin=3)


# --- JAX -------------------------------------------------------------------------------------
@pytest.mark.parametrize("home", ["jax", "flax", "equinox"])
def test_one_program_of_jax_serves_all_steps(home: str) -> None:
    required(home)
    jax = required("jax")
    case = Case(home, **RING)
    layer = case.layer
    step = jax.jit(lambda x, cache: layer(x, cache=cache), donate_argnums=1)
    cache = case.steps(step)
    assert step._cache_size() == 1
    with pytest.raises(anymha.AnymhaError, match="room for 6"):
        layer(case.x[:, :1], cache=cache)  # eagerly, from what a program gave
    output, cache = step(case.x[:, :1], cache)
    assert np.isnan(case.plain(output)).all()
    assert case.plain(cache.overflowed).all()


def test_loops_of_jax_carry_a_cache() -> None:
    jax = required("jax")
    case = Case("jax", **RING)
    layer, x = case.layer, case.x

    def body(cache: Any, x: Any) -> Any:
        output, cache = layer(x[:, None], cache=cache)
        return cache, output[:, 0]

    _, outputs = jax.lax.scan(body, case.cache(), x.swapaxes(0, 1))
    case.check(outputs.swapaxes(0, 1))

    def again(state: Any) -> Any:
        i, cache, outputs = state
        output, cache = layer(jax.lax.dynamic_slice_in_dim(x, i, 1, 1), cache=cache)
        return i + 1, cache, jax.lax.dynamic_update_slice_in_dim(outputs, output, i, 1)

    first = (0, case.cache(), jax.numpy.zeros_like(x))
    case.check(jax.lax.while_loop(lambda state: state[0] < LENGTH, again, first)[2])


def test_ids_that_a_loop_of_jax_appends_have_their_place_before() -> None:
    jax = required("jax")
    case = Case("jax")
    ids = jax.numpy.asarray([[0, 0, 1, 1, 1, 2]] * 2, "int32")
    zeros = jax.numpy.zeros((2, LENGTH), "int32")

    def body(cache: Any, piece: Any) -> Any:
        x, own = (array[:, None] for array in piece)
        output, cache = case.layer(x, cache=cache, segment_ids=own)
        return cache, output[:, 0]

    cache = dataclasses.replace(case.cache(), segment_ids=zeros)
    _, outputs = jax.lax.scan(body, cache, (case.x.swapaxes(0, 1), ids.T))
    expected = case.layer(case.x, segment_ids=ids, **CAUSAL)
    np.testing.assert_allclose(outputs.swapaxes(0, 1), expected, atol=2e-6)


def test_vmap_of_jax_over_caches() -> None:
    jax = required("jax")
    case = Case("jax", **RING)
    caches = [case.layer.make_cache(1, LENGTH) for _ in range(2)]
    stacked = jax.tree.map(lambda *arrays: jax.numpy.stack(arrays), *caches)
    mapped = jax.jit(jax.vmap(lambda x, cache: case.layer(x[None], cache=cache)))
    first, stacked = mapped(case.x[:, :3], stacked)
    second, stacked = mapped(case.x[:, 3:], stacked)
    case.check(np.concatenate([first, second], axis=2)[:, 0])
    assert stacked.lengths.tolist() == [[LENGTH], [LENGTH]]


def test_gradients_of_jax_through_a_cache() -> None:
    jax = required("jax")
    case = Case("jax")

    def cut(layer: Any, x: Any) -> Any:
        first, cache = layer(x[:, :3], cache=layer.make_cache(2, LENGTH))
        second, _ = layer(x[:, 3:], cache=cache)
        return (jax.numpy.concatenate([first, second], 1) ** 2).sum()

    found = jax.jit(jax.grad(cut, (0, 1)))(case.layer, case.x)
    whole = jax.grad(lambda layer, x: (layer(x, **CAUSAL) ** 2).sum(), (0, 1))
    wanted = jax.jit(whole)(case.layer, case.x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_trees_of_jax() -> None:
    jax = required("jax")
    case = Case("jax")
    cache = case.cache()
    paths, structure = jax.tree_util.tree_flatten_with_path(cache)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert names == [".keys", ".values", ".lengths", ".previous", ".overflowed"]
    assert jax.tree.map(lambda x: None, cache, is_leaf=None).keys is None
    shapes = jax.eval_shape(lambda x, c: case.layer(x, cache=c), case.x, cache)
    assert jax.tree.structure(shapes[1]) == structure
    half = jax.tree.map(lambda x: x.astype("bfloat16") if x.ndim == 4 else x, cache)
    assert case.layer(case.x, cache=half)[1].keys.dtype == "bfloat16"


def test_a_step_is_exported_by_jax() -> None:
    jax = required("jax")
    case = Case("jax", **RING)
    step = jax.jit(lambda x, cache: case.layer(x, cache=cache))
    exported = jax.export.export(step)(case.x[:, :1], case.cache())
    case.steps(jax.export.deserialize(exported.serialize()).call)


@pytest.mark.parametrize("kind", ["Cache", "data"])
def test_a_module_of_flax_holds_a_cache(kind: str) -> None:
    nnx: Any = pytest.importorskip("flax.nnx")
    case = Case("flax", **RING)

    class Decoder(nnx.Module):
        def __init__(self) -> None:
            self.attention = case.layer
            cache = case.cache()
            self.cache = nnx.Cache(cache) if kind == "Cache" else nnx.data(cache)

        def __call__(self, x: Any) -> Any:
            held = self.cache.get_value() if kind == "Cache" else self.cache
            output, held = self.attention(x, cache=held)
            if kind == "Cache":
                self.cache.set_value(held)
            else:
                self.cache = held
            return output

    decoder = Decoder()
    count = 0

    @nnx.jit
    def step(decoder: Any, x: Any) -> Any:
        nonlocal count
        count += 1
        return decoder(x)

    case.steps(lambda x, cache: (step(decoder, x), cache))
    assert count == 1


def test_scan_of_flax_carries_a_cache() -> None:
    nnx: Any = pytest.importorskip("flax.nnx")
    case = Case("flax", **RING)

    @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(layer: Any, cache: Any, x: Any) -> Any:
        output, cache = layer(x[:, None], cache=cache)
        return cache, output[:, 0]

    _, outputs = run(case.layer, case.cache(), case.x.swapaxes(0, 1))
    case.check(outputs.swapaxes(0, 1))


def test_a_module_of_equinox_holds_a_cache() -> None:
    eqx: Any = required("equinox")
    case = Case("equinox", **RING)

    class Decoder(eqx.Module):
        attention: Any
        cache: anymha.Cache

        def __call__(self, x: Any) -> Any:
            output, cache = self.attention(x, cache=self.cache)
            return output, eqx.tree_at(lambda decoder: decoder.cache, self, cache)

    step = eqx.filter_jit(lambda decoder, x: decoder(x))
    case.steps(lambda x, decoder: step(decoder, x), Decoder(case.layer, case.cache()))
    filtered = eqx.filter_jit(lambda layer, x, cache: layer(x, cache=cache))
    case.steps(lambda x, cache: filtered(case.layer, x, cache))
    arrays, others = eqx.partition(case.cache(), eqx.is_array)
    assert eqx.combine(arrays, others).keys.shape == (2, 2, 3, 4)


# --- PyTorch ---------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, RING], ids=["whole", "ring"])
def test_one_program_of_torch_serves_all_steps(options: dict[str, Any]) -> None:
    torch = required("torch")
    case = Case("torch", **options)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(
        lambda x, cache: case.layer(x, cache=cache), fullgraph=True, backend=backend
    )
    with torch.no_grad():
        cache = case.steps(step)
        assert len(graphs) == 1
        with pytest.raises(anymha.AnymhaError, match="room for 6"):
            case.layer(case.x[:, :1], cache=cache)
        output, cache = step(case.x[:, :1], cache)
    assert output.isnan().all()
    assert cache.overflowed.all()
    assert len(graphs) == 1


def test_modes_of_torch() -> None:
    torch = required("torch")
    case = Case("torch", **RING)
    layer, x = case.layer, case.x
    with torch.inference_mode():
        first, cache = layer(x[:, :2], cache=case.cache())
    with torch.no_grad():
        second, cache = layer(x[:, 2:3], cache=cache)
    third, cache = layer(x[:, 3:4], cache=cache)
    with torch.inference_mode():
        last, cache = layer(x[:, 4:], cache=cache)
    case.check(torch.cat([first, second, third.detach(), last], 1))


def test_gradients_of_torch_through_a_cache() -> None:
    torch = required("torch")
    case = Case("torch", **RING)
    weights = dict(case.layer.named_parameters())
    plain = {name: weight.detach() for name, weight in weights.items()}

    def call(weights: Any, x: Any, **call: Any) -> Any:
        return torch.func.functional_call(case.layer, weights, (x,), call)

    def cut(weights: Any, x: Any) -> Any:
        first, cache = call(weights, x[:, :3], cache=case.cache())
        second, cache = call(weights, x[:, 3:4], cache=cache)
        third, _ = call(weights, x[:, 4:], cache=cache)
        return (torch.cat([first, second, third], 1) ** 2).sum()

    def whole(weights: Any, x: Any) -> Any:
        return (call(weights, x, **CAUSAL) ** 2).sum()

    wanted, _ = torch.func.grad(whole, (0, 1))(plain, case.x)
    found, _ = torch.func.grad(cut, (0, 1))(plain, case.x)
    eager = torch.autograd.grad(cut(weights, case.x), list(weights.values()))
    for name, gradient in zip(weights, eager, strict=True):
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5)
        np.testing.assert_allclose(gradient, wanted[name], atol=2e-5)


def test_trees_of_torch() -> None:
    torch = required("torch")
    pytree = torch.utils._pytree
    case = Case("torch", **RING)
    with torch.no_grad():
        caches = [
            case.layer(case.x[i : i + 1, :3], cache=case.layer.make_cache(1, LENGTH))[1]
            for i in range(2)
        ]
        assert pytree.tree_map(lambda x: x, caches[0]) is caches[0]
        stacked = pytree.tree_map(lambda *arrays: torch.stack(arrays), *caches)
        mapped = torch.func.vmap(lambda x, cache: case.layer(x[None], cache=cache))
        output, stacked = mapped(case.x[:, 3:], stacked)
    case.check(output[:, 0], begin=3)
    assert stacked.lengths.tolist() == [[LENGTH], [LENGTH]]


def test_a_step_is_exported_by_torch() -> None:
    torch = required("torch")
    case = Case("torch", **RING)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = case.layer

        def forward(self, x: Any, cache: Any) -> Any:
            return self.layer(x, cache=cache)

    with torch.no_grad():
        exported = torch.export.export(Step(), (case.x[:, :1], case.cache()))
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        case.steps(torch.export.load(file).module())


def test_torch_saves_a_cache() -> None:
    torch = required("torch")
    case = Case("torch", **RING)
    with torch.no_grad():
        _, cache = case.layer(case.x[:, :3], cache=case.cache())
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        case.check(case.layer(case.x[:, 3:], cache=torch.load(file))[0], begin=3)


# --- TensorFlow ------------------------------------------------------------------------------
@pytest.mark.parametrize("compiler", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_one_program_of_tensorflow_serves_all_steps(compiler: dict[str, Any]) -> None:
    tf = required("tensorflow")
    case = Case("tensorflow", **RING)
    step = tf.function(lambda x, cache: case.layer(x, cache=cache), **compiler)
    cache = case.steps(step)
    assert step.experimental_get_tracing_count() == 1
    with pytest.raises(anymha.AnymhaError, match="room for 6"):
        case.layer(case.x[:, :1], cache=cache)
    output, cache = step(case.x[:, :1], cache)
    assert np.isnan(output).all()
    assert cache.overflowed.numpy().all()


def test_a_program_of_tensorflow_for_all_lengths() -> None:
    tf = required("tensorflow")
    case = Case("tensorflow")
    specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, case.cache())
    signature = [tf.TensorSpec((2, None, WIDTH)), specs]
    step = tf.function(lambda x, cache: case.layer(x, cache=cache), input_signature=signature)
    first, cache = step(case.x[:, :2], case.cache())
    second, cache = step(case.x[:, 2:], cache)
    case.check(np.concatenate([first, second], axis=1))


def test_loops_of_tensorflow_carry_a_cache() -> None:
    tf = required("tensorflow")
    case = Case("tensorflow", **RING)
    layer, x = case.layer, case.x

    @tf.function
    def converted() -> Any:
        cache = layer.make_cache(2, LENGTH)
        outputs = tf.TensorArray(tf.float32, LENGTH)
        for i in tf.range(LENGTH):
            output, cache = layer(x[:, i : i + 1], cache=cache)
            outputs = outputs.write(i, output[:, 0])
        return tf.transpose(outputs.stack(), (1, 0, 2))

    @tf.function
    def written() -> Any:
        def body(i: Any, cache: Any, outputs: Any) -> Any:
            output, cache = layer(x[:, i : i + 1], cache=cache)
            return i + 1, cache, outputs.write(i, output[:, 0])

        first = (tf.constant(0), layer.make_cache(2, LENGTH), tf.TensorArray(tf.float32, LENGTH))
        _, _, outputs = tf.while_loop(lambda i, *_: i < LENGTH, body, first)
        return tf.transpose(outputs.stack(), (1, 0, 2))

    case.check(converted())
    case.check(written())


def test_gradients_of_tensorflow_through_a_cache() -> None:
    tf = required("tensorflow")
    case = Case("tensorflow")

    def cut() -> Any:
        first, cache = case.layer(case.x[:, :3], cache=case.cache())
        second, _ = case.layer(case.x[:, 3:], cache=cache)
        return tf.concat([first, second], 1)

    def gradients(function: Callable[[], Any]) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function() ** 2)
        return tape.gradient(loss, case.layer.trainable_variables)

    wanted = gradients(lambda: case.layer(case.x, **CAUSAL))
    for found in (gradients(cut), gradients(tf.function(cut))):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_module_of_tensorflow_holds_a_cache() -> None:
    tf = required("tensorflow")
    case = Case("tensorflow", **RING)

    class Decoder(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.cache = case.layer, case.cache()

        def __call__(self, x: Any) -> Any:
            output, self.cache = self.attention(x, cache=self.cache)
            return output

    decoder = Decoder()
    case.steps(lambda x, cache: (decoder(x), cache))
    assert len(decoder.variables) == len(case.layer.variables)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_cast_layer_has_caches_and_memories_of_its_dtype(dtype) -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch", seed=0)
    layer = layer.to(getattr(torch, dtype))
    x = torch.from_numpy(normal((2, 5, 8), "x")).to(getattr(torch, dtype))
    cache = layer.make_cache(2, 6)
    memory = layer.make_memory(x)
    assert cache.keys.dtype == memory.keys.dtype == x.dtype
    outputs = []
    with torch.no_grad():
        for t in range(5):
            output, cache = layer(x[:, t : t + 1], cache=cache)
            outputs.append(output)
        tolerance = {"float64": 1e-14, "bfloat16": 3e-2}[dtype]
        whole = layer(x, use_causal_mask=True)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=tolerance, rtol=0)
        torch.testing.assert_close(layer(x, memory=memory), layer(x, x), atol=tolerance, rtol=0)


def test_a_cache_with_gradients_is_copied_deeply() -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch", seed=0)
    x = torch.from_numpy(normal((2, 5, 8), "x"))
    _, cache = layer(x[:, :4], cache=layer.make_cache(2, 6))
    kept = copy.deepcopy({"cache": cache})["cache"]
    one, other = (layer(x[:, 4:], cache=c)[0] for c in (cache, kept))
    assert torch.equal(one, other)
    other.sum().backward()
    assert layer.query.weight.grad is not None
