"""The ops of NumPy, the reference backend.

Half precision never reaches these functions: the core computes it in float32.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numpy import (
    abs,
    arange,
    asarray,
    bitwise_and,
    bitwise_right_shift,
    bitwise_xor,
    broadcast_to,
    concat,
    exp,
    float32,
    float64,
    int32,
    logical_and,
    matmul,
    max,
    permute_dims,
    reshape,
    sqrt,
    stack,
    sum,
    tanh,
    tensordot,
    where,
)

bool = np.bool
name = "numpy"


def astype(x, dtype, /):
    return x.astype(dtype, copy=False)


def is_array(x, /):
    return isinstance(x, (np.ndarray, np.generic))


def shape(x, /):
    return x.shape


def device(x, /):
    return None


def step(device, /):
    return 1 << 16


overwriting = SimpleNamespace(
    bitwise_and=lambda x1, x2: np.bitwise_and(x1, x2, out=x1),
    bitwise_xor=lambda x1, x2: np.bitwise_xor(x1, x2, out=x1),
)


def dtype(name, /):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def to_numpy(x, /):
    return np.asarray(x)


def from_numpy(x, /):
    return np.asarray(x)


def stop_gradient(x, /):
    return x


def in_float64(function, arrays, /):
    return function(arrays)


def seed_words(seed, /):
    seed = int(seed)
    low, high = (
        np.asarray([word % 2**32], dtype=np.uint32).view(np.int32) for word in (seed, seed >> 32)
    )
    return low, high


def draw_seed():
    return int(np.random.randint(0, 2**31))


def native_keep_mask(seed, shape, keep, device, /):
    return np.random.default_rng(int(seed) % 2**64).random(shape, dtype=np.float32) < keep
