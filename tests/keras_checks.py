"""What the Keras layer does on the Keras backend that is set.

Run by `test_keras_layer.py` in a process of its own for each of them, since importing Keras fixes
the backend.
"""

from __future__ import annotations

import contextlib
import doctest
import itertools
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

import anymha
import anymha_keras.layer
from anymha.errors import ConfigError, DtypeError, ShapeError, WeightsError
from anymha.interchange.convert_model import convert_file
from anymha.interchange.detect import find_layer_groups
from anymha.interchange.files.formats import format_of, open_file
from anymha.parity import compare
from anymha.parity.stages.tolerance import tolerance
from anymha_keras import MultiHeadAttention
from anymha_numpy import MultiHeadAttention as NumpyLayer

ROOT = Path(__file__).parents[1]
BACKEND = keras.config.backend()
if BACKEND != "tensorflow":  # whose import takes seconds; `set_random_seed` would seed it too
    keras.src.utils.module_utils.tensorflow._available = False
Theirs = keras.layers.MultiHeadAttention

pytestmark = [
    # Keras's torch backend, when it makes NumPy arrays.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not train on NumPy")


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x))


def close(got: Any, want: Any, length: int = 16, scale: float = 1.0) -> None:
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape
    margin = 2 * tolerance("float32", length, scale * max(1.0, float(np.abs(want).max())))
    np.testing.assert_allclose(got, want, rtol=0, atol=margin)


def randomised(layer: Any, seed: int = 3) -> Any:
    """The layer with weights none of which is zero."""
    layer.set_weights(
        [0.5 * numbers(*w.shape, seed=seed + i) for i, w in enumerate(layer.get_weights())]
    )
    return layer


def pair(*args: Any, call: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    """Our layer and Keras's with the same weights."""
    ours, theirs = MultiHeadAttention(*args, **options), Theirs(*args, **options)
    for layer in (ours, theirs):  # Keras's call fails on JAX where `value_dim` is not `key_dim`
        layer.build(*(x.shape for x in call))
    randomised(theirs)
    ours.set_weights(theirs.get_weights())
    return ours, theirs


X, Y, Z = numbers(2, 5, 8, seed=1), numbers(2, 6, 7, seed=2), numbers(2, 6, 3, seed=3)
PADDING = np.array([[True] * 6, [True] * 4 + [False] * 2])
TOKENS = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [1, 2, 2, 2, 0]])


# --- Keras's numbers -----------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "self": ({}, (X, X), {}),
    "cross": ({"value_dim": 5, "use_bias": False}, (X, Y, Z), {}),
    "causal": ({}, (X, X), {"use_causal_mask": True}),
    "mask": ({}, (X, Y), {"attention_mask": numbers(2, 5, 6, seed=4) > -1.2}),
    "numeric mask": ({}, (X, Y), {"attention_mask": 1.0 * (numbers(2, 5, 6, seed=4) > -1.2)}),
    "padding": ({}, (X, Y), {"value_mask": PADDING}),
    "window": ({"sliding_window": 2}, (X, X), {"use_causal_mask": True}),
    "shape": ({"output_shape": (3, 2)}, (X, Y), {}),
    "axes": ({"attention_axes": (2,)}, (numbers(2, 3, 4, 8), numbers(2, 3, 5, 8, seed=1)), {}),
    "all axes": ({}, (numbers(2, 3, 4, 8), numbers(2, 2, 2, 8, seed=1)), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_and_scores_are_those_of_keras_layer(name: str) -> None:
    options, inputs, call = CALLS[name]
    ours, theirs = pair(2, 4, call=inputs, **options)
    output, scores = ours(*inputs, **call, return_attention_scores=True)
    wanted, wanted_scores = theirs(*inputs, **call, return_attention_scores=True)
    close(scores, wanted_scores)
    close(output, wanted, scale=10)
    np.testing.assert_array_equal(to_numpy(ours(*inputs, **call)), to_numpy(output))


def test_a_row_without_keys_gives_the_output_bias() -> None:
    ours, _ = pair(2, 4, call=(X, Y))
    mask = np.ones((2, 5, 6), bool)
    mask[1, 2] = False
    output, scores = ours(X, Y, attention_mask=mask, return_attention_scores=True)
    np.testing.assert_array_equal(to_numpy(output)[1, 2], to_numpy(ours.output_dense.bias))
    assert not to_numpy(scores)[1, :, 2].any()


def test_weights_have_the_names_order_and_shapes_of_keras_layer() -> None:
    ours, theirs = pair(2, 4, call=(X, Y, Z), value_dim=5, output_shape=(3, 2), name="attention")

    def shown(layer: Any) -> list[Any]:
        return [(w.path, tuple(w.shape), w.dtype, w.trainable) for w in layer.variables]

    assert shown(ours) == shown(theirs)
    assert ours.count_params() == theirs.count_params()


def test_list_inputs_are_query_value_and_key() -> None:
    ours, _ = pair(2, 4, call=(X, Y, Z))
    np.testing.assert_array_equal(to_numpy(ours([X, Y, Z])), to_numpy(ours(X, Y, Z)))
    fresh = MultiHeadAttention(2, 4)
    fresh([X, Y])
    assert fresh.key_dense.kernel.shape[0] == 7
    assert fresh.compute_output_shape([X.shape, Y.shape]) == (2, 5, 8)


def test_options_beyond_keras_are_those_of_the_numpy_layer() -> None:
    options = {"num_key_value_heads": 2, "sliding_window": 3, "scale": 0.3, "seed": 5}
    ours, numpy = MultiHeadAttention(4, 4, **options), NumpyLayer(4, 4, **options)
    ours(X, Y)
    numpy = anymha.convert(randomised(ours), to="numpy")
    bias = numbers(2, 4, 5, 6)
    call = {"use_causal_mask": True, "query_offset": 1, "attention_bias": bias}
    close(ours(X, Y, **call), numpy(X, Y, **call), scale=10)


# --- Masks ---------------------------------------------------------------------------------------


def embedded() -> Any:
    return keras.layers.Embedding(4, 8, mask_zero=True)(TOKENS)


def test_attached_masks_count_in_self_attention_and_are_passed_on() -> None:
    ours, _ = pair(2, 4, call=(X, X))
    x, mask = embedded(), TOKENS != 0
    wanted = to_numpy(ours(to_numpy(x), query_mask=mask, value_mask=mask))
    for call in ((x,), (x, x), ([x, x],)):
        output = ours(*call)
        np.testing.assert_array_equal(to_numpy(output), wanted)
        np.testing.assert_array_equal(to_numpy(keras.src.backend.get_keras_mask(output)), mask)
    with_bias = ours(x, attention_bias=np.zeros((5, 5), "float32"))
    np.testing.assert_allclose(to_numpy(with_bias), wanted, rtol=1e-5, atol=1e-6)
    assert (wanted[0, 3:] == to_numpy(ours.output_dense.bias)).all()


def test_attached_masks_are_those_of_keras_layer_where_a_row_has_keys() -> None:
    ours, theirs = pair(2, 4, call=(X, X))
    x = embedded()
    close(to_numpy(ours(x, x))[TOKENS != 0], to_numpy(theirs(x, x))[TOKENS != 0], scale=10)


def test_positions_that_a_mask_excludes_do_not_matter() -> None:
    ours, _ = pair(2, 4, call=(X, Y))
    broken = np.where(PADDING[..., None], Y, np.nan).astype("float32")
    zeroed = np.where(PADDING[..., None], Y, 0).astype("float32")
    results = [ours(X, y, value_mask=PADDING.astype("int32")) for y in (broken, zeroed)]
    np.testing.assert_array_equal(*map(to_numpy, results))


def test_a_mask_that_is_passed_wins_over_an_attached_one() -> None:
    ours, _ = pair(2, 4, call=(X, X))
    x, mask = embedded(), np.array([[False] + [True] * 4] * 3)
    output = ours(x, query_mask=mask, value_mask=mask)
    wanted = ours(to_numpy(x), query_mask=mask, value_mask=mask)
    np.testing.assert_array_equal(to_numpy(output), to_numpy(wanted))
    np.testing.assert_array_equal(to_numpy(keras.src.backend.get_keras_mask(output)), mask)


def test_masks_go_through_a_functional_model() -> None:
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(4, 8, mask_zero=True)(tokens)
    layer = MultiHeadAttention(2, 4)
    attended = layer(x)
    model = keras.Model(tokens, keras.layers.GlobalAveragePooling1D()(attended))
    randomised(layer)
    embedding = model.layers[1](TOKENS)
    wanted = to_numpy(layer(embedding))
    mask = (TOKENS != 0)[..., None]
    mean = (wanted * mask).sum(1) / mask.sum(1)
    close(model(TOKENS), mean, scale=10)


def test_a_mask_of_other_numbers_than_0_and_1_is_an_error() -> None:
    ours, _ = pair(2, 4, call=(X, X))
    additive = np.where(np.tri(5), 0.0, -1e9).astype("float32")
    with pytest.raises(DtypeError, match="Pass an additive mask as `attention_bias`"):
        ours(X, X, attention_mask=additive)
    close(ours(X, attention_bias=additive), ours(X, use_causal_mask=True), scale=10)


# --- Shapes without arrays -----------------------------------------------------------------------


def test_symbolic_shapes_are_those_of_the_results() -> None:
    layer = MultiHeadAttention(2, 4, output_shape=(3, 2), attention_axes=2)
    inputs = [keras.Input((3, None, 8)), keras.Input((3, None, 7))]
    symbolic = layer(*inputs, return_attention_scores=True)
    assert [tuple(s.shape) for s in symbolic] == [(None, 3, None, 3, 2), (None, 3, 2, None, None)]
    x, y = numbers(2, 3, 4, 8), numbers(2, 3, 5, 7)
    model = keras.Model(inputs, symbolic)
    output, scores = model([x, y])
    assert (tuple(output.shape), tuple(scores.shape)) == ((2, 3, 4, 3, 2), (2, 3, 2, 4, 5))
    assert layer.compute_output_shape(x.shape, y.shape) == (2, 3, 4, 3, 2)


@pytest.mark.parametrize("symbolic", [False, True])
def test_inputs_that_do_not_fit_are_an_error_before_weights_are_made(symbolic: bool) -> None:
    layer = MultiHeadAttention(2, 4)
    shapes = ((5, 8), (6, 7), (4, 7))
    inputs = [keras.Input(s) if symbolic else numbers(2, *s) for s in shapes]
    with pytest.raises(ShapeError, match="`key` and `value` must have the same length"):
        layer(*inputs)
    assert not layer.weights
    layer(*inputs[:2])
    with pytest.raises(ShapeError, match="7 features"):
        layer(inputs[0], inputs[0])


# --- Dropout -------------------------------------------------------------------------------------


def exact(**options: Any) -> Any:
    """A layer in reproducible mode, with weights."""
    return MultiHeadAttention(
        2, 4, dropout=0.4, query_features=8, compute_dtype="float64", **options
    )


def test_compare_reads_the_weights_of_layers_of_ones_own() -> None:
    class Attention(keras.layers.Layer):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale
            parts = [keras.layers.Dense(16, bias_initializer="random_normal") for _ in range(4)]
            self.to_q, self.to_k, self.to_v, self.to_out = parts
            for part in parts:
                part.build((None, None, 16))

        def call(self, x: Any) -> Any:
            ops: Any = keras.ops
            q, k, v = (
                ops.transpose(ops.reshape(part(x), (2, 5, 4, 4)), (0, 2, 1, 3))
                for part in (self.to_q, self.to_k, self.to_v)
            )
            shares = ops.softmax(self.scale * ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))))
            context = ops.transpose(ops.matmul(shares, v), (0, 2, 1, 3))
            return self.to_out(ops.reshape(context, (2, 5, 16)))

    right, wrong = Attention(0.5), Attention(0.3)
    wrong.set_weights(right.get_weights())
    report = compare(right, wrong, keras.ops.convert_to_tensor(numbers(2, 5, 16)))
    assert "wrong scale (0.6 times)" in str(report.diagnosis)
    assert "4 heads of 4: attention of them gives its output" in report.to_text()


@trains
def test_a_stateless_call_takes_arrays_of_numpy() -> None:
    x = numbers(2, 5, 8)
    layer = MultiHeadAttention(2, 4, query_features=8, seed=0)
    weights = [variable.value for variable in layer.trainable_variables]
    rest = [variable.value for variable in layer.non_trainable_variables]
    options = {"attention_mask": numbers(5, 5) > 0, "attention_bias": numbers(5, 5, seed=1)}
    output, _ = layer.stateless_call(weights, rest, x, x, **options)
    close(output, layer(x, x, **options))


def test_dropout_of_a_seed_is_that_of_the_numpy_layer_bit_for_bit() -> None:
    layer = exact(seed=1)
    numpy = anymha.convert(layer, to="numpy")
    got = to_numpy(layer(X, training=True, seed=2**40 + 7 if BACKEND != "jax" else 7))
    want = numpy(X, training=True, seed=2**40 + 7 if BACKEND != "jax" else 7)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - numpy(X)).max() > 0.01


def test_seeds_of_numpy_of_one_integer_and_of_keras_are_seeds() -> None:
    layer = exact(seed=1)
    numpy = anymha.convert(layer, to="numpy")
    seeds = {5: [np.int64(5), np.array([5]), keras.ops.convert_to_tensor([5])]}
    seeds |= {2**40 + 7: [np.int64(2**40 + 7)]}
    generator = keras.random.SeedGenerator(11)
    seeds |= {11 * 2**32 + step: [generator.next()] for step in range(2)}
    for number, forms in seeds.items():
        want = numpy(X, training=True, seed=number)
        for seed in forms:
            np.testing.assert_array_equal(to_numpy(layer(X, training=True, seed=seed)), want)
    with pytest.raises(ShapeError, match=r"`seed` must be one integer, or one key of"):
        layer(X, training=True, seed=keras.ops.convert_to_tensor([1, 9, 2]))


def test_dropout_draws_from_keras_generator_the_same_in_every_backend() -> None:
    keras.utils.set_random_seed(3)
    random.seed(3)
    layer = exact(seed=11)
    numpy = anymha.convert(layer, to="numpy")
    for step in range(2):
        got = to_numpy(layer(X, training=True))
        np.testing.assert_array_equal(got, numpy(X, training=True, seed=11 * 2**32 + step))


def test_set_random_seed_repeats_first_values_and_dropout() -> None:
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(8)
        layer = exact()
        runs.append([*layer.get_weights(), *(to_numpy(layer(X, training=True)) for _ in range(2))])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    assert (runs[0][-1] != runs[0][-2]).any()


def test_dropout_acts_in_training_only_which_an_outer_layer_may_say() -> None:
    layer = exact()
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layer(inputs))
    np.testing.assert_array_equal(to_numpy(model(X)), to_numpy(layer(X)))
    assert (to_numpy(model(X, training=True)) != to_numpy(layer(X))).any()


# --- Dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_dtype_policies_say_what_weights_and_results_are(name: str) -> None:
    half = name.removeprefix("mixed_")
    layer = MultiHeadAttention(2, 4, dtype=name, seed=0)
    output = layer(X)
    wanted = "float32" if "mixed" in name else half
    assert {w.dtype for w in layer.weights} == {wanted}
    assert keras.backend.standardize_dtype(output.dtype) == half
    assert layer(keras.Input((5, 8))).dtype == half
    numpy = NumpyLayer(2, 4, dtype=wanted, compute_dtype=half, query_features=8, seed=0)
    kind = np.dtype(getattr(ml_dtypes, half, half))
    want = numpy(X.astype(kind)).astype("float32")
    margin = 2 * tolerance(half, 16, float(np.abs(want).max()), stored=half)
    np.testing.assert_allclose(to_numpy(output).astype("float32"), want, rtol=0, atol=margin)


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_a_bias_in_float32_is_not_rounded(name: str) -> None:
    half = name.removeprefix("mixed_")
    layer, wide = (MultiHeadAttention(2, 4, dtype=d, seed=0) for d in (name, "float32"))
    kind = np.dtype(getattr(ml_dtypes, half, half))
    x = X.astype(kind).astype("float32")
    for each in (layer, wide):
        each.build(x.shape)
    anymha.set_weights(wide, {
        n: np.asarray(w, "float32") for n, w in anymha.get_weights(layer).items()
    })  # fmt: skip
    large = (1500 + numbers(5, 5, seed=1)).astype("float32")
    lowest = np.full((5, 5), np.finfo("float32").min, "float32")
    for bias in (large, lowest):
        want = to_numpy(wide(x, attention_bias=bias))
        margin = 8 * float(ml_dtypes.finfo(kind).eps) * np.abs(want).max()
        for given in (bias, keras.ops.convert_to_tensor(bias)):
            output = to_numpy(layer(x, attention_bias=given)).astype("float32")
            np.testing.assert_allclose(output, want, rtol=0, atol=margin)
    inputs = keras.Input((5, 8)), keras.Input((5, 5), dtype="float32")
    one = keras.ops.reshape(inputs[1], (-1, 1, 5, 5))
    model = keras.Model(inputs, layer(inputs[0], attention_bias=one))
    output = to_numpy(model([x, np.repeat(large[None], len(x), 0)])).astype("float32")
    want = to_numpy(wide(x, attention_bias=large))
    margin = 8 * float(ml_dtypes.finfo(kind).eps) * np.abs(want).max()
    np.testing.assert_allclose(output, want, rtol=0, atol=margin)


def test_a_policy_and_another_compute_dtype_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Pass dtype='mixed_float16' alone"):
        MultiHeadAttention(2, 4, dtype="mixed_float16", compute_dtype="float32")


def test_float32_with_a_half_compute_dtype_is_the_mixed_policy() -> None:
    layer = MultiHeadAttention(2, 4, compute_dtype="bfloat16")
    assert layer.dtype_policy.name == "mixed_bfloat16"
    assert anymha.MultiHeadAttention(2, 4, backend="keras").config.compute_dtype is None


def test_float64_is_exact_to_float64() -> None:
    jax = pytest.importorskip("jax") if BACKEND == "jax" else None
    with jax.enable_x64(True) if jax else contextlib.nullcontext():
        layer = MultiHeadAttention(2, 4, dtype="float64", seed=0)
        x = numbers(2, 5, 8, dtype="float64")
        output = to_numpy(layer(x))
    want = NumpyLayer(2, 4, dtype="float64", query_features=8, seed=0)(x)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, want, rtol=0, atol=tolerance("float64", 16, 10.0))


def test_the_reproducible_mode_gives_the_bits_of_the_numpy_layer() -> None:
    layer = MultiHeadAttention(2, 4, compute_dtype="float64", seed=0)
    output, scores = layer(X, Y, return_attention_scores=True)
    numpy = anymha.convert(layer, to="numpy")
    want, want_scores = numpy(X, Y, return_attention_scores=True)
    np.testing.assert_array_equal(to_numpy(output), want)
    np.testing.assert_array_equal(to_numpy(scores), want_scores)


# --- First values, penalties, constraints --------------------------------------------------------


@pytest.mark.parametrize(
    "initializer",
    ["glorot_uniform", "orthogonal", {"class_name": "RandomNormal", "config": {"stddev": 0.3}}],
    ids=str,
)
def test_first_values_by_name_are_those_of_the_numpy_layer(initializer: Any) -> None:
    options = {"kernel_initializer": initializer, "bias_initializer": "normal", "seed": 4}
    layer = MultiHeadAttention(2, 4, **options)
    layer.build(X.shape, Y.shape)
    numpy = NumpyLayer(2, 4, query_features=8, value_features=7, **options)
    for name, values in anymha.get_weights(layer).items():
        np.testing.assert_array_equal(values, numpy.weights[name])


def test_first_values_of_keras_instance_are_those_of_keras_layer() -> None:
    options = {"kernel_initializer": keras.initializers.HeNormal(seed=3)}
    layers = [MultiHeadAttention(2, 4, **options), Theirs(2, 4, **options)]
    layers.append(MultiHeadAttention.from_config(layers[0].get_config()))
    for layer in layers:
        layer.build(X.shape, Y.shape)
    for ours, theirs, again in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, again)


def test_first_values_of_an_instance_without_seed_differ_between_projections() -> None:
    layer = MultiHeadAttention(2, 4, kernel_initializer=keras.initializers.HeNormal())
    layer(X)
    assert (to_numpy(layer.query_dense.kernel) != to_numpy(layer.key_dense.kernel)).all()


@keras.saving.register_keras_serializable(package="checks")
class Peak(keras.regularizers.Regularizer):
    """A regulariser that anymha does not know."""

    def __call__(self, x: Any) -> Any:
        return keras.ops.max(keras.ops.abs(x))

    def get_config(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": "l2", "bias_regularizer": keras.regularizers.L1(0.3)},
        {"activity_regularizer": keras.regularizers.L1L2(0.1, 0.2)},
        {"kernel_regularizer": Peak(), "activity_regularizer": "l2"},
        {"activity_regularizer": Peak()},
    ],
    ids=["weights", "activity", "own", "own activity"],
)
def test_losses_are_those_of_keras_layer(options: dict[str, Any]) -> None:
    ours, theirs = pair(2, 4, call=(X, Y), **options)
    for layer in (ours, theirs):
        layer(X, Y)
    total, wanted = (float(sum(to_numpy(x) for x in layer.losses)) for layer in (ours, theirs))
    assert wanted > 0.1
    assert abs(total - wanted) <= 1e-6 * wanted
    again = MultiHeadAttention.from_config(json.loads(json.dumps(ours.get_config())))
    again(X, Y)
    again.set_weights(ours.get_weights())
    again(X, Y)
    assert float(sum(to_numpy(x) for x in again.losses)) == pytest.approx(wanted, rel=1e-6)


def test_the_orthogonal_regularizer_takes_kernels_as_matrices() -> None:
    layer = MultiHeadAttention(2, 4, kernel_regularizer="orthogonal_regularizer", seed=0)
    layer(X)
    numpy = anymha.convert(layer, to="numpy")
    wanted = float(numpy.regularization_loss())
    assert float(sum(to_numpy(x) for x in layer.losses)) == pytest.approx(wanted, rel=1e-6)


def test_constraints_are_keras_own_on_every_weight() -> None:
    layer = MultiHeadAttention(
        2, 4, kernel_constraint=keras.constraints.MaxNorm(0.7), bias_constraint="non_neg"
    )
    layer(X)
    numpy = anymha.convert(randomised(layer), to="numpy").apply_constraints()
    for weight, want in zip(layer.weights, numpy.weights.values(), strict=True):
        close(weight.constraint(weight.value), want)
        assert (to_numpy(weight.value) != want).any()


# --- Configuration, files, conversion ------------------------------------------------------------


def test_config_goes_to_keras_layer_and_back() -> None:
    options = {
        "value_dim": 5, "dropout": 0.1, "use_bias": False, "output_shape": 3, "attention_axes": 1,
        "kernel_regularizer": "l2", "kernel_constraint": "max_norm", "seed": 2, "name": "attention",
    }  # fmt: skip
    ours = MultiHeadAttention(2, 4, **options)
    theirs = Theirs.from_config(ours.get_config())
    back = MultiHeadAttention.from_config(json.loads(json.dumps(theirs.get_config())))
    assert back.config == ours.config
    for name in ("num_heads", "key_dim", "value_dim", "dropout", "use_bias", "seed", "name"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_config_has_every_option() -> None:
    layer = MultiHeadAttention(
        4, 4, use_bias=("query", "output"), num_key_value_heads=2, scale=0.5, sliding_window=3,
        dropout_rng="native", compute_dtype="float64", query_features=8, trainable=False,
        kernel_initializer="orthogonal", activity_regularizer={"class_name": "L1", "config": {}},
        name="attention",
    )  # fmt: skip
    again = MultiHeadAttention.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.config == layer.config
    assert again.get_config() == layer.get_config()
    assert not again.trainable_weights
    assert len(again.weights) == 6


def example() -> keras.Model:
    """A model with masks, dropout and initialisers of all kinds."""
    keras.utils.set_random_seed(1)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 8, mask_zero=True)(tokens)
    x = MultiHeadAttention(2, 4, dropout=0.2)(x, use_causal_mask=True)
    x = MultiHeadAttention(
        2, 4, query_features=8, kernel_initializer=keras.initializers.HeNormal(), dtype="float32"
    )([x, x])
    return keras.Model(tokens, keras.layers.Dense(3)(x))


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model = example()
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(again(TOKENS)), to_numpy(model(TOKENS)))


@pytest.mark.skipif("ANYMHA_KERAS_MODEL" not in os.environ, reason="no model of another backend")
def test_a_model_saved_under_another_backend_predicts_the_same() -> None:
    """The first backend of a run saves it."""
    folder = Path(os.environ["ANYMHA_KERAS_MODEL"])
    if not (folder / "model.keras").exists():
        model = example()
        model.save(folder / "model.keras")
        np.save(folder / "predictions.npy", to_numpy(model(TOKENS)))
    model: Any = keras.saving.load_model(folder / "model.keras")
    close(model(TOKENS), np.load(folder / "predictions.npy"), scale=10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_weight_files_go_to_keras_layer_and_back(tmp_path: Path, dropout: float) -> None:
    def model(cls: Any) -> keras.Model:
        inputs = keras.Input((5, 8))
        return keras.Model(inputs, cls(2, 4, dropout=dropout, name="attention")(inputs, inputs))

    ours, theirs = model(MultiHeadAttention), model(Theirs)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    close(ours(X), theirs(X), scale=10)
    other = model(MultiHeadAttention)
    other.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    close(theirs(X), other(X), scale=10)


def test_convert_goes_to_numpy_and_back() -> None:
    layer = MultiHeadAttention(2, 4, value_dim=3, output_shape=(3, 2))
    with pytest.raises(WeightsError, match="no weights yet"):
        anymha.get_weights(layer)
    layer(X, Y, Z)
    numpy = anymha.convert(layer, to="numpy")
    close(layer(X, Y, Z), numpy(X, Y, Z), scale=10)
    back = anymha.convert(numpy, to="keras")
    np.testing.assert_array_equal(to_numpy(back(X, Y, Z)), to_numpy(layer(X, Y, Z)))
    with pytest.raises(WeightsError, match=r"query\.bias"):
        anymha.set_weights(back, {n: w for n, w in numpy.weights.items() if n != "query.bias"})


def test_set_weights_makes_the_weights_of_a_layer_that_has_none() -> None:
    numpy = NumpyLayer(2, 4, query_features=8, seed=0, attention_axes=2)
    layer = anymha.set_weights(MultiHeadAttention(2, 4, attention_axes=2), numpy.weights)
    x = numbers(2, 3, 4, 8)
    close(layer(x), numpy(x), scale=10)


# --- Training ------------------------------------------------------------------------------------


def task() -> tuple[np.ndarray, np.ndarray]:
    """Sequences, and whether their first token comes again."""
    tokens = np.random.default_rng(0).integers(1, 9, (256, 6))
    return tokens, (tokens[:, 1:] == tokens[:, :1]).any(1).astype("float32")


@trains
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_model_learns(dtype: str) -> None:
    keras.utils.set_random_seed(0)
    tokens, labels = task()
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(9, 16)(inputs)
    attention = MultiHeadAttention(
        4, 4, dropout=0.1, kernel_constraint="max_norm", activity_regularizer="l2", dtype=dtype
    )
    x = x + keras.ops.cast(attention(x), "float32")
    x = keras.layers.Dense(1)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, x)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    losses = model.fit(tokens, labels, epochs=12, batch_size=64, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    for dense in (attention.query_dense, attention.output_dense):
        assert np.linalg.norm(to_numpy(dense.kernel), axis=0).max() <= 2.0 + 1e-5


@trains
def test_training_is_that_of_keras_layer() -> None:
    tokens, labels = task()
    x = np.eye(9, dtype="float32")[tokens]
    histories, weights = [], None
    for cls in (Theirs, MultiHeadAttention):
        inputs = keras.Input((6, 9))
        attention = cls(2, 4, kernel_regularizer="l2", activity_regularizer="l1")
        attended = attention(inputs, inputs, use_causal_mask=True)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
        weights = randomised(model).get_weights() if weights is None else weights
        model.set_weights(weights)
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05), loss)
        fit = model.fit(x, labels, epochs=3, batch_size=64, verbose=0, shuffle=False)
        histories.append(fit.history["loss"])
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-5)
    assert histories[0][-1] < histories[0][0]


@trains
def test_lora_of_a_projection_takes_part() -> None:
    layer = MultiHeadAttention(2, 4)
    before = to_numpy(layer(X))
    layer.query_dense.enable_lora(2)
    np.testing.assert_array_equal(to_numpy(layer(X)), before)
    layer.query_dense.lora_kernel_b.assign(numbers(*layer.query_dense.lora_kernel_b.shape))
    assert np.abs(to_numpy(layer(X)) - before).max() > 1e-3


# --- Refusals ------------------------------------------------------------------------------------


def test_flash_attention_is_taken_where_it_changes_no_result() -> None:
    plain, flash = randomised(MultiHeadAttention(2, 4, query_features=8)), None
    for value in (None, False, True):
        flash = MultiHeadAttention(2, 4, query_features=8, flash_attention=value)
        flash.set_weights(plain.get_weights())
        close(flash(X), plain(X))
    with pytest.raises(ValueError, match="Please disable flash attention to access attention sc"):
        flash(X, return_attention_scores=True)
    with pytest.raises(ConfigError, match="Dropout is not supported when flash attention"):
        MultiHeadAttention(2, 4, flash_attention=True, dropout=0.1)
    with pytest.raises(ConfigError, match="`flash_attention` must be True or False"):
        MultiHeadAttention(2, 4, flash_attention="auto")


def test_a_policy_that_quantises_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="floating dtypes"):
        MultiHeadAttention(2, 4, dtype="int8_from_float32")


PASSES_THROUGH = "ignore:.*acts as a pass-through:UserWarning"  # says Keras on NumPy


@pytest.mark.filterwarnings(PASSES_THROUGH)
@pytest.mark.parametrize("axes", [None, (2,)])
def test_quantised_projections_take_part(axes: Any) -> None:
    x = numbers(2, 3, 4, 8) if axes else X
    layer = randomised(MultiHeadAttention(2, 4, gate="elementwise", attention_axes=axes, name="a"))
    layer.build(x.shape)
    randomised(layer)
    before = to_numpy(layer(x))
    for dense in layer._flatten_layers():
        with contextlib.suppress(NotImplementedError):  # of what holds no product
            dense.quantize("int8")
    after = to_numpy(layer(x))
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    for read in (anymha.get_weights, lambda layer: anymha.set_weights(layer, {})):
        with pytest.raises(WeightsError, match="must not be quantised"):
            read(layer)


@pytest.mark.filterwarnings(PASSES_THROUGH)
def test_a_map_of_policies_quantises_the_projections_that_it_names() -> None:
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["attention/query"] = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    layer = MultiHeadAttention(2, 4, dtype=policies, name="attention")
    layer.build(X.shape)
    modes = [dense.quantization_mode for dense in (layer.query_dense, layer.key_dense)]
    assert modes == ["int8", None]
    assert to_numpy(layer(X)).shape == X.shape


# --- Gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_bias": False, "value_dim": 4}])
def test_gate_is_that_of_keras(options: dict[str, Any]) -> None:
    ours, theirs = pair(2, 4, use_gate=True, call=(X, Y, Z), **options)
    assert ours.config.gate == "elementwise"
    assert [w.path.split("/")[-2:] for w in ours.weights] == [
        w.path.split("/")[-2:] for w in theirs.weights
    ]
    close(ours(X, Y, Z), theirs(X, Y, Z))
    wanted = theirs(X, Y, Z, use_causal_mask=True, return_attention_scores=True)
    for got, want in zip(
        ours(X, Y, Z, use_causal_mask=True, return_attention_scores=True), wanted, strict=True
    ):
        close(got, want)


@trains
def test_gate_trains_and_is_seen_as_in_keras() -> None:
    """A step of training with penalties of weights and of activity leaves the same weights."""
    options = {"use_gate": True, "kernel_regularizer": "l2", "activity_regularizer": "l1"}
    models, states, losses = [], [], []
    for kind in (MultiHeadAttention, Theirs):
        inputs = keras.Input(X.shape[1:])
        models.append(keras.Model(inputs, kind(2, 4, **options)(inputs, inputs)))
        models[-1].compile(keras.optimizers.SGD(0.1), "mse")
    models[0].set_weights(randomised(models[1]).get_weights())
    for model in models:
        losses += model.fit(X, 0 * X, batch_size=len(X), verbose=0).history["loss"]
        states.append(model.get_weights())
    for got, want in zip(*states, strict=True):
        close(got, want, length=256)
    close(*losses, length=256)  # penalties among them


def test_gate_goes_into_configs_and_files_both_ways(tmp_path: Path) -> None:
    ours, theirs = pair(2, 4, use_gate=True, call=(X, X, X))
    assert ours.get_config()["use_gate"] is True
    there, here = (
        kind.from_config(layer.get_config())
        for kind, layer in ((Theirs, ours), (MultiHeadAttention, theirs))
    )
    assert here.config.gate == "elementwise"
    for layer, source in ((here, theirs), (there, ours)):
        inputs = keras.Input(X.shape[1:])
        model, other = (keras.Model(inputs, one(inputs, inputs)) for one in (source, layer))
        model.save_weights(tmp_path / "a.weights.h5")
        other.load_weights(tmp_path / "a.weights.h5")
        close(layer(X, X), source(X, X))
    by_head = MultiHeadAttention(2, 4, gate="head", query_features=8)
    assert by_head.get_config()["gate"] == "head"
    again = MultiHeadAttention.from_config(by_head.get_config())
    assert again.config.gate == "head"
    with pytest.raises(ConfigError, match="Pass one of them"):
        MultiHeadAttention(2, 4, use_gate=True, gate="head")
    with pytest.raises(ConfigError, match="`use_gate` must be True or False"):
        MultiHeadAttention(2, 4, use_gate="yes")


def test_gate_is_converted_from_and_to_keras(tmp_path: Path) -> None:
    _, theirs = pair(2, 4, use_gate=True, call=(X, X, X))
    plain = anymha.convert(theirs, to="numpy")
    assert plain.config.gate == "elementwise"
    close(plain(X), theirs(X, X))
    back = anymha.convert(plain, to="keras.MultiHeadAttention")
    close(back(X, X), theirs(X, X))
    ours = anymha.convert(theirs, to="keras")
    close(ours(X), theirs(X, X))
    anymha.set_weights(theirs, {name: 2 * w for name, w in anymha.get_weights(ours).items()})
    close(theirs.get_weights()[4], 2 * to_numpy(ours._gate_dense.kernel))
    grouped = keras.layers.GroupQueryAttention(4, 4, 2, use_gate=True)
    grouped.build(X.shape, X.shape)
    close(anymha.convert(randomised(grouped), to="numpy")(X), grouped(X, X))


def test_comparison_with_a_gate_of_keras() -> None:
    ours, theirs = pair(2, 4, use_gate=True, call=(X, Y, Z))
    report = compare(anymha.convert(ours, to="numpy"), theirs, [X, Y, Z])
    assert report.passed, report
    assert "context" in {stage.name for stage in report.stages}


HELD: list[Any] = [np.asarray, keras.ops.convert_to_tensor]
if BACKEND == "tensorflow":  # whose tensors Keras's variables are
    HELD.append(keras.Variable)


COMPARED: list[dict[str, Any]] = [{}, {"gate": "elementwise", "sinks": True}]
# On torch each kind with each option; where each comparison is compiled, with one of them, on JAX
# with the one that TensorFlow leaves out.
FIRST = int(BACKEND == "tensorflow")
HELD_WITH = list(itertools.product(COMPARED, HELD)) if BACKEND == "torch" else [
    (COMPARED[(place + FIRST) % 2], held) for place, held in enumerate(HELD)
]  # fmt: skip


@pytest.mark.parametrize(("options", "held"), HELD_WITH)
def test_comparison_of_our_layer(held: Any, options: dict[str, Any]) -> None:
    """Its weights, which a tape of TensorFlow does not take, and inputs of every kind."""
    ours = randomised(MultiHeadAttention(2, 4, query_features=X.shape[-1], **options))
    plain = anymha.convert(ours, to="numpy")
    for one, other in ((ours, plain), (plain, ours)):
        report = compare(one, other, held(X), use_causal_mask=True)
        assert report.passed, report
        assert "gradient of query.kernel" in {stage.name for stage in report.stages}, report
    wrong = anymha.get_weights(ours)
    wrong["query.kernel"] = wrong["query.kernel"][:, ::-1]
    report = compare(ours, anymha.set_weights(plain, wrong), held(X))
    assert "query's kernel" in str(report.diagnosis)


@trains
def test_gate_takes_lora() -> None:
    layer = MultiHeadAttention(2, 4, gate="head")
    before = to_numpy(layer(X))
    layer._gate_dense.enable_lora(2)
    np.testing.assert_array_equal(to_numpy(layer(X)), before)
    layer._gate_dense.lora_kernel_b.assign(numbers(*layer._gate_dense.lora_kernel_b.shape))
    assert np.abs(to_numpy(layer(X)) - before).max() > 1e-4


# --- Dtypes --------------------------------------------------------------------------------------


def test_dtypes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Pass dtype=.mixed_bfloat16. alone"):
        MultiHeadAttention(2, 4, dtype="mixed_bfloat16", compute_dtype="float64")


def test_an_unknown_option_is_an_error_of_keras() -> None:
    with pytest.raises(ValueError, match="num_headz"):
        MultiHeadAttention(2, 4, num_headz=3)


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_is_saved_and_loaded_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    layer = randomised(MultiHeadAttention(2, 3, query_features=8, dropout=0.1, dtype=dtype))
    anymha.save(tmp_path / "a.safetensors", layer)
    found = anymha.load(tmp_path / "a.safetensors", backend="keras")
    assert isinstance(found, MultiHeadAttention)
    before, after = anymha.get_weights(layer), anymha.get_weights(found)
    assert [a.tobytes() for a in before.values()] == [a.tobytes() for a in after.values()]
    assert after["query.kernel"].dtype.name == dtype
    assert found.config.dropout == 0.1


def model_of_three() -> Any:
    inputs = keras.Input((5, 8))
    x = Theirs(2, 3, name="first")(inputs, inputs)
    x = Theirs(2, 3, use_bias=False, name="second")(x, x)
    x = keras.layers.GroupQueryAttention(4, 2, 1, name="grouped")(x, x)
    return randomised(keras.Model(inputs, x))


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_layers_in_a_file_of_keras_are_found_and_converted(tmp_path: Path, suffix: str) -> None:
    model, path = model_of_three(), tmp_path / f"model{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)
    kinds = {"first": "keras.MultiHeadAttention", "second": "keras.MultiHeadAttention",
             "grouped": "keras.GroupQueryAttention"}  # fmt: skip
    with open_file(path) as reader:
        groups = find_layer_groups(reader.tensors, format_of(path))
    held = {prefix: [one.name for one in g.fits] for g in groups for prefix in g.prefixes}
    # Keras names the groups of a file by the layers' classes.
    parts = ("multi_head_attention", "multi_head_attention_1", "grouped_query_attention")
    named = zip(parts, kinds.values(), strict=True)
    assert held == {f"layers/{part}/": [kind] for part, kind in named}
    for kind in dict.fromkeys(kinds.values()):
        ours = tmp_path / "ours.safetensors"
        done = convert_file(path, ours, kind, "anymha")
        layers = [model.get_layer(name) for name, layout in kinds.items() if layout == kind]
        for layer, prefix in zip(layers, done.layers.values(), strict=True):
            found = anymha.load(ours, "numpy", prefix=prefix)
            wanted = anymha.get_weights(layer)
            assert all(np.array_equal(found.weights[n], array) for n, array in wanted.items())


def test_keras_loads_a_file_that_was_converted(tmp_path: Path) -> None:
    model, path = model_of_three(), tmp_path / "model.weights.h5"
    model.save_weights(path)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.weights.h5"
    convert_file(path, there, "keras.MultiHeadAttention", "transformers.bert", others=True)
    convert_file(
        there, back, "transformers.bert", "keras.MultiHeadAttention", others=True, num_heads=2
    )
    x = numbers(2, 5, 8)
    wanted = to_numpy(model(x))
    randomised(model, seed=50)
    assert not np.array_equal(to_numpy(model(x)), wanted)
    model.load_weights(back)
    np.testing.assert_array_equal(to_numpy(model(x)), wanted)


# --- Examples ------------------------------------------------------------------------------------


@trains
def test_python_blocks_of_the_page_run_in_order() -> None:
    page = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "keras.md", "exec"), namespace)


def test_examples_of_the_docstrings_give_what_they_show() -> None:
    assert doctest.testmod(anymha_keras.layer) == (0, 4)
