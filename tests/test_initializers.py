"""Initial values: the same in every framework, of the right spread, independent of each other."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ConfigError
from anymha.framework.registry import Backend
from anymha.options.initializers import (
    Constant,
    Identity,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    VarianceScaling,
)
from anymha.options.variance_scaling import TRUNCATED_STD
from tests.support import np_dtype

SIZES: dict[str, Any] = {
    "num_heads": 4, "key_dim": 16, "value_dim": 8, "query_features": 40,
    "value_features": 24, "key_features": 32, "num_key_value_heads": 2, "output_shape": (5, 6),
}  # fmt: skip


def _weights(backend: Backend, **options: Any) -> dict[str, np.ndarray]:
    return anymha.get_weights(backend.layer(**{**SIZES, "seed": 3, **options}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_one_seed_gives_one_layer_in_every_framework(installed: list[Backend], dtype: str) -> None:
    every = [_weights(backend, dtype=dtype) for backend in installed]
    for one, other in itertools.pairwise(every):
        assert list(one) == list(other)
        for name, array in one.items():
            assert array.dtype == other[name].dtype == np_dtype(dtype)
            assert array.tobytes() == other[name].tobytes(), name


# JAX's layer, a pytree, cannot grow weights; its error is tested among the errors.
@pytest.mark.parametrize("backend", ["numpy", "torch", "tensorflow"], indirect=True)
def test_weights_made_at_the_first_call_are_those_made_at_once(backend: Backend) -> None:
    widths = ("query_features", "value_features", "key_features")
    layer = backend.layer(**{n: s for n, s in SIZES.items() if n not in widths}, seed=3)
    query, value, key = (
        backend.ops.from_numpy(np.ones((1, 2, SIZES[name]), np.float32)) for name in widths
    )
    layer(query, value, key)
    grown = anymha.get_weights(layer)
    for name, array in _weights(backend).items():
        assert array.tobytes() == grown[name].tobytes(), name


def test_another_seed_gives_other_values(backend: Backend) -> None:
    one, other = _weights(backend), _weights(backend, seed=4)
    for name in one:
        assert np.array_equal(one[name], other[name]) == name.endswith("bias"), name


def test_without_a_seed_layers_differ(backend: Backend) -> None:
    one, other = (_weights(backend, seed=None) for _ in range(2))
    assert not np.array_equal(one["query.kernel"], other["query.kernel"])


@pytest.mark.parametrize("seed", [0, 2**70, -5])
def test_seed_may_be_any_integer(backend: Backend, seed: int) -> None:
    weights = _weights(backend, seed=seed)
    assert np.isfinite(weights["query.kernel"]).all()
    assert weights["query.kernel"].any()


def test_kernels_of_one_shape_are_independent(backend: Backend) -> None:
    layer = backend.layer(8, 16, query_features=128, output_shape=128, seed=3)
    weights = anymha.get_weights(layer)
    flat = [array.ravel() for name, array in weights.items() if name.endswith("kernel")]
    assert len({array.size for array in flat}) == 1
    for one, other in itertools.combinations(flat, 2):
        # Five standard deviations of the correlation of as many independent pairs.
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(one.size)


FANS = {
    "query.kernel": (40, 4 * 16),
    "key.kernel": (32, 2 * 16),
    "value.kernel": (24, 2 * 8),
    "output.kernel": (4 * 8, 5 * 6),
}


@pytest.mark.parametrize(("name", "fans"), FANS.items(), ids=FANS)
def test_glorot_uniform_has_the_fans_of_the_matrix(
    backend: Backend, name: str, fans: tuple[int, int]
) -> None:
    kernel, limit = _weights(backend, dtype="float64")[name], math.sqrt(6 / sum(fans))
    largest = np.abs(kernel).max()
    assert largest <= limit
    # Of n values in [-l, l] the greatest falls short of l by l / n on average.
    assert largest >= limit * (1 - 10 / kernel.size)
    variance = limit**2 / 3
    spread = math.sqrt(4 / 45) * limit**2 / math.sqrt(kernel.size)  # of the mean of x^2
    assert abs(np.mean(kernel**2) - variance) < 5 * spread
    assert abs(kernel.mean()) < 5 * math.sqrt(variance / kernel.size)


def test_biases_start_at_zero(backend: Backend) -> None:
    weights = _weights(backend)
    biases = [array for name, array in weights.items() if name.endswith("bias")]
    assert len(biases) == 4
    assert not any(array.any() for array in biases)


def test_a_bias_left_out_does_not_change_the_other_values(backend: Backend) -> None:
    full, fewer = _weights(backend), _weights(backend, use_bias=("query",))
    for name, array in fewer.items():
        assert array.tobytes() == full[name].tobytes(), name


def test_known_answers(backend: Backend) -> None:
    # Pinned, so that no release starts a seed's layer elsewhere than the one before.
    kernel = _weights(backend, dtype="float64")["query.kernel"]
    np.testing.assert_array_equal(kernel[0, 0, :3], KNOWN)


KNOWN = [0.019873336680333947, -0.05828103424290687, 0.19195194156883186]


# --- kinds ---------------------------------------------------------------------------------------
SCALED = {
    "glorot_uniform": (1, "avg", "uniform"),
    "glorot_normal": (1, "avg", "truncated"),
    "he_uniform": (2, "in", "uniform"),
    "he_normal": (2, "in", "truncated"),
    "lecun_uniform": (1, "in", "uniform"),
    "lecun_normal": (1, "in", "truncated"),
}
CUT = 2 / 0.87962566103423978
"""Where a truncated normal distribution of unit variance ends."""


def _spread(values: np.ndarray, std: float, ends: float, mean: float = 0.0) -> None:
    """Mean, standard deviation and greatest deviation are those of the distribution.

    The fourth moment of none of the distributions is above 3 variances squared, so that the mean
    square of n values has a standard deviation of at most ``sqrt(2 / n)`` variances.
    """
    n, away = values.size, values.ravel() - mean
    assert abs(np.mean(away)) < 5 * std / math.sqrt(n)
    assert abs(np.mean(away**2) / std**2 - 1) < 5 * math.sqrt(2 / n)
    assert 0.93 * ends < np.abs(away).max() <= ends


@pytest.mark.parametrize("name", FANS)
@pytest.mark.parametrize("initializer", SCALED)
def test_variance_follows_the_fans_of_the_matrix(initializer: str, name: str) -> None:
    scale, mode, distribution = SCALED[initializer]
    fan_in, fan_out = FANS[name]
    std = math.sqrt(scale / (fan_in if mode == "in" else (fan_in + fan_out) / 2))
    ends = std * (math.sqrt(3) if distribution == "uniform" else CUT)
    numpy = anymha.framework.registry.get_backend("numpy")
    _spread(_weights(numpy, kernel_initializer=initializer, dtype="float64")[name], std, ends)


KINDS: dict[str, tuple[Any, float, float, float]] = {
    "random_normal": ("random_normal", 0.05, 0.05 * 5.5, 0.0),
    "RandomNormal": (RandomNormal(1.0, 0.3), 0.3, 0.3 * 5.5, 1.0),
    "TruncatedNormal": (TruncatedNormal(1.0, 0.3), 0.3 * TRUNCATED_STD, 0.6, 1.0),
    "random_uniform": ("random_uniform", 0.05 / math.sqrt(3), 0.05, 0.0),
    "RandomUniform": (RandomUniform(1.0, 4.0), 1.5 / math.sqrt(3), 1.5, 2.5),
    "fan_out": (VarianceScaling(3.0, "fan_out"), math.sqrt(3 / 64), math.sqrt(3 / 64) * CUT, 0.0),
    "untruncated": (
        VarianceScaling(1.0, "fan_in", "untruncated_normal"),
        math.sqrt(1 / 40), math.sqrt(1 / 40) * 5.5, 0.0,
    ),
    "axes": (
        VarianceScaling(1.0, "fan_in", "uniform", input_axes=(0, 1), output_axes=(2,)),
        math.sqrt(1 / 160), math.sqrt(3 / 160), 0.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("initializer", "std", "ends", "mean"), KINDS.values(), ids=KINDS)
def test_distribution_of_the_other_kinds(
    initializer: Any, std: float, ends: float, mean: float
) -> None:
    numpy = anymha.framework.registry.get_backend("numpy")
    kernel = _weights(numpy, kernel_initializer=initializer, dtype="float64")["query.kernel"]
    if ends == 5.5 * std:  # has no ends; of 2560 values none is as far out
        assert np.abs(kernel - mean).max() > 3 * std
        ends = float(np.abs(kernel - mean).max())
        assert ends < 5.5 * std
    _spread(kernel, std, ends, mean)


def test_constants(backend: Backend) -> None:
    for initializer, value in (("zeros", 0), ("ones", 1), (Constant(0.25), 0.25)):
        options = {"kernel_initializer": initializer, "bias_initializer": initializer}
        for array in _weights(backend, **options).values():
            np.testing.assert_array_equal(array, value)


def test_orthogonal_has_orthonormal_columns_or_rows(backend: Backend) -> None:
    options: dict[str, Any] = {"kernel_initializer": Orthogonal(2.0), "dtype": "float64"}
    weights = _weights(backend, **options, num_heads=2, key_dim=100, num_key_value_heads=1)
    for name, kernel in weights.items():
        if name.endswith("kernel"):
            matrix = kernel.reshape(-1, kernel.shape[-1])  # as Keras has it
            small = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
            np.testing.assert_allclose(small @ small.T, 4 * np.eye(len(small)), atol=1e-13)
    assert {a.shape[-1] > math.prod(a.shape[:-1]) for n, a in weights.items() if "kernel" in n} == {
        True,
        False,
    }


def test_orthogonal_favours_no_sign() -> None:
    numpy = anymha.framework.registry.get_backend("numpy")
    corners = [
        _weights(numpy, kernel_initializer="orthogonal", seed=seed)["query.kernel"][0, 0, 0] > 0
        for seed in range(100)
    ]
    assert 25 < sum(corners) < 75  # five standard deviations


def test_identity_is_that_of_the_projection_as_a_matrix(backend: Backend) -> None:
    weights = _weights(backend, kernel_initializer=Identity(1.5))
    for name, (rows, columns) in FANS.items():
        np.testing.assert_array_equal(
            weights[name].reshape(rows, columns), 1.5 * np.eye(rows, columns)
        )


@pytest.mark.parametrize("initializer", ["he_normal", "orthogonal", "truncated_normal"])
def test_every_kind_is_the_same_in_every_framework(
    installed: list[Backend], initializer: str
) -> None:
    every = [_weights(backend, kernel_initializer=initializer) for backend in installed]
    for one, other in itertools.pairwise(every):
        for name, array in one.items():
            assert array.tobytes() == other[name].tobytes(), name


def test_seed_of_the_initialiser_goes_before_the_layers(backend: Backend) -> None:
    spec = {"class_name": "HeNormal", "config": {"seed": 9}}
    square: dict[str, Any] = {"num_heads": 5, "key_dim": 8, "value_dim": 8, "output_shape": 40,
                              "value_features": 40, "key_features": 40,
                              "num_key_value_heads": 5}  # fmt: skip
    one, other = (
        _weights(backend, kernel_initializer=spec, bias_initializer="normal", seed=s, **square)
        for s in (3, 4)
    )
    for name in one:
        assert np.array_equal(one[name], other[name]) == name.endswith("kernel"), name
    kernels = [one[f"{name}.kernel"].ravel() for name in ("query", "key", "value", "output")]
    for kernel, next_one in itertools.combinations(kernels, 2):
        assert abs(np.corrcoef(kernel, next_one)[0, 1]) < 5 / math.sqrt(kernel.size)


# --- callables -----------------------------------------------------------------------------------
def test_a_function_is_called_with_shape_and_dtype(backend: Backend) -> None:
    calls = []

    def mine(shape: tuple[int, ...], dtype: str | None = None) -> np.ndarray:
        calls.append((shape, dtype))
        return np.arange(math.prod(shape), dtype=dtype).reshape(shape)

    weights = _weights(backend, kernel_initializer=mine)
    kernels = {name: array for name, array in weights.items() if name.endswith("kernel")}
    assert calls == [(array.shape, "float32") for array in kernels.values()]
    for array in kernels.values():
        np.testing.assert_array_equal(array.ravel(), np.arange(array.size))


def test_functions_of_the_framework_are_called(backend: Backend) -> None:
    ops = backend.ops

    def halves(shape: tuple[int, ...]) -> Any:
        return ops.from_numpy(np.full(shape, 0.5, np.float32))

    for initializer, value in ((halves, 0.5), (np.ones, 1.0)):
        weights = _weights(backend, bias_initializer=initializer)
        np.testing.assert_array_equal(weights["output.bias"], np.full((5, 6), value))


def test_torch_functions_fill_the_matrix_of_a_linear_layer(backend: Backend) -> None:
    if backend.name != "torch":
        pytest.skip("torch.nn.init is torch's")
    torch = pytest.importorskip("torch")
    init = torch.nn.init
    xavier = functools.partial(init.xavier_uniform_, gain=2.0)
    weights = _weights(backend, kernel_initializer=xavier, dtype="float64")
    for name, (fan_in, fan_out) in FANS.items():
        limit = 2 * math.sqrt(6 / (fan_in + fan_out))
        _spread(weights[name], limit / math.sqrt(3), limit)
    kaiming = _weights(backend, kernel_initializer=init.kaiming_uniform_)
    for name, (fan_in, _) in FANS.items():
        _spread(kaiming[name], math.sqrt(2 / fan_in), math.sqrt(6 / fan_in))
    eye = _weights(backend, kernel_initializer=lambda w: init.eye_(w).mul_(3))["key.kernel"]
    np.testing.assert_array_equal(eye.reshape(32, 32), 3 * np.eye(32))


def test_torch_functions_draw_from_the_layers_seed(backend: Backend) -> None:
    if backend.name != "torch":
        pytest.skip("torch.nn.init is torch's")
    torch = pytest.importorskip("torch")
    options: dict[str, Any] = {"kernel_initializer": torch.nn.init.normal_}
    state = torch.get_rng_state()
    one, again = _weights(backend, **options), _weights(backend, **options)
    assert torch.equal(state, torch.get_rng_state())
    kernels = [one[name] for name in FANS]
    assert all(np.array_equal(one[name], again[name]) for name in FANS)
    assert not np.array_equal(kernels[0].ravel()[:100], kernels[1].ravel()[:100])
    assert not np.array_equal(_weights(backend, seed=4, **options)["query.kernel"], kernels[0])
    torch.manual_seed(1)
    drawn = _weights(backend, seed=None, **options)
    torch.manual_seed(1)
    same = _weights(backend, seed=None, **options)
    assert np.array_equal(drawn["query.kernel"], same["query.kernel"])


def test_jax_initialisers_get_a_key_and_the_matrix(backend: Backend) -> None:
    if backend.name != "jax":
        pytest.skip("jax.nn.initializers are JAX's")
    jax = pytest.importorskip("jax")
    initializers = jax.nn.initializers
    for dtype in ("float32", "float64"):
        options: dict[str, Any] = {"kernel_initializer": initializers.glorot_uniform()}
        weights = _weights(backend, dtype=dtype, **options)
        for name, (fan_in, fan_out) in FANS.items():
            limit = math.sqrt(6 / (fan_in + fan_out))
            _spread(weights[name], limit / math.sqrt(3), limit)
        again = _weights(backend, dtype=dtype, **options)["key.kernel"]
        assert np.array_equal(weights["key.kernel"], again)
        flat = [weights[name].ravel()[:100] for name in FANS]
        assert not np.array_equal(flat[0], flat[1])
    ones = _weights(backend, bias_initializer=initializers.ones)
    np.testing.assert_array_equal(ones["output.bias"], np.ones((5, 6)))


def test_a_function_of_another_style_is_refused(backend: Backend) -> None:
    def keyed(key: Any, shape: Any, dtype: Any) -> Any:
        raise NotImplementedError

    def in_place(tensor: Any) -> Any:
        raise NotImplementedError

    also = {
        "torch": ", or as f(tensor), which fills it,",
        "jax": ", or as f(key, shape, dtype)",
    }
    foreign = {"torch": [keyed], "jax": [in_place]}
    for function in foreign.get(backend.name, [keyed, in_place]):
        with pytest.raises(ConfigError) as error:
            _weights(backend, kernel_initializer=function)
        assert str(error.value) == (
            f"`kernel_initializer` must be callable as f(shape, dtype){also.get(backend.name, '')}"
            f", with parameters of these names. Received: {function!r}."
        )


@pytest.mark.parametrize(
    ("function", "received"),
    [
        (lambda shape: np.ones(shape[:-1]), "shape (40, 4), 0 not finite."),
        (lambda shape: np.full(shape, np.nan), "shape (40, 4, 16), 2560 not finite."),
    ],
    ids=["shape", "NaN"],
)
def test_a_function_that_gives_no_weight_is_refused(
    backend: Backend, function: Any, received: str
) -> None:
    with pytest.raises(ConfigError) as error:
        _weights(backend, kernel_initializer=function)
    assert str(error.value) == (
        f"`kernel_initializer` must give finite numbers of shape (40, 4, 16). Received: {received}"
    )
