"""The TensorFlow layer is a `tf.Module`: graphs, XLA, SavedModel, checkpoints, tapes."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

import anymha
import anymha.functional
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError, WeightsError
from tests.frameworks import required
from tests.support import normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of TensorFlow, while it is imported
    tf = required("tensorflow")

from anymha_tensorflow import MultiHeadAttention

NAMES = [
    f"{projection}.{part}"
    for projection in ("query", "key", "value", "output")
    for part in ("kernel", "bias")
]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def make(**options):
    return MultiHeadAttention(2, 4, **{"query_features": 8, "seed": 0, **options})


def numbers(*shape, seed=0, dtype="float32"):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), dtype)


def booleans(*shape, seed=0):
    return numbers(*shape, seed=seed) > -0.5


@pytest.fixture
def x():
    return numbers(2, 5, 8)


def assert_equal(one, other):
    np.testing.assert_array_equal(one.numpy(), other.numpy())


def differ(one, other):
    return bool(tf.reduce_any(one != other))


# --- state --------------------------------------------------------------------------------------


def test_variables_have_the_canonical_names():
    layer = make(name="attention")
    names = {variable.name for variable in layer.trainable_variables}
    assert names == {f"attention/{name.replace('.', '/')}:0" for name in NAMES}
    assert len(layer.variables) == 8
    assert list(layer.canonical_weights()) == NAMES
    assert len(make(use_bias=False).variables) == 4


def test_a_module_that_holds_the_layer_finds_its_variables():
    holder = tf.Module()
    holder.attention = make()
    assert len(holder.trainable_variables) == 8


@pytest.mark.parametrize("built", [True, False])
def test_checkpoint(x, tmp_path, built):
    source = make()
    path = tf.train.Checkpoint(layer=source).save(str(tmp_path / "layer"))
    target = make(seed=1) if built else MultiHeadAttention(2, 4)
    status = tf.train.Checkpoint(layer=target).restore(path)
    output = target(x)
    status.assert_consumed()
    assert_equal(output, source(x))


def test_saved_model(x, tmp_path):
    layer = make()

    class Served(tf.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, None, 8], name="x"),
                tf.TensorSpec([None, None], tf.bool, name="mask"),
            ]
        )
        def __call__(self, x, mask):
            return {"output": self.layer(x, value_mask=mask, use_causal_mask=True)}

    served = Served()
    tf.saved_model.save(served, str(tmp_path), signatures=served.__call__)
    loaded = tf.saved_model.load(str(tmp_path))
    for shape in ((2, 5), (3, 7)):
        x, mask = numbers(*shape, 8), booleans(*shape)
        wanted = layer(x, value_mask=mask, use_causal_mask=True)
        assert_equal(loaded(x, mask)["output"], wanted)
        assert_equal(loaded.signatures["serving_default"](x=x, mask=mask)["output"], wanted)
    loaded.layer.query.kernel.assign_add(tf.ones_like(layer.query.kernel))
    assert differ(loaded(x, mask)["output"], wanted)  # its variables are alive


def test_saved_model_of_the_layer_itself(x, tmp_path):
    layer = make()
    call = tf.function(layer.__call__).get_concrete_function(tf.TensorSpec([None, None, 8]))
    tf.saved_model.save(layer, str(tmp_path), signatures=call)
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    assert_equal(served(query=x)["output_0"], layer(x))


def test_deepcopy_is_independent(x):
    layer = make()
    other = copy.deepcopy(layer)
    assert_equal(other(x), layer(x))
    other.query.kernel.assign_add(tf.ones_like(other.query.kernel))
    assert differ(other(x), layer(x))


def test_set_weights_keeps_the_variables(x):
    layer = make()
    before = layer.canonical_weights()
    anymha.set_weights(layer, anymha.get_weights(make(seed=1)))
    assert all(before[name] is held for name, held in layer.canonical_weights().items())
    assert_equal(layer(x), make(seed=1)(x))
    with pytest.raises(WeightsError, match=r"`query\.kernel` must have shape \(8, 2, 4\)"):
        anymha.set_weights(layer, anymha.get_weights(make(query_features=6)))
    assert_equal(layer(x), make(seed=1)(x))


def test_tied_weights_have_one_value():
    layer, weights = make(), anymha.get_weights(make(seed=1))
    layer.key.kernel = layer.query.kernel
    with pytest.raises(WeightsError, match=r"`query.kernel` and `key.kernel` are tied.*two values"):
        anymha.set_weights(layer, weights)
    weights["key.kernel"] = weights["query.kernel"]
    anymha.set_weights(layer, weights)
    np.testing.assert_array_equal(anymha.get_weights(layer)["key.kernel"], weights["key.kernel"])


# --- graphs -------------------------------------------------------------------------------------

UNKNOWN = [None, None, 8]
B, T, N = 2, 5, 3
GRAPHS = {
    "plain": ({}, (B, T), {}, {}),
    "causal": ({}, (B, T), {}, {"use_causal_mask": True, "return_attention_scores": True}),
    "window": ({"sliding_window": 2}, (B, T), {}, {"use_causal_mask": True}),
    "value mask": ({}, (B, T), {"value_mask": booleans(B, T)}, {}),
    "query mask": ({}, (B, T), {"query_mask": booleans(B, T)}, {}),
    "mask (T, S)": ({}, (B, T), {"attention_mask": booleans(T, T)}, {}),
    "mask (B, T, S)": ({}, (B, T), {"attention_mask": booleans(B, T, T)}, {}),
    "mask (B, 1, T, S)": ({}, (B, T), {"attention_mask": booleans(B, 1, T, T)}, {}),
    "bias": ({}, (B, T), {"attention_bias": numbers(B, 2, T, T)}, {}),
    "offset": ({}, (B, T), {"query_offset": tf.range(B)}, {"use_causal_mask": True}),
    "seed": ({"dropout": 0.5}, (B, T), {"seed": tf.constant(3)}, {"training": True}),
    "int seed": ({"dropout": 0.5}, (B, T), {}, {"training": True, "seed": 3}),
    "grouped": ({"num_key_value_heads": 1, "output_shape": (3, 2)}, (B, T), {}, {}),
    "reproducible": ({"compute_dtype": "float64"}, (B, T), {}, {"use_causal_mask": True}),
    "N-D": ({}, (B, N, T), {"value_mask": booleans(B, N, T)}, {"use_causal_mask": True}),
    "N-D mask": ({}, (B, N, T), {"attention_mask": booleans(B, N, T, N, T)}, {}),
    "N-D bias": ({}, (B, N, T), {"attention_bias": numbers(B, 2, N, T, N, T)}, {}),
    "axes": ({"attention_axes": 2}, (B, N, T), {"value_mask": booleans(B, N, T)}, {}),
    "axes mask": ({"attention_axes": -2}, (B, N, T), {"attention_mask": booleans(B, N, T, T)}, {}),
    "swapped axes": ({"attention_axes": 1}, (B, N, T), {}, {"return_attention_scores": True}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_of_unknown_lengths_gives_the_same(name):
    """By TensorFlow's graph, and by XLA."""
    options, shape, arrays, call = GRAPHS[name]
    layer, x = make(**options), numbers(*shape, 8)
    specs = [tf.TensorSpec([None] * array.shape.rank, array.dtype) for array in arrays.values()]
    signature = [tf.TensorSpec([None] * len(shape) + [8]), *specs]

    def function(x, *values):
        return layer(x, **dict(zip(arrays, values, strict=True)), **call)

    plain = tf.nest.flatten(layer(x, **arrays, **call))
    for jit in (False, True):
        graph = tf.function(function, input_signature=signature, jit_compile=jit)
        fast = tf.nest.flatten(graph(x, *arrays.values()))
        for one, other in zip(fast, plain, strict=True):
            np.testing.assert_allclose(one, other, **TOLERANCE, err_msg=f"XLA: {jit}")
            if options.get("compute_dtype") == "float64":
                assert_equal(one, other)


@pytest.mark.parametrize("known", [[2, None, 8], [None, 5, 8], [2, 5, 8]])
def test_shapes_known_in_part_stay_known(x, known):
    layer = make(output_shape=(3, 2))

    @tf.function(input_signature=[tf.TensorSpec(known), tf.TensorSpec([None, 6, 7])])
    def graph(x, value):
        output, scores = layer(x, value, return_attention_scores=True)
        assert output.shape.rank == 4
        assert output.shape[2:] == [3, 2]
        assert scores.shape[1] == 2
        return output

    value = numbers(2, 6, 7)
    layer = make(output_shape=(3, 2), value_features=7)
    np.testing.assert_allclose(graph(x, value), layer(x, value), **TOLERANCE)


def test_mask_of_the_wrong_length_fails_where_it_is_known():
    layer = make()

    @tf.function(input_signature=[tf.TensorSpec([None, 5, 8]), tf.TensorSpec([None, 4], tf.bool)])
    def graph(x, mask):
        return layer(x, value_mask=mask)

    with pytest.raises(ShapeError, match=r"`value_mask` must broadcast to shape \(\?, 5\)\."):
        graph.get_concrete_function()


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_functions_in_a_graph(jit):
    q = numbers(2, 5, 2, 4)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 2, 4])], jit_compile=jit)
    def heads(q):
        return anymha.dot_product_attention(q, q, q, is_causal=True, dropout=0.5, seed=3)

    wanted = anymha.dot_product_attention(q, q, q, is_causal=True, dropout=0.5, seed=3)
    np.testing.assert_allclose(heads(q), wanted, **TOLERANCE)
    layer, x = make(), numbers(2, 5, 8)

    @tf.function(jit_compile=jit)
    def whole(x):
        return anymha.multi_head_attention(layer.canonical_weights(), x, config=layer.config)

    np.testing.assert_allclose(whole(x), layer(x), **TOLERANCE)


def test_functions_are_not_converted_by_autograph(monkeypatch):
    """It would take seconds for all that they call, and warn of what it cannot convert."""
    functional, seen = anymha.functional, []

    def noting(function):
        def called(*args, **options):
            seen.append(inspect.stack()[1].filename)
            return function(*args, **options)

        return called

    monkeypatch.setattr(functional, "common_ops", noting(functional.common_ops))
    layer, q = make(), numbers(2, 5, 2, 4)

    @tf.function
    def graph(q, x):
        turned = anymha.rotate(q, tf.range(5), True)
        context, lse = anymha.dot_product_attention(turned, q, q, return_lse=True)
        anymha.multi_head_attention(layer.canonical_weights(), x, config=layer.config)
        return anymha.merge_attention([context, context], [lse, lse])

    np.testing.assert_array_equal(graph(q, numbers(2, 5, 8))[0].shape, q.shape)
    assert seen == [functional.__file__] * 4


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
@pytest.mark.parametrize("signature", [None, [tf.TensorSpec(UNKNOWN)]], ids=["shapes", "unknown"])
def test_weights_come_at_a_first_call_in_a_graph(x, jit, signature):
    layer = MultiHeadAttention(2, 4, seed=0)

    @tf.function(jit_compile=jit, input_signature=signature)
    def graph(x):
        return layer(x)

    np.testing.assert_allclose(graph(x), make()(x), **TOLERANCE)
    assert len(layer.trainable_variables) == 8
    np.testing.assert_allclose(graph(x + 1), layer(x + 1), **TOLERANCE)


def test_first_call_without_a_seed_makes_weights_in_a_graph(x):
    layer = MultiHeadAttention(2, 4)
    tf.random.set_seed(3)
    graph = tf.function(lambda x: layer(x))
    np.testing.assert_allclose(graph(x), layer(x), **TOLERANCE)


def test_unknown_width_is_refused_at_the_first_call():
    layer = MultiHeadAttention(2, 4)
    graph = tf.function(layer.__call__, input_signature=[tf.TensorSpec([None, None, None])])
    with pytest.raises(ShapeError, match=r"The first call makes the weights and needs inputs of"):
        graph.get_concrete_function()
    assert not layer.built


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_tape_gives_all_gradients(x, jit):
    layer = make(dropout=0.5)

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, use_causal_mask=True, training=True, seed=3)
            loss = tf.reduce_sum(output**2)
        return tape.gradient(loss, [*layer.trainable_variables, x])

    fast, plain = tf.function(gradients, jit_compile=jit)(x), gradients(x)
    assert all(gradient is not None for gradient in plain)
    for one, other in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_gradient_matches_finite_differences():
    layer = make(dtype="float64")
    x, direction = numbers(2, 5, 8, dtype="float64"), numbers(2, 5, 8, seed=1, dtype="float64")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, use_causal_mask=True) ** 2)
    slope = tf.reduce_sum(tape.gradient(loss, x) * direction)
    ahead, behind = (
        tf.reduce_sum(layer(x + step * direction, use_causal_mask=True) ** 2)
        for step in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-7)


def test_training_step_lowers_the_loss(x):
    layer, target = make(), numbers(2, 5, 8, seed=1)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((layer(x) - target) ** 2)
        variables = layer.trainable_variables
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.1 * gradient)
        return loss

    losses = [float(step()) for _ in range(5)]
    assert sorted(losses, reverse=True) == losses


# --- dropout and dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_set_seed_decides_dropout_where_there_is_no_seed(x, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    for run in (layer, tf.function(layer.__call__)):
        tf.random.set_seed(3)
        first, second = run(x, training=True), run(x, training=True)
        assert differ(first, second)
        tf.random.set_seed(3)
        assert_equal(run(x, training=True), first)


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_dropout_acts_in_training_alone(x, rng):
    layer, plain = make(dropout=0.5, dropout_rng=rng), make()
    assert differ(layer(x, training=True, seed=3), plain(x))
    assert_equal(layer(x, seed=3), plain(x))
    assert_equal(layer(x, training=True, seed=tf.constant(3)), layer(x, training=True, seed=3))
    assert_equal(layer(x, training=True, seed=np.int64(3)), layer(x, training=True, seed=3))
    wide = tf.constant(2**40 + 3, tf.int64)
    assert_equal(layer(x, training=True, seed=wide), layer(x, training=True, seed=2**40 + 3))


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_native_dropout_in_a_graph(x, jit):
    layer = make(dropout=0.5, dropout_rng="native")
    graph = tf.function(lambda s: layer(x, training=True, seed=s), jit_compile=jit)
    one, again, other = (graph(tf.constant(seed)) for seed in (3, 3, 4))
    assert_equal(one, again)
    assert differ(one, other)
    assert differ(one, layer(x))


def test_set_seed_decides_the_first_weights():
    tf.random.set_seed(3)
    first = make(seed=None)
    tf.random.set_seed(3)
    assert_equal(make(seed=None).query.kernel, first.query.kernel)
    assert differ(make(seed=None).query.kernel, first.query.kernel)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 5e-2), ("float16", 5e-3)])
def test_half_precision(x, dtype, limit, jit):
    layer = make(dtype=dtype)
    narrow = tf.cast(x, dtype)
    output = tf.function(layer.__call__, jit_compile=jit)(narrow, use_causal_mask=True)
    assert output.dtype == tf.as_dtype(dtype)
    exact = make()(tf.cast(narrow, "float32"), use_causal_mask=True)
    assert float(tf.reduce_max(tf.abs(tf.cast(output, "float32") - exact))) < limit
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(layer(narrow), "float32"))
    gradients = tape.gradient(loss, layer.trainable_variables)
    assert {gradient.dtype for gradient in gradients} == {tf.as_dtype(dtype)}


# --- bad calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: ((x[0],), {}), ShapeError),
        (lambda x: ((x, x[:1]), {}), ShapeError),
        (lambda x: ((tf.cast(x, tf.int32),), {}), DtypeError),
        (lambda x: ((x,), {"attention_mask": tf.ones((5, 5))}), DtypeError),
        (lambda x: ((x,), {"seed": "one"}), ArgumentError),
    ],
    ids=["rank", "batch", "int", "float mask", "seed"],
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_bad_first_call_leaves_the_layer_unbuilt(x, call, error, graph):
    layer = MultiHeadAttention(2, 4)
    args, options = call(x)
    run = tf.function(layer.__call__) if graph else layer
    with pytest.raises(error):
        run(*args, **options)
    assert not layer.built
    assert layer.variables == ()


def test_arrays_of_another_framework_are_refused(x):
    with pytest.raises(MixedBackendsError, match=r"`value_mask` must be an array of tensorflow"):
        make()(x, value_mask=np.ones((2, 5), bool))
    layer = MultiHeadAttention(2, 4)
    with pytest.raises(MixedBackendsError, match=r"`query` must be an array of tensorflow"):
        layer(x.numpy())
    assert not layer.built


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (1, 1, 1, 4), (1, 1, 4, 4), (1, 2, 1, 4)])
def test_tiles_with_a_bias_that_all_share(shape: tuple[int, ...]) -> None:
    # More tiles than run one by one: TensorFlow's loop, as its optimiser of graphs makes it.
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0, memory_budget=64)
    x, bias = tf.constant(normal((3, 4, 8), "x")), tf.constant(normal(shape, "bias"))
    in_one_piece = MultiHeadAttention(2, 4, query_features=8, seed=0)
    found = []
    for one in (layer, in_one_piece):
        with tf.GradientTape() as tape:
            tape.watch([x, bias])
            output = one(x, attention_bias=bias)
        found.append((output, *tape.gradient(output, [x, bias])))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("budget", "most"), [(None, 4), (2**10, 16)], ids=["few logits", "over the budget"]
)
def test_calls_of_many_lengths_share_programs(budget: int | None, most: int) -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0, memory_budget=budget)
    same = MultiHeadAttention(2, 4, query_features=8, seed=0)
    for length in range(20, 36):
        x = numbers(8, length, 8, seed=length)
        mask = tf.range(length)[None] < length - 2
        found = layer(x, value_mask=mask, use_causal_mask=True)
        tf.config.run_functions_eagerly(True)
        try:
            want = same(x, value_mask=mask, use_causal_mask=True)
        finally:
            tf.config.run_functions_eagerly(False)
        np.testing.assert_allclose(found, want, **TOLERANCE)
    (plan,) = layer.plans.plans.values()
    compiled: Any = plan.run
    assert compiled._function.experimental_get_tracing_count() == most


def test_rounds_of_a_loop_are_not_converted_by_autograph() -> None:
    """`tf.map_fn` has each converted by AutoGraph, in which what it calls is seconds slower."""
    seen = []

    def function(index, arrays):
        seen.append(tf.__internal__.autograph.control_status_ctx().status.name)
        return {"double": arrays["x"] + arrays["x"]}

    loop = MultiHeadAttention.ops.capabilities.loop
    found = loop(function, 9, {"x": numbers(9, 2)}, {}, {"double": tf.float32})
    assert tuple(found["double"].shape) == (9, 2)
    assert set(seen) == {"DISABLED"}


def test_tiles_have_second_derivatives() -> None:
    x = tf.constant(normal((3, 4, 8), "x"))
    found = []
    for budget in (None, 64):
        layer = MultiHeadAttention(2, 4, query_features=8, seed=0, memory_budget=budget)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, use_causal_mask=True) ** 2)
            first = inner.gradient(loss, x)
            norm = tf.reduce_sum(first**2)
        found.append((first, outer.gradient(norm, x), outer.gradient(loss, x)))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.fixture
def refusing_what_is_not_finite():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.mark.usefixtures("refusing_what_is_not_finite")
@pytest.mark.parametrize(
    "options",
    [{}, {"compute_dtype": "float64"}, {"dtype": "float16"}, {"memory_budget": 64}],
    ids=["float32", "reproducible", "float16", "tiles"],
)
@pytest.mark.parametrize("biased", [False, True], ids=["masked", "biased"])
def test_no_number_of_a_masked_call_is_infinite(options, biased):
    """Masks that hide whole rows, forward and backward, under TensorFlow's own check."""
    layer = make(**options)
    x = numbers(2, 5, 8, dtype=options.get("dtype", "float32"))
    call = {"value_mask": tf.constant([[True] * 3 + [False] * 2, [False] * 5])}
    if biased:
        call["attention_bias"] = numbers(2, 2, 5, 5, seed=1)
    with tf.GradientTape() as tape:
        output = layer(x, use_causal_mask=True, query_offset=-1, **call)
    gradients = tape.gradient(output, layer.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    assert_equal(output[1, 0], layer.output.bias + tf.zeros(8, output.dtype))


def test_a_bias_of_the_least_number_hides_nothing():
    """Such a bias on a whole row leaves its keys alike, beside a mask too."""
    layer, x = make(), numbers(1, 3, 8)
    least = tf.fill((1, 1, 3, 3), tf.float32.min)
    seen = tf.constant([[True, True, False]])
    _, scores = layer(x, value_mask=seen, attention_bias=least, return_attention_scores=True)
    np.testing.assert_array_equal(scores[0, 0], [[0.5, 0.5, 0.0]] * 3)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
@pytest.mark.parametrize("name", ["query", "value", "value_mask", "attention_bias"])
def test_what_is_not_dense_is_refused_in_words(x, kind, name):
    if kind == "ragged":
        array = tf.RaggedTensor.from_tensor(x, lengths=[3, 5])
    else:
        array = tf.sparse.from_dense(x)
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a dense array.*`value_mask`"):
        make()(**{"query": x, name: array})


REPLICAS = """
import numpy as np, tensorflow as tf
from anymha_tensorflow import MultiHeadAttention
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x = tf.reshape(tf.range(80.0), (2, 5, 8)) / 80
for options in ({}, {"compute_dtype": "float64"}):
    found = []
    with strategy.scope():
        mirrored = MultiHeadAttention(2, 4, query_features=8, seed=0, **options)
    alone = MultiHeadAttention(2, 4, query_features=8, seed=0, **options)
    def gradients(layer):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, use_causal_mask=True) ** 2)
        return tape.gradient(loss, layer.trainable_variables)
    for gradient, want in zip(strategy.run(gradients, (mirrored,)), gradients(alone)):
        for got in strategy.experimental_local_results(gradient):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
"""


def test_every_replica_of_a_strategy_has_gradients():
    run = [sys.executable, "-c", REPLICAS]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("tied_first", [True, False])
def test_layers_of_tied_and_of_own_weights_have_their_own_values(tied_first: bool) -> None:
    x = tf.random.stateless_normal((2, 3, 12), seed=(1, 2))
    tied, apart = (MultiHeadAttention(3, 2, query_features=12, seed=seed) for seed in (0, 1))
    tied.key.kernel = tied.query.kernel
    for layer in (tied, apart) if tied_first else (apart, tied):
        with tf.GradientTape() as tape:
            y = layer(x)
        twin = anymha.convert(layer, to="numpy")
        np.testing.assert_allclose(y.numpy(), twin(x.numpy()), rtol=0, atol=1e-5)
        gradients = tape.gradient(y, layer.trainable_variables)
        assert all(gradient is not None for gradient in gradients)


SAFE = """
import numpy as np, tensorflow as tf, anymha
tf.experimental.numpy.experimental_enable_numpy_behavior(dtype_conversion_mode="safe")
options = {"query_features": 8, "seed": 0, "dropout": 0.3, "rotary": True, "sinks": True}
layer = anymha.MultiHeadAttention(2, 4, backend="tensorflow", **options)
x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("f4")
call = {"use_causal_mask": True, "training": True, "seed": 7}
want = anymha.convert(layer, to="numpy")(x, **call)
np.testing.assert_allclose(layer(tf.constant(x), **call).numpy(), want, rtol=1e-4, atol=1e-5)
_, cache = layer(tf.constant(x), cache=layer.make_cache(2, 8))
layer(tf.constant(x[:, :1]), cache=cache)
"""


def test_a_safe_promotion_of_dtypes_takes_calls_with_dropout_and_caches() -> None:
    done = subprocess.run([sys.executable, "-c", SAFE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
