"""The ops of TensorFlow, by `tf` functions alone: importing Keras would fix its global backend."""

from __future__ import annotations

from functools import partial
from operator import attrgetter

import numpy as np
import tensorflow as tf
from tensorflow import (
    abs,
    bool,
    broadcast_to,
    cos,
    exp,
    float32,
    float64,
    int32,
    logical_and,
    matmul,
    reshape,
    sin,
    sqrt,
    stack,
    stop_gradient,
    tanh,
    tensordot,
)
from tensorflow import cast as astype
from tensorflow import convert_to_tensor as from_numpy
from tensorflow import reduce_max as max
from tensorflow import reduce_sum as sum
from tensorflow import transpose as permute_dims

from anymha.framework.capabilities import Capabilities
from anymha_tensorflow import products
from anymha_tensorflow.compiled import CompiledCall
from anymha_tensorflow.products import HALF, multiplies, wide_matmul

name = "tensorflow"
log = tf.math.log
bitwise_and = tf.bitwise.bitwise_and
bitwise_xor = tf.bitwise.bitwise_xor
bitwise_right_shift = tf.bitwise.right_shift
remainder = tf.math.floormod


def asarray(obj, /, *, dtype=None, device=None):
    return tf.convert_to_tensor(obj, dtype=dtype)


def is_array(x, /):
    return tf.is_tensor(x) and not isinstance(x, NOT_DENSE)


NOT_DENSE = (tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices)


def arange(start, /, stop, *, dtype, device=None):
    return tf.range(start, stop, dtype=dtype)


def concat(arrays, /, *, axis=0):
    return tf.concat(arrays, axis=axis)


def argsort(x, /, *, axis):
    return tf.argsort(x, axis=axis)


def gather(x, indices, /, *, axis):
    return tf.gather(x, indices, axis=axis, batch_dims=1)


def where(condition, x1, x2, /):
    dtype = (x1 if tf.is_tensor(x1) else x2).dtype
    return tf.where(condition, tf.convert_to_tensor(x1, dtype), tf.convert_to_tensor(x2, dtype))


def shape(x, /):
    known = x.shape
    if known.is_fully_defined():
        return tuple(known)
    sizes = tf.shape(x)
    return tuple(sizes[i] if size is None else size for i, size in enumerate(known))


def device(x, /):
    return None


def has_values(x, /):
    return hasattr(x, "numpy") and tf.executing_eagerly()


def write_slots(storage, new, slot, in_place, /):
    batch, heads, size, width = full = shape(storage)
    length = shape(new)[2]
    first = tf.reshape(slot, (-1, 1, 1)) + tf.range(length)  # [1 or B, 1, T]
    starts = tf.reshape(tf.range(batch * heads) * size, (batch, heads, 1))
    rows = tf.reshape(starts + first, (-1, 1))
    flat, new = (tf.reshape(x, (-1, width)) for x in (storage, new))
    return tf.reshape(tf.tensor_scatter_nd_update(flat, rows, new), full)


def take_rows(x, rows, end, /):
    found = tf.gather(x, rows)
    if end is None:
        return found
    missing = shape(x)[2] - end
    return tf.pad(found[:, :, :end], ((0, 0), (0, 0), (0, missing), (0, 0)))


def choose(index, functions, arrays, /):
    return tf.switch_case(index, [partial(function, arrays) for function in functions])


def is_tracing():
    return not tf.executing_eagerly()


def seed_array(seed, /):
    return tf.constant((seed + 2**63) % 2**64 - 2**63, tf.int64)


def linear(x, matrix, bias, /):
    if x.dtype in HALF:
        return products.linear(x, matrix, bias)
    y = tf.matmul(x, matrix)
    return y if bias is None else tf.nn.bias_add(y, bias)  # which TensorFlow joins with the product


def tile_size(device, /):
    return 1 << 22


def _recomputed(function, /, *arrays):
    """``function(*arrays)``, of which only the arrays are kept: differentiation computes it again.

    `tf.recompute_grad` is that, but for second derivatives, and so for persistent tapes.
    """

    @tf.custom_gradient
    def forward(*arrays):
        def pullback(*cotangents):
            with tf.GradientTape() as tape:
                again = [tf.identity(x) for x in arrays]
                tape.watch(again)
                with tf.control_dependencies(cotangents):  # not before they are needed
                    results = tf.nest.flatten(function(*again))
            return tape.gradient(results, again, output_gradients=list(cotangents))

        return function(*arrays), pullback

    return forward(*arrays)


def loop(function, count, mapped, constant, results, /):
    # Masks stay outside: TensorFlow would add up their gradients, and cannot add booleans.
    fixed = {name: x for name, x in constant.items() if not x.dtype.is_floating}
    moving = {name: x for name, x in constant.items() if name not in fixed}
    names = [*mapped, *moving]

    def at(index, own):
        def body(*arrays):
            return function(index, dict(zip(names, arrays, strict=True)) | fixed)

        return _recomputed(body, *[x[index] for x in mapped.values()], *own)

    # A few rounds are faster one by one; of many, XLA would hold all the logits at a time.
    if isinstance(count, int) and count <= 4:
        found = [at(tf.constant(i), moving.values()) for i in range(count)]
        return {name: tf.stack([each[name] for each in found]) for name in results}

    # TensorFlow's optimiser of graphs makes the shape (0,) of what a loop gives into which a
    # floating array goes as it is. So each round takes the array out of a condition.
    @tf.autograph.experimental.do_not_convert  # which takes a second and is of no use here
    def round_of_many(index):
        own = [tf.where(index >= 0, x, tf.zeros((), x.dtype)) for x in moving.values()]
        return at(index, own)

    indices = tf.range(count)
    signature = dict(results)
    return tf.map_fn(round_of_many, indices, parallel_iterations=1, fn_output_signature=signature)


def narrow(x, start, length, /, *, axis):
    begin = [0] * len(x.shape)
    begin[axis] = start
    size = [-1] * len(x.shape)
    size[axis] = length
    return tf.slice(x, begin, size)


def dtype(name, /):
    return getattr(tf, name)


def to_numpy(x, /):
    return x.numpy()


def in_float64(function, arrays, /):
    return function(arrays)


def seed_words(seed, /):
    wide, low = tf.cast(seed, tf.int64), tf.constant(np.int64(0xFFFFFFFF))
    return tuple(
        tf.bitcast(tf.cast(tf.bitwise.bitwise_and(word, low), tf.uint32), tf.int32)
        for word in (wide, tf.bitwise.right_shift(wide, tf.constant(32, tf.int64)))
    )


def draw_seed():
    return tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32)


def native_keep_mask(seed, shape, keep, device, /):
    low, high = seed_words(seed)
    return tf.random.stateless_uniform(shape, tf.stack([low, high])) < keep


def vjp(function, arrays, cotangents, /):
    # Variables, Keras's too, which no tape watches, are taken as they are now.
    arrays = {name: tf.convert_to_tensor(x) for name, x in arrays.items()}
    with tf.GradientTape() as tape:
        tape.watch(list(arrays.values()))
        outputs = function(arrays)
    return outputs, tape.gradient(outputs, arrays, output_gradients=cotangents)


capabilities = Capabilities(
    array_key=attrgetter("__class__", "dtype"),
    is_tracing=is_tracing,
    has_values=has_values,
    write_slots=write_slots,
    take_rows=take_rows,
    choose=choose,
    compile=CompiledCall,
    seed_array=seed_array,
    vjp=vjp,
    tile_size=tile_size,
    loop=loop,
    narrow=narrow,
    multiplies=multiplies,
    wide_matmul=wide_matmul,
    linear=linear,
    softmax=tf.nn.softmax,
)
