"""Constraints, with Keras's names, fields, defaults and formulas.

The norms are those over `axis` of the canonical form of a weight, ``sqrt(sum(w^2))``: with axis 0,
the default, over the input features of a query, key or value kernel (D, H, d), and over the heads
of an output kernel (H, d_v, *O).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anymha.errors import ConfigError
from anymha.framework.protocol import Array, Ops
from anymha.options.serialization import ConfigObject, checked_places, table

EPSILON = 1e-7
"""What is added to norms before dividing by them, as Keras's `epsilon`."""


@dataclass(frozen=True)
class Constraint(ConfigObject):
    """The base of the constraints."""

    def applied(self, ops: Ops, w: Array) -> Array:
        """The weight as the constraint wants it."""
        raise NotImplementedError


@dataclass(frozen=True)
class NonNeg(Constraint):
    """No element is below zero."""

    name = "non_neg"

    def applied(self, ops: Ops, w: Array) -> Array:
        """The weight, zero where it was below."""
        return ops.where(w < 0, 0.0, w)


class _OfNorm(Constraint):
    """A constraint of the norms over an axis, or several."""

    axis: int | tuple[int, ...]

    def refusal(self, rank: int) -> str:
        """Each axis must be there."""
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        good = all(-rank <= axis < rank for axis in axes)
        return "" if good else f"axis {self.axis} is not there"

    def _check_axis(self) -> None:
        if self.axis is None:
            raise ConfigError("`axis` must be an integer or several. Received: None.")
        object.__setattr__(self, "axis", checked_places(self.axis, "axis"))

    def _norms(self, ops: Ops, w: Array) -> Array:
        squares = w * w
        for axis in self.axis if isinstance(self.axis, tuple) else (self.axis,):
            squares = ops.sum(squares, axis=axis, keepdims=True)
        return ops.sqrt(squares)


@dataclass(frozen=True)
class MaxNorm(_OfNorm):
    """No norm is above `max_value`."""

    max_value: float = 2.0
    axis: int | tuple[int, ...] = 0
    name = "max_norm"

    def __post_init__(self) -> None:
        self._check_number("max_value", low=0)
        self._check_axis()

    def applied(self, ops: Ops, w: Array) -> Array:
        """The weight, shorter where its norm was above."""
        norms = self._norms(ops, w)
        return w * (_clipped(ops, norms, 0.0, self.max_value) / (norms + EPSILON))


@dataclass(frozen=True)
class UnitNorm(_OfNorm):
    """Every norm is 1."""

    axis: int | tuple[int, ...] = 0
    name = "unit_norm"

    def __post_init__(self) -> None:
        self._check_axis()

    def applied(self, ops: Ops, w: Array) -> Array:
        """The weight with norms of 1; zeros stay zeros."""
        return w / (self._norms(ops, w) + EPSILON)


@dataclass(frozen=True)
class MinMaxNorm(_OfNorm):
    """Every norm is in [min_value, max_value], or with ``rate < 1`` comes nearer to it.

    The norm becomes ``(1 - rate) * norm + rate * clip(norm, min_value, max_value)``.
    """

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int | tuple[int, ...] = 0
    name = "min_max_norm"

    def __post_init__(self) -> None:
        self._check_number("min_value", low=0)
        self._check_number("max_value", low=self.min_value)
        self._check_number("rate", low=0, high=1)
        self._check_axis()

    def applied(self, ops: Ops, w: Array) -> Array:
        """The weight, longer or shorter where its norm was outside."""
        norms = self._norms(ops, w)
        wanted = _clipped(ops, norms, self.min_value, self.max_value) * self.rate
        return w * ((wanted + norms * (1 - self.rate)) / (norms + EPSILON))


CONSTRAINTS = table(MaxNorm, NonNeg, UnitNorm, MinMaxNorm)
"""The classes by all of their names."""


def constrained(
    ops: Ops, constraint: Constraint | Callable[[Array], Any], w: Array, argument: str
) -> Array:
    """What a constraint, be it of the user's own, makes of a weight.

    Raises:
        ConfigError: a constraint of the user's gives something else than an array of that shape.
    """
    if isinstance(constraint, Constraint):
        return constraint.applied(ops, w)
    found = constraint(w)
    if not ops.is_array(found) or tuple(found.shape) != tuple(w.shape):
        raise ConfigError(
            f"`{argument}` must give an array of {ops.name} of shape {tuple(w.shape)}. "
            f"Received: {type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}."
        )
    return found


def _clipped(ops: Ops, x: Array, low: float, high: float) -> Array:
    x = ops.where(x > high, high, x)
    return ops.where(x < low, low, x)
