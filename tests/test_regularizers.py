"""Penalties of weights and of activities: Keras's values, their gradients, and who refuses what."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ConfigError, WeightsError
from anymha.framework.autodiff import vjp
from anymha.framework.registry import Backend
from anymha.layer.forward import multi_head_attention
from anymha.layer.weights import regularization_loss
from tests import keras_reference as reference
from tests.keras_reference import ACTIVITY, AXES, OPTIONS, REGULARIZERS, WIDTHS

pytestmark = pytest.mark.usefixtures("quick_programs")

CLOSE = 1e-6
"""How far a float32 penalty may be from Keras's, relative to it."""


def layer_of(backend: Backend, **options: Any) -> Any:
    """A layer with the weights of the reference."""
    return anymha.set_weights(
        backend.layer(**{**OPTIONS, **WIDTHS, **options}), reference.weights()
    )


def number(backend: Backend, scalar: Any) -> float:
    """A penalty, which must be a scalar of the framework."""
    assert backend.ops.is_array(scalar)
    assert tuple(scalar.shape) == ()
    return float(backend.ops.to_numpy(scalar))


def activity(backend: Backend, layer: Any, inputs: dict[str, np.ndarray], **call: Any) -> float:
    arrays = [backend.ops.from_numpy(inputs[n]) for n in ("query", "value", "key")]
    call = {n: backend.ops.from_numpy(mask) for n, mask in call.items()}
    output, loss = layer(*arrays, **call, return_activity_loss=True)
    assert tuple(output.shape)[-2:] == OPTIONS["output_shape"]
    return number(backend, loss)


# --- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["kernel", "bias"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_penalty_of_the_weights_is_that_of_keras(backend: Backend, name: str, part: str) -> None:
    layer = layer_of(backend, **{f"{part}_regularizer": REGULARIZERS[name]})
    expected = reference.keras_values()[f"{part} {name}"]
    assert number(backend, layer.regularization_loss()) == pytest.approx(expected, rel=CLOSE)


def test_penalties_of_kernels_and_biases_add_up(backend: Backend) -> None:
    layer = layer_of(backend, kernel_regularizer="l2", bias_regularizer="l1")
    every = reference.weights()
    expected = sum(
        0.01 * np.sum(w.astype(float) ** 2 if name.endswith("kernel") else np.abs(w))
        for name, w in every.items()
    )
    assert number(backend, layer.regularization_loss()) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", ACTIVITY)
def test_activity_penalty_is_that_of_keras(backend: Backend, name: str, axes: str) -> None:
    layer = layer_of(backend, activity_regularizer=REGULARIZERS[name], attention_axes=AXES[axes])
    expected = reference.keras_values()[f"activity {axes} {name}"]
    found = activity(backend, layer, reference.inputs(axes))
    assert found == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_orthogonal_penalty_by_hand(backend: Backend, mode: str) -> None:
    # Rows (1, 0), (3, 4), (0, 2): cosines 0.6, 0 and 0.8. Columns (1, 3, 0), (0, 4, 2).
    matrix = np.array([[1, 0], [3, 4], [0, 2]], np.float32)
    cosines = [0.6, 0.0, 0.8] if mode == "rows" else [12 / np.sqrt(10 * 20)]
    regularizer = anymha.AttentionConfig(
        1, 1, kernel_regularizer={"class_name": "orthogonal", "config": {"mode": mode}}
    ).kernel_regularizer
    found = regularizer.penalty(backend.ops, backend.ops.from_numpy(matrix))
    assert number(backend, found) == pytest.approx(0.01 * np.mean(cosines), rel=CLOSE)


def test_orthogonal_penalty_of_zeros_and_of_one_row_is_zero(backend: Backend) -> None:
    orthogonal = anymha.AttentionConfig(1, 1, kernel_regularizer="orthogonal").kernel_regularizer
    for shape in ((3, 4), (1, 4)):
        zeros = backend.ops.from_numpy(np.zeros(shape, np.float32))
        assert number(backend, orthogonal.penalty(backend.ops, zeros)) == 0


def test_without_regularisers_the_penalties_are_zero(backend: Backend) -> None:
    layer = layer_of(backend)
    assert number(backend, layer.regularization_loss()) == 0
    assert activity(backend, layer, reference.inputs("plain")) == 0


def test_results_come_in_order_and_do_not_change_one_another(backend: Backend) -> None:
    layer = layer_of(backend, activity_regularizer="l2")
    arrays = [backend.ops.from_numpy(a) for a in reference.inputs("plain").values()]
    plain = layer(*arrays)
    output, scores, loss = layer(*arrays, return_attention_scores=True, return_activity_loss=True)
    assert tuple(scores.shape) == (3, 2, 4, 5)
    assert number(backend, loss) > 0
    to_numpy = backend.ops.to_numpy
    assert to_numpy(plain).tobytes() == to_numpy(output).tobytes()


def test_activity_penalty_of_a_batch_of_unknown_size(backend: Backend) -> None:
    if backend.name != "tensorflow":
        pytest.skip("only TensorFlow traces unknown sizes")
    tf = pytest.importorskip("tensorflow")
    layer = layer_of(backend, activity_regularizer="l2")
    given = reference.inputs("plain")
    traced = tf.function(
        lambda *arrays: layer(*arrays, return_activity_loss=True)[1],
        input_signature=[
            tf.TensorSpec([None, None, given[n].shape[-1]]) for n in ("query", "value", "key")
        ],
    )
    for size in (3, 0):
        some = {name: array[:size] for name, array in given.items()}
        loss = traced(*(tf.constant(some[n]) for n in ("query", "value", "key")))
        expected = activity(backend, layer, some)
        assert number(backend, loss) == pytest.approx(expected, rel=CLOSE)
        assert (expected > 0) == (size > 0)


# --- masks ---------------------------------------------------------------------------------------
def test_excluded_positions_have_no_activity(backend: Backend) -> None:
    layer = layer_of(backend, activity_regularizer=REGULARIZERS["L1L2"])
    short = reference.inputs("plain")
    seen = {"query": np.arange(6) < 4, "value": np.arange(7) < 5, "key": np.arange(7) < 5}
    padded = {
        name: np.full((3, seen[name].size, array.shape[-1]), np.nan, np.float32)
        for name, array in short.items()
    }
    for name, array in short.items():
        padded[name][:, : array.shape[1]] = array
    masks = {f"{name}_mask": np.tile(seen[name], (3, 1)) for name in ("query", "value")}
    expected = activity(backend, layer, short)
    assert activity(backend, layer, padded, **masks) == pytest.approx(expected, rel=CLOSE)


# --- precision -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"compute_dtype": "float64"}, "float32"),
        ({"compute_dtype": "bfloat16"}, "float32"),
        ({"dtype": "bfloat16"}, "float32"),
    ],
    ids=["float64", "reproducible", "mixed", "bfloat16"],
)
def test_dtype_of_the_penalties(backend: Backend, options: dict[str, str], dtype: str) -> None:
    layer = layer_of(backend, kernel_regularizer="l2", activity_regularizer="l2", **options)
    kind = options.get("dtype", "float32")
    query, value, key = (
        backend.ops.astype(backend.ops.from_numpy(a), backend.ops.dtype(kind))
        if kind != "float64"
        else backend.ops.from_numpy(a.astype("float64"))
        for a in reference.inputs("plain").values()
    )
    loss = layer(query, value, key, return_activity_loss=True)[1]
    for found in (loss, layer.regularization_loss()):
        assert backend.ops.to_numpy(found).dtype.name == dtype


@pytest.mark.as_users_compile
def test_reproducible_penalties_are_equal_in_every_bit(installed: list[Backend]) -> None:
    def losses(backend: Backend) -> tuple[float, float]:
        regularizers = {"kernel_regularizer": "orthogonal", "activity_regularizer": "l2"}
        layer = layer_of(backend, bias_regularizer="l1", compute_dtype="float64", **regularizers)
        found = activity(backend, layer, reference.inputs("plain"))
        return found, number(backend, layer.regularization_loss())

    for one, other in itertools.pairwise(map(losses, installed)):
        assert one == other


# --- gradients -----------------------------------------------------------------------------------
def gradients(
    backend: Backend, function: Callable[[Any, Any], Any], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The gradients of a scalar ``function(ops, arrays)``, by the framework or by the tape."""
    ops = backend.ops
    native = {name: ops.from_numpy(array) for name, array in arrays.items()}
    one = ops.from_numpy(np.ones((), next(iter(arrays.values())).dtype))
    if ops.capabilities.vjp is not None:
        found = ops.capabilities.vjp(functools.partial(function, ops), native, one)[1]
    else:
        found = vjp(ops, function, native)[1](one)
    return {name: ops.to_numpy(gradient) for name, gradient in found.items()}


def config_of(**options: Any) -> anymha.AttentionConfig:
    return anymha.AttentionConfig(**{**OPTIONS, **WIDTHS, **options})


@pytest.mark.parametrize("name", ["L1L2", "rows", "columns"])
def test_gradient_of_the_weights_penalty_is_the_slope(backend: Backend, name: str) -> None:
    config = config_of(kernel_regularizer=REGULARIZERS[name], dtype="float64")
    every = {n: w.astype("float64") for n, w in reference.weights().items()}
    kernels = {n: w for n, w in every.items() if n.endswith("kernel")}
    found = gradients(backend, lambda ops, w: regularization_loss(ops, config, w), kernels)
    ops = anymha.framework.registry.get_backend("numpy").ops
    rng = np.random.default_rng(2)
    for kernel, array in kernels.items():
        direction, h = rng.standard_normal(array.shape), 1e-6
        up, down = (
            float(regularization_loss(ops, config, {**kernels, kernel: array + s * direction}))
            for s in (h, -h)
        )
        slope = np.sum(found[kernel] * direction)
        assert slope == pytest.approx((up - down) / (2 * h), rel=1e-6)


def test_gradient_of_the_penalty_at_zero_is_zero(backend: Backend) -> None:
    zeros = {n: np.zeros_like(w) for n, w in reference.weights().items() if "kernel" in n}
    for name in ("L1L2", "rows"):
        config = config_of(kernel_regularizer=REGULARIZERS[name])
        found = gradients(backend, lambda ops, w, c=config: regularization_loss(ops, c, w), zeros)
        for gradient in found.values():
            np.testing.assert_array_equal(gradient, 0)


def test_activity_penalty_gives_every_weight_its_gradient(backend: Backend) -> None:
    config = config_of(activity_regularizer="l2", dtype="float64")
    inputs = {n: a.astype("float64") for n, a in reference.inputs("plain").items()}
    weights = {n: w.astype("float64") for n, w in reference.weights().items()}

    def loss(ops: Any, weights: Any) -> Any:
        arrays = [backend.ops.from_numpy(inputs[n]) for n in ("query", "value", "key")]
        call = multi_head_attention
        return call(ops, config, weights, *arrays, return_activity_loss=True)[1]

    found = gradients(backend, loss, weights)
    ops = anymha.framework.registry.get_backend("numpy").ops
    arrays = [inputs[n] for n in ("query", "value", "key")]
    rng = np.random.default_rng(3)
    for name, array in weights.items():  # the key's bias among them, which attention ignores
        direction, h = rng.standard_normal(array.shape), 1e-6
        up, down = (
            float(
                multi_head_attention(
                    ops,
                    config,
                    {**weights, name: array + s * direction},
                    *arrays,
                    return_activity_loss=True,
                )[1]
            )
            for s in (h, -h)
        )
        slope = np.sum(found[name] * direction)
        assert slope == pytest.approx((up - down) / (2 * h), rel=1e-6), name


# --- callables, refusals -------------------------------------------------------------------------
def test_a_function_may_be_the_regulariser(backend: Backend) -> None:
    ops = backend.ops

    def largest(x: Any) -> Any:
        return ops.max(ops.reshape(ops.abs(x), (-1,)), axis=-1, keepdims=False)

    layer = layer_of(backend, kernel_regularizer=largest)
    kernels = [w for name, w in reference.weights().items() if name.endswith("kernel")]
    expected = sum(float(np.abs(kernel).max()) for kernel in kernels)
    assert number(backend, layer.regularization_loss()) == pytest.approx(expected, rel=CLOSE)


def test_a_function_gets_the_activities_as_keras_has_them(backend: Backend) -> None:
    shapes = []

    def note(x: Any) -> Any:
        shapes.append(tuple(x.shape))
        return 0.0

    layer = layer_of(backend, activity_regularizer=note, attention_axes=AXES["N-D"])
    assert activity(backend, layer, reference.inputs("N-D")) == 0
    expected = [(3, 2, 4, 2, 3), (3, 2, 5, 2, 3), (3, 2, 5, 2, 4), (3, 2, 4, 5, 2)]
    assert shapes == expected


def test_a_function_that_gives_no_scalar_is_refused(backend: Backend) -> None:
    layer = layer_of(backend, kernel_regularizer=lambda x: x * x)
    with pytest.raises(ConfigError, match="`kernel_regularizer` must give a scalar") as error:
        layer.regularization_loss()
    assert "of shape (6, 2, 3). Sum it up." in str(error.value)


def test_weights_that_do_not_exist_yet_have_no_penalty(backend: Backend) -> None:
    if backend.name == "jax":
        pytest.skip("its weights exist at once")
    layer = backend.layer(**OPTIONS, kernel_regularizer="l2")
    with pytest.raises(WeightsError, match=r"The layer has no weights yet\. Call it once"):
        layer.regularization_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel_regularizer": "l3"},
            "`kernel_regularizer` must be one of 'l1', 'l1l2', 'l2', 'orthogonal_regularizer'. "
            "Received: 'l3'.",
        ),
        (
            {"bias_regularizer": {"class_name": "L1", "config": {"l2": 0.1}}},
            "`bias_regularizer`, L1: `L1` takes no `l2`. Received: l2=0.1. It takes: l1.",
        ),
        (
            {"activity_regularizer": {"class_name": "L2", "config": {"l2": -1}}},
            "`activity_regularizer`, L2: `l2` must be a finite number of at least 0. Received: -1.",
        ),
        (
            {"kernel_regularizer": {"class_name": "orthogonal", "config": {"mode": "diagonal"}}},
            "`kernel_regularizer`, OrthogonalRegularizer: `mode` must be one of 'rows', "
            "'columns'. Received: 'diagonal'.",
        ),
        (
            {"activity_regularizer": "orthogonal"},
            "`activity_regularizer` must fit arrays of 3 axes, which this layer has. Received: "
            "OrthogonalRegularizer(factor=0.01, mode='rows'); it takes matrices only.",
        ),
        (
            {"bias_regularizer": "orthogonal"},
            "`bias_regularizer` must fit arrays of 1 axes, which this layer has. Received: "
            "OrthogonalRegularizer(factor=0.01, mode='rows'); it takes matrices only.",
        ),
        (
            {"kernel_regularizer": 0.1},
            "`kernel_regularizer` must be one of 'l1', 'l1l2', 'l2', 'orthogonal_regularizer'; or "
            "a dict of 'class_name' and 'config'; or an object of this kind; or callable. "
            "Received: 0.1.",
        ),
    ],
    ids=["name", "field", "value", "mode", "activity", "bias", "kind"],
)
def test_bad_regularisers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        anymha.AttentionConfig(2, 3, **options)
    assert str(error.value) == message
