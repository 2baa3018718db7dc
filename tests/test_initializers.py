"""Initial values: the same in every framework, of the right spread, independent of each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.registry import Backend
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
