"""The Flax layer: JAX's numbers, and what users of `nnx.Module`s expect."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, ConfigError, ShapeError, WeightsError
from tests.frameworks import required
from tests.jax_calls import in_each_mode

jax = required("jax")
required("flax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from anymha_flax import MultiHeadAttention  # noqa: E402

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
    options = {"rngs": nnx.Rngs(0), "seed": 0, **options}
    return MultiHeadAttention(2, 4, query_features=8, **options)


def plain(layer):
    """The JAX layer of the same options and weights."""
    return anymha.convert(layer, to="jax")


def same(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def count(layer):
    """How many dropout keys the layer has drawn."""
    return layer.rngs.count[...]


X = numbers(2, 5, 8, seed=1)


# --- JAX's numbers -------------------------------------------------------------------------------


@in_each_mode(MODES)
def test_outputs_are_those_of_the_jax_layer(mode: dict[str, Any], call: dict[str, Any]) -> None:
    layer = make(dropout=0.25, **mode).with_canonical_weights(random_weights())
    layer.eval()
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

    same(nnx.jit(run)(layer, X), jax.jit(run)(plain(layer), X))


def random_weights(**options):
    shapes = anymha.AttentionConfig(2, 4, query_features=8, **options).weight_shapes()
    return {
        name: np.random.default_rng(i).standard_normal(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


@mode
def test_gradients_are_those_of_the_jax_layer(mode):
    layer = make(dropout=0.25, **mode)

    def loss(layer, x):
        return (layer(x, training=True, seed=3).astype("float32") ** 2).sum()

    x = numbers(2, 5, 8, dtype=mode.get("dtype", "float32"))
    mine = nnx.jit(nnx.grad(loss))(layer, x)  # one program, not one for each operation
    theirs = jax.jit(jax.grad(loss))(plain(layer), x).weights
    for name, gradient in theirs.items():
        projection, part = name.split(".")
        same(mine[projection][part][...], gradient)


def test_cross_attention_of_grouped_heads_into_another_shape():
    options = {"value_features": 6, "key_features": 3, "num_key_value_heads": 1}
    layer = make(output_shape=(3, 2), use_bias=("query", "output"), **options)
    query, value, key = X, numbers(2, 7, 6), numbers(2, 7, 3)
    same(layer(query, value, key), plain(layer)(query, value, key))
    same(layer([query, value, key]), layer(query, value, key))
    assert layer(query, value, key).shape == (2, 5, 3, 2)


# --- parameters ----------------------------------------------------------------------------------


def test_params_stand_at_their_canonical_names():
    layer = make(use_bias=("query", "value", "output"))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert paths == set(layer.canonical_weights())
    assert "key.bias" not in paths
    assert type(layer.query.kernel) is nnx.Param


def test_seed_gives_the_values_of_every_backend():
    reference = anymha.MultiHeadAttention(2, 4, query_features=8, seed=5, backend="numpy")
    for name, value in make(seed=5).canonical_weights().items():
        np.testing.assert_array_equal(value, reference.weights[name])


def test_initialisers_of_jax_are_taken():
    layer = make(kernel_initializer=jax.nn.initializers.constant(0.25))
    assert (layer.query.kernel[...] == 0.25).all()
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


def test_rngs_give_the_values_where_there_is_no_seed():
    def kernel(**options):
        return np.asarray(make(seed=None, **options).query.kernel[...])

    one, again, other = (kernel(rngs=nnx.Rngs(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(
        kernel(rngs=nnx.Rngs(params=1, dropout=9)), kernel(rngs=nnx.Rngs(params=1))
    )
    assert not np.array_equal(kernel(rngs=None), kernel(rngs=None))
    rngs = nnx.Rngs(0)
    assert not np.array_equal(kernel(rngs=rngs), kernel(rngs=rngs))


def test_params_stream_is_drawn_from_once_and_only_where_it_is_needed():
    rngs = nnx.Rngs(params=0, dropout=1)
    make(rngs=rngs)
    assert rngs.params.count[...] == 0
    make(rngs=rngs, seed=None)
    assert rngs.params.count[...] == 1
    assert rngs.dropout.count[...] == 0


def test_layer_may_be_made_in_a_trace():
    def create():
        return make(seed=None, rngs=nnx.Rngs(3))

    wanted, compiled = create(), nnx.jit(create)()
    same(nnx.state(compiled), nnx.state(wanted))
    shapes = nnx.eval_shape(create)
    assert shapes.query.kernel.shape == (8, 2, 4)


def test_vmap_makes_an_ensemble():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return make(seed=None, dropout=0.5, rngs=rngs)

    layers = create(nnx.Rngs(0))
    assert layers.query.kernel.shape == (3, 8, 2, 4)
    outputs = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    structure, state = nnx.split(layers)
    for i, output in enumerate(outputs):
        one = nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        assert count(one) == 1
        one.rngs.count[...] = jnp.uint32(0)
        np.testing.assert_allclose(one(X), output, rtol=1e-5, atol=1e-6)


# --- dropout -------------------------------------------------------------------------------------


def test_eval_switches_dropout_off_and_train_on():
    layer = make(dropout=0.5)
    quiet = make()(X)
    assert not np.array_equal(layer(X), quiet)
    layer.eval()
    assert layer.deterministic
    same(layer(X), quiet)
    layer.train()
    assert not np.array_equal(layer(X), quiet)


def test_call_goes_before_the_attribute():
    layer, quiet = make(dropout=0.5), make()(X)
    same(layer(X, deterministic=True), quiet)
    same(layer(X, training=False), quiet)
    layer = make(dropout=0.5, deterministic=True)
    same(layer(X), quiet)
    assert not np.array_equal(layer(X, deterministic=False), quiet)
    assert not np.array_equal(layer(X, training=True), quiet)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_view_switches_dropout_off():
    layer = make(dropout=0.5)
    same(nnx.view(layer, deterministic=True)(X), make()(X))
    assert not layer.deterministic


def test_seeds_are_those_that_flax_draws():
    """Each call takes the key that an `nnx.Dropout` in the layer's place would take."""
    layer = make(dropout=0.5, rngs=nnx.Rngs(params=0, dropout=1))
    theirs = nnx.Dropout(0.5, rngs=nnx.Rngs(params=0, dropout=1)).rngs
    assert isinstance(theirs, nnx.RngStream)
    for drawn in (1, 2):
        same(layer(X), plain(layer)(X, training=True, seed=theirs()))
        assert count(layer) == drawn


def test_rngs_at_the_call_go_before_the_layers_own():
    layer, key = make(dropout=0.5), jax.random.key(4)
    rngs = nnx.Rngs(dropout=4)
    wanted = plain(layer)(X, training=True, seed=jax.random.fold_in(key, 0))
    same(layer(X, rngs=rngs), wanted)
    assert rngs.dropout.count[...] == 1
    same(layer(X, rngs=nnx.Rngs(dropout=4).dropout), wanted)
    same(layer(X, rngs=key), plain(layer)(X, training=True, seed=key))
    assert count(layer) == 0


def test_counter_stands_where_nothing_is_drawn():
    layer = make(dropout=0.5)
    layer(X, seed=3)
    layer(X, deterministic=True)
    with pytest.raises(ShapeError):
        layer(X[..., :7])
    assert count(layer) == 0


def test_counter_advances_under_jit():
    layer, eager = make(dropout=0.5), make(dropout=0.5)
    run = nnx.jit(lambda layer, x: layer(x))
    for _ in range(2):
        np.testing.assert_allclose(run(layer, X), eager(X), rtol=1e-5, atol=1e-6)
    assert count(layer) == 2


def test_dropout_without_rngs_asks_for_them():
    layer = make(dropout=0.5, rngs=None)
    with pytest.raises(ArgumentError) as caught:
        layer(X)
    assert str(caught.value) == (
        "`rngs` are needed for dropout in training. Received: None. Pass rngs=nnx.Rngs(...) to the "
        "constructor or to the call, or an int or a key as `seed`; or switch dropout off with "
        "`layer.eval()`."
    )
    same(layer(X, deterministic=True), make(rngs=None)(X))


# --- transformations and training ----------------------------------------------------------------


def test_split_and_merge_give_the_layer_back():
    layer = make(dropout=0.5)
    structure, params, rest = nnx.split(layer, nnx.Param, ...)
    assert len(jax.tree.leaves(params)) == 8
    expected = nnx.clone(layer)(X)
    same(nnx.merge(structure, params, rest)(X), expected)


@pytest.mark.parametrize(
    "clone", [nnx.clone, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_are_equal_and_apart(clone):
    layer = make()
    other = clone(layer)
    assert other.config == layer.config
    same(other(X), layer(X))
    other.query.kernel[...] += 1
    assert not np.array_equal(other(X), layer(X))


def test_second_call_does_not_trace_again():
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    layer = make(dropout=0.5)
    run(layer, X)
    run(layer, X + 1)
    assert len(traces) == 1
    layer.eval()
    run(layer, X)
    assert len(traces) == 2


def test_state_goes_through_numpy_and_back():
    """As a checkpoint takes it."""
    layer, other = make(seed=1), make(seed=2)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, saved))
    nnx.update(other, state)
    same(other(X), layer(X))


def test_layers_in_a_module_train():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = MultiHeadAttention(2, 4, query_features=8, dropout=0.1, rngs=rngs)
            self.head = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(x + self.attention(self.norm(x), use_causal_mask=True))

    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = numbers(16, 5, 8, seed=3)
    target = jnp.cumsum(x[..., :1], axis=1)

    def loss(model):
        return ((model(x) - target) ** 2).mean()

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    start = np.asarray(model.attention.value.kernel[...])
    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < losses[0] / 4
    assert not np.array_equal(model.attention.value.kernel[...], start)
    assert count(model.attention) == 40
    model.eval()
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
    assert constrained is layer


def test_penalties_train_and_constraints_hold_under_jit():
    layer = penalised()
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        value, gradients = nnx.value_and_grad(lambda layer: layer.regularization_loss())(layer)
        optimizer.update(layer, gradients)
        layer.apply_constraints()
        return value

    losses = [float(step(layer, optimizer)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    norms = jnp.sqrt((layer.query.kernel[...] ** 2).sum(0))
    assert norms.max() <= 0.5 * (1 + 1e-6)


# --- weights -------------------------------------------------------------------------------------


@mode
def test_weights_are_set_in_place_and_got_back(mode):
    layer, weights = make(**mode), random_weights()
    assert anymha.set_weights(layer, weights) is layer
    for name, value in anymha.get_weights(layer).items():
        np.testing.assert_array_equal(value, weights[name].astype(value.dtype))
        assert value.dtype.name == mode.get("dtype", "float32")


@pytest.mark.parametrize("form", [lambda state: state, nnx.to_pure_dict], ids=["state", "dict"])
def test_a_state_sets_the_weights(form) -> None:
    layers = [MultiHeadAttention(2, 4, query_features=8, seed=seed, sinks=True) for seed in (0, 1)]
    weights = form(nnx.state(layers[1], nnx.Param))
    assert anymha.set_weights(layers[0], weights) is layers[0]
    one, other = (anymha.get_weights(layer) for layer in layers)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_weights_that_do_not_fit_leave_the_layer_as_it_was():
    layer, weights = make(), random_weights()
    before = anymha.get_weights(layer)
    with pytest.raises(WeightsError, match=r"`output.bias` must have shape \(8,\)"):
        layer.with_canonical_weights({**weights, "output.bias": np.zeros(7)})
    same(anymha.get_weights(layer), before)


def test_backend_of_that_name_is_this_layer():
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, rngs=nnx.Rngs(0), backend="flax")
    assert isinstance(layer, MultiHeadAttention)


@pytest.mark.parametrize("options", [{}, {"use_bias": ("value",), "output_shape": (2, 3)}])
def test_conversion_there_and_back(options):
    reference = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", **options)
    layer = anymha.convert(reference, to="flax")
    assert isinstance(layer, MultiHeadAttention)
    back = anymha.convert(layer, to="numpy")
    for name, value in reference.weights.items():
        np.testing.assert_array_equal(back.weights[name], value)
    assert back.config == anymha.convert(reference, to="numpy").config


@pytest.mark.parametrize("causal", [False, True])
def test_flax_gives_the_same(causal):
    layer, theirs = (
        make(),
        nnx.MultiHeadAttention(2, 8, decode=False, deterministic=True, rngs=nnx.Rngs(0)),
    )
    layer.with_canonical_weights(random_weights())
    for name in ("query", "key", "value", "out"):
        mine = getattr(layer, "output" if name == "out" else name)
        getattr(theirs, name).kernel[...] = mine.kernel[...]
        getattr(theirs, name).bias[...] = mine.bias[...]
    mask = nnx.make_causal_mask(X[..., 0]) if causal else None
    output = layer(X, use_causal_mask=causal)
    np.testing.assert_allclose(output, theirs(X, mask=mask), rtol=2e-5, atol=2e-5)


# --- bad calls -----------------------------------------------------------------------------------


def test_query_features_are_needed():
    with pytest.raises(ConfigError, match=r"`query_features`.* is needed"):
        MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rngs", [0, jax.random.key(0)])
def test_rngs_of_another_kind_are_refused(rngs):
    with pytest.raises(ArgumentError, match=r"`rngs` must be an nnx\.Rngs or one of its streams"):
        make(rngs=rngs, seed=None)


def test_training_and_deterministic_together_are_refused():
    with pytest.raises(ArgumentError, match=r"`training` and `deterministic` say the same"):
        make()(X, training=True, deterministic=False)


def test_signatures_name_every_argument():
    constructor = inspect.signature(MultiHeadAttention.__init__).parameters
    assert {"num_heads", "kernel_initializer", "rngs", "deterministic"} <= set(constructor)
    call = inspect.signature(MultiHeadAttention.__call__).parameters
    assert {"attention_mask", "seed", "deterministic", "rngs"} <= set(call)


def test_partitioned_initialisers_say_how_weights_are_shared_out():
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "h"))
    bias = nnx.with_metadata(nnx.initializers.zeros, of="bias")
    mesh = jax.make_mesh((1,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"query_features": 8, "kernel_initializer": kernel, "bias_initializer": bias}
    with jax.set_mesh(mesh):
        layer = MultiHeadAttention(2, 4, **options, rngs=nnx.Rngs(0))
        specs = nnx.get_partition_spec(nnx.state(layer, nnx.Param))
    assert "'h'" in str(specs["output"]["kernel"])
    assert layer.value.bias.get_metadata("of") == "bias"
    options |= {"kernel_initializer": nnx.initializers.lecun_normal(), "bias_initializer": "zeros"}
    unboxed = MultiHeadAttention(2, 4, **options, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.query.kernel[...], unboxed.query.kernel[...])


def test_boxed_values_are_refused_in_words_elsewhere():
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "h"))
    with pytest.raises(ConfigError, match=r"`kernel_initializer` must give an array.*Metadata"):
        anymha.MultiHeadAttention(
            2, 4, query_features=8, seed=0, kernel_initializer=kernel, backend="jax"
        )


def test_tied_weights_have_one_value():
    layer, other = (MultiHeadAttention(2, 4, query_features=8, rngs=nnx.Rngs(n)) for n in (0, 1))
    layer.key.kernel = layer.query.kernel
    weights = anymha.get_weights(other)
    with pytest.raises(WeightsError, match=r"`query.kernel` and `key.kernel` are tied.*two values"):
        anymha.set_weights(layer, weights)
    weights["key.kernel"] = weights["query.kernel"]
    anymha.set_weights(layer, weights)
    np.testing.assert_array_equal(anymha.get_weights(layer)["key.kernel"], weights["key.kernel"])


def test_another_object_in_the_place_of_a_projection_is_an_error_in_words() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, rngs=nnx.Rngs(0))
    layer.query = nnx.LoRA(8, 2, 8, base_module=layer.query, rngs=nnx.Rngs(1))
    with pytest.raises(WeightsError, match=r"`layer.query` must hold `kernel`.*Received: flax"):
        layer(jnp.ones((1, 3, 8)))
