"""Tests of the functions and operators that compute, in floating, integers and booleans."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anymha.parity.stages.tolerance import eps
from anymha.testing.calls import call, values, words
from anymha.testing.capabilities import BackendTests

FLOATING = ("float32", "float64")
ULPS = 8.0
"""How many times its dtype's eps `exp`, `sqrt` or `tanh` may be off; libraries have 1 to 5."""


def by_dtype(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in each dtype in which the layer accumulates."""
    return pytest.mark.parametrize("dtype", FLOATING)(test)


class ArithmeticTests(BackendTests):
    """Products, elementwise functions, reductions, and 32-bit integers."""

    # --- products --------------------------------------------------------------------------------
    @by_dtype
    @pytest.mark.parametrize(
        "shapes",
        [((3, 40), (40, 5)), ((2, 3, 4, 40), (2, 3, 40, 5)), ((2, 3, 4, 8), (8, 5))],
        ids=["matrices", "batches", "broadcast"],
    )
    def test_matmul_in_full_precision(self, ops: Any, dtype: str, shapes: Any) -> None:
        """Over the last two axes, in no less than the dtype's own precision."""
        self.need(ops, dtype)
        x, y = values(*shapes[0], dtype=dtype), values(*shapes[1], dtype=dtype, seed=1)
        got = call(ops, "matmul", x, y)
        expected, allowed = _product(np.matmul, x, y)
        got.is_near(expected, allowed, dtype)

    @by_dtype
    def test_tensordot_in_full_precision(self, ops: Any, dtype: str) -> None:
        """Over the last axis of the first and the first axis of the second."""
        self.need(ops, dtype)
        x, y = values(2, 3, 40, dtype=dtype), values(40, 5, dtype=dtype, seed=1)
        got = call(ops, "tensordot", x, y, axes=1)
        expected, allowed = _product(lambda x, y: np.tensordot(x, y, axes=1), x, y)
        got.is_near(expected, allowed, dtype)

    # --- elementwise -----------------------------------------------------------------------------
    @by_dtype
    def test_where_takes_the_first_where_true(self, ops: Any, dtype: str) -> None:
        """Condition and arrays broadcast; what is not taken does not matter, be it NaN."""
        self.need(ops, dtype)
        x, y = values(2, 3, 4, dtype=dtype), values(4, dtype=dtype, seed=1)
        condition = values(2, 1, 4, seed=2) > 0
        call(ops, "where", condition, x, y).equals(np.where(condition, x, y))
        holes = np.where(condition, x, np.full_like(x, np.nan))
        call(ops, "where", condition, holes, y).equals(np.where(condition, x, y))
        never = np.array(False)
        call(ops, "where", never, x, x + 1).equals(x + 1)

    @by_dtype
    @pytest.mark.parametrize("scalar", [0.0, 1.0, float("-inf")])
    def test_where_takes_a_scalar(self, ops: Any, dtype: str, scalar: float) -> None:
        """In either place; the result has the dtype of the array."""
        self.need(ops, dtype)
        x, condition = values(2, 3, dtype=dtype), values(3, seed=1) > 0
        filled = np.full_like(x, scalar)
        call(ops, "where", condition, x, scalar).equals(np.where(condition, x, filled))
        call(ops, "where", condition, scalar, x).equals(np.where(condition, filled, x))

    @by_dtype
    def test_exp_of_finite_and_infinite(self, ops: Any, dtype: str) -> None:
        """Accurate, and exactly 0 at -inf and 1 at 0."""
        self._check_function(ops, dtype, np.exp, [0.0, -np.inf], 8 * values(200, dtype="float64"))

    @by_dtype
    def test_tanh_of_small_and_large(self, ops: Any, dtype: str) -> None:
        """Accurate, relative to its size near 0, and 1 far from it."""
        numbers = 2 * values(200, dtype="float64")
        self._check_function(ops, dtype, np.tanh, [0.0, 1e-4, 40.0, -40.0], numbers)

    @by_dtype
    def test_cos_of_small_and_large_angles(self, ops: Any, dtype: str) -> None:
        """Accurate to the eps of 1, as positions times frequencies need it; 1 at 0."""
        self._check_angles(ops, dtype, np.cos)

    @by_dtype
    def test_sin_of_small_and_large_angles(self, ops: Any, dtype: str) -> None:
        """Accurate to the eps of 1; exactly 0 at 0."""
        self._check_angles(ops, dtype, np.sin)

    @by_dtype
    def test_log_of_small_and_large(self, ops: Any, dtype: str) -> None:
        """Accurate to the eps of its size, or of 1 where that is more; exactly 0 at 1."""
        numbers = values(200, dtype="float64") ** 2 + 1e-3
        self._check_function(ops, dtype, np.log, [1.0, 1e-4, 1e4], numbers, least=1.0)

    def _check_angles(self, ops: Any, dtype: str, exact: np.ufunc) -> None:
        __tracebackhide__ = True
        numbers = values(200, dtype="float64") * np.geomspace(1e-2, 1e5, 200)
        self._check_function(ops, dtype, exact, [0.0, 1e-4, -1e-4], numbers, least=1.0)

    @by_dtype
    def test_sqrt_of_small_and_large(self, ops: Any, dtype: str) -> None:
        """Accurate, relative to its size, and exactly 0 at 0."""
        numbers = values(200, dtype="float64") ** 2
        self._check_function(ops, dtype, np.sqrt, [0.0, 1e-30, 1e30], numbers)

    def _check_function(
        self,
        ops: Any,
        dtype: str,
        exact: np.ufunc,
        special: list[float],
        numbers: np.ndarray,
        least: float = 0.0,
    ) -> None:
        __tracebackhide__ = True
        self.need(ops, dtype)
        x = np.concatenate([special, numbers]).astype(dtype)
        expected = exact(x.astype(np.float64))
        simple = x == special[0]  # where the result is exact
        allowed = ULPS * eps(dtype) * np.maximum(np.abs(expected), least) * ~simple
        call(ops, exact.__name__, x).is_near(expected, allowed, dtype)

    @by_dtype
    def test_abs_is_exact(self, ops: Any, dtype: str) -> None:
        """Of every sign, of zero and of infinity."""
        self.need(ops, dtype)
        x = np.concatenate([[0.0, -np.inf, np.inf], values(20, dtype="float64")]).astype(dtype)
        call(ops, "abs", x).equals(np.abs(x))

    @by_dtype
    @pytest.mark.parametrize("symbol", ["+", "-", "*", "/"])
    def test_operator_on_floating(self, ops: Any, dtype: str, symbol: str) -> None:
        """Arrays broadcast; a number on the right takes the array's dtype. Correctly rounded."""
        self.need(ops, dtype)
        function = OPERATORS[symbol]
        x, y = values(2, 3, dtype=dtype), values(3, dtype=dtype, seed=1)
        for right, other in ((y, y), (0.3, np.asarray(0.3, dtype))):
            expected = function(x, other)
            got = call(ops, function, x, right)
            # XLA divides by multiplying with the reciprocal, which rounds twice.
            allowed = eps(dtype) * np.abs(expected) if symbol == "/" else 0.0
            got.is_near(expected.astype(np.float64), allowed, dtype)

    @by_dtype
    @pytest.mark.parametrize("symbol", ["<", "<=", ">", ">="])
    def test_comparison_gives_booleans(self, ops: Any, dtype: str, symbol: str) -> None:
        """Of arrays, and of an array with a number, be it -inf."""
        self.need(ops, dtype)
        function = OPERATORS[symbol]
        x = np.array([[0.5, -np.inf, 2.0], [0.0, 1.0, -3.0]], dtype)
        call(ops, function, x, x[:1]).equals(function(x, x[:1]))
        for number in (0.0, float("-inf")):
            call(ops, function, x, number).equals(function(x, number))
        i = np.array([-2, 0, 3], np.int32)
        call(ops, function, i, 0).equals(function(i, 0))

    # --- reductions ------------------------------------------------------------------------------
    @by_dtype
    @pytest.mark.parametrize("axis", [-1, 0, 1])
    def test_max_over_an_axis(self, ops: Any, dtype: str, axis: int) -> None:
        """Of one axis, kept with length 1 or dropped; -inf where all is -inf, NaN where one is."""
        self.need(ops, dtype)
        x = values(3, 4, 5, dtype=dtype)
        x[0, 0] = x[:, 1, 1] = x[1, :, 2] = -np.inf
        x[2, 3, 4] = np.nan
        for keep in (True, False):
            expected = np.max(x, axis=axis, keepdims=keep)
            call(ops, "max", x, axis=axis, keepdims=keep).equals(expected)

    @by_dtype
    @pytest.mark.parametrize("axis", [-1, 0, 1])
    def test_sum_over_an_axis(self, ops: Any, dtype: str, axis: int) -> None:
        """Of one axis, kept with length 1 or dropped."""
        self.need(ops, dtype)
        x = values(3, 40, 50, dtype=dtype)
        wide = x.astype(np.float64)
        for keep in (True, False):
            got = call(ops, "sum", x, axis=axis, keepdims=keep)
            expected = np.sum(wide, axis=axis, keepdims=keep)
            spread = np.sum(np.abs(wide), axis=axis, keepdims=keep)
            got.is_near(expected, np.sqrt(x.shape[axis]) * eps(dtype) * spread, dtype)

    # --- booleans and integers -------------------------------------------------------------------
    def test_logical_and_broadcasts(self, ops: Any) -> None:
        """Of booleans (B, 1, 1, S) and (1, 1, T, S), as masks meet."""
        x, y = values(2, 1, 1, 4) > 0, values(1, 1, 3, 4, seed=1) > 0
        call(ops, "logical_and", x, y).equals(np.logical_and(x, y))

    def test_bitwise_and_of_words(self, ops: Any) -> None:
        """Of int32 arrays, and of an array and a number."""
        x, y = words(2, 30), words(30, seed=1)
        call(ops, "bitwise_and", x, y).equals(x & y)
        for mask in (0xFFFF, (1 << 17) - 1):
            call(ops, "bitwise_and", x, mask).equals(x & np.int32(mask))

    def test_bitwise_xor_of_words(self, ops: Any) -> None:
        """Of int32 arrays that broadcast, and of an array and a number."""
        x, y = words(2, 30), words(30, seed=1)
        call(ops, "bitwise_xor", x, y).equals(x ^ y)
        for mask in (0xFFFF, -(2**31)):
            call(ops, "bitwise_xor", x, mask).equals(x ^ np.int32(mask))

    @pytest.mark.parametrize("shift", [1, 15, 16, 31])
    def test_bitwise_right_shift_copies_the_sign(self, ops: Any, shift: int) -> None:
        """int32 shifts are arithmetic: -1 >> 16 is -1. The portable dropout builds on it."""
        x = np.concatenate([words(30), np.array([-1, -(2**31), 2**31 - 1], np.int32)])
        call(ops, "bitwise_right_shift", x, shift).equals(x >> np.int32(shift))

    @pytest.mark.parametrize("size", [1, 5, 64])
    def test_remainder_is_never_negative(self, ops: Any, size: int) -> None:
        """Of int32, as Python's: -1 leaves ``size - 1``. A ring finds its slots by it."""
        x = np.arange(-70, 70, dtype=np.int32).reshape(2, 70)
        call(ops, "remainder", x, size).equals(x % np.int32(size))

    def test_argsort_of_rows(self, ops: Any) -> None:
        """The places of the numbers in their order, along the last of two axes."""
        x = np.array([[5, 1, 3, 2], [0, 9, -4, 7]], np.int32)
        found = ops.to_numpy(ops.argsort(ops.from_numpy(x), axis=1))
        assert found.tolist() == np.argsort(x, axis=1).tolist()

    @pytest.mark.parametrize("axis", [1, 2, 3])
    @pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
    def test_gather_takes_places_of_each_member(self, ops: Any, axis: int, dtype: str) -> None:
        """Others for each member of the first axis; more or fewer than there are; NaN too."""
        x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
        x = x % 2 == 0 if dtype == "bool" else x.astype(dtype)
        if dtype == "float32":
            x[1, 0, 0, 0] = np.nan
        indices = np.array([[2, 0, 2, 1], [0, 1, 0, 2]], np.int32)
        shape = [1, 1, 1, 1]
        shape[0], shape[axis] = indices.shape
        expected = np.take_along_axis(x, indices.reshape(shape), axis)
        call(ops, "gather", x, indices, axis=axis).equals(expected)

    @pytest.mark.parametrize("factor", [0x31848BAB, 0xED5AD4BB - 2**32, 3])
    def test_int32_multiplication_wraps(self, ops: Any, factor: int) -> None:
        """Modulo 2^32, neither saturated nor widened. The portable dropout builds on it."""
        x = words(4, 8)
        wrapped = (x.astype(object) * factor + 2**31) % 2**32 - 2**31
        call(ops, operator.mul, x, factor).equals(wrapped.astype(np.int32))

    def test_int32_addition_wraps(self, ops: Any) -> None:
        """Modulo 2^32, of arrays that broadcast and of a number; so does subtraction."""
        x, y = words(4, 8), words(8, seed=1)
        for function in (operator.add, operator.sub):
            for other in (y, 0x9E3779B9 - 2**32):
                wide = np.asarray(other, object)
                wrapped = (function(x.astype(object), wide) + 2**31) % 2**32 - 2**31
                call(ops, function, x, other).equals(wrapped.astype(np.int32))


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def _product(
    function: Callable[..., np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 product, and how far the sum of n rounded terms may be from it."""
    wide = [array.astype(np.float64) for array in (x, y)]
    spread = function(*map(np.abs, wide))
    if x.dtype == np.float64:
        return function(*wide), np.sqrt(x.shape[-1]) * 2 * eps("float64") * spread
    return function(*wide), np.sqrt(x.shape[-1]) * eps("float32") * spread
