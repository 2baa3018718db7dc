"""Constraints: Keras's values, in place where layers change and in a new layer where not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.errors import ConfigError, WeightsError
from anymha.framework.registry import Backend
from anymha.options.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from tests import keras_reference as reference
from tests.keras_reference import CONSTRAINTS, OPTIONS, WIDTHS
from tests.test_regularizers import layer_of

pytestmark = pytest.mark.usefixtures("quick_programs")

ALSO_BIASES = [name for name in CONSTRAINTS if name != "two axes"]


def constrained(backend: Backend, **options: Any) -> dict[str, np.ndarray]:
    layer = layer_of(backend, **options)
    return anymha.get_weights(layer.apply_constraints())


# --- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrained_weights_are_those_of_keras(backend: Backend, name: str) -> None:
    spec = CONSTRAINTS[name]
    every = constrained(backend, kernel_constraint=spec, bias_constraint=spec)
    values = reference.keras_values()
    for weight, found in every.items():
        expected = values[f"constraint {name} {weight}"]
        assert not np.array_equal(expected, reference.weights()[weight])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_weights_without_a_constraint_stay_as_they_are(backend: Backend, part: str) -> None:
    before = reference.weights()
    after = constrained(backend, **{f"{part}_constraint": "unit_norm"})
    for name, array in before.items():
        assert np.array_equal(after[name], array) == (not name.endswith(part)), name


def test_norms_by_hand(backend: Backend) -> None:
    w = np.array([[3.0, 0.1, 0.0], [4.0, 0.0, 0.0]], np.float32)  # columns of norms 5, 0.1, 0
    expected = {
        UnitNorm(): [[0.6, 1.0, 0.0], [0.8, 0.0, 0.0]],
        MaxNorm(2.5): [[1.5, 0.1, 0.0], [2.0, 0.0, 0.0]],
        MinMaxNorm(0.2, 1.0): [[0.6, 0.2, 0.0], [0.8, 0.0, 0.0]],
        MinMaxNorm(0.2, 1.0, rate=0.5): [[1.8, 0.15, 0.0], [2.4, 0.0, 0.0]],
        NonNeg(): w,
    }
    for constraint, wanted in expected.items():
        found = constraint.applied(backend.ops, backend.ops.from_numpy(w))
        np.testing.assert_allclose(backend.ops.to_numpy(found), wanted, rtol=2e-6)
    negative = NonNeg().applied(backend.ops, backend.ops.from_numpy(-w))
    np.testing.assert_array_equal(backend.ops.to_numpy(negative), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype_of_the_weights_stays(backend: Backend, dtype: str) -> None:
    np_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    exact = constrained(backend, kernel_constraint="unit_norm", dtype="float64")
    for name, found in constrained(backend, kernel_constraint="unit_norm", dtype=dtype).items():
        assert found.dtype == np_dtype
        eps = float(ml_dtypes.finfo(np_dtype).eps)
        np.testing.assert_allclose(found.astype("float64"), exact[name], rtol=0, atol=4 * eps)


@pytest.mark.as_users_compile
def test_reproducible_constraints_are_equal_in_every_bit(installed: list[Backend]) -> None:
    options = {"kernel_constraint": "unit_norm", "compute_dtype": "float64"}
    first = constrained(installed[0], **options)
    for backend in installed[1:]:
        for name, found in constrained(backend, **options).items():
            assert found.tobytes() == first[name].tobytes(), name


# --- where the result is -------------------------------------------------------------------------
def test_layer_changes_in_place_but_for_jax(backend: Backend) -> None:
    layer = layer_of(backend, kernel_constraint="non_neg")
    held = layer.canonical_weights()["query.kernel"]
    returned = layer.apply_constraints()
    assert (returned is layer) == (backend.name != "jax")
    changed = anymha.get_weights(returned)["query.kernel"]
    assert changed.min() == 0
    same = backend.ops.to_numpy(backend.ops.astype(held, backend.ops.float32))
    assert np.array_equal(same, changed) == (backend.name != "jax")


def test_torch_parameters_stay_leaves_that_are_trained(backend: Backend) -> None:
    if backend.name != "torch":
        pytest.skip("is about torch's parameters")
    layer = layer_of(backend, kernel_constraint="non_neg")
    layer.apply_constraints()
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in layer.parameters())


def test_jax_applies_constraints_under_jit(backend: Backend) -> None:
    if backend.name != "jax":
        pytest.skip("is about jit")
    jax = pytest.importorskip("jax")
    layer = layer_of(backend, kernel_constraint="max_norm", kernel_regularizer="l2")
    after = jax.jit(lambda layer: layer.apply_constraints())(layer)
    plain = anymha.get_weights(layer.apply_constraints())
    for name, found in anymha.get_weights(after).items():
        np.testing.assert_allclose(found, plain[name], rtol=1e-6)


def test_tensorflow_applies_constraints_in_a_function(backend: Backend) -> None:
    if backend.name != "tensorflow":
        pytest.skip("is about tf.function")
    tf = pytest.importorskip("tensorflow")
    layer = layer_of(backend, kernel_constraint="non_neg")
    tf.function(lambda: (layer.apply_constraints(), None)[1])()
    assert anymha.get_weights(layer)["key.kernel"].min() == 0


# --- callables, refusals -------------------------------------------------------------------------
def test_a_function_may_be_the_constraint(backend: Backend) -> None:
    after = constrained(backend, bias_constraint=lambda w: w * 0.5)
    for name, array in reference.weights().items():
        factor = 0.5 if name.endswith("bias") else 1.0
        np.testing.assert_array_equal(after[name], array * np.float32(factor))


def test_a_function_that_changes_the_shape_is_refused(backend: Backend) -> None:
    layer = layer_of(backend, bias_constraint=lambda w: backend.ops.reshape(w, (-1,)))
    with pytest.raises(ConfigError, match="`bias_constraint` must give an array") as error:
        layer.apply_constraints()
    assert "of shape (2, 3). Received:" in str(error.value)
    for name, array in anymha.get_weights(layer).items():
        np.testing.assert_array_equal(array, reference.weights()[name])


def test_weights_that_do_not_exist_yet_are_refused(backend: Backend) -> None:
    if backend.name == "jax":
        pytest.skip("its weights exist at once")
    layer = backend.layer(**OPTIONS, kernel_constraint="non_neg")
    with pytest.raises(WeightsError, match="The layer has no weights yet"):
        layer.apply_constraints()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel_constraint": "norm"},
            "`kernel_constraint` must be one of 'max_norm', 'min_max_norm', 'non_neg', "
            "'unit_norm'. Received: 'norm'.",
        ),
        (
            {"kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": -1}}},
            "`kernel_constraint`, MaxNorm: `max_value` must be a finite number of at least 0. "
            "Received: -1.",
        ),
        (
            {"kernel_constraint": {"class_name": "MinMaxNorm", "config": {"min_value": 2}}},
            "`kernel_constraint`, MinMaxNorm: `max_value` must be a finite number of at least 2. "
            "Received: 1.0.",
        ),
        (
            {"kernel_constraint": {"class_name": "UnitNorm", "config": {"axis": "last"}}},
            "`kernel_constraint`, UnitNorm: `axis` must be an integer or a tuple of integers, each "
            "once. Received: 'last'.",
        ),
        (
            {"kernel_constraint": UnitNorm(3)},
            "`kernel_constraint` must fit arrays of 3 axes, which this layer has. Received: "
            "UnitNorm(axis=3); axis 3 is not there.",
        ),
        (
            {"bias_constraint": UnitNorm((0, 1))},
            "`bias_constraint` must fit arrays of 1 axes, which this layer has. Received: "
            "UnitNorm(axis=(0, 1)); axis (0, 1) is not there.",
        ),
    ],
    ids=["name", "value", "order", "axis", "kernel rank", "bias rank"],
)
def test_bad_constraints_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        anymha.AttentionConfig(2, 3, **options)
    assert str(error.value) == message


def test_axis_of_a_bias_that_is_not_there_does_not_matter() -> None:
    config = anymha.AttentionConfig(
        2, 3, bias_constraint=UnitNorm((0, 1)), use_bias=("query", "value"), **WIDTHS
    )
    assert config.bias_constraint.axis == (0, 1)
