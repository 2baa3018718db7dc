"""The ops of NumPy, the reference backend.

Half precision never reaches these functions: the core computes it in float32.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from operator import attrgetter

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
    cos,
    exp,
    float32,
    float64,
    int32,
    log,
    logical_and,
    matmul,
    remainder,
    sin,
    sqrt,
    stack,
    tanh,
    tensordot,
)

from anymha.framework.capabilities import Capabilities

bool = np.bool
name = "numpy"
to_numpy = from_numpy = asarray


def astype(x, dtype, /):
    return x.astype(dtype, copy=False)


# Methods: NumPy's functions of these names take longer to find them than a small array takes.
def reshape(x, shape, /):
    return x.reshape(shape)


permute_dims = np.ndarray.transpose


def where(condition, x1, x2, /):
    if isinstance(x2, float) and isinstance(x1, np.ndarray):
        if x2 == -inf and x1.dtype == float32 and x1.size >= _MANY:
            return _masked(condition, x1)
        if x1.dtype.kind == "V":  # bfloat16, which NumPy would promote to float64
            x2 = x1.dtype.type(x2)
    return np.where(condition, x1, x2)


_MANY = 1 << 13


# Of many numbers faster than NumPy's `where`: -0.0 is added where the mask holds, which changes
# nothing, and -inf elsewhere, which leaves NaN and inf; where there are such, NumPy's own does it.
def _masked(mask, x):
    added = np.multiply(mask, _BITS[1] - _BITS[0], dtype=int32)
    added += _BITS[0]
    with np.errstate(invalid="ignore"):
        found = x + added.view(float32)
    peak = np.maximum.reduce(found, axis=None, initial=-inf)
    return np.where(mask, x, -inf) if peak != peak else found  # NaN is not itself


_BITS = np.array([-np.inf, -0.0], float32).view(int32)
"""What is added to a logit that is masked, and to one that is not."""


# NumPy finds where the maximum of a row is two to three times as fast as the maximum itself.
def max(x, /, *, axis, keepdims):
    length = x.shape[axis]
    if axis == -1 and keepdims and x.size >= 16 * length > 0:
        rows = x.reshape(-1, length)
        places = rows.argmax(1)
        places += _starts(rows.size, length)
        return rows.reshape(-1).take(places).reshape(*x.shape[:-1], 1)
    return np.maximum.reduce(x, axis=axis, keepdims=keepdims)


@lru_cache(maxsize=16)
def _starts(size, length, /):
    return np.arange(0, size, length)


def sum(x, /, *, axis, keepdims):
    return np.add.reduce(x, axis=axis, keepdims=keepdims)


def argsort(x, /, *, axis):
    return np.argsort(x, axis=axis)


def gather(x, indices, /, *, axis):
    shape = [1] * x.ndim
    shape[0], shape[axis] = indices.shape
    return np.take_along_axis(x, indices.reshape(shape), axis)


def is_array(x, /):
    return isinstance(x, (np.ndarray, np.generic))


shape = attrgetter("shape")  # written in C


def device(x, /):
    return None


def chunk_size(device, /):
    return 1 << 16


def bitwise_and_inplace(x1, x2, /):
    return np.bitwise_and(x1, x2, out=x1)


def bitwise_xor_inplace(x1, x2, /):
    return np.bitwise_xor(x1, x2, out=x1)


def dtype(name, /):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def is_differentiated(x, /):
    return False


def linear(x, /, matrix, bias):
    y = np.matmul(x, matrix)  # `dot` begins sooner, but tells `np.errstate` of no overflow
    if bias is not None:
        y += bias
    return y


def tile_size(device, /):
    return 1 << 20


def loop(function, count, mapped, constant, results, /):
    gathered = {}
    for i in range(count):
        found = function(i, {name: x[i] for name, x in mapped.items()} | constant)
        if not gathered:
            gathered = {n: np.empty((count, *x.shape), x.dtype) for n, x in found.items()}
        for n, x in found.items():
            gathered[n][i] = x
    return gathered


def narrow(x, start, length, /, *, axis):
    return x[(slice(None),) * axis + (slice(start, start + length),)]


def exp_and_sum(x, peak, /):
    np.subtract(x, peak, out=x)
    np.exp(x, out=x)
    return x, np.matmul(x, _ones(x.shape[-1], x.dtype))


def _ones(length, dtype, /):
    return _power_of_two(length.bit_length(), dtype)[:length]


@lru_cache(maxsize=32)  # arrays of ever new lengths, as in decoding, would be kept otherwise
def _power_of_two(exponent, dtype, /):
    return np.ones((1 << exponent, 1), dtype)


def has_values(x, /):
    return True


def write_slots(storage, new, slot, in_place, /):
    if not in_place or not storage.flags.writeable:
        storage = storage.copy()
    length = new.shape[2]
    if isinstance(slot, int):
        storage[:, :, slot : slot + length] = new
        return storage
    rows = np.arange(storage.shape[0])[:, None]
    storage[rows, :, slot[:, None] + np.arange(length)] = new.swapaxes(1, 2)
    return storage


def take_rows(x, rows, end, /):
    found = np.zeros((len(rows), *x.shape[1:]), x.dtype)  # memory that nobody writes is not taken
    found[:, :, :end] = x[rows, :, :end]
    return found


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


def known_padding(mask, /):
    return mask, 1e6


capabilities = Capabilities(
    array_key=attrgetter("__class__", "dtype"),
    has_values=has_values,
    write_slots=write_slots,
    take_rows=take_rows,
    writes_in_place=True,
    chunk_size=chunk_size,
    bitwise_and_inplace=bitwise_and_inplace,
    bitwise_xor_inplace=bitwise_xor_inplace,
    tile_size=tile_size,
    loop=loop,
    eager_loop=True,
    narrow=narrow,
    known_padding=known_padding,
    linear=linear,
    exp_and_sum=exp_and_sum,
    is_differentiated=is_differentiated,
)
