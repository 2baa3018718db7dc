"""The ops of array-api-strict: NumPy with everything removed that is not in the standard."""

# ruff: noqa: F401 (an imported function is the backend's function)
import array_api_strict as xp
import numpy as np
from array_api_strict import (
    abs,
    arange,
    argsort,
    asarray,
    astype,
    bitwise_and,
    bitwise_right_shift,
    bitwise_xor,
    bool,
    broadcast_to,
    concat,
    cos,
    exp,
    float32,
    float64,
    int32,
    log,
    logical_and,
    matmul,
    max,
    permute_dims,
    remainder,
    reshape,
    sin,
    sqrt,
    stack,
    sum,
    tanh,
    tensordot,
    where,
)

from anymha.errors import ArgumentError, DtypeError
from anymha.framework.capabilities import Capabilities

name = "strict"
array_modules = ("array_api_strict",)
capabilities = Capabilities()
Array = type(xp.empty(0))


def is_array(x, /):
    return isinstance(x, Array)


def shape(x, /):
    return x.shape


def device(x, /):
    return x.device


def gather(x, indices, /, *, axis):
    shape = list(x.shape)
    shape[axis] = indices.shape[1]
    index = reshape(indices, tuple(n if i in (0, axis) else 1 for i, n in enumerate(shape)))
    return xp.take_along_axis(x, broadcast_to(index, tuple(shape)), axis=axis)


def dtype(name, /):
    if not hasattr(xp, name):
        raise DtypeError(f"The standard has no dtype {name}.")
    return getattr(xp, name)


def to_numpy(x, /):
    return np.asarray(x.to_device(xp.Device("CPU_DEVICE")))


def from_numpy(x, /):
    return xp.asarray(x)


def stop_gradient(x, /):
    return x


def in_float64(function, arrays, /):
    return function(arrays)


def seed_words(seed, /):
    low, high = (int(seed) >> shift & 0xFFFFFFFF for shift in (0, 32))
    low, high = (word - 2**32 if word >= 2**31 else word for word in (low, high))
    return xp.asarray(low, dtype=int32), xp.asarray(high, dtype=int32)


def draw_seed():
    raise ArgumentError("`seed` is needed: array-api-strict has no generator of random numbers.")


def native_keep_mask(seed, shape, keep, device, /):
    raise ArgumentError("Use dropout_rng='portable': array-api-strict has no generator.")
