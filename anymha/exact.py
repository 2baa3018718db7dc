"""What keeps results and gradients equal to the last bit in every framework."""

from __future__ import annotations

from collections.abc import Mapping

from anymha.ops import Array, Ops


def without_subnormals(ops: Ops, x: Array) -> Array:
    """`x` with zero for what float32 holds only as a subnormal number; gradients pass as if not.

    On the way to float32 some frameworks keep such numbers and some make them zero.
    """
    smallest = 2.0**-126
    small = ops.logical_and(x < smallest, x > -smallest)
    return x + ops.stop_gradient(ops.where(small, 0.0 - x, 0.0))


def without_gradient(ops: Ops, arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The array of that name with a gradient of exactly zero.

    The key's bias adds one number to all logits of a query, to which the softmax is indifferent:
    its gradient is zero. Summed up in floating point it would be noise, of other bits in every
    framework, which an optimiser like Adam scales up to full steps.
    """
    if name not in arrays:
        return {}
    array = arrays[name]
    never = ops.asarray(False, dtype=ops.bool, device=ops.device(array))
    return {name: ops.where(never, array, ops.stop_gradient(array))}
