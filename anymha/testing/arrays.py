"""Tests of the functions that make, move and describe arrays; all of their results are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anymha.framework.dtypes import dtype_name
from anymha.framework.registry import BUILT_IN
from anymha.parity.oracle.cases import numpy_dtype
from anymha.testing.calls import call, must, values, words
from anymha.testing.capabilities import BackendTests

DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "bool")
EDGES = (0.0, -0.0, 1.0, -1.5, 1 / 3, 65504.0, 1e-7, float("inf"), float("-inf"), float("nan"))


def sample(dtype: str) -> np.ndarray:
    """Values of a dtype that a careless conversion would change."""
    if dtype == "bool":
        return np.array([[True, False, True]])
    if dtype == "int32":
        return np.array([[0, -1, 7], [2**31 - 1, -(2**31), 2**24 + 1]], np.int32)
    return np.array([EDGES, EDGES[::-1]]).astype(numpy_dtype(dtype))


class ArrayTests(BackendTests):
    """Conversion, creation, shapes, slices."""

    def test_name_is_a_string(self, ops: Any) -> None:
        """`name` is what error messages call the backend."""
        must(isinstance(ops.name, str), f"`name` must be a string. Received: {ops.name!r}.")

    def test_array_modules_hold_the_array_type(self, ops: Any) -> None:
        """`array_modules` is how the functions of anymha find the backend of an array."""
        built_in = {backend.name: backend.array_modules for backend in BUILT_IN}
        modules = getattr(ops, "array_modules", built_in.get(ops.name, ()))
        kind = type(ops.from_numpy(values(2)))
        roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
        must(
            roots & set(modules),
            f"`array_modules` must hold a module out of {sorted(roots)}, in which the array type "
            f"{kind.__qualname__} or a base of it is defined. Received: {modules!r}.",
        )

    # --- dtypes ----------------------------------------------------------------------------------
    @pytest.mark.parametrize("name", DTYPES)
    def test_dtype_is_that_of_arrays_from_numpy(self, ops: Any, name: str) -> None:
        """`dtype` gives what arrays have as ``.dtype``, and its name can be read off it."""
        self.need(ops, name)
        got = ops.from_numpy(sample(name)).dtype
        expected = ops.bool if name == "bool" else ops.dtype(name)
        must(
            got == expected,
            f"An array from a NumPy array of {name} must have the dtype {expected!r}. "
            f"Received: {got!r}.",
        )
        must(
            dtype_name(got) in (name, f"{name}_"),
            f"The dtype {got!r} must be called {name} by its `name`, its `__name__` or the end "
            f"of its `str`. Received: {dtype_name(got)!r}.",
        )

    @pytest.mark.parametrize("name", ["float32", "float64", "int32", "bool"])
    def test_dtype_attribute(self, ops: Any, name: str) -> None:
        """`ops.float32`, `ops.float64`, `ops.int32` and `ops.bool` are dtypes."""
        self.need(ops, name)
        got, found = getattr(ops, name), ops.from_numpy(sample(name)).dtype
        must(found == got, f"`ops.{name}` must equal {found!r}. Received: {got!r}.")

    # --- from and to NumPy -----------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_from_numpy_and_to_numpy_are_exact(self, ops: Any, dtype: str) -> None:
        """There and back, every bit of every value stays, the sign of zero included."""
        self.need(ops, dtype)
        given = sample(dtype)
        call(ops, _itself, given).equals(given)
        back = ops.to_numpy(ops.from_numpy(given))
        must(
            isinstance(back, np.ndarray),
            f"`to_numpy` must give a numpy.ndarray. Received: {type(back).__qualname__}.",
        )
        lost = np.signbit(back.astype(np.float64)) != np.signbit(given.astype(np.float64))
        must(not np.any(lost), f"The sign was lost of {given[lost]}.")

    @pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4, 5, 6)], ids=str)
    def test_from_numpy_and_to_numpy_keep_the_shape(self, ops: Any, shape: tuple[int, ...]) -> None:
        """Scalars, empty arrays and many axes are arrays like others."""
        given = values(*shape)
        call(ops, _itself, given).equals(given)

    def test_from_numpy_takes_strided_and_read_only_arrays(self, ops: Any) -> None:
        """The order of the elements in memory does not matter, nor who may write them."""
        given = values(4, 6)[::-1, ::2].T
        given.flags.writeable = False
        call(ops, _itself, given).equals(given)

    # --- what an array is ------------------------------------------------------------------------
    def test_is_array_knows_its_own(self, ops: Any) -> None:
        """True for arrays of this framework, of any dtype and rank."""
        for given in (values(2, 3), values(), words(2), np.array(True)):
            must(ops.is_array(ops.from_numpy(given)), f"`is_array` refused its own: {given!r}.")

    @pytest.mark.parametrize("other", [None, 0, 1.5, True, "x", [1.0], (1.0,), {}], ids=repr)
    def test_is_array_refuses_others(self, ops: Any, other: Any) -> None:
        """False for what is no array, without an exception."""
        must(not ops.is_array(other), f"`is_array` took {other!r} for an array.")

    def test_shape_is_a_tuple_of_lengths(self, ops: Any) -> None:
        """And the array's own ``.shape`` has as many places."""
        for shape in ((2, 3, 4), ()):
            x = ops.from_numpy(values(*shape))
            got = ops.shape(x)
            must(
                isinstance(got, tuple) and got == shape,
                f"`shape` must give the tuple {shape}. Received: {got!r}.",
            )
            must(tuple(x.shape) == shape, f"`x.shape` must be {shape}. Received: {x.shape}.")

    def test_device_is_where_asarray_and_arange_make_arrays(self, ops: Any) -> None:
        """What `device` gives is taken by both, and the results go together with the array."""
        x = values(3)

        def beside(x: Any) -> Any:
            device = ops.device(x)
            places = ops.arange(0, 3, dtype=ops.int32, device=device)
            always = ops.asarray([True], dtype=ops.bool, device=device)
            return ops.where(ops.logical_and(places >= 1, always), x, 0.0)

        call(ops, beside, x).equals(np.array([0.0, *x[1:]], np.float32))

    # --- creation --------------------------------------------------------------------------------
    def test_asarray_makes_an_array_of_numbers(self, ops: Any) -> None:
        """A list of numbers, or one number, with a dtype."""
        call(ops, "asarray", [-5, 2**31 - 1], dtype="int32").equals(
            np.array([-5, 2**31 - 1], np.int32)
        )
        call(ops, "asarray", [0.5, -2.0], dtype="float32").equals(np.array([0.5, -2.0], np.float32))
        call(ops, "asarray", False, dtype="bool", device=None).equals(np.array(False))

    def test_arange_counts_from_start_to_before_stop(self, ops: Any) -> None:
        """In the dtype asked for; nothing where start equals stop."""
        call(ops, "arange", 0, 5, dtype="int32").equals(np.arange(5, dtype=np.int32))
        call(ops, "arange", 3, 7, dtype="int32", device=None).equals(
            np.array([3, 4, 5, 6], np.int32)
        )
        call(ops, "arange", 2, 2, dtype="int32").equals(np.zeros(0, np.int32))

    @pytest.mark.parametrize("to", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("of", ["float16", "bfloat16", "float32", "float64", "int32"])
    def test_astype_rounds_once_to_nearest_even(self, ops: Any, of: str, to: str) -> None:
        """Floating numbers are rounded to the nearest, ties to even."""
        self.need(ops, of, to)
        # 1 + k/512 has ties for bfloat16, 1 + k/4096 for float16, and their neighbours.
        ties = np.concatenate([1 + np.arange(9) / 512, 1 + np.arange(9) / 4096])
        x = np.concatenate([ties, ties + 2**-23, values(20, dtype="float64")])
        x = (x * 1000 if of == "int32" else x).astype(numpy_dtype(of))
        if (of, to) == ("float64", "bfloat16"):
            x = x.astype(np.float32).astype(np.float64)  # frameworks go by way of float32
        call(ops, "astype", x, to).equals(x.astype(numpy_dtype(to)))

    def test_astype_of_integers_to_int32(self, ops: Any) -> None:
        """Offsets come in any integer dtype that the framework has."""
        for dtype in (np.int32, np.int64):
            x = np.array([0, -3, 1000], dtype)
            call(ops, "astype", x, "int32").equals(x.astype(np.int32))

    # --- shapes ----------------------------------------------------------------------------------
    @pytest.mark.parametrize(
        "shape", [(6, 4), (2, 3, 2, 2), (24,), (-1, 8), (1, 1, -1, 1)], ids=str
    )
    def test_reshape_keeps_the_row_major_order(self, ops: Any, shape: tuple[int, ...]) -> None:
        """One length may be -1: what is left."""
        x = values(2, 3, 4)
        call(ops, "reshape", x, shape).equals(x.reshape(shape))

    @pytest.mark.parametrize("axes", [(0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 2, 3)], ids=str)
    def test_permute_dims_puts_axes_in_order(self, ops: Any, axes: tuple[int, ...]) -> None:
        """Axis i of the result is axis ``axes[i]`` of the array."""
        x = values(2, 3, 4, 5)
        call(ops, "permute_dims", x, axes).equals(np.transpose(x, axes))

    def test_permute_dims_then_reshape_is_row_major(self, ops: Any) -> None:
        """A reshape sees the permuted order, not that of the memory."""
        x = values(2, 3, 4)

        def moved(x: Any) -> Any:
            return ops.reshape(ops.permute_dims(x, (2, 0, 1)), (4, 6))

        call(ops, moved, x).equals(x.transpose(2, 0, 1).reshape(4, 6))

    def test_broadcast_to_repeats_axes_of_length_one(self, ops: Any) -> None:
        """And adds axes in front; booleans too."""
        x = values(3, 1)
        call(ops, "broadcast_to", x, (2, 3, 4)).equals(np.broadcast_to(x, (2, 3, 4)))
        call(ops, "broadcast_to", x > 0, (3, 4)).equals(np.broadcast_to(x > 0, (3, 4)))

    @pytest.mark.parametrize("axis", [0, 1, 3])
    def test_stack_joins_along_a_new_axis(self, ops: Any, axis: int) -> None:
        """Of integers and booleans too: the dropout's generator does."""
        x, y = words(2, 3, 4, seed=1), words(2, 3, 4, seed=2)
        call(ops, "stack", [x, y], axis=axis).equals(np.stack([x, y], axis=axis))
        call(ops, "stack", [x > 0, y > 0], axis=axis).equals(np.stack([x > 0, y > 0], axis=axis))

    @pytest.mark.parametrize("axis", [0, 2])
    def test_concat_joins_along_an_axis(self, ops: Any, axis: int) -> None:
        """Of booleans: the dropout's generator joins its parts."""
        x, y = words(2, 3, 4, seed=1) > 0, words(2, 3, 4, seed=2) > 0
        call(ops, "concat", [x, y], axis=axis).equals(np.concatenate([x, y], axis=axis))

    def test_slice_of_an_axis_after_an_ellipsis(self, ops: Any) -> None:
        """``x[..., a:b]``, ``x[..., a:b, :]`` are the only ways in which the core slices."""
        x = values(2, 5, 6)
        call(ops, _last, x).equals(x[..., 1:4])
        call(ops, _next_to_last, x).equals(x[..., :3, :])


def _itself(x: Any) -> Any:
    return x


def _last(x: Any) -> Any:
    return x[..., 1:4]


def _next_to_last(x: Any) -> Any:
    return x[..., :3, :]
