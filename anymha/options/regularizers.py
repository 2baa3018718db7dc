"""Regularisers, with Keras's names, fields, defaults and formulas.

A penalty is a scalar that grows with what is not wanted: ``sum(abs(x))`` (L1), ``sum(x^2)`` (L2),
or how far the rows of a matrix are from orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from anymha.errors import ConfigError
from anymha.framework.protocol import Array, Ops
from anymha.options.serialization import ConfigObject, table

EPSILON = 1e-7
"""The least length by which `OrthogonalRegularizer` divides, as Keras's `epsilon`."""


@dataclass(frozen=True)
class Regularizer(ConfigObject):
    """The base of the regularisers.

    Attributes:
        as_matrix: Whether it takes a kernel as the projection's matrix, (fan in, fan out).
    """

    as_matrix: ClassVar[bool] = False

    def penalty(self, ops: Ops, x: Array) -> Array:
        """The penalty of `x`, an array of rank 0 in its dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class L1(Regularizer):
    """``l1 * sum(abs(x))``."""

    l1: float = 0.01
    name = "l1"

    def __post_init__(self) -> None:
        self._check_number("l1", low=0)

    def penalty(self, ops: Ops, x: Array) -> Array:
        """The penalty of `x`, an array of rank 0 in its dtype."""
        return _total(ops, ops.abs(x)) * self.l1


@dataclass(frozen=True)
class L2(Regularizer):
    """``l2 * sum(x^2)``."""

    l2: float = 0.01
    name = "l2"

    def __post_init__(self) -> None:
        self._check_number("l2", low=0)

    def penalty(self, ops: Ops, x: Array) -> Array:
        """The penalty of `x`, an array of rank 0 in its dtype."""
        return _total(ops, x * x) * self.l2


@dataclass(frozen=True)
class L1L2(Regularizer):
    """``l1 * sum(abs(x)) + l2 * sum(x^2)``; by its name alone both factors are 0, as in Keras."""

    l1: float = 0.0
    l2: float = 0.0
    name, aliases = "l1l2", ("l1_l2",)

    def __post_init__(self) -> None:
        self._check_number("l1", low=0)
        self._check_number("l2", low=0)

    def penalty(self, ops: Ops, x: Array) -> Array:
        """The penalty of `x`, an array of rank 0 in its dtype."""
        return _total(ops, ops.abs(x)) * self.l1 + _total(ops, x * x) * self.l2


@dataclass(frozen=True)
class OrthogonalRegularizer(Regularizer):
    """`factor` times the mean of ``abs(cos)`` of the angles between all rows, or all columns.

    Differs from:
        Keras refuses kernels of more than two axes, and so every kernel of an attention layer;
        here they are taken as the projection's matrix. Of one row alone the penalty is 0, in
        Keras NaN.
    """

    factor: float = 0.01
    mode: str = "rows"
    name, aliases, as_matrix = "orthogonal_regularizer", ("orthogonal",), True

    def __post_init__(self) -> None:
        self._check_number("factor", low=0)
        self._check_choice("mode", "rows", "columns")

    def refusal(self, rank: int) -> str:
        """Only matrices have rows and columns."""
        return "" if rank == 2 else "it takes matrices only"

    def penalty(self, ops: Ops, x: Array) -> Array:
        """The penalty of the matrix `x`, an array of rank 0 in its dtype."""
        rows = x if self.mode == "rows" else ops.permute_dims(x, (1, 0))
        count = rows.shape[0]
        squares = ops.sum(rows * rows, axis=-1, keepdims=True)
        # Before the root, whose gradient at zero is infinite.
        squares = ops.where(squares > EPSILON**2, squares, EPSILON**2)
        unit = rows / ops.sqrt(squares)
        cosines = ops.abs(ops.matmul(unit, ops.permute_dims(unit, (1, 0))))
        places = ops.arange(0, count, dtype=ops.int32, device=ops.device(x))
        pairs = ops.reshape(places, (count, 1)) < ops.reshape(places, (1, count))
        number = max(count * (count - 1) / 2, 1)
        return _total(ops, ops.where(pairs, cosines, 0.0)) * (self.factor / number)


REGULARIZERS = table(L1, L2, L1L2, OrthogonalRegularizer)
"""The classes by all of their names."""


def penalty(
    ops: Ops, regularizer: Regularizer | Callable[[Array], Any], x: Array, argument: str
) -> Any:
    """What a regulariser, be it of the user's own, gives for `x`: a scalar.

    Raises:
        ConfigError: a regulariser of the user's gives something else.
    """
    if isinstance(regularizer, Regularizer):
        return regularizer.penalty(ops, x)
    found = regularizer(x)
    shape = tuple(getattr(found, "shape", ()))
    if shape or not (ops.is_array(found) or isinstance(found, (int, float))):
        raise ConfigError(
            f"`{argument}` must give a scalar of {ops.name}. Received: {type(found).__name__} "
            f"of shape {shape}. Sum it up."
        )
    return found


def _total(ops: Ops, x: Array) -> Array:
    return ops.sum(ops.reshape(x, (-1,)), axis=-1, keepdims=False)
