"""Arrays that remember how they came about, and a backend's functions on them.

`Tape` notes how a gradient goes back through each; see `anymha.framework.autodiff`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from anymha.framework.capabilities import Capabilities
from anymha.framework.protocol import Array, Ops

Pull = Callable[[Array], Array]
"""How the gradient of a result becomes the gradient of one of its arguments."""

_numbers = itertools.count()


class Variable:
    """An array and how it came about; of it the core uses operators, `dtype` and `shape` only."""

    __array_ufunc__ = None  # NumPy leaves its operators to this class

    def __init__(self, tape: Tape, value: Array, *sources: tuple[Any, Pull]) -> None:
        self.tape, self.value, self.number = tape, value, next(_numbers)
        self.sources = [(one, pull) for one, pull in sources if isinstance(one, Variable)]

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.value.dtype

    @property
    def shape(self) -> Any:
        """The shape of the array."""
        return self.value.shape

    def __add__(self, other: Any) -> Variable:
        return self.tape.broadcasting(operator.add, self, other, lambda g: g, lambda g: g)

    def __sub__(self, other: Any) -> Variable:
        return self.tape.broadcasting(operator.sub, self, other, lambda g: g, lambda g: 0.0 - g)

    def __rsub__(self, other: Any) -> Variable:
        return self.tape.broadcasting(operator.sub, other, self, lambda g: g, lambda g: 0.0 - g)

    def __mul__(self, other: Any) -> Variable:
        a, b = plain(self), plain(other)
        return self.tape.broadcasting(operator.mul, self, other, lambda g: g * b, lambda g: g * a)

    def __truediv__(self, other: Any) -> Variable:
        a, b = plain(self), plain(other)
        return self.tape.broadcasting(
            operator.truediv, self, other, lambda g: g / b, lambda g: 0.0 - g * (a / b) / b
        )

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> Variable:
        _, *slices = index  # an Ellipsis, and a slice for each of the last axes
        result = self
        for axis, part in enumerate(slices, len(self.shape) - len(slices)):
            if part != slice(None):
                start, stop, _ = part.indices(self.shape[axis])
                result = self.tape.narrow(result, start, stop - start, axis=axis)
        return result

    def __lt__(self, other: Any) -> Array:
        return self.value < plain(other)

    def __gt__(self, other: Any) -> Array:
        return self.value > plain(other)


def plain(x: Any) -> Any:
    """The array of a variable; anything else as it is."""
    return x.value if isinstance(x, Variable) else x


class Tape:
    """The functions of a backend, on its arrays and on variables.

    Those that are not written here are the backend's own, and see plain arrays only. Of the
    backend's capabilities it has those alone that are written here.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        own = ops.capabilities
        self.capabilities = Capabilities(
            exp_and_sum=None if own.exp_and_sum is None else self.exp_and_sum,
            keep_mask=own.keep_mask,
            chunk_size=own.chunk_size,
            bitwise_and_inplace=own.bitwise_and_inplace,
            bitwise_xor_inplace=own.bitwise_xor_inplace,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def broadcasting(
        self, function: Callable[[Any, Any], Array], a: Any, b: Any, pull_a: Pull, pull_b: Pull
    ) -> Variable:
        """``function(a, b)``, whose gradients are summed to the shapes of `a` and `b`."""
        return Variable(
            self,
            function(plain(a), plain(b)),
            (a, lambda g: self._summed(pull_a(g), a)),
            (b, lambda g: self._summed(pull_b(g), b)),
        )

    def _summed(self, gradient: Array, like: Variable) -> Array:
        """`gradient`, summed over the axes along which `like` was broadcast."""
        ops = self.ops
        shape, full = ops.shape(like.value), ops.shape(gradient)
        padded = (1,) * (len(full) - len(shape)) + tuple(shape)
        for axis, (own, spread) in enumerate(zip(padded, full, strict=True)):
            if own != spread:
                gradient = ops.sum(gradient, axis=axis, keepdims=True)
        return gradient if padded == shape else ops.reshape(gradient, shape)

    def _unary(self, x: Any, value: Array, pull: Pull) -> Any:
        return Variable(self, value, (x, pull)) if isinstance(x, Variable) else value

    # --- the protocol, as far as gradients go through it ----------------------------------------
    def is_array(self, x: Any, /) -> bool:
        return isinstance(x, Variable) or self.ops.is_array(x)

    def shape(self, x: Any, /) -> tuple[Any, ...]:
        return self.ops.shape(plain(x))

    def device(self, x: Any, /) -> Any:
        return self.ops.device(plain(x))

    def stop_gradient(self, x: Any, /) -> Array:
        return self.ops.stop_gradient(plain(x))

    def in_float64(self, function: Callable[[Any], Any], arrays: Mapping[str, Any], /) -> Any:
        return function(arrays)

    def astype(self, x: Any, dtype: Any, /) -> Any:
        ops, own = self.ops, x.dtype
        return self._unary(x, ops.astype(plain(x), dtype), lambda g: ops.astype(g, own))

    def reshape(self, x: Any, shape: tuple[Any, ...], /) -> Any:
        ops, own = self.ops, self.shape(x)
        return self._unary(x, ops.reshape(plain(x), shape), lambda g: ops.reshape(g, own))

    def permute_dims(self, x: Any, axes: tuple[int, ...], /) -> Any:
        ops, back = self.ops, tuple(axes.index(i) for i in range(len(axes)))
        value = ops.permute_dims(plain(x), axes)
        return self._unary(x, value, lambda g: ops.permute_dims(g, back))

    def broadcast_to(self, x: Any, shape: tuple[Any, ...], /) -> Any:
        value = self.ops.broadcast_to(plain(x), shape)
        return self._unary(x, value, lambda g: self._summed(g, x))

    def gather(self, x: Any, indices: Array, /, *, axis: int) -> Any:
        ops, own = self.ops, self.shape(x)
        axes = (0, axis, *(i for i in range(1, len(own)) if i != axis))
        back = tuple(axes.index(i) for i in range(len(own)))

        def pull(g: Array) -> Array:  # each place gets the sum of what was taken from it
            g = ops.permute_dims(g, axes)
            batch, count, *rest = ops.shape(g)
            places = ops.reshape(ops.arange(0, own[axis], dtype=ops.int32), (1, -1, 1))
            taken = ops.astype(places == ops.reshape(indices, (batch, 1, count)), g.dtype)
            summed = ops.matmul(taken, ops.reshape(g, (batch, count, -1)))
            return ops.permute_dims(ops.reshape(summed, (batch, own[axis], *rest)), back)

        return self._unary(x, ops.gather(plain(x), indices, axis=axis), pull)

    def abs(self, x: Any, /) -> Any:
        ops, own = self.ops, plain(x)
        sign = ops.where(own < 0, -1.0, ops.where(own > 0, 1.0, own))
        return self._unary(x, ops.abs(own), lambda g: g * sign)

    def sqrt(self, x: Any, /) -> Any:
        value = self.ops.sqrt(plain(x))
        return self._unary(x, value, lambda g: g / value * 0.5)

    def exp(self, x: Any, /) -> Any:
        value = self.ops.exp(plain(x))
        return self._unary(x, value, lambda g: g * value)

    def exp_and_sum(self, x: Any, peak: Any, /) -> Any:
        ops: Any = self.ops
        # The capability may overwrite its argument.
        weights, total = ops.capabilities.exp_and_sum(plain(x) + 0.0, plain(peak))
        result = self._unary(x, weights, lambda g: g * weights)
        full = ops.shape(weights)
        return result, self._unary(result, total, lambda g: ops.broadcast_to(g, full))

    def tanh(self, x: Any, /) -> Any:
        value = self.ops.tanh(plain(x))
        return self._unary(x, value, lambda g: g * (1.0 - value * value))

    def sum(self, x: Any, /, *, axis: int, keepdims: bool) -> Any:
        ops, own = self.ops, self.shape(x)
        value = ops.sum(plain(x), axis=axis, keepdims=keepdims)
        kept = tuple(1 if i == axis % len(own) else n for i, n in enumerate(own))
        return self._unary(x, value, lambda g: ops.broadcast_to(ops.reshape(g, kept), own))

    def max(self, x: Any, /, *, axis: int, keepdims: bool) -> Any:
        ops, own = self.ops, plain(x)
        value = ops.max(own, axis=axis, keepdims=True)

        def pull(g: Array) -> Array:  # to all that are the greatest, in equal parts
            greatest = ops.astype(own == value, own.dtype)
            share = greatest / ops.sum(greatest, axis=axis, keepdims=True)
            return share * ops.reshape(g, ops.shape(value))

        result = value if keepdims else ops.max(own, axis=axis, keepdims=False)
        return self._unary(x, result, pull)

    def where(self, condition: Any, x1: Any, x2: Any, /) -> Any:
        ops = self.ops
        if not isinstance(x1, Variable) and not isinstance(x2, Variable):
            return ops.where(condition, x1, x2)
        return self.broadcasting(
            lambda a, b: ops.where(condition, a, b),
            x1,
            x2,
            lambda g: ops.where(condition, g, 0.0),
            lambda g: ops.where(condition, 0.0, g),
        )

    def matmul(self, x1: Any, x2: Any, /) -> Any:
        ops, a, b = self.ops, plain(x1), plain(x2)

        def turned(x: Array) -> Array:
            axes = tuple(range(len(ops.shape(x))))
            return ops.permute_dims(x, (*axes[:-2], axes[-1], axes[-2]))

        return Variable(
            self,
            ops.matmul(a, b),
            (x1, lambda g: self._summed(ops.matmul(g, turned(b)), x1)),
            (x2, lambda g: self._summed(ops.matmul(turned(a), g), x2)),
        )

    def tensordot(self, x1: Any, x2: Any, /, *, axes: int) -> Any:
        """Over one axis, as the core calls it, of a matrix `x2`."""
        ops, a, b = self.ops, plain(x1), plain(x2)
        inner, outer = ops.shape(b)
        rows = math.prod(ops.shape(a)[:-1])

        def to_matrix(g: Array) -> Array:
            tall = ops.permute_dims(ops.reshape(a, (rows, inner)), (1, 0))
            return ops.matmul(tall, ops.reshape(g, (rows, outer)))

        return Variable(
            self,
            ops.tensordot(a, b, axes=axes),
            (x1, lambda g: ops.tensordot(g, ops.permute_dims(b, (1, 0)), axes=1)),
            (x2, to_matrix),
        )
