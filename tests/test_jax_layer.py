"""The JAX layer is a frozen pytree: every transformation of JAX works on it."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, ConfigError, DtypeError, MixedBackendsError
from tests.frameworks import required

jax = required("jax")

import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

from anymha_jax import MultiHeadAttention  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_programs")

MODES = [{}, {"compute_dtype": "float64"}]
mode = pytest.mark.parametrize("mode", MODES, ids=["float32", "reproducible"])


def numbers(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def new(**options):
    return MultiHeadAttention(2, 4, query_features=8, seed=0, **options)


@functools.cache
def _kept(compiled, options):
    return new(**dict(options))


def make(**options):
    """The layer with these options, whose programs all tests share that compile alike."""
    compiled = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")
    return _kept(compiled, tuple(sorted(options.items())))


def loss(layer, x, **call):
    return (layer(x, use_causal_mask=True, **call) ** 2).sum()


def close(tree, other, limit=2e-5):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=limit, atol=limit)


def python(code, **environment):
    """Run code in a process of its own, where it must succeed."""
    paths = [path for path in sys.path if path]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{textwrap.dedent(code)}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


X = np.random.default_rng(1).standard_normal((2, 5, 8)).astype("float32")


# --- a pytree ------------------------------------------------------------------------------------


def test_leaves_are_the_weights_by_canonical_name():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(make())]
    assert paths[0] == "['query.kernel']"
    assert len(paths) == 8


def test_tree_map_gives_a_layer():
    layer = make()
    doubled = jax.tree.map(lambda w: 2 * w, layer)
    assert isinstance(doubled, MultiHeadAttention)
    np.testing.assert_array_equal(doubled.weights["key.kernel"], 2 * layer.weights["key.kernel"])


def test_layers_of_different_seeds_stack_into_an_ensemble():
    layers = [MultiHeadAttention(2, 4, query_features=8, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    outputs = jax.vmap(lambda layer: layer(jnp.asarray(X)))(stacked)
    for output, layer in zip(outputs, layers, strict=True):
        close(output, layer(jnp.asarray(X)))


def test_structure_is_hashable_and_equal_for_equal_options():
    one, two = jax.tree.structure(new()), jax.tree.structure(new())
    assert hash(one) == hash(two)
    assert one == two
    assert one != jax.tree.structure(make(sliding_window=2))


def test_second_call_does_not_trace_again():
    traces = []

    @jax.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    run(new(), X)
    run(jax.tree.map(lambda w: w + 1, new()), X + 1)
    assert len(traces) == 1
    run(make(scale=2.0), X)  # options are static
    assert len(traces) == 2


def test_layer_is_frozen():
    layer = make()
    with pytest.raises(AttributeError, match=r"`config` cannot be set: the layer is frozen\. Make"):
        layer.config = layer.config


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(clone):
    layer = make()
    other = clone(layer)
    assert other.config == layer.config
    np.testing.assert_array_equal(other(jnp.asarray(X)), layer(jnp.asarray(X)))


def test_query_features_are_needed():
    with pytest.raises(ConfigError, match=r"`query_features`.* is needed: a pytree cannot grow"):
        MultiHeadAttention(2, 4)


def test_weights_of_numpy_are_taken():
    layer = jax.tree.map(np.asarray, make())
    for options in MODES:
        held = make(**options)
        bare = jax.tree.map(np.asarray, held)
        np.testing.assert_array_equal(bare(jnp.asarray(X)), held(jnp.asarray(X)))
    assert isinstance(layer.weights["query.kernel"], np.ndarray)


# --- transformations -----------------------------------------------------------------------------


@mode
def test_jit(mode):
    layer = make(**mode)
    close(jax.jit(MultiHeadAttention.__call__)(layer, X), layer(jnp.asarray(X)))


@mode
def test_grad_matches_finite_differences(mode):
    layer, x, direction = make(**mode), jnp.asarray(X), numbers(2, 5, 8, seed=2)
    step = 1e-2
    ahead, behind = loss(layer, x + step * direction), loss(layer, x - step * direction)
    slope = (jax.grad(loss, argnums=1)(layer, x) * direction).sum()
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=3e-3)


@mode
def test_jit_of_value_and_grad(mode):
    layer, x = make(**mode), jnp.asarray(X)
    both = jax.value_and_grad(loss, argnums=(0, 1))
    close(jax.jit(both)(layer, x), both(layer, x), 1e-4)


@mode
def test_jvp_is_the_transpose_of_vjp(mode):
    layer, x, tangent = make(**mode), jnp.asarray(X), numbers(2, 5, 8, seed=2)
    output, forward = jax.jvp(layer, (x,), (tangent,))
    cotangent = numbers(*output.shape, seed=3)
    _, pullback = jax.vjp(layer, x)
    np.testing.assert_allclose(
        (forward * cotangent).sum(), (pullback(cotangent)[0] * tangent).sum(), rtol=1e-4
    )
    assert forward.dtype == jnp.float32


@mode
def test_linearize(mode):
    layer, x, tangent = make(**mode), jnp.asarray(X), numbers(2, 5, 8, seed=2)
    close(jax.linearize(layer, x)[1](tangent), jax.jvp(layer, (x,), (tangent,))[1])


@mode
def test_vmap_of_grad(mode):
    layer, xs = make(**mode), numbers(3, 2, 5, 8)
    gradient = jax.grad(loss, argnums=1)
    batched = jax.jit(jax.vmap(gradient, (None, 0)))(layer, xs)
    close(batched, jnp.stack([jax.jit(gradient)(layer, x) for x in xs]), 1e-4)


@mode
def test_vmap_with_masks(mode):
    layer, xs = make(**mode), numbers(3, 2, 5, 8)
    masks = xs[..., 0] > 0
    batched = jax.jit(jax.vmap(lambda x, m: layer(x, value_mask=m)))(xs, masks)
    close(batched, jnp.stack([layer(x, value_mask=m) for x, m in zip(xs, masks, strict=True)]))


@mode
def test_grad_through_scan(mode):
    layer, x = make(**mode), jnp.asarray(X)

    def scanned(layer):
        return jax.lax.scan(lambda c, _: (layer(c), None), x, None, length=3)[0].sum()

    def unrolled(layer):
        return layer(layer(layer(x))).sum()

    close(jax.jit(jax.grad(scanned))(layer), jax.jit(jax.grad(unrolled))(layer), 1e-4)


@mode
def test_checkpoint(mode):
    layer, x = make(**mode), jnp.asarray(X)
    saved, again = jax.grad(loss), jax.grad(jax.checkpoint(loss))
    close(jax.jit(again)(layer, x), jax.jit(saved)(layer, x), 1e-4)


@mode
def test_second_order(mode):
    """Forward over reverse, reverse over reverse and forward over forward agree."""
    layer, x, tangent = make(**mode), numbers(1, 3, 8), numbers(1, 3, 8, seed=2)

    def f(x):
        return loss(layer, x)

    def along(x):
        return jax.jvp(f, (x,), (tangent,))[1]

    first = jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (tangent,))[1])(x)
    second = jax.jit(jax.grad(lambda x: (jax.grad(f)(x) * tangent).sum()))(x)
    close(first, second, 2e-4)
    twice = jax.jit(lambda x: jax.jvp(along, (x,), (tangent,))[1])(x)
    np.testing.assert_allclose(twice, (first * tangent).sum(), rtol=1e-3)


def test_donated_layer_gives_the_same():
    layer, x = make(), jnp.asarray(X)
    expected = layer(x)

    def update(layer, x):
        return jax.tree.map(lambda w: w - 1, layer), layer(x)

    new, output = jax.jit(update, donate_argnums=0)(jax.tree.map(jnp.copy, layer), x)
    close(output, expected)
    close(new, jax.tree.map(lambda w: w - 1, layer))


def test_traced_offset():
    layer, x = make(), jnp.asarray(X)
    run = jax.jit(lambda x, o: layer(x, use_causal_mask=True, query_offset=o))
    rows = [layer(x[i : i + 1], use_causal_mask=True, query_offset=i)[0] for i in range(2)]
    close(run(x, jnp.arange(2)), jnp.stack(rows))
    known = jax.jit(lambda x: layer(x, use_causal_mask=True, query_offset=np.arange(2)))
    close(known(x), jnp.stack(rows))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    layer, x = make(dtype=dtype), jnp.asarray(X, dtype)
    output = jax.jit(MultiHeadAttention.__call__)(layer, x)
    assert output.dtype == jnp.dtype(dtype)
    gradient = jax.grad(lambda m: m(x).astype("float32").sum())(layer)
    assert gradient.weights["query.kernel"].dtype == jnp.dtype(dtype)
    exact = make()(x.astype("float32"))
    assert np.abs(np.asarray(output, "float32") - exact).max() < 0.05


# --- float64 -------------------------------------------------------------------------------------


def test_float64_layer_in_a_float32_program():
    assert not jax.config.jax_enable_x64
    layer = make(dtype="float64")
    with jax.enable_x64(True):
        x, cotangent = jnp.asarray(X.astype("float64")), jnp.ones((2, 5, 8))
    output = layer(x, use_causal_mask=True)
    assert output.dtype == jnp.float64
    compiled = jax.jit(lambda layer, x: layer(x, use_causal_mask=True))(layer, x)
    np.testing.assert_allclose(compiled, output, rtol=1e-13, atol=1e-14)
    gradient = jax.vjp(lambda layer: layer(x, use_causal_mask=True), layer)[1](cotangent)[0]
    with jax.enable_x64(True):
        wanted = jax.grad(lambda m: m(x, use_causal_mask=True).sum())(layer)
    for name, value in gradient.weights.items():
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted.weights[name], rtol=1e-12, atol=1e-13)


def test_float64_heads_in_a_float32_program():
    with jax.enable_x64(True):
        q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 2, 4)))
    assert anymha.dot_product_attention(q, q, q, is_causal=True).dtype == jnp.float64


@pytest.mark.as_users_compile
def test_reproducible_mode_computes_in_float64():
    x, exact = jnp.asarray(X), make(dtype="float64")
    with jax.enable_x64(True):
        rounded = {k: np.asarray(v, "float64") for k, v in make().weights.items()}
        wanted = exact.with_canonical_weights(rounded)(x.astype("float64")).astype("float32")
    output = make(compute_dtype="float64")(x)
    np.testing.assert_array_equal(output, wanted)
    assert (np.asarray(make()(x)) != np.asarray(wanted)).any()


def test_reproducible_mode_where_a_traced_program_imports_the_backend():
    python(
        """
    import sys, jax, jax.numpy as jnp, numpy as np, anymha
    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype("float32")
    options = {"query_features": 8, "seed": 0, "compute_dtype": "float64"}
    def loss(x):
        layer = anymha.MultiHeadAttention(2, 4, backend="jax", **options)
        return layer(x, use_causal_mask=True).sum()
    assert "anymha_jax" not in sys.modules
    first = jax.jit(jax.grad(loss))(x)
    assert "anymha_jax" in sys.modules
    for again in (jax.grad(loss), jax.jit(jax.grad(lambda x: loss(x)))):
        np.testing.assert_array_equal(again(jnp.asarray(x)), first)
    """,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )


@pytest.mark.as_users_compile
def test_reproducible_gradients_are_the_same_compiled_batched_and_scanned():
    layer, x = make(compute_dtype="float64", dropout=0.25), jnp.asarray(X)

    def gradient(layer, x):
        return jax.grad(lambda m, x: m(x, training=True, seed=5).sum(), (0, 1))(layer, x)

    def scanned(layer, x):
        return jax.lax.scan(lambda c, x: (c, gradient(layer, x)), 0, x)[1]

    plain, xs = gradient(layer, x), jnp.stack([x, x + 1])
    for many in (jax.vmap(gradient, (None, 0)), scanned):
        for a, b in zip(*map(jax.tree.leaves, (jax.jit(many)(layer, xs), plain)), strict=True):
            np.testing.assert_array_equal(a[0], b)
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(gradient)(layer, x), plain)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.as_users_compile
def test_reproducible_gradients_are_those_of_torch():
    torch = pytest.importorskip("torch")
    layer = make(compute_dtype="float64", num_key_value_heads=1)
    other = anymha.convert(layer, to="torch")
    x = torch.tensor(X, requires_grad=True)
    other(x, use_causal_mask=True).sum().backward()
    gradient = jax.jit(jax.grad(lambda m, x: m(x, use_causal_mask=True).sum(), (0, 1)))
    mine, mine_x = gradient(layer, jnp.asarray(X))
    np.testing.assert_array_equal(mine_x, x.grad.numpy())
    for name, own in mine.weights.items():
        projection, _, part = name.partition(".")
        linear = other.get_submodule(projection)
        theirs = linear.weight.grad.T if part == "kernel" else linear.bias.grad
        np.testing.assert_array_equal(own, theirs.numpy().reshape(own.shape))


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]], ids=str)
def test_reproducible_mode_is_exported_with_lengths_that_are_symbols(platforms):
    layer, plain, x = make(compute_dtype="float64", dropout=0.5), make(), jnp.asarray(X)

    def run(x):  # both modes in one program
        return plain(layer(plain(x), use_causal_mask=True, training=True, seed=3)).sum()

    function = jax.jit(jax.value_and_grad(run))
    given = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 8"), jnp.float32)
    program = export.export(function, platforms=platforms)(given)
    if find_spec("flatbuffers"):  # JAX saves programs by it
        program = export.deserialize(program.serialize())
    close(program.call(x), function(x))


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
def test_reproducible_mode_leaks_no_tracers(transform):
    layer = make(compute_dtype="float64")
    function = transform(lambda x: layer(x).sum())
    with jax.checking_leaks():
        found = jax.jit(jax.vmap(function))(jnp.asarray(X)[:, None])
    np.testing.assert_allclose(found[0], function(jnp.asarray(X)[:1]), atol=2e-5)


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_asks_for_a_seed():
    with pytest.raises(ArgumentError) as caught:
        make(dropout=0.5)(jnp.asarray(X), training=True)
    assert str(caught.value) == (
        "`seed` is needed for dropout in training: JAX has no generator of its own. "
        "Received: None. Pass an int or a key, e.g. seed=jax.random.key(0)."
    )


@mode
@pytest.mark.parametrize(
    "seed",
    [
        lambda n: n,
        lambda n: np.int64(n),
        lambda n: jnp.int32(n),
        lambda n: jnp.uint32(n),
        lambda n: jax.random.key(n),
        lambda n: jax.random.PRNGKey(n),
    ],
    ids=["int", "numpy", "int32", "uint32", "key", "raw key"],
)
def test_seed_of_any_kind_gives_one_mask(mode, seed):
    layer, x = make(dropout=0.5, **mode), jnp.asarray(X)
    wanted = layer(x, training=True, seed=7)
    assert (wanted != layer(x, training=True, seed=8)).any()
    np.testing.assert_array_equal(layer(x, training=True, seed=seed(7)), wanted)
    if not isinstance(seed(7), (int, np.integer)):
        traced = jax.jit(lambda s: layer(x, training=True, seed=s))(seed(7))
        close(traced, wanted)
    compiled = jax.jit(lambda x: layer(x, training=True, seed=seed(7)))(x)
    close(compiled, wanted)


def test_negative_traced_seed_is_the_negative_int():
    layer, x = make(dropout=0.5), jnp.asarray(X)
    np.testing.assert_array_equal(
        layer(x, training=True, seed=jnp.int32(-7)), layer(x, training=True, seed=-7)
    )


@mode
def test_vmap_over_seeds_is_each_seed(mode):
    layer, x = make(dropout=0.5, **mode), jnp.asarray(X)
    keys = jax.random.split(jax.random.key(0), 3)
    batched = jax.jit(jax.vmap(lambda s: layer(x, training=True, seed=s)))(keys)
    close(batched, jnp.stack([layer(x, training=True, seed=k) for k in keys]))


def test_seed_that_is_no_seed_is_refused():
    with pytest.raises(ArgumentError, match=r"`seed` must be an int, or an integer array of jax"):
        make(dropout=0.5)(jnp.asarray(X), training=True, seed="7")
    with pytest.raises(
        DtypeError, match=r"`seed` must be an integer\. Received: shape \(\), dtype float32"
    ):
        make(dropout=0.5)(jnp.asarray(X), training=True, seed=jnp.float32(7))


@mode
@pytest.mark.parametrize("seed", [lambda: 3, lambda: jax.random.key(3), lambda: jnp.int32(3)])
def test_native_dropout_is_the_same_compiled(mode, seed):
    layer, x = make(dropout=0.5, dropout_rng="native", **mode), jnp.asarray(X)
    wanted = layer(x, training=True, seed=seed())
    close(jax.jit(lambda x: layer(x, training=True, seed=seed()))(x), wanted)
    close(layer(x, training=True, seed=jax.random.PRNGKey(3)), wanted)
    assert (wanted != layer(x, training=True, seed=4)).any()


# --- several devices -----------------------------------------------------------------------------


def test_sharded_inputs_and_weights():
    code = """
    import warnings; warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from anymha_jax import MultiHeadAttention
    assert len(jax.devices()) == 2
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")
    for options in ({}, {"compute_dtype": "float64"}):
        layer = MultiHeadAttention(2, 4, query_features=8, dropout=0.5, seed=0, **options)
        run = lambda layer, x: layer(x, use_causal_mask=True, training=True, seed=3)
        grad = jax.jit(jax.grad(lambda layer, x: run(layer, x).sum(), (0, 1)))
        wanted, slope = jax.jit(run)(layer, jnp.asarray(x)), grad(layer, jnp.asarray(x))
        for spec in (P("d"), P(None, "d"))[: 1 if options else 2]:
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            output = jax.jit(run)(layer, placed)
            assert output.sharding.is_equivalent_to(placed.sharding, 3), output.sharding
            np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(grad(layer, placed)[1], slope[1], rtol=1e-4, atol=1e-5)
        heads = {"query.kernel": P(None, "d"), "key.kernel": P(None, "d")}
        split = jax.tree_util.tree_map_with_path(
            lambda path, w: jax.device_put(w, NamedSharding(mesh, heads.get(path[0].key, P()))),
            layer,
        )
        output = jax.jit(run)(split, jnp.asarray(x))
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
        share = jax.shard_map(lambda x: layer(x), mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        np.testing.assert_allclose(jax.jit(share)(x), layer(jnp.asarray(x)), rtol=1e-5, atol=1e-5)
        lost = lambda x: jax.jit(share)(x).sum()
        near = jax.grad(lambda x: layer(x).sum())(jnp.asarray(x))
        np.testing.assert_allclose(jax.grad(lost)(x), near, rtol=1e-4, atol=1e-5)
    """
    flags = "--xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false"
    python(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")


# --- bad calls -----------------------------------------------------------------------------------


def test_arrays_of_another_framework_are_refused():
    with pytest.raises(MixedBackendsError, match=r"`query` must be an array of jax"):
        make()(X)
    with pytest.raises(MixedBackendsError, match=r"`value_mask` must be an array of jax"):
        make()(jnp.asarray(X), value_mask=np.ones((2, 5), bool))


EVERYTHING = {"rotary": True, "query_key_norm": "rms", "sinks": True, "alibi": True, "gate": "head",
              "softcap": 4.0, "num_key_value_heads": 1}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_dtype": "float64"},
        EVERYTHING,
        {**EVERYTHING, "sliding_window": 3},
        {"rotary": anymha.Rotary(scaling=DYNAMIC, max_position_embeddings=4)},
    ],
    ids=["float32", "float64", "everything", "ring", "dynamic"],
)
def test_a_strict_jax_takes_calls_with_caches_and_memories(options):
    x, valid = jnp.asarray(X), jnp.arange(5) < jnp.array([[5], [3]])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        layer = make(**options)
        step = jax.jit(lambda layer, x, cache: layer(x, cache=cache))
        _, cache = layer(x, cache=layer.make_cache(2, 9, rewind=1), value_mask=valid)
        _, cache = layer(x[:, :1], cache=cache)
        _, cache = step(layer, x[:, :1], cache.truncate([5, 3]).reorder([1, 0]))
        output, _ = step(layer, x[:, :2], cache)
        layer(x[:, :2], memory=layer.make_memory(x), value_mask=valid)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("options", [{}, {"compute_dtype": "float64"}], ids=["float32", "float64"])
def test_no_rank_is_promoted(options):
    layer = make(output_shape=(2, 3), **options)
    call = {"use_causal_mask": True, "attention_bias": jnp.ones(5)}
    with jax.numpy_rank_promotion("raise"):
        output = layer(jnp.asarray(X), **call)
        jax.jit(jax.grad(lambda layer, x: layer(x, **call).sum()))(layer, jnp.asarray(X))
    assert output.shape == (2, 5, 2, 3)


@pytest.mark.parametrize(
    "options",
    [
        lambda i: {"name": f"layer_{i}"},
        lambda i: {"kernel_initializer": jax.nn.initializers.normal(0.02)},
        lambda i: {"kernel_initializer": {"class_name": "Ones"} if i else "zeros"},
        lambda i: {"bias_initializer": lambda shape, dtype: np.full(shape, i)},
    ],
    ids=["names", "functions", "options", "biases"],
)
def test_layers_of_different_names_and_initialisers_stack(options):
    layers = [MultiHeadAttention(2, 4, query_features=8, seed=i, **options(i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    outputs = jax.vmap(lambda layer: layer(jnp.asarray(X)))(stacked)
    for output, layer in zip(outputs, layers, strict=True):
        close(output, layer(jnp.asarray(X)))
    name = layers[0].config.name
    assert stacked.config.name == jax.tree.map(lambda w: w, layers[0]).config.name == name


@pytest.mark.parametrize("options", [{}, {"compute_dtype": "float64"}], ids=["float32", "float64"])
def test_constants_of_numpy_are_masks_within_jit(options):
    layer, rng = make(**options), np.random.default_rng(0)
    masks = {
        "attention_mask": np.tril(np.ones((5, 5), bool)),
        "value_mask": rng.random((2, 5)) < 0.8,
        "attention_bias": rng.standard_normal((2, 1, 5, 5)),
    }
    if not options:
        masks["attention_bias"] = masks["attention_bias"].astype("float32")
    with jax.enable_x64(bool(options)):
        arrays = {name: jnp.asarray(mask) for name, mask in masks.items()}
    wanted = layer(jnp.asarray(X), **arrays)
    close(jax.jit(lambda x: layer(x, **masks))(jnp.asarray(X)), wanted)
    with pytest.raises(DtypeError, match="`value_mask` must be boolean"):
        jax.jit(lambda x: layer(x, value_mask=np.ones((2, 5), "int32")))(jnp.asarray(X))


def test_sparse_inputs_are_refused_in_words():
    sparse = pytest.importorskip("jax.experimental.sparse")
    with pytest.raises(ArgumentError, match="`query` must be a dense array of jax"):
        make()(sparse.BCOO.fromdense(jnp.asarray(X)))
