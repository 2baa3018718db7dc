"""The NumPy layer is a plain object that holds a dict of arrays."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError, WeightsError
from anymha_numpy import MultiHeadAttention, ops

NAMES = [
    f"{projection}.{part}"
    for projection in ("query", "key", "value", "output")
    for part in ("kernel", "bias")
]


def make(**options):
    return MultiHeadAttention(2, 4, **{"query_features": 8, "seed": 0, **options})


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")


def test_weights_are_a_dict_by_canonical_name():
    layer = make(output_shape=(3, 2), num_key_value_heads=1)
    assert list(layer.weights) == NAMES
    assert {name: array.shape for name, array in layer.weights.items()} == (
        layer.config.weight_shapes()
    )
    assert list(make(use_bias=False).weights) == NAMES[::2]


def test_changing_a_weight_changes_the_output(x):
    layer = make()
    before = layer(x)
    layer.weights["output.bias"] += 1
    np.testing.assert_allclose(layer(x), before + 1, rtol=1e-6)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(x, clone):
    layer = make()
    other = clone(layer)
    np.testing.assert_array_equal(other(x), layer(x))
    other.weights["query.kernel"] += 1
    assert (other(x) != layer(x)).any()


def test_weights_come_at_the_first_call(x):
    layer = MultiHeadAttention(2, 4, seed=0)
    assert layer.weights == {}
    value, key = np.ones((2, 6, 7), "float32"), np.ones((2, 6, 3), "float32")
    layer(x, value, key)
    assert layer.weights["value.kernel"].shape == (7, 2, 4)
    assert layer.weights["key.kernel"].shape == (3, 2, 4)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: ((x[0],), {}), ShapeError),
        (lambda x: ((x[0, 0, 0],), {}), ShapeError),
        (lambda x: ((x, x[:1]), {}), ShapeError),
        (lambda x: (([x, x, x, x],), {}), ArgumentError),
        (lambda x: ((x.tolist(),), {}), ArgumentError),
        (lambda x: ((None,), {}), ArgumentError),
        (lambda x: ((x.astype(int),), {}), DtypeError),
        (lambda x: ((x,), {"attention_mask": np.ones((5, 5))}), DtypeError),
        (lambda x: ((x,), {"query_mask": np.ones((2, 4), bool)}), ShapeError),
        (lambda x: ((x,), {"query_offset": 0.5}), ArgumentError),
        (lambda x: ((x,), {"seed": 1.5}), ArgumentError),
    ],
    ids=[
        "rank 2", "rank 0", "batch", "list", "numbers", "none", "int", "float mask", "mask",
        "offset", "seed",
    ],
)  # fmt: skip
def test_bad_first_call_leaves_the_layer_unbuilt(x, call, error):
    layer = MultiHeadAttention(2, 4)
    state = np.random.get_state()[1].copy()
    args, options = call(x)
    with pytest.raises(error):
        layer(*args, **options)
    assert layer.weights == {}
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("framework", ["torch", "tensorflow", "jax.numpy"])
def test_arrays_of_another_framework_are_refused(x, framework):
    module = pytest.importorskip(framework)
    ones = module.ones((2, 5, 8))
    with pytest.raises(MixedBackendsError, match=r"`query` must be an array of numpy"):
        make()(ones)
    with pytest.raises(MixedBackendsError, match=r"`value` must be an array of numpy"):
        make()(x, ones)


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_dropout_acts_in_training_alone(x, rng):
    layer, plain = make(dropout=0.5, dropout_rng=rng), make()
    dropped = layer(x, training=True, seed=3)
    assert (dropped != plain(x)).any()
    np.testing.assert_array_equal(layer(x, seed=3), plain(x))
    np.testing.assert_array_equal(layer(x, training=True, seed=np.int64(3)), dropped)
    np.testing.assert_array_equal(layer(x, training=True, seed=np.array(3)), dropped)
    assert (layer(x, training=True, seed=4) != dropped).any()


@pytest.mark.parametrize("rng", ["portable", "native"])
def test_numpy_seed_decides_dropout_where_there_is_no_seed(x, rng):
    layer = make(dropout=0.5, dropout_rng=rng)
    np.random.seed(3)
    first, second = layer(x, training=True), layer(x, training=True)
    np.random.seed(3)
    np.testing.assert_array_equal(layer(x, training=True), first)
    assert (first != second).any()


def test_numpy_seed_decides_the_first_weights():
    np.random.seed(3)
    first = make(seed=None).weights["query.kernel"]
    np.random.seed(3)
    np.testing.assert_array_equal(make(seed=None).weights["query.kernel"], first)
    assert (make(seed=None).weights["query.kernel"] != first).any()


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 5e-2), ("float16", 5e-3)])
def test_half_precision(x, dtype, limit):
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype])
    output = make(dtype=dtype)(x.astype(kind))
    assert output.dtype == kind
    exact = make()(x.astype(kind).astype("float32"))
    assert np.abs(output.astype("float32") - exact).max() < limit


def test_inputs_are_not_changed(x):
    before, mask = x.copy(), np.array([[True] * 3 + [False] * 2] * 2)
    make(dropout=0.5)(x, value_mask=mask, use_causal_mask=True, training=True, seed=3)
    np.testing.assert_array_equal(x, before)


def test_signature_of_vjp_shows_the_arguments_of_the_call():
    layer = make()
    assert inspect.signature(layer.vjp) == inspect.signature(layer)


def test_signature_shows_the_arguments_of_the_call():
    assert list(inspect.signature(make()).parameters)[:4] == [
        "query", "value", "key", "attention_mask",
    ]  # fmt: skip
    assert list(inspect.signature(MultiHeadAttention).parameters)[:3] == [
        "num_heads", "key_dim", "value_dim",
    ]  # fmt: skip


def test_set_weights_does_not_keep_the_arrays_it_was_given(x):
    layer, weights = make(), anymha.get_weights(make(seed=1))
    anymha.set_weights(layer, weights)
    weights["query.kernel"][...] = 0
    np.testing.assert_array_equal(layer(x), make(seed=1)(x))


def test_set_weights_that_do_not_fit_leaves_the_layer(x):
    layer, weights = make(), anymha.get_weights(make(seed=1))
    weights["gate.kernel"] = weights.pop("key.bias")
    with pytest.raises(WeightsError) as caught:
        anymha.set_weights(layer, weights)
    assert str(caught.value) == (
        f"Weights must have the names {', '.join(NAMES)}. Missing: key.bias. Unknown: gate.kernel."
    )
    np.testing.assert_array_equal(layer(x), make()(x))


@pytest.mark.parametrize("great", [1.0, -0.0, 3e38, np.inf, -np.inf, np.nan])
def test_logits_are_masked_as_numpy_would(great: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 5)).astype(np.float32)
    x[:, :, 2:, 3:] = great
    for shape in ((2, 1, 6, 5), (5,), (6, 1), (2, 3, 6, 5)):
        mask = rng.random(shape) < 0.5
        found = ops.where(mask, x, -np.inf)
        assert found.tobytes() == np.where(mask, x, np.float32(-np.inf)).tobytes()


def test_kept_projections_are_those_of_the_names_and_the_options() -> None:
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0)
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype("float32")
    before = layer(x)
    layer(x)
    others = {"query.kernel": "key.kernel", "key.kernel": "value.kernel",
              "value.kernel": "query.kernel"}  # fmt: skip
    layer.weights = {others.get(name, name): array for name, array in layer.weights.items()}
    after = layer(x)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, copy.deepcopy(layer)(x))
    layer.config = dataclasses.replace(layer.config, compute_dtype="float16")
    np.testing.assert_array_equal(layer(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_small_numbers_vanish_whatever_numpy_is_told(dtype):
    layer = make(dtype=dtype)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(dtype) * 100
    call = {"use_causal_mask": True, "value_mask": np.ones((2, 5), bool)}
    wanted, pullback = layer.vjp(x, **call)
    slopes = pullback(np.ones_like(wanted))
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(layer(x, **call), wanted)
        result, pullback = layer.vjp(x, **call)
        for name, slope in pullback(np.ones_like(result)).items():
            np.testing.assert_array_equal(slope, slopes[name])


def test_overflow_is_an_error_where_numpy_is_told_so():
    told = "overflow encountered in matmul"
    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match=told):
        make()(np.full((1, 3, 8), 3e38, "float32"))


def test_a_number_that_vanishes_changes_no_seed() -> None:
    layer = make(dropout=0.5)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32) * 1000
    drawn: list[int] = []

    def seed() -> int:
        drawn.append(len(drawn))
        return 7

    layer(x)
    expected = layer(x, training=True, seed=7)
    np.random.seed(3)
    first = layer(x, training=True)
    with np.errstate(under="raise"):
        assert np.array_equal(layer(x, training=True, seed=seed), expected)
        assert drawn == [0]
        np.random.seed(3)
        assert np.array_equal(layer(x, training=True), first)
