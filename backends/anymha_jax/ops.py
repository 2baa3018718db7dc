"""The ops of JAX."""

from __future__ import annotations

import sys
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.lax import stop_gradient
from jax.numpy import (
    asarray,
    bitwise_and,
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
    max,
    permute_dims,
    remainder,
    reshape,
    sin,
    sqrt,
    stack,
    sum,
    tanh,
    where,
)
from jax.numpy import right_shift as bitwise_right_shift
from numpy import asarray as to_numpy

from anymha.errors import ArgumentError
from anymha.framework.capabilities import Capabilities
from anymha_jax import cudnn
from anymha_jax import float64 as x64
from anymha_jax.float64 import in_float64
from anymha_jax.products import HALF, multiplies, wide_matmul

bool = jnp.bool
name = "jax"
dtype = jnp.dtype
_these: Any = sys.modules[__name__]
shape = attrgetter("shape")


def abs(x, /):
    return x * jnp.sign(x)  # JAX's own has the slope 1 at zero, all others' 0


def astype(x, dtype, /):
    return x.astype(dtype)


def arange(start, /, stop, *, dtype, device=None):
    return jnp.arange(start, stop, dtype=dtype)


def argsort(x, /, *, axis):
    return jnp.argsort(x, axis=axis)


def gather(x, indices, /, *, axis):
    shape = [1] * x.ndim
    shape[0], shape[axis] = indices.shape
    return jnp.take_along_axis(x, indices.reshape(shape), axis, mode="clip")


def is_array(x, /):
    return isinstance(x, jax.Array)


def device(x, /):
    return None


def compile(function, pairs, /):
    return jax.jit(function, inline=True)


# Padding, slicing and `jnp.asarray` would each compile a program for each shape.
def resized(x, shape, /):
    if isinstance(x, Tracer) or not _is_one_cpu():
        return None
    if x.shape == shape:
        return x
    corner = tuple([slice(min(n, m)) for n, m in zip(x.shape, shape, strict=True)])
    found = np.zeros(shape, x.dtype)
    found[corner] = np.asarray(x)[corner]
    return jax.device_put(found)


def has_values(x, /):
    return not isinstance(x, Tracer)


def write_slots(storage, new, slot, in_place, /):
    if isinstance(slot, int):
        return jax.lax.dynamic_update_slice_in_dim(storage, new, slot, 2)
    rows = jnp.arange(storage.shape[0], dtype=int32)[:, None]
    slots = slot[:, None] + jnp.arange(new.shape[2], dtype=int32)[None]
    return storage.at[rows, :, slots].set(jnp.swapaxes(new, 1, 2), mode="clip")


def take_rows(x, rows, end, /):
    found = jnp.take(x, rows, axis=0, mode="clip")
    return found if end is None else found.at[:, :, end:].set(0)


def choose(index, functions, arrays, /):
    return jax.lax.switch(index, functions, arrays)


def seed_array(seed, /):
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


# One head after another is no work for an accelerator, or for several devices.
def tile_size(device, /):
    return 1 << 20 if _is_one_cpu() else 1 << 28


# The product of a matrix has gradients that XLA computes on a processor without copies. Among
# several devices an axis that is shared out must stay what it is.
def tensordot(x1, x2, /, *, axes):
    if axes != 1 or x2.ndim != 2 or not _is_one_cpu():
        return jnp.tensordot(x1, x2, axes=axes)
    rows = jnp.reshape(x1, (-1, x1.shape[-1]))
    product = wide_matmul(rows, x2).astype(x1.dtype) if x1.dtype in HALF else jnp.matmul(rows, x2)
    return jnp.reshape(product, (*x1.shape[:-1], *x2.shape[1:]))


def _is_one_cpu():
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def loop(function, count, mapped, constant, results, /):
    # Only what goes into a round is kept for differentiation, which computes the round again.
    @jax.checkpoint
    def body(index, own):
        return function(index, own | constant)

    return jax.lax.map(lambda x: body(*x), (jnp.arange(count, dtype=int32), dict(mapped)))


def narrow(x, start, length, /, *, axis):
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis)


def from_numpy(x, /):
    with jax.enable_x64(x.dtype == np.float64 or x64.exists()):
        if jax.sharding.get_abstract_mesh().empty:
            return jax.device_put(np.array(x))  # a copy, whose memory JAX may take
        return jnp.asarray(x)  # on the devices of the mesh


def constants(query, arrays, /):
    if not isinstance(query, Tracer):
        return arrays
    return {n: from_numpy(x) if type(x) is np.ndarray else x for n, x in arrays.items()}


def seed_words(seed, /):
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    if seed.ndim:  # the words of a key, the high one first
        words = jax.lax.bitcast_convert_type(seed, int32)
        return words[..., -1], words[..., 0]
    if seed.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(seed, int32)
        return words[0], words[1]
    high = seed.astype(int32) >> 31 if jnp.issubdtype(seed.dtype, jnp.signedinteger) else 0
    return seed.astype(int32), jnp.asarray(high, int32)


def draw_seed():
    raise ArgumentError(
        "`seed` is needed for dropout in training: JAX has no generator of its own. "
        "Received: None. Pass an int or a key, e.g. seed=jax.random.key(0)."
    )


def initialize(function, shape, dtype, seed, /):
    with jax.enable_x64(dtype == "float64"), jax.ensure_compile_time_eval():
        return function(jax.random.key(seed), shape, jnp.dtype(dtype))


def native_keep_mask(seed, shape, keep, device, /):
    with jax.enable_x64(False):  # in float64 the same seed would give another mask
        if not is_array(seed):
            seed = jax.random.key(seed)
        elif not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
            seed = jax.random.wrap_key_data(seed) if seed.ndim else jax.random.key(seed)
        return jax.random.bernoulli(seed, keep, shape)


def vjp(function, arrays, cotangents, /):
    def both(arrays, cotangents):
        outputs, pullback = jax.vjp(function, arrays)
        return outputs, pullback(cotangents)[0]

    arrays = dict(arrays)
    try:  # one program is compiled in less time than one for each operation
        return jax.jit(both)(arrays, cotangents)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # it looks at numbers
        return both(arrays, cotangents)


capabilities = Capabilities(
    array_key=attrgetter("__class__", "dtype"),
    constants=constants,
    compile=compile,
    has_values=has_values,
    write_slots=write_slots,
    take_rows=take_rows,
    choose=choose,
    resized=resized,
    seed_array=seed_array,
    vjp=vjp,
    tile_size=tile_size,
    loop=loop,
    narrow=narrow,
    fused_attention=partial(cudnn.fused_attention, _these),
    fused_window=cudnn.makes_window,
    why_not_fused=cudnn.why_not_fused,
    multiplies=multiplies,
    wide_matmul=wide_matmul,
    initialize=initialize,
    initializer_style="key",
)
