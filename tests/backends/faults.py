"""Backends with one fault each, and the tests of the conformance kit that must find it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from anymha.attention.dropout import keep_mask
from anymha.attention.formula import formula, softmax
from anymha.attention.masks import TileOrigin
from anymha.framework.capabilities import TOGETHER, Capabilities
from anymha.framework.protocol import Ops
from anymha.framework.registry import get_backend

FUNCTIONS = [
    *[name for name in vars(Ops) if callable(vars(Ops)[name]) and not name.startswith("_")],
    "vjp",
]
CAPABILITIES = [field.name for field in fields(Capabilities)]


@dataclass(frozen=True)
class Fault:
    """A backend that is right but for one thing.

    Args:
        name: What is wrong.
        make: The changed functions and capabilities, from the module of the right ones.
        tests: The tests of the kit each of which must fail.
        base: The backend that is right.
        compiler: The framework's compiler where it is no capability.
    """

    name: str
    make: Callable[[Any], dict[str, Any]]
    tests: tuple[str, ...]
    base: str = "numpy"
    compiler: Callable[..., Any] | None = None

    @property
    def backend(self) -> Any:
        right = get_backend(self.base).ops
        changed = self.make(right)
        # What stands for other functions would hide their faults: no capability but those named.
        named = {name: changed.pop(name) for name in CAPABILITIES if name in changed}
        named.setdefault("vjp", right.capabilities.vjp)
        for name, other in TOGETHER:
            if name in named:
                named.setdefault(other, getattr(right.capabilities, other))
        capabilities = Capabilities(**named)
        return SimpleNamespace(**{**vars(right), **changed, "capabilities": capabilities})


def torch_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch  # noqa: PLC0415  # a test file without torch must import this one

    return torch.compile(function, backend="eager")


def jax_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax  # noqa: PLC0415  # as above

    return jax.jit(function)


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


def refuse_capability(name: str) -> Callable[[Any], dict[str, Any]]:
    """A capability that raises, with what it needs."""

    def make(ops: Any) -> dict[str, Any]:
        own = {other: getattr(ops.capabilities, other) for one, other in TOGETHER if one == name}
        made_up: dict[str, Any] = {
            "seed_array": np.asarray,
            "multiplies": lambda dtype, device: False,
            "why_not_fused": lambda spec, shape: None,
            "initializer_style": "key",
        }
        return own | {n: x for n, x in made_up.items() if n in own} | refuse(name)(ops)

    return make


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


def capability(name: str, change: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """One capability of a backend, changed."""
    return lambda ops: {name: change(getattr(ops.capabilities, name))}


def exact(ops: Any, number: Callable[[Any], int]) -> Callable[[int], Any]:
    """`seed_array` of NumPy, of what `number` makes of the seed."""
    return lambda seed: np.array(number(seed) % 2**64, np.uint64).view(np.int64)


def kept(change: Callable[..., dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """`keep_mask` for an origin of which parts are changed."""

    def make(ops: Any) -> dict[str, Any]:
        def mask(seed: Any, threshold: int, shape: Any, origin: Any = None, *, device: Any) -> Any:
            origin = origin or TileOrigin()
            return keep_mask(ops, seed, threshold, shape, replace(origin, **change(origin)))

        return {"keep_mask": mask}

    return make


def looped(change: Callable[[int], int]) -> Callable[[Any], dict[str, Any]]:
    """A loop whose function gets another number than that of the round."""

    def make(ops: Any) -> dict[str, Any]:
        def loop(function: Any, *arguments: Any) -> Any:
            return ops.capabilities.loop(lambda i, own: function(change(i), own), *arguments)

        return {"loop": loop, "eager_loop": True}

    return make


def last_round_dropped(ops: Any) -> dict[str, Any]:
    def loop(function: Any, count: int, mapped: Any, constant: Any, results: Any) -> Any:
        return ops.capabilities.loop(
            lambda i, own: {n: x * (i < count - 1 or not i) for n, x in function(i, own).items()},
            count, mapped, constant, results,
        )  # fmt: skip

    return {"loop": loop, "eager_loop": True}


def constants_without_gradients(ops: Any) -> dict[str, Any]:
    def loop(function: Any, count: int, mapped: Any, constant: Any, results: Any) -> Any:
        fixed = {name: ops.stop_gradient(x) for name, x in constant.items()}
        # Added so that there is a gradient, of zero.
        fixed = {n: x if x.dtype == ops.bool else x + 0 * constant[n] for n, x in fixed.items()}
        return ops.capabilities.loop(function, count, mapped, fixed, results)

    return {"loop": loop, "eager_loop": True}


def backwards(ops: Any) -> dict[str, Any]:
    def loop(function: Any, count: int, mapped: Any, constant: Any, results: Any) -> Any:
        found = [
            function(i, {name: x[i] for name, x in mapped.items()} | constant)
            for i in reversed(range(count))
        ]
        return {name: np.stack([each[name] for each in reversed(found)]) for name in results}

    return {"loop": loop, "eager_loop": True}


def compiled_for_ever(ops: Any) -> dict[str, Any]:
    """`compile` of a function that gives the first result again for arrays of that shape."""

    def compile(function: Any, pairs: int) -> Any:
        results: dict[Any, Any] = {}

        def compiled(given: Any) -> Any:
            shapes = tuple([x.shape for x in given.values()])
            if shapes not in results:
                results[shapes] = function(given)
            return results[shapes]

        return compiled

    return {"compile": compile, "seed_array": exact(ops, int)}


def loop_of_nothing_where_compiled(ops: Any) -> dict[str, Any]:
    """A loop whose results a compiler drops, as TensorFlow's did."""
    compiling: list[Any] = []

    def compile(function: Any, pairs: int) -> Any:
        def compiled(given: Any) -> Any:
            compiling.append(function)
            try:
                return function(given)
            finally:
                compiling.pop()

        return compiled

    def loop(*arguments: Any) -> Any:
        found = ops.capabilities.loop(*arguments)
        return {name: x[:0] for name, x in found.items()} if compiling else found

    return {"compile": compile, "loop": loop, "seed_array": exact(ops, int)}


def loop_of_few_rounds(ops: Any) -> dict[str, Any]:
    """A loop that is right for at most six rounds."""

    def loop(function: Any, count: int, *arguments: Any) -> Any:
        found = ops.capabilities.loop(function, count, *arguments)
        return {name: x if count <= 6 else 0 * x for name, x in found.items()}

    return {"loop": loop}


def resized(x: Any, shape: tuple[int, ...], mode: Any = "constant") -> Any:
    more = [(0, max(n - m, 0)) for n, m in zip(shape, x.shape, strict=True)]
    return np.pad(x, more, mode)[tuple([slice(n) for n in shape])]


def compiled_for_one_shape(ops: Any) -> dict[str, Any]:
    def compile(function: Any, pairs: int) -> Any:
        first: list[Any] = []

        def compiled(given: Any) -> Any:
            first.append(given["query"].shape)
            if given["query"].shape != first[0]:
                raise ValueError(f"compiled for {first[0]}")
            return function(given)

        return compiled

    return {"compile": compile, "seed_array": exact(ops, int)}


def fused(
    change: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]] = lambda s, a: (s, a),
    why: Callable[[Any, Any], Any] = lambda spec, shape: None,
    result: Callable[[Any], Any] = lambda x: x,
) -> Callable[[Any], dict[str, Any]]:
    """A kernel that does all calls, of changed options and arrays."""

    def make(ops: Any) -> dict[str, Any]:
        def kernel(spec: Any, given: Any, *, causal: bool) -> Any:
            # The masks of positions are in "mask", but of causality and with dropout.
            if not causal and spec.dropout is None:
                positions = replace(spec.position_mask, left=None, right=None)
                spec = replace(spec, position_mask=positions)
            spec, given = change(spec, dict(given))
            return result(formula(ops, spec, given, TileOrigin(), None, False)["context"])

        return {"fused_attention": kernel, "why_not_fused": why}

    return make


def without(name: str) -> Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """Attention without an array."""
    return lambda spec, given: (spec, {n: x for n, x in given.items() if n != name})


def mask_as_lowest(spec: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Masked by a low number: a query that sees nothing sees all."""
    if "mask" in given:
        bias = np.where(given.pop("mask"), np.float32(0), np.float32(-1e9))
        given["bias"] = bias + given.get("bias", np.float32(0))
    return spec, given


def bottom_right(spec: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Causality by which the last query, not the first, stands at its key."""
    offset = given["key"].shape[2] - given["query"].shape[2]
    if spec.position_mask.right == 0 and spec.position_mask.left is None:
        spec = replace(spec, position_mask=replace(spec.position_mask, offset=offset))
    return spec, given


def heads_in_turn(spec: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Query head h reads key head ``h % K``."""
    times = given["query"].shape[1] // given["key"].shape[1]
    for name in ("key", "value"):
        given[name] = np.concatenate([given[name]] * times, axis=1)
    return spec, given


def another_seed(spec: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if spec.dropout is not None:
        spec = replace(spec, dropout=replace(spec.dropout, seed=int(np.int32(5))))
    return spec, given


def constant_key(ops: Any) -> dict[str, Any]:
    """Torch's kernel, of keys without a gradient."""
    right = ops.capabilities.fused_attention

    def kernel(spec: Any, given: Any, *, causal: bool) -> Any:
        key = ops.stop_gradient(given["key"]) + 0 * given["key"]
        return right(spec, {**given, "key": key}, causal=causal)

    return {"fused_attention": kernel}


def bias_without_gradient(ops: Any) -> dict[str, Any]:
    """Torch's kernel, also where a gradient of the bias is wanted."""
    right = ops.capabilities

    def kernel(spec: Any, given: Any, *, causal: bool) -> Any:
        if "bias" in given:
            bias = given["bias"]
            none = 0.0 * ops.where(bias > -np.inf, bias, 0.0)
            given = {**given, "bias": ops.stop_gradient(bias) + none}
        return right.fused_attention(spec, given, causal=causal)

    def why(spec: Any, shape: Any) -> Any:
        return right.why_not_fused(spec, shape._replace(bias_differentiated=False))

    return {"fused_attention": kernel, "why_not_fused": why}


def by_key(function: Any, shape: Any, dtype: str, seed: int) -> Any:
    return function(np.array(seed, np.int32), shape, np.dtype(dtype))


def sound(ops: Any) -> dict[str, Any]:
    """Each capability that a backend without differentiation may have, and none of them wrong."""
    own = ops.capabilities
    names = [name for name in own.names if name != "eager_loop"]
    tracing: list[Any] = []

    def compile(function: Any, pairs: int) -> Any:
        def compiled(given: Any) -> Any:
            tracing.append(function)
            try:
                return function(given)
            finally:
                tracing.pop()

        return compiled

    return {
        **{name: getattr(own, name) for name in names},
        **kept(lambda origin: {})(ops),
        **fused()(ops),
        "mixed_dtype": lambda x: None,
        "multiplies": lambda dtype, device: False,
        "wide_matmul": lambda x, y: np.matmul(np.float32(x), np.float32(y)),
        "fused_window": lambda spec, shape: spec.position_mask.right == 0,
        "fused_sinks": True,
        "softmax": lambda x: softmax(ops, x),
        "compile": compile,
        "resized": resized,
        "has_values": lambda x: not tracing,
        "known_padding": lambda mask: None if tracing else (mask, 0.0),
        "choose": lambda index, functions, arrays: functions[int(index)](arrays),
        "is_tracing": lambda: bool(tracing),
        "compiles_writes": lambda: bool(tracing),
        "is_inference": lambda: False,
        "constants": lambda query, arrays: arrays,
        "seed_array": exact(ops, int),
        "draw_seed_like": lambda x, native: ops.draw_seed(),
        "initialize": by_key,
        "initializer_style": "key",
    }


def initialized(change: Callable[..., Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda ops: {"initialize": change, "initializer_style": "key"}


def off(weights: Any, total: Any) -> Any:
    """Exponentials, and a sum that is a little off."""
    return weights, total * np.asarray(1.0001, total.dtype)


SOUND = Fault("none", sound, ()).backend
"""A backend with capabilities in which there is no fault."""

MASKED = "test_fused_attention_has_the_written_meaning"

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
            "test_a_segment_changes_no_bit_of_another",
            "test_a_segment_changes_no_gradient_of_another",
        ),
    ),
    Fault(
        "abs is the identity",
        lambda o: {"abs": lambda x: x},
        ("test_abs_is_exact",),
    ),
    Fault(
        "abs of what is not finite is zero",
        lambda o: {"abs": lambda x: np.where(np.isfinite(x), np.abs(x), x.dtype.type(0))},
        (
            "test_a_segment_changes_no_bit_of_another",
            "test_a_segment_changes_no_gradient_of_another",
        ),
    ),
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
        "cos of angles in half precision",
        lambda o: {"cos": lambda x: np.cos(x.astype(np.float16).astype(x.dtype))},
        ("test_cos_of_small_and_large_angles",),
    ),
    Fault(
        "sin of angles in half precision",
        lambda o: {"sin": lambda x: np.sin(x.astype(np.float16).astype(x.dtype))},
        ("test_sin_of_small_and_large_angles",),
    ),
    Fault(
        "log to the base 2",
        lambda o: {"log": np.log2},
        ("test_log_of_small_and_large", "test_log_sum_exp_is_that_of_the_logits"),
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
        "max leaves NaN out",
        lambda o: {
            "max": lambda x, *, axis, keepdims: np.fmax.reduce(x, axis=axis, keepdims=keepdims)
        },
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
        "remainder has the sign of the number",
        lambda o: {"remainder": np.fmod},
        ("test_remainder_is_never_negative",),
    ),
    Fault(
        "argsort is from the greatest on",
        lambda o: {"argsort": lambda x, *, axis: np.argsort(-x, axis=axis)},
        ("test_argsort_of_rows",),
    ),
    Fault(
        "gather takes the places of the first member",
        lambda o: {"gather": lambda x, indices, *, axis: np.take(x, indices[0], axis)},
        ("test_gather_takes_places_of_each_member",),
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
        "draw_seed_like is always the same where dropout is native",
        lambda o: {"draw_seed_like": lambda x, native: 4 if native else o.draw_seed()},
        ("test_draw_seed_like_gives_another_each_time",),
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
    # --- capabilities
    Fault(
        "linear without bias",
        capability("linear", lambda right: lambda x, matrix, bias: right(x, matrix, None)),
        ("test_linear_is_tensordot_and_bias",),
    ),
    Fault(
        "linear in half precision",
        lambda o: {"linear": lambda x, m, b: half(np.matmul)(x, m) + (0 if b is None else b)},
        ("test_linear_is_tensordot_and_bias",),
    ),
    Fault(
        "mixed precision everywhere",
        lambda o: {"mixed_dtype": lambda x: np.dtype("float16")},
        ("test_mixed_dtype_is_none_outside_of_a_region",),
    ),
    Fault(
        "half precision added in itself",
        lambda o: {"multiplies": lambda dtype, device: True},
        ("test_multiplies_says_that_sums_are_of_float32",),
    ),
    Fault(
        "wide_matmul rounds its sums",
        lambda o: {
            "multiplies": lambda dtype, device: False,
            "wide_matmul": lambda x, y: np.float32(np.matmul(x, y).astype(x.dtype)),
        },
        ("test_wide_matmul_keeps_its_sums",),
    ),
    Fault(
        "wide_matmul gives its second array no gradient",
        lambda o: {
            "wide_matmul": lambda x, y: o.matmul(
                x.float(), o.stop_gradient(y).float() + 0.0 * y.float()
            ),
        },
        ("test_wide_matmul_has_the_gradients_of_matmul",),
        base="torch",
    ),
    Fault(
        "fused_window without a window",
        lambda o: {
            **fused(
                lambda spec, given: (
                    replace(spec, position_mask=replace(spec.position_mask, left=None)), given
                )
            )(o),
            "fused_window": lambda spec, shape: spec.position_mask.right == 0,
        },
        (MASKED, "test_fused_window_has_the_written_meaning"),
    ),
    Fault(
        "fused_sinks without sinks",
        lambda o: {
            **fused(lambda spec, given: (replace(spec, features=()), given))(o),
            "fused_sinks": True,
        },
        (MASKED, "test_fused_sinks_has_the_written_meaning"),
    ),
    Fault(
        "another context in half precision",
        lambda o: {
            "multiplies": lambda dtype, device: True,
            "fused_attention": lambda spec, arrays, causal: (
                o.capabilities.fused_attention(spec, arrays, causal=causal)
                + 0.2 * (arrays["query"].element_size() == 2)
            ),
        },
        ("test_half_precision_is_that_of_float32",),
        base="torch",
    ),
    Fault(
        "softmax over the axis before the last",
        lambda o: {"softmax": lambda x: softmax(o, x.swapaxes(-1, -2)).swapaxes(-1, -2)},
        ("test_softmax_is_the_general_softmax",),
    ),
    Fault(
        "softmax without the greatest",
        lambda o: {"softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)},
        ("test_softmax_is_the_general_softmax",),
    ),
    Fault(
        "exp_and_sum whose sum is off",
        capability("exp_and_sum", lambda right: lambda x, peak: off(*right(x, peak))),
        ("test_exp_and_sum_are_exp_and_sum",),
    ),
    Fault(
        "exp_and_sum forgets the peak",
        capability("exp_and_sum", lambda right: lambda x, peak: right(x, 0 * peak)),
        ("test_exp_and_sum_are_exp_and_sum",),
    ),
    Fault(
        "bitwise_and_inplace sets all bits",
        lambda o: {"bitwise_and_inplace": lambda x, y: np.full_like(x, -1)},
        ("test_bitwise_and_inplace_is_bitwise_and",),
    ),
    Fault(
        "bitwise_xor_inplace is or",
        lambda o: {"bitwise_xor_inplace": np.bitwise_or},
        ("test_bitwise_xor_inplace_is_bitwise_xor",),
    ),
    *[
        Fault(
            f"keep_mask ignores the origin's {name}",
            kept(lambda origin, name=name: {name: 0}),
            ("test_keep_mask_gives_the_bits_of_the_general_one",),
        )
        for name in ("batch", "head", "query", "key")
    ],
    Fault(
        "keep_mask of the low word alone",
        lambda o: {
            "keep_mask": lambda seed, *rest, device: keep_mask(o, int(seed) % 2**32, *rest)
        },
        ("test_keep_mask_gives_the_bits_of_the_general_one",),
    ),
    Fault(
        "keep_mask takes no origin of arrays",
        lambda o: {
            **kept(lambda origin: {"head": origin.head if type(origin.head) is int else 0})(o),
            "loop": o.capabilities.loop,
        },
        ("test_keep_mask_gives_the_bits_of_the_general_one",),
    ),
    Fault(
        "chunk_size is no number",
        lambda o: {"chunk_size": lambda device: 0.5},
        ("test_chunk_size_is_a_number_of_words_or_none",),
    ),
    Fault(
        "seed_array loses the high word",
        lambda o: {"seed_array": exact(o, lambda seed: seed % 2**32)},
        ("test_seed_array_gives_the_words_of_the_int",),
    ),
    Fault(
        "tile_size is zero",
        lambda o: {"tile_size": lambda device: 0},
        ("test_tile_size_is_a_number_of_logits",),
    ),
    Fault("loop drops the last round", last_round_dropped, ("test_loop_is_a_plain_loop",)),
    Fault("loop counts from one", looped(lambda i: max(i - 1, 0)), ("test_loop_is_a_plain_loop",)),
    Fault(
        "loop keeps constants from gradients",
        constants_without_gradients,
        ("test_loop_has_the_gradients_of_a_plain_loop",),
        base="torch",
    ),
    Fault("loop forgets after six rounds", loop_of_few_rounds, ("test_loop_is_a_plain_loop",)),
    Fault(
        "loop gives nothing where it is compiled",
        loop_of_nothing_where_compiled,
        ("test_loop_is_the_same_where_it_is_compiled",),
    ),
    Fault(
        "narrow begins at 8 at most",
        capability("narrow", lambda right: lambda x, start, n, axis: right(
            x, min(int(start), 8), n, axis=axis)),
        ("test_narrow_is_a_slice",),
    ),
    Fault("eager_loop goes backwards", backwards, ("test_eager_loop_goes_round_by_round",)),
    Fault(
        "narrow is off by one",
        capability("narrow", lambda right: lambda x, start, n, axis: right(
            x, start + (start > 0) * (start + n < x.shape[axis]), n, axis=axis)),
        ("test_narrow_is_a_slice",),
    ),
    Fault(
        "narrow takes no array",
        lambda o: {
            "loop": o.capabilities.loop,
            "narrow": lambda x, start, length, *, axis: o.capabilities.narrow(
                x, start if type(start) is int else 0, length, axis=axis
            ),
        },
        ("test_narrow_is_a_slice",),
    ),
    Fault(
        "why_not_fused is empty",
        fused(why=lambda spec, shape: ""),
        ("test_why_not_fused_gives_a_reason_or_none",),
    ),
    Fault("fused_attention ignores the mask", fused(without("mask")), (MASKED,)),
    Fault("fused_attention ignores the bias", fused(without("bias")), (MASKED,)),
    Fault("fused_attention sees all where it sees nothing", fused(mask_as_lowest), (MASKED,)),
    Fault("fused_attention gives NaN for zero", fused(result=lambda x: x / (x != 0)), (MASKED,)),
    Fault("fused_attention is causal from the last", fused(bottom_right), (MASKED,)),
    Fault("fused_attention takes key heads in turn", fused(heads_in_turn), (MASKED,)),
    Fault("fused_attention drops by another seed", fused(another_seed), (MASKED,)),
    Fault(
        "fused_attention scales by itself",
        fused(lambda spec, given: (replace(spec, scale=8**-0.5), given)),
        (MASKED,),
    ),
    Fault(
        "fused_attention is in half precision",
        fused(lambda s, given: (s, {**given, "value": np.float32(np.float16(given["value"]))})),
        (MASKED,),
    ),
    Fault(
        "fused_attention gives the key no gradient",
        constant_key,
        ("test_fused_attention_has_the_written_gradients",),
        base="torch",
    ),
    Fault(
        "fused_attention gives a bias no gradient",
        bias_without_gradient,
        ("test_fused_attention_has_the_written_gradients",),
        base="torch",
    ),
    Fault(
        "has_values is false",
        lambda o: {"has_values": lambda x: False},
        ("test_has_values_is_true_in_an_eager_call",),
    ),
    Fault(
        "has_values is true for a compiler",
        lambda o: {"has_values": lambda x: True},
        ("test_has_values_is_false_inside_of_a_compiler",),
        base="jax",
        compiler=jax_compile,
    ),
    Fault(
        "known_padding is that of the other mask",
        lambda o: {"known_padding": lambda mask: (~mask, 0.0)},
        ("test_known_padding_has_the_values_of_a_mask",),
    ),
    Fault(
        "known_padding forgets gradients",
        lambda o: {"known_padding": lambda mask: (mask.numpy(), 0.0)},
        ("test_known_padding_has_the_values_of_a_mask",),
        base="torch",
    ),
    Fault(
        "known_padding looks into a compiler",
        lambda o: {"known_padding": lambda mask: (mask, 0.0)},
        ("test_known_padding_is_none_inside_of_a_compiler",),
        base="jax",
        compiler=jax_compile,
    ),
    Fault(
        "write_slots writes one slot late",
        lambda o: {"write_slots": lambda s, x, slot, p: o.capabilities.write_slots(
            s, np.roll(x, 1, 2), slot, p)},
        ("test_write_slots_writes_these_alone",),
    ),
    Fault(
        "writes_in_place of what is copied",
        lambda o: {"writes_in_place": True, "write_slots": lambda s, x, slot, p: (
            o.capabilities.write_slots(s, x, slot, False))},
        ("test_writes_in_place_is_what_write_slots_does",),
    ),
    Fault(
        "take_rows keeps what lies past the end",
        lambda o: {"take_rows": lambda x, rows, end: o.capabilities.take_rows(x, rows, None)},
        ("test_take_rows_keeps_the_slots_before_the_end",),
    ),
    Fault(
        "compiles_writes is true",
        lambda o: {"compiles_writes": lambda: True},
        ("test_compiles_writes_is_false_in_an_eager_call",),
    ),
    Fault(
        "compiles_writes of a program that copies",
        lambda o: {"compiles_writes": o.capabilities.compiles_writes, "write_slots": (
            lambda s, x, slot, p: o.capabilities.write_slots(s, x, slot, False))},
        ("test_compiles_writes_is_what_a_program_does",),
        base="torch",
        compiler=torch_compile,
    ),
    Fault(
        "is_inference is true",
        lambda o: {"is_inference": lambda: True},
        ("test_is_inference_is_false_in_an_eager_call",),
    ),
    Fault(
        "choose takes the last function",
        lambda o: {"choose": lambda index, functions, arrays: functions[-1](arrays)},
        ("test_choose_runs_the_function_of_the_index",),
    ),
    Fault(
        "resized repeats the last place",
        lambda o: {"resized": lambda x, shape: resized(x, shape, "edge")},
        ("test_resized_adds_zeros_and_cuts_at_the_end",),
    ),
    Fault(
        "compile keeps the values", compiled_for_ever, ("test_compile_gives_the_same_function",)
    ),
    Fault(
        "compile takes one shape",
        compiled_for_one_shape,
        ("test_compile_gives_the_same_function",),
    ),
    Fault(
        "array_key is equal for other dtypes",
        lambda o: {"array_key": lambda x: type(x)},
        ("test_array_key_tells_dtypes_apart",),
    ),
    Fault(
        "array_key is not hashable",
        lambda o: {"array_key": lambda x: [x.dtype]},
        ("test_array_key_tells_dtypes_apart",),
    ),
    Fault(
        "array_key tells shapes apart",
        lambda o: {"array_key": lambda x: (x.dtype, x.shape)},
        ("test_array_key_tells_dtypes_apart",),
    ),
    Fault(
        "is_tracing says yes to all",
        lambda o: {"is_tracing": lambda: True},
        ("test_is_tracing_is_false_in_an_eager_call",),
    ),
    Fault(
        "is_tracing says no to a compiler",
        lambda o: {
            "is_tracing": lambda: False, "compile": lambda f: f, "seed_array": exact(o, int)
        },
        ("test_is_tracing_is_true_inside_of_a_compiler",),
    ),
    Fault(
        "is_tracing says no to torch.compile",
        lambda o: {"is_tracing": lambda: False},
        ("test_is_tracing_is_true_inside_of_a_compiler",),
        base="torch",
        compiler=torch_compile,
    ),
    Fault(
        "constants are NumPy's within a compiler",
        lambda o: {
            "constants": lambda query, arrays: arrays,
            "compile": lambda f: f, "seed_array": exact(o, int),
        },
        ("test_constants_are_arrays_where_a_compiler_runs_the_call",),
        base="torch",
    ),
    Fault(
        "constants takes NumPy's arrays in an eager call",
        lambda o: {
            "constants": lambda query, arrays: {n: o.from_numpy(x) for n, x in arrays.items()}
        },
        ("test_constants_are_arrays_where_a_compiler_runs_the_call",),
        base="torch",
    ),
    Fault(
        "is_differentiated says no to all",
        lambda o: {"is_differentiated": lambda x: False},
        ("test_is_differentiated_sees_what_vjp_differentiates",),
        base="torch",
    ),
    Fault(
        "is_differentiated gives no bool",
        lambda o: {"is_differentiated": lambda x: None},
        ("test_is_differentiated_sees_what_vjp_differentiates",),
    ),
    Fault(
        "initializer_style is not known",
        lambda o: {"initialize": by_key, "initializer_style": "by key"},
        ("test_initializer_style_is_known",),
    ),
    Fault(
        "initialize turns the shape round",
        initialized(lambda f, shape, dtype, seed: by_key(f, shape[::-1], dtype, seed)),
        ("test_initialize_calls_an_initializer_of_its_style",),
    ),
    Fault(
        "initialize ignores the dtype",
        initialized(lambda f, shape, dtype, seed: by_key(f, shape, "float32", seed)),
        ("test_initialize_calls_an_initializer_of_its_style",),
    ),
    Fault(
        "initialize ignores the seed",
        initialized(lambda f, shape, dtype, seed: by_key(f, shape, dtype, 0)),
        ("test_initialize_calls_an_initializer_of_its_style",),
    ),
    Fault(
        "initialize draws a seed each time",
        lambda o: {
            "initialize": lambda f, shape, dtype, seed: by_key(f, shape, dtype, o.draw_seed()),
            "initializer_style": "key",
        },
        ("test_initialize_calls_an_initializer_of_its_style",),
    ),
)  # fmt: skip
