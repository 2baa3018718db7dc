"""Weights between live layers of all backends, bit for bit."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, WeightsError
from anymha.framework.registry import Backend
from tests.frameworks import required
from tests.support import bits, np_dtype

SIZES = {"query_features": 8, "value_features": 7, "key_features": 6}
OPTIONS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2, "value_dim": 3, "output_shape": (3, 2)},
    "no key bias": {"use_bias": ("query", "value", "output")},
    "no bias": {"use_bias": False, "attention_axes": (1,), "scale": 0.5, "sliding_window": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "compute_dtype": "float32"},
    "float64": {"dtype": "float64"},
    "reproducible": {"compute_dtype": "float64", "dropout": 0.25},
}


def make(backend: Backend, **options):
    return backend.layer(4, 3, **{**SIZES, "seed": 0, **options})


def random_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np_dtype(config.dtype)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in config.weight_shapes().items()
    }


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].shape == other[name].shape
        np.testing.assert_array_equal(bits(one[name]), bits(other[name]), err_msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_weights_come_back_bit_for_bit(backend: Backend, options):
    layer = make(backend, **options)
    weights = random_weights(layer.config)
    layer = anymha.set_weights(layer, weights)
    found = anymha.get_weights(layer)
    assert all(type(array) is np.ndarray for array in found.values())
    same(found, weights)
    found["query.kernel"][...] = 0  # a copy
    same(anymha.get_weights(layer), weights)


def test_special_values_come_back_bit_for_bit(backend: Backend):
    layer = make(backend)
    weights = random_weights(layer.config)
    weights["query.bias"].flat[:5] = [np.nan, np.inf, -np.inf, -0.0, 1e-40]
    same(anymha.get_weights(anymha.set_weights(layer, weights)), weights)


def test_arrays_of_any_memory_layout_are_taken(backend: Backend):
    layer = make(backend)
    weights = random_weights(layer.config)
    turned = {name: np.asfortranarray(array) for name, array in weights.items()}
    turned["query.kernel"] = weights["query.kernel"][::-1][::-1]
    same(anymha.get_weights(anymha.set_weights(layer, turned)), weights)


def test_weights_of_another_dtype_are_rounded_once(backend: Backend):
    for dtype in ("bfloat16", "float16", "float32"):
        layer = make(backend, dtype=dtype)
        # Halfway between two numbers of the dtype by way of float32, but not in truth.
        exact = {
            name: 1 + 2.0**-8 + 2.0**-11 + np.full(shape, 2.0**-40)
            for name, shape in layer.config.weight_shapes().items()
        }
        found = anymha.get_weights(anymha.set_weights(layer, exact))
        same(found, {name: array.astype(np_dtype(dtype)) for name, array in exact.items()})


def test_initial_weights_are_the_same_everywhere(installed: list[Backend]):
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        first, *others = (anymha.get_weights(make(b, dtype=dtype, seed=3)) for b in installed)
        for other in others:
            same(other, first)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_convert_between_all_backends(installed: list[Backend], backend: Backend, options):
    layer = anymha.set_weights(
        make(backend, **options), random_weights(make(backend, **options).config)
    )
    for target in installed:
        other = anymha.convert(layer, to=target.name)
        assert type(other) is target.layer
        assert dataclasses.replace(other.config, seed=None) == dataclasses.replace(
            layer.config, seed=None
        )
        same(anymha.get_weights(other), anymha.get_weights(layer))


def test_converted_reproducible_layers_compute_the_same(installed: list[Backend], backend: Backend):
    layer = make(backend, compute_dtype="float64", value_features=8, key_features=8)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
    wanted = backend.ops.to_numpy(layer(backend.ops.from_numpy(x), use_causal_mask=True))
    for target in installed:
        other = anymha.convert(layer, to=target.name)
        output = other(target.ops.from_numpy(x), use_causal_mask=True)
        np.testing.assert_array_equal(target.ops.to_numpy(output), wanted)


def test_unbuilt_layer_takes_weights_of_any_width(backend: Backend):
    if backend.name == "jax":  # has no layer without weights
        return
    weights = random_weights(make(backend).config)
    layer = backend.layer(4, 3)
    with pytest.raises(WeightsError) as caught:
        anymha.get_weights(layer)
    assert str(caught.value) == (
        "The layer has no weights yet. Call it once, or pass `query_features` to its constructor."
    )
    same(anymha.get_weights(anymha.set_weights(layer, weights)), weights)


@pytest.mark.parametrize("built", [True, False])
def test_weights_that_do_not_fit_leave_the_layer(backend: Backend, built):
    if backend.name == "jax" and not built:  # has no layer without weights
        return
    layer = make(backend) if built else backend.layer(4, 3)
    before = layer.canonical_weights()
    weights = random_weights(make(backend).config)
    missing = {name: array for name, array in weights.items() if name != "query.kernel"}
    bent = {**weights, "output.bias": np.zeros(9, "float32")}
    for bad in (missing, {**weights, "more": np.zeros(1)}, bent):
        with pytest.raises(WeightsError):
            anymha.set_weights(layer, bad)
    after = layer.canonical_weights()
    assert list(before) == list(after)
    for name in before:
        np.testing.assert_array_equal(
            backend.ops.to_numpy(before[name]), backend.ops.to_numpy(after[name])
        )


def test_what_is_no_layer_is_refused():
    with pytest.raises(
        ArgumentError, match=r"must be a layer of anymha, .*Received: builtins\.str"
    ):
        anymha.get_weights("layer")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("form", ["parameters", "state dict"])
def test_weights_of_torch_are_taken_in_every_dtype(backend: Backend, form, dtype):
    torch = required("torch")
    options = {**SIZES, "output_shape": (3, 2)}
    source = anymha.MultiHeadAttention(4, 3, seed=0, dtype=dtype, backend="torch", **options)
    if form == "state dict":
        weights = source.state_dict()
    else:
        weights = {name: torch.nn.Parameter(w) for name, w in source.canonical_weights().items()}
    for widths in (options, {"output_shape": (3, 2)}):  # built, or not yet where that may be
        if widths is not options and backend.name == "jax":
            continue
        layer = anymha.set_weights(backend.layer(4, 3, dtype=dtype, **widths), weights)
        same(dict(anymha.get_weights(layer)), dict(anymha.get_weights(source)))


@pytest.mark.parametrize("weights", [[np.zeros(3)], None, "query.kernel", "a layer"])
def test_weights_without_names_are_refused_in_words(backend: Backend, weights):
    layer = make(backend)
    weights = layer if weights == "a layer" else weights
    config = layer.config
    for call in (
        lambda: anymha.set_weights(layer, weights),
        lambda: anymha.to_canonical(weights, layout="keras.MultiHeadAttention"),
        lambda: anymha.from_canonical(weights, layout="keras.MultiHeadAttention"),
        lambda: anymha.multi_head_attention(weights, np.zeros((1, 2, 8)), config=config),
    ):
        with pytest.raises(ArgumentError, match=r"must be a dict of arrays by name.*get_weights"):
            call()


@pytest.mark.parametrize("bad", ["complex", "text", "sparse", "quantised", "float8", "nothing"])
def test_weights_that_are_no_real_numbers_are_refused(bad):
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, seed=0, backend="torch")
    before, zeros = anymha.get_weights(layer), torch.zeros(2, 4)
    values = {
        "complex": np.zeros((2, 4), complex),
        "text": np.full((2, 4), "a"),
        "sparse": zeros.to_sparse(),
        "float8": zeros.to(torch.float8_e4m3fn),
        "nothing": None,
    }
    if bad == "quantised":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch may warn, once in a process
            values[bad] = torch.quantize_per_tensor(zeros, 1.0, 0, torch.qint8)
    with pytest.raises((WeightsError, ArgumentError)):
        anymha.set_weights(layer, {**before, "query.bias": values[bad]})
    same(dict(anymha.get_weights(layer)), dict(before))
