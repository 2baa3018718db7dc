"""The Equinox layer: JAX's numbers, and what users of `eqx.Module`s expect."""

from __future__ import annotations

import inspect
import io
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, ConfigError, WeightsError
from tests.frameworks import required
from tests.jax_calls import in_each_mode

jax = required("jax")
required("equinox")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from anymha_equinox import MultiHeadAttention  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_programs")

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "reproducible": {"compute_dtype": "float64"},
    "float64": {"dtype": "float64"},
    "bf16": {"dtype": "bfloat16"},
}
mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def numbers(*shape, seed=0, dtype="float32"):
    with jax.enable_x64(dtype == "float64"):
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make(**options):
    return MultiHeadAttention(2, 4, query_features=8, **{"seed": 0, **options})


def plain(layer):
    """The JAX layer of the same options and weights."""
    return anymha.convert(layer, to="jax")


def same(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)


def random_weights(**options):
    shapes = anymha.AttentionConfig(2, 4, query_features=8, **options).weight_shapes()
    return {
        name: np.random.default_rng(i).standard_normal(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


X = numbers(2, 5, 8, seed=1)
KEY = jax.random.key(1)


# --- JAX's numbers -------------------------------------------------------------------------------


@in_each_mode(MODES)
def test_outputs_are_those_of_the_jax_layer(mode: dict[str, Any], call: dict[str, Any]) -> None:
    layer = make(dropout=0.25, inference=True, **mode).with_canonical_weights(random_weights())
    call = {name: jnp.asarray(v) if name.endswith("mask") else v for name, v in call.items()}
    x = numbers(2, 5, 8, dtype=mode.get("dtype", "float32"))
    same(layer(x, **call), plain(layer)(x, **call))


@pytest.mark.as_users_compile
@pytest.mark.parametrize("mode", [{}, MODES["reproducible"]], ids=["float32", "reproducible"])
def test_compiled_outputs_are_those_of_the_compiled_jax_layer(mode):
    layer = make(dropout=0.25, **mode)

    def run(layer, x):
        call = {"use_causal_mask": True, "training": True, "seed": 7}
        return layer(x, return_attention_scores=True, **call)

    same(eqx.filter_jit(run)(layer, X), jax.jit(run)(plain(layer), X))


@mode
def test_gradients_are_those_of_the_jax_layer(mode):
    layer = make(dropout=0.25, **mode)
    x = numbers(2, 5, 8, dtype=mode.get("dtype", "float32"))

    def loss(layer, x):
        return (layer(x, training=True, seed=3).astype("float32") ** 2).sum()

    mine = eqx.filter_jit(eqx.filter_grad(loss))(layer, x)  # not a program for each operation
    assert mine.inference is None
    same(mine.canonical_weights(), jax.jit(jax.grad(loss))(plain(layer), x).weights)


def test_cross_attention_of_grouped_heads_into_another_shape():
    options = {"value_features": 6, "key_features": 3, "num_key_value_heads": 1}
    layer = make(output_shape=(3, 2), use_bias=("query", "output"), **options)
    query, value, key = X, numbers(2, 7, 6), numbers(2, 7, 3)
    same(layer(query, value, key), plain(layer)(query, value, key))
    same(layer([query, value, key]), layer(query, value, key))
    assert layer(query, value, key).shape == (2, 5, 3, 2)


# --- leaves --------------------------------------------------------------------------------------


def test_array_leaves_are_the_weights():
    layer = make(use_bias=("query", "value", "output"))
    arrays, static = eqx.partition(layer, eqx.is_array)
    assert len(jax.tree.leaves(arrays)) == 7
    assert layer.key.bias is None
    same(eqx.combine(arrays, static)(X), layer(X))


def test_seed_gives_the_values_of_every_backend():
    reference = anymha.MultiHeadAttention(2, 4, query_features=8, seed=5, backend="numpy")
    for layer in (make(seed=5), make(seed=None, key=jax.random.key(5)), make(seed=5, key=KEY)):
        same(layer.canonical_weights(), {n: jnp.asarray(w) for n, w in reference.weights.items()})


def test_initialisers_of_jax_are_taken():
    layer = make(kernel_initializer=jax.nn.initializers.constant(0.25))
    assert (layer.query.kernel == 0.25).all()
    layer = make(kernel_initializer=jax.nn.initializers.he_normal())
    wanted = anymha.MultiHeadAttention(
        2,
        4,
        query_features=8,
        seed=0,
        backend="jax",
        kernel_initializer=jax.nn.initializers.he_normal(),
    )
    same(layer.canonical_weights(), wanted.weights)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_traced_key_gives_the_values_of_the_key(dtype):
    def create(key):
        return make(seed=None, key=key, dtype=dtype)

    keys = jax.random.split(KEY, 3)
    same(eqx.filter_jit(create)(keys[0]), create(keys[0]))
    same(eqx.filter_jit(create)(jax.random.key_data(keys[0])), create(keys[0]))
    layers = eqx.filter_vmap(create)(keys)
    for i, key in enumerate(keys):
        same(
            jax.tree.map(lambda w, i=i: w[i], eqx.filter(layers, eqx.is_array)),
            eqx.filter(create(key), eqx.is_array),
        )
    shapes = eqx.filter_eval_shape(create, KEY)
    assert shapes.query.kernel.shape == (8, 2, 4)
    assert shapes.query.kernel.dtype == jnp.dtype(dtype)


def test_layers_of_different_seeds_have_one_structure():
    layers = [eqx.filter(make(seed=seed), eqx.is_array) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    outputs = eqx.filter_vmap(lambda layer: eqx.combine(layer, make())(X))(stacked)
    for seed, output in enumerate(outputs):
        np.testing.assert_allclose(output, make(seed=seed)(X), rtol=1e-5, atol=1e-6)
    one, other = jax.tree.structure(make()), jax.tree.structure(make(sliding_window=2))
    assert hash(one) == hash(jax.tree.structure(make(seed=9)))
    assert one != other


def test_layer_is_frozen_and_tree_at_makes_another():
    layer = make()
    with pytest.raises(AttributeError):
        layer.inference = True
    doubled = eqx.tree_at(lambda m: m.query.kernel, layer, replace_fn=lambda w: 2 * w)
    same(doubled.query.kernel, 2 * layer.query.kernel)
    same(doubled.key, layer.key)


def test_leaves_are_serialised():
    file, layer = io.BytesIO(), make(seed=1)
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    same(eqx.tree_deserialise_leaves(file, make(seed=2)), layer)
    file.seek(0)
    like = eqx.filter_eval_shape(lambda: make(seed=None, key=KEY))
    same(eqx.tree_deserialise_leaves(file, like), layer)


# --- dropout -------------------------------------------------------------------------------------


def test_inference_mode_switches_dropout_off_and_on():
    layer, quiet = make(dropout=0.5), make()(X)
    model = {"attention": layer, "other": eqx.nn.Dropout()}
    off = eqx.nn.inference_mode(model)
    same(off["attention"](X), quiet)
    on = eqx.nn.inference_mode(off, value=False)["attention"]
    same(on(X, seed=KEY), layer(X, seed=KEY))
    assert not np.array_equal(on(X, seed=KEY), quiet)


def test_call_goes_before_the_attribute():
    layer, quiet = make(dropout=0.5), make()(X)
    same(layer(X, inference=True), quiet)
    same(layer(X, training=False), quiet)
    off, wanted = make(dropout=0.5, inference=True), layer(X, seed=KEY)
    same(off(X, seed=KEY), quiet)
    same(off(X, seed=KEY, inference=False), wanted)
    same(off(X, seed=KEY, training=True), wanted)


def test_dropout_asks_for_a_seed():
    with pytest.raises(ArgumentError, match=r"`seed` is needed .* e\.g\. seed=jax\.random\.key"):
        make(dropout=0.5)(X)


def test_vmap_over_seeds_is_each_seed():
    layer, keys = make(dropout=0.5), jax.random.split(KEY, 3)
    outputs = eqx.filter_vmap(lambda layer, key: layer(X, seed=key), in_axes=(None, 0))(layer, keys)
    for key, output in zip(keys, outputs, strict=True):
        np.testing.assert_allclose(output, layer(X, seed=key), rtol=1e-5, atol=1e-6)


def test_without_dropout_the_flag_may_be_traced():
    layer = make()
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, X), layer(X), rtol=1e-5, atol=1e-6)


# --- transformations and training ----------------------------------------------------------------


def test_second_call_does_not_trace_again():
    traces = []

    @eqx.filter_jit
    def run(layer, x, key):
        traces.append(1)
        return layer(x, seed=key)

    layer = make(dropout=0.5)
    run(layer, X, KEY)
    run(make(dropout=0.5, seed=2), X + 1, jax.random.key(2))
    assert len(traces) == 1
    run(eqx.nn.inference_mode(layer), X, KEY)
    assert len(traces) == 2


def test_layers_in_a_module_train():
    optax = pytest.importorskip("optax")

    class Block(eqx.Module):
        attention: MultiHeadAttention
        head: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.attention = MultiHeadAttention(2, 4, query_features=8, dropout=0.1, key=one)
            self.head = eqx.nn.Linear(8, 1, key=two)

        def __call__(self, x, key=None):
            hidden = x + self.attention(x, use_causal_mask=True, seed=key)
            return jax.vmap(jax.vmap(self.head))(hidden)

    model, x = Block(KEY), numbers(16, 5, 8, seed=3)
    target = jnp.cumsum(x[..., :1], axis=1)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, key):
        def loss(model):
            return ((model(x, key) - target) ** 2).mean()

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(model, updates), state, value

    losses, start = [], model.attention.value.kernel
    for key in jax.random.split(KEY, 40):
        model, state, value = step(model, state, key)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 4
    assert not np.array_equal(model.attention.value.kernel, start)
    model = eqx.nn.inference_mode(model)
    same(model(x), model(x))


def penalised(**options):
    return make(
        kernel_regularizer="l2",
        activity_regularizer="l1",
        kernel_constraint={"class_name": "MaxNorm", "config": {"max_value": 0.5}},
        bias_constraint="non_neg",
        **options,
    ).with_canonical_weights(random_weights())


@mode
def test_penalties_and_constraints_are_those_of_the_jax_layer(mode):
    layer = penalised(**mode)
    same(layer.regularization_loss(), plain(layer).regularization_loss())
    x = numbers(2, 5, 8, dtype=mode.get("dtype", "float32"))
    same(layer(x, return_activity_loss=True), plain(layer)(x, return_activity_loss=True))
    wanted, before = plain(layer).apply_constraints().weights, layer.canonical_weights()
    constrained = layer.apply_constraints()
    same(constrained.canonical_weights(), wanted)
    assert not np.array_equal(wanted["query.kernel"], before["query.kernel"])
    same(layer.canonical_weights(), before)


def test_constraints_hold_under_jit():
    layer = eqx.filter_jit(lambda layer: layer.apply_constraints())(penalised())
    norms = jnp.sqrt((layer.query.kernel**2).sum(0))
    assert 0.4 < norms.max() <= 0.5 * (1 + 1e-6)


# --- weights -------------------------------------------------------------------------------------


@mode
def test_new_layer_has_the_weights_and_the_old_one_keeps_its_own(mode):
    layer, weights = make(inference=True, **mode), random_weights()
    before = anymha.get_weights(layer)
    other = anymha.set_weights(layer, weights)
    assert other.inference is True
    for name, value in anymha.get_weights(other).items():
        np.testing.assert_array_equal(value, weights[name].astype(value.dtype))
        assert value.dtype.name == mode.get("dtype", "float32")
    same(anymha.get_weights(layer), before)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(WeightsError, match=r"`output.bias` must have shape \(8,\)"):
        make().with_canonical_weights({**random_weights(), "output.bias": np.zeros(7)})


def test_backend_of_that_name_is_this_layer():
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, key=KEY, backend="equinox")
    assert isinstance(layer, MultiHeadAttention)


@pytest.mark.parametrize("options", [{}, {"use_bias": ("value",), "output_shape": (2, 3)}])
def test_conversion_there_and_back(options):
    reference = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", **options)
    layer = anymha.convert(reference, to="equinox")
    assert isinstance(layer, MultiHeadAttention)
    back = anymha.convert(layer, to="numpy")
    for name, value in reference.weights.items():
        np.testing.assert_array_equal(back.weights[name], value)
    assert back.config == anymha.convert(reference, to="numpy").config


@pytest.mark.parametrize("causal", [False, True])
def test_equinox_gives_the_same(causal):
    layer = make().with_canonical_weights(random_weights())
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    theirs = eqx.nn.MultiheadAttention(2, 8, qk_size=4, vo_size=4, key=KEY, **biases)
    for name, mine in (("query", layer.query), ("key", layer.key), ("value", layer.value)):
        linear = lambda m, name=name: getattr(m, f"{name}_proj")  # noqa: E731
        bias = jnp.zeros(8) if mine.bias is None else mine.bias.reshape(8)
        values = (mine.kernel.reshape(8, 8).T, bias)
        theirs = eqx.tree_at(lambda m, f=linear: (f(m).weight, f(m).bias), theirs, values)
    values = (layer.output.kernel.reshape(8, 8).T, layer.output.bias)
    theirs = eqx.tree_at(lambda m: (m.output_proj.weight, m.output_proj.bias), theirs, values)
    mask = jnp.tri(5, dtype=bool) if causal else None
    wanted = jax.vmap(lambda x: theirs(x, x, x, mask))(X)
    np.testing.assert_allclose(layer(X, use_causal_mask=causal), wanted, rtol=2e-5, atol=2e-5)


# --- bad calls -----------------------------------------------------------------------------------


def test_query_features_are_needed():
    with pytest.raises(ConfigError, match=r"`query_features`.* is needed"):
        MultiHeadAttention(2, 4, key=KEY)


@pytest.mark.parametrize("key", [0, jax.random.split(KEY, 2), jnp.zeros(2)], ids=str)
def test_key_of_another_kind_is_refused(key):
    with pytest.raises(ArgumentError, match=r"`key` must be one JAX key\. Received: .* as `seed`"):
        make(key=key, seed=None)


def test_training_and_inference_together_are_refused():
    with pytest.raises(ArgumentError, match=r"`training` and `inference` say the same"):
        make()(X, training=True, inference=False)


def test_function_as_initialiser_cannot_draw_from_a_traced_key():
    def create(key):
        return make(seed=None, key=key, kernel_initializer=lambda shape, dtype: np.ones(shape))

    same(create(KEY).query.kernel, jnp.ones((8, 2, 4)))
    with pytest.raises(Exception, match=r"`kernel_initializer` is a function, .* Pass `seed`"):
        eqx.filter_jit(create)(KEY)


def test_signatures_name_every_argument():
    constructor = inspect.signature(MultiHeadAttention).parameters
    assert {"num_heads", "kernel_initializer", "key", "inference"} <= set(constructor)
    call = inspect.signature(MultiHeadAttention.__call__).parameters
    assert {"attention_mask", "seed", "inference"} <= set(call)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_function_as_initialiser_draws_from_a_traced_key(dtype):
    def create(key):
        normal = jax.nn.initializers.normal(0.02)
        ones = jax.nn.initializers.ones
        return make(
            seed=None, key=key, dtype=dtype, kernel_initializer=normal, bias_initializer=ones
        )

    keys = jax.random.split(KEY, 3)
    layers = eqx.filter_vmap(create)(keys)
    for i, key in enumerate(keys):
        one, wanted = (eqx.filter(layer, eqx.is_array) for layer in (layers, create(key)))
        for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(wanted), strict=True):
            assert got.dtype == want.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(got[i].astype("float32"), want.astype("float32"), rtol=1e-2)
    assert eqx.filter_eval_shape(create, KEY).query.kernel.shape == (8, 2, 4)


@pytest.mark.parametrize("key", [KEY, jax.random.key_data(KEY)], ids=["typed", "raw"])
def test_key_for_dropout_is_taken_by_the_name_that_layers_of_equinox_have(key):
    layer, x = make(dropout=0.5), jnp.ones((1, 3, 8))
    same(layer(x, key=key), layer(x, seed=key))
    model = eqx.nn.Sequential([layer, eqx.nn.Lambda(jax.nn.relu)])
    own, _ = jax.random.split(key, 2)
    same(model(x, key=key), jax.nn.relu(layer(x, seed=own)))
    same(layer(x, x, x, seed=3), layer(x, seed=3))


def test_layers_of_different_names_and_initialisers_have_one_structure():
    layers = [
        make(seed=i, name=f"layer_{i}", kernel_initializer=jax.nn.initializers.normal(0.02))
        for i in range(2)
    ]
    arrays = [eqx.filter(layer, eqx.is_array) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    assert stacked.query.kernel.shape == (2, 8, 2, 4)
    assert [layer.config.name for layer in layers] == ["layer_0", "layer_1"]


def test_another_object_in_the_place_of_a_projection_is_an_error_in_words() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, key=jax.random.key(0))
    other = eqx.nn.Linear(8, 8, key=jax.random.key(1))
    changed = eqx.tree_at(lambda layer: layer.output, layer, other)
    with pytest.raises(WeightsError, match=r"`layer.output` must hold `kernel`.*Received: equinox"):
        changed(jnp.ones((1, 3, 8)))
