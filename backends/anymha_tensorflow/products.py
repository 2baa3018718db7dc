"""Products of half precision, whose sums are of float32 in both directions.

TensorFlow's own product rounds its sums. The one that XLA compiles gives them as they are, and as
fast; it needs the shapes, and time to be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import tensorflow as tf

HALF = (tf.bfloat16, tf.float16)

LEAST = 1 << 23
"""Of fewer multiplications, to start a program takes longer than what it saves."""


def multiplies(dtype: Any, device: Any, /) -> bool:
    """Whether the programs of XLA multiply a half-precision dtype as it is, on this processor."""
    return not tf.config.get_visible_devices("GPU") and _is_multiplied(tf.as_dtype(dtype))


@cache
def _is_multiplied(dtype: Any) -> bool:
    """Where the processor has no such products, XLA's program casts the numbers first."""
    matrix = tf.TensorSpec((256, 256), dtype)
    try:
        text = _product.experimental_get_compiler_ir(matrix, matrix)("optimized_hlo")
    except (tf.errors.OpError, ValueError):  # a TensorFlow without XLA, as on Windows
        return False
    return "convert(" not in text


def _batched(x: Any, y: Any) -> Any:
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=tf.float32)


_product: Any = tf.function(_batched, jit_compile=True, autograph=False)


@tf.function(jit_compile=True, autograph=False)
def _rows(x: Any, matrix: Any, bias: Any) -> Any:
    product = _batched(x, matrix)
    if bias is not None:
        product += tf.cast(bias, tf.float32)
    return tf.cast(product, x.dtype)


def _of_float32(x: Any, matrix: Any, bias: Any) -> Any:
    product = tf.matmul(tf.cast(x, tf.float32), tf.cast(matrix, tf.float32))
    if bias is not None:
        product = tf.nn.bias_add(product, tf.cast(bias, tf.float32))
    return tf.cast(product, x.dtype)


def _is_compiled(x: Any, y: Any) -> bool:
    """Whether a product of these is worth a program, and its shapes are known."""
    if not (x.shape.is_fully_defined() and y.shape.is_fully_defined()):
        return False
    return math.prod(x.shape) * y.shape[-1] >= LEAST and multiplies(x.dtype, None)


@tf.custom_gradient
def wide_matmul(x1: Any, x2: Any, /) -> Any:
    """``x1 . x2`` of arrays of one half-precision dtype and equal batch axes, in float32.

    On the way back the cotangent is rounded to that dtype, so that these products are as fast.
    """

    def pullback(cotangent: Any) -> tuple[Any, Any]:
        cotangent = tf.cast(cotangent, x1.dtype)
        left = wide_matmul(cotangent, tf.linalg.matrix_transpose(x2))
        right = wide_matmul(tf.linalg.matrix_transpose(x1), cotangent)
        return tf.cast(left, x1.dtype), tf.cast(right, x2.dtype)

    if not _is_compiled(x1, x2):
        return tf.matmul(tf.cast(x1, tf.float32), tf.cast(x2, tf.float32)), pullback
    # XLA knows fast products of one batch axis at the most; TensorFlow shall not derive them again.
    one = [tf.reshape(x, (-1, *x.shape[-2:])) if len(x.shape) > 3 else x for x in (x1, x2)]
    product = _product(*[tf.stop_gradient(x) for x in one])
    return tf.reshape(product, (*x1.shape[:-1], x2.shape[-1])), pullback


def linear(x: Any, matrix: Any, bias: Any, /) -> Any:
    """``x . matrix + bias`` of (N, D) and (D, W) of half precision, rounded once."""
    rows: Callable[..., Any] = _rows if _is_compiled(x, matrix) else _of_float32

    @tf.custom_gradient
    def forward(x: Any, matrix: Any, *biases: Any) -> Any:
        def pullback(cotangent: Any) -> tuple[Any, ...]:
            left = wide_matmul(cotangent, tf.transpose(matrix))
            right = wide_matmul(tf.transpose(x), cotangent)
            totals = [tf.reduce_sum(tf.cast(cotangent, tf.float32), 0) for _ in biases]
            return tuple(tf.cast(each, x.dtype) for each in (left, right, *totals))

        fixed = [tf.stop_gradient(each) for each in (x, matrix, *biases)]
        return rows(*fixed, *([] if biases else [None])), pullback

    return forward(x, matrix, *([] if bias is None else [bias]))
