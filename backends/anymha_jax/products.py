"""Products of half precision, whose sums are of float32 in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from anymha_jax.transposed import linear

HALF = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


def multiplies(dtype: Any, device: Any, /) -> bool:
    """Whether XLA's products of a half-precision dtype are fast, and added in float32."""
    platform = jax.default_backend()
    if platform == "gpu":  # NVIDIA's have bfloat16 from Ampere on
        major = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
        return dtype == jnp.float16 or not major.isdecimal() or int(major) >= 8
    return platform == "cpu" and _is_multiplied_on_cpu(jnp.dtype(dtype))


@cache
def _is_multiplied_on_cpu(dtype: Any) -> bool:
    """Whether the program that XLA makes of a product multiplies the numbers as they are.

    Where the processor has no such products, the program casts them to float32 first.
    """
    matrix = jax.ShapeDtypeStruct((256, 256), dtype)
    text = jax.jit(_wide).lower(matrix, matrix).compile().as_text() or "convert("
    return "convert(" not in text


# Of arrays with several batch axes, or with several free ones in the second, which `vmap` makes of
# products, XLA makes programs for processors that it cannot run. So these have one batch axis.
@custom_vmap
def _wide(x: Any, y: Any) -> Any:
    one = [array.reshape(-1, *array.shape[-2:]) if array.ndim > 3 else array for array in (x, y)]
    product = jnp.matmul(*one, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:-1], y.shape[-1])


@_wide.def_vmap
def _(size: int, batched: Sequence[bool], x: Any, y: Any) -> Any:
    if y.ndim == 2 and not batched[1]:  # the rows of all members, one below the other
        product = _wide(x.reshape(size * x.shape[1], x.shape[2]), y)
        return product.reshape(size, -1, y.shape[1]), True
    every = [
        array if own else jnp.broadcast_to(array, (size, *array.shape))
        for array, own in zip((x, y), batched, strict=True)
    ]
    return _wide(*every), True


@jax.custom_jvp
def wide_matmul(x1: Any, x2: Any, /) -> Any:
    """``x1 . x2`` of arrays of one half-precision dtype and equal batch axes, in float32.

    On the way back the cotangent is rounded to that dtype, so that these products are as fast.
    """
    return _wide(x1, x2)


@partial(wide_matmul.defjvp, symbolic_zeros=True)
def _(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, y = primals
    dx, dy = tangents
    total: Any = None
    if not isinstance(dx, SymbolicZero):
        total = linear(_of_left, _back_to_left, [y], [dx])
    if not isinstance(dy, SymbolicZero):
        right = linear(_of_right, _back_to_right, [x], [dy])
        total = right if total is None else total + right
    result = wide_matmul(x, y)
    return result, jnp.zeros_like(result) if total is None else total


def _of_left(y: Any, dx: Any) -> Any:
    return wide_matmul(dx, y)


def _of_right(x: Any, dy: Any) -> Any:
    return wide_matmul(x, dy)


def _back_to_left(y: Any, cotangent: Any) -> Sequence[Any]:
    product = wide_matmul(cotangent.astype(y.dtype), jnp.matrix_transpose(y))
    return [product.astype(y.dtype)]


def _back_to_right(x: Any, cotangent: Any) -> Sequence[Any]:
    product = wide_matmul(jnp.matrix_transpose(x), cotangent.astype(x.dtype))
    return [product.astype(x.dtype)]
