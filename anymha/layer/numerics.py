"""What keeps results and gradients equal to the last bit in every framework."""

from __future__ import annotations

from typing import Any

from anymha.framework.protocol import Array, Ops


def without_subnormals(ops: Ops, x: Array) -> Array:
    """`x` with zero for what float32 holds only as a subnormal number; gradients pass as if not.

    On the way to float32 some frameworks keep such numbers and some make them zero.
    """
    smallest = 2.0**-126
    small = ops.logical_and(x < smallest, x > -smallest)
    return x + ops.stop_gradient(ops.where(small, 0.0 - x, 0.0))


def without_gradient(ops: Ops, array: Array, columns: tuple[bool, ...]) -> Array:
    """The array with a gradient of exactly zero in some of its last columns: the key's bias.

    There it adds one number to all logits of a query, to which the softmax is indifferent: its
    gradient is zero. Summed up in floating point it would be noise, of other bits in every
    framework, which an optimiser like Adam scales up to full steps.
    """
    differentiated = ops.capabilities.is_differentiated
    if not any(columns) or (differentiated is not None and not differentiated(array)):
        return array
    held = False if all(columns) else [not free for free in columns]
    held = ops.asarray(held, dtype=ops.bool, device=ops.device(array))
    return ops.where(held, array, ops.stop_gradient(array))


def cast_to(ops: Ops, x: Array, dtype: Any) -> Array:
    """`x` in that dtype; `x` itself where it has it."""
    return x if x.dtype == dtype else ops.astype(x, dtype)
