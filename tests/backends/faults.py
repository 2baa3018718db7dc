"""Backends with one fault each, and the tests of the conformance kit that must find it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from anymha.framework.capabilities import Capabilities
from anymha.framework.protocol import Ops
from anymha.framework.registry import get_backend

FUNCTIONS = [
    *[name for name in vars(Ops) if callable(vars(Ops)[name]) and not name.startswith("_")],
    "vjp",
]


@dataclass(frozen=True)
class Fault:
    """A backend that is right but for one thing.

    Args:
        name: What is wrong.
        make: The changed functions, from the module of the right ones.
        tests: The tests of the kit each of which must fail.
        base: The backend that is right.
    """

    name: str
    make: Callable[[Any], dict[str, Any]]
    tests: tuple[str, ...]
    base: str = "numpy"

    @property
    def backend(self) -> Any:
        right = get_backend(self.base).ops
        changed = self.make(right)
        # What stands for other functions would hide their faults.
        vjp = changed.pop("vjp", right.capabilities.vjp)
        capabilities = Capabilities(vjp=vjp)
        return SimpleNamespace(**{**vars(right), **changed, "capabilities": capabilities})


def arrays(**methods: Any) -> Callable[[Any], dict[str, Any]]:
    """NumPy's functions on a class of arrays that has these methods."""
    kind = type("Array", (np.ndarray,), methods)

    def make(ops: Any) -> dict[str, Any]:
        def of(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **options: np.asarray(function(*args, **options)).view(kind)

        return {name: of(getattr(ops, name)) for name in ("from_numpy", "asarray", "arange")}

    return make


def half(function: Callable[..., Any]) -> Callable[..., Any]:
    """A product of factors rounded to half precision, in the dtype of the first."""

    def product(x: Any, y: Any, /, **options: Any) -> Any:
        return function(x.astype(np.float16), y.astype(np.float16), **options).astype(x.dtype)

    return product


def shift_in_zeros(x: Any, shift: int) -> Any:
    return (np.asarray(x).view(np.uint32) >> np.uint32(shift)).view(np.int32)


def leak(condition: Any, x: Any, y: Any) -> Any:
    """`where` to which what it does not take is added zero times: NaN and infinity leak."""
    with np.errstate(invalid="ignore"):
        return np.where(condition, x, y + 0 * x)


def truncate(x: Any, dtype: Any) -> Any:
    if dtype.name == "bfloat16" and x.dtype == np.float32:
        return (x.view(np.uint32) >> 16).astype(np.uint16).view(dtype)
    if dtype.itemsize < x.dtype.itemsize and dtype.kind == "f":
        return (x * (1 - 2.0**-12)).astype(dtype)
    return x.astype(dtype)


def noisy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A product whose last bits are other ones at each call."""
    calls = itertools.count()
    return lambda x, y: (function(x, y) * (1 + 2e-7 * (next(calls) % 7))).astype(x.dtype)


def narrow(function: Any, given: Any) -> Any:
    """`in_float64` that stays in float32."""
    return function(
        {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in given.items()}
    )


def drop_booleans(function: Any, given: Any) -> Any:
    return function({name: array for name, array in given.items() if array.dtype != bool})


def int32(method: str) -> Callable[[Any, Any], Any]:
    """An operator that widens int32 to int64 instead of wrapping."""
    right = getattr(np.ndarray, method)

    def wide(self: Any, other: Any) -> Any:
        return right(self.astype(np.int64) if self.dtype == np.int32 else self, other)

    return wide


def refuse(name: str) -> Callable[[Any], dict[str, Any]]:
    def function(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(name)

    return lambda ops: {name: function}


def scaled_vjp(ops: Any) -> dict[str, Any]:
    def wrong(function: Any, given: Any, cotangents: Any) -> Any:
        value, pulled = ops.capabilities.vjp(function, given, cotangents)
        return value, {name: gradient * 1.001 for name, gradient in pulled.items()}

    return {"vjp": wrong}


def first_result_only(ops: Any) -> dict[str, Any]:
    def wrong(function: Any, given: Any, cotangents: Any) -> Any:
        if not isinstance(cotangents, tuple):
            return ops.capabilities.vjp(function, given, cotangents)
        return ops.capabilities.vjp(lambda given: function(given)[0], given, cotangents[0])

    return {"vjp": wrong}


def rank_two_as_bool(x: np.ndarray) -> np.ndarray:
    return x.astype(bool) if x.shape == (7, 7) else x


def last_axis_but_one(function: Any) -> Any:
    """A reduction over the axis before the last where the last is asked for."""
    return lambda x, *, axis, keepdims: function(
        x, axis=-2 if axis == -1 else axis, keepdims=keepdims
    )


FAULTS = (
    # --- what a backend is called, and its arrays
    Fault("name is no string", lambda o: {"name": 5}, ("test_name_is_a_string",)),
    Fault(
        "array_modules name another module",
        lambda o: {"array_modules": ("torch",)},
        ("test_array_modules_hold_the_array_type",),
    ),
    Fault(
        "dtype is always float32",
        lambda o: {"dtype": lambda name: np.dtype("float32")},
        ("test_dtype_is_that_of_arrays_from_numpy",),
    ),
    Fault(
        "float64 is float32",
        lambda o: {"float64": np.float32, "dtype": lambda n: o.dtype(n.replace("64", "32"))},
        (
            "test_dtype_attribute", "test_in_float64_rounds_once",
            "test_reproducible_gradients_are_rounded_once",
            "test_reproducible_mode_gives_the_bits_of_numpy",
        ),
    ),
    Fault(
        "from_numpy rounds to float32",
        lambda o: {"from_numpy": lambda x: x.astype(np.float32) if x.dtype == float else x},
        ("test_from_numpy_and_to_numpy_are_exact",),
    ),
    Fault(
        "to_numpy loses the sign of zero",
        lambda o: {"to_numpy": lambda x: np.asarray(x) + np.asarray(x).dtype.type(0)},
        ("test_from_numpy_and_to_numpy_are_exact",),
    ),
    Fault(
        "from_numpy makes scalars vectors",
        lambda o: {"from_numpy": np.atleast_1d},
        ("test_from_numpy_and_to_numpy_keep_the_shape",),
    ),
    Fault(
        "from_numpy copies the memory as it lies",
        lambda o: {"from_numpy": lambda x: np.ravel(x, order="K").reshape(x.shape)},
        ("test_from_numpy_takes_strided_and_read_only_arrays",),
    ),
    Fault(
        "from_numpy makes booleans of a mask",
        lambda o: {"from_numpy": rank_two_as_bool},
        ("test_mask_that_is_not_boolean_is_refused",),
    ),
    Fault(
        "is_array says yes to all",
        lambda o: {"is_array": lambda x: True},
        ("test_is_array_refuses_others", "test_array_of_another_framework_is_refused"),
    ),
    Fault(
        "is_array forgets scalars",
        lambda o: {"is_array": lambda x: getattr(x, "ndim", 0) > 0},
        ("test_is_array_knows_its_own",),
    ),
    Fault(
        "shape is a list",
        lambda o: {"shape": lambda x: list(x.shape)},
        ("test_shape_is_a_tuple_of_lengths",),
    ),
    Fault(
        "device is not what arange takes",
        lambda o: {"device": lambda x: "elsewhere"},
        ("test_device_is_where_asarray_and_arange_make_arrays",),
    ),
    # --- creation and shapes
    Fault(
        "asarray ignores dtype",
        lambda o: {"asarray": lambda obj, *, dtype=None, device=None: np.asarray(obj)},
        ("test_asarray_makes_an_array_of_numbers",),
    ),
    Fault(
        "asarray gives zeros",
        lambda o: {"asarray": lambda obj, **options: np.zeros_like(obj, dtype=options["dtype"])},
        ("test_asarray_makes_an_array_of_numbers", "test_dropout_acts_in_training_only"),
    ),
    Fault(
        "arange includes stop",
        lambda o: {"arange": lambda a, b, **options: np.arange(a, b + 1, **options)},
        ("test_arange_counts_from_start_to_before_stop",),
    ),
    Fault(
        "arange counts down",
        lambda o: {"arange": lambda a, b, **options: np.arange(a, b, **options)[::-1]},
        (
            "test_arange_counts_from_start_to_before_stop", "test_causal_mask_hides_the_future",
            "test_window_of_unequal_sides", "test_query_offset_moves_the_causal_mask",
        ),
    ),
    Fault(
        "astype rounds downward",
        lambda o: {"astype": truncate},
        ("test_astype_rounds_once_to_nearest_even",),
    ),
    Fault(
        "astype reinterprets integers",
        lambda o: {"astype": lambda x, d: x.view(d) if x.dtype == np.int64 else o.astype(x, d)},
        ("test_astype_of_integers_to_int32",),
    ),
    Fault(
        "reshape in column-major order",
        lambda o: {"reshape": lambda x, shape: np.reshape(x, shape, order="F")},
        ("test_reshape_keeps_the_row_major_order", "test_layer_agrees_with_the_oracle"),
    ),
    Fault(
        "reshape sees the memory, not the axes",
        lambda o: {"reshape": lambda x, shape: np.ravel(x, order="K").reshape(shape)},
        ("test_permute_dims_then_reshape_is_row_major",),
    ),
    Fault(
        "permute_dims inverts the permutation",
        lambda o: {"permute_dims": lambda x, axes: np.transpose(x, np.argsort(axes))},
        ("test_permute_dims_puts_axes_in_order",),
    ),
    Fault(
        "broadcast_to repeats the memory",
        lambda o: {"broadcast_to": np.resize},
        ("test_broadcast_to_repeats_axes_of_length_one",),
    ),
    Fault(
        "stack ignores the axis",
        lambda o: {"stack": lambda arrays, *, axis=0: np.stack(arrays)},
        ("test_stack_joins_along_a_new_axis",),
    ),
    Fault(
        "concat ignores the axis",
        lambda o: {"concat": lambda arrays, *, axis=0: np.concatenate(arrays)},
        ("test_concat_joins_along_an_axis",),
    ),
    Fault(
        "step is no number",
        lambda o: {"step": lambda device: 0.5},
        ("test_step_is_a_number_of_elements_or_none",),
    ),
    Fault(
        "slices start at 0",
        arrays(__getitem__=lambda x, i: np.asarray(x)[..., : i[1].stop]),
        ("test_slice_of_an_axis_after_an_ellipsis",),
    ),
    # --- arithmetic
    Fault(
        "matmul in half precision",
        lambda o: {"matmul": half(np.matmul)},
        (
            "test_matmul_in_full_precision", "test_layer_agrees_with_the_oracle",
            "test_gradients_agree_with_the_oracle",
        ),
    ),
    Fault(
        "tensordot in half precision",
        lambda o: {"tensordot": half(np.tensordot)},
        ("test_tensordot_in_full_precision",),
    ),
    Fault(
        "matmul gives other bits each time",
        lambda o: {"matmul": noisy(np.matmul)},
        (
            "test_scores_flag_never_changes_the_output",
            "test_reproducible_mode_gives_the_bits_of_numpy",
        ),
    ),
    Fault(
        "where swaps its branches",
        lambda o: {"where": lambda condition, x, y: np.where(condition, y, x)},
        ("test_where_takes_the_first_where_true", "test_where_takes_a_scalar"),
    ),
    Fault(
        "where widens for a scalar",
        lambda o: {"where": lambda c, x, y: np.where(c, np.float64(x), np.float64(y))},
        ("test_where_takes_a_scalar",),
    ),
    Fault(
        "where leaks NaN and infinity",
        lambda o: {"where": leak},
        (
            "test_where_takes_the_first_where_true", "test_excluded_positions_may_hold_anything",
            "test_fully_masked_row_gives_exactly_the_output_bias",
            "test_fully_masked_row_has_zero_gradients",
            "test_excluded_positions_have_zero_gradients",
        ),
    ),
    Fault("abs is the identity", lambda o: {"abs": lambda x: x}, ("test_abs_is_exact",)),
    Fault(
        "sqrt in half precision",
        lambda o: {"sqrt": lambda x: np.sqrt(x.astype(np.float16)).astype(x.dtype)},
        ("test_sqrt_of_small_and_large",),
    ),
    Fault(
        "exp is never zero",
        lambda o: {"exp": lambda x: np.exp(np.maximum(x, np.asarray(-60, x.dtype)))},
        ("test_exp_of_finite_and_infinite", "test_fully_masked_row_gives_exactly_the_output_bias"),
    ),
    Fault(
        "exp in float32",
        lambda o: {"exp": lambda x: np.exp(x.astype(np.float32)).astype(x.dtype)},
        ("test_exp_of_finite_and_infinite", "test_reproducible_mode_gives_the_bits_of_numpy"),
    ),
    Fault(
        "tanh by a rough formula",
        lambda o: {"tanh": lambda x: x / (1 + np.abs(x))},
        ("test_tanh_of_small_and_large", "test_softcap_bounds_the_logits"),
    ),
    Fault(
        "division in half precision",
        arrays(__truediv__=lambda x, y: half(np.divide)(np.asarray(x), np.asarray(y))),
        ("test_operator_on_floating",),
    ),
    Fault(
        "greater or equal is greater",
        arrays(__ge__=lambda x, y: np.asarray(x) > y),
        ("test_comparison_gives_booleans",),
    ),
    Fault(
        "max ignores keepdims",
        lambda o: {"max": lambda x, *, axis, keepdims: np.max(x, axis=axis)},
        ("test_max_over_an_axis",),
    ),
    Fault(
        "softmax over the queries: max",
        lambda o: {"max": last_axis_but_one(np.max)},
        ("test_max_over_an_axis",),
    ),
    Fault(
        "softmax over the queries: sum",
        lambda o: {"sum": last_axis_but_one(np.sum)},
        ("test_sum_over_an_axis", "test_layer_agrees_with_the_oracle"),
    ),
    Fault(
        "sum in half precision",
        lambda o: {"sum": lambda x, **o: np.sum(x, dtype=np.float16, **o).astype(x.dtype)},
        ("test_sum_over_an_axis",),
    ),
    Fault(
        "logical_and is or",
        lambda o: {"logical_and": np.logical_or},
        ("test_logical_and_broadcasts",),
    ),
    Fault(
        "bitwise_and sets all bits",
        lambda o: {"bitwise_and": lambda x, y: np.full_like(x, -1)},
        ("test_bitwise_and_of_words",),
    ),
    Fault(
        "bitwise_xor is or",
        lambda o: {"bitwise_xor": np.bitwise_or},
        ("test_bitwise_xor_of_words", "test_dropout_keeps_the_known_elements"),
    ),
    Fault(
        "bitwise_right_shift fills with zeros",
        lambda o: {"bitwise_right_shift": shift_in_zeros},
        ("test_bitwise_right_shift_copies_the_sign",),
    ),
    Fault(
        "multiplication does not wrap",
        arrays(__mul__=int32("__mul__")),
        ("test_int32_multiplication_wraps",),
    ),
    Fault(
        "addition does not wrap",
        arrays(__add__=int32("__add__")),
        ("test_int32_addition_wraps",),
    ),
    # --- float64, seeds, differentiation
    Fault(
        "in_float64 stays in float32",
        lambda o: {"in_float64": narrow},
        ("test_in_float64_computes_in_float64",),
    ),
    Fault(
        "in_float64 drops booleans",
        lambda o: {"in_float64": drop_booleans},
        ("test_in_float64_passes_names_and_tuples",),
    ),
    Fault(
        "seed_words forget the sign",
        lambda o: {"seed_words": lambda seed: (o.seed_words(seed)[0], np.array([0], np.int32))},
        ("test_seed_words_of_an_array", "test_seed_words_of_an_array_seed_the_dropout"),
    ),
    Fault(
        "draw_seed is always the same",
        lambda o: {"draw_seed": lambda: 4},
        ("test_draw_seed_gives_another_each_time",),
    ),
    Fault(
        "native_keep_mask drops what it should keep",
        lambda o: {"native_keep_mask": lambda *given: ~o.native_keep_mask(*given)},
        ("test_native_keep_mask_keeps_the_share",),
    ),
    Fault(
        "stop_gradient gives zeros",
        lambda o: {"stop_gradient": np.zeros_like},
        ("test_stop_gradient_keeps_the_values",),
    ),
    Fault(
        "stop_gradient does not stop",
        lambda o: {"stop_gradient": lambda x: x},
        ("test_stop_gradient_is_a_constant_for_vjp",),
        base="torch",
    ),
    Fault(
        "abs has the slope 1 at zero",
        lambda o: {"abs": lambda x: o.where(x >= 0, x, 0.0 - x)},
        ("test_abs_has_the_slope_zero_at_zero",),
        base="torch",
    ),
    Fault(
        "vjp is a little off",
        scaled_vjp,
        ("test_vjp_gives_value_and_gradients_by_name", "test_gradients_agree_with_the_oracle"),
        base="torch",
    ),
    Fault(
        "vjp sees the first result only",
        first_result_only,
        ("test_vjp_takes_a_tuple_of_results",),
        base="torch",
    ),
    Fault(
        "in_float64 is differentiated in float32",
        lambda o: {"float64": o.float32},
        ("test_in_float64_is_differentiated_in_float64",),
        base="torch",
    ),
)  # fmt: skip
