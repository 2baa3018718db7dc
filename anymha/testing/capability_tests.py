"""Tests of the capabilities: each gives what the core's general way gives without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anymha.attention.dropout import keep_mask
from anymha.attention.formula import softmax
from anymha.attention.masks import TileOrigin
from anymha.execution.path import choose_path
from anymha.framework.registry import get_backend
from anymha.parity.oracle.cases import numpy_dtype
from anymha.parity.stages.tolerance import eps, tolerance
from anymha.testing import fused
from anymha.testing.arithmetic import by_dtype
from anymha.testing.calls import Returned, call, must, values, words
from anymha.testing.capabilities import CAPABILITIES, BackendTests, compiler_of
from anymha.testing.fused import WHOLE, AttentionCase, general

REAL = ("float16", "bfloat16", "float32", "float64")
SEEDS = (0, 1, -1, -7, 2**31, -(2**31) - 1, 2**32 + 5, 2**40 + 5, -(2**62), 2**63 - 1, -(2**63))
ORIGINS = (
    None,
    TileOrigin(),
    TileOrigin(batch=1),
    TileOrigin(head=3),
    TileOrigin(query=6),
    TileOrigin(key=5),
    TileOrigin(2, 1, 4, 3),
)
ROUNDS = (1, 3, 9)
ULPS = 16.0
"""By how many eps two ways of computing the same exponential may differ."""

by_half = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
by_case = pytest.mark.parametrize("case", fused.CASES, ids=lambda case: case.name)


class CapabilityTests(BackendTests):
    """What a backend may have beside its functions, one test or more for each."""

    # --- arithmetic ------------------------------------------------------------------------------
    @by_dtype
    @pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("lengths", [(6, 40, 5), (600, 260, 288)], ids=["small", "large"])
    def test_linear_is_tensordot_and_bias(
        self, ops: Any, dtype: str, biased: bool, lengths: tuple[int, int, int]
    ) -> None:
        """Of (N, D), (D, W) and maybe (W,), where another product may be taken for large ones."""
        self.need(ops, "linear", dtype)
        rows, inner, width = lengths
        x, matrix = values(rows, inner, dtype=dtype), values(inner, width, dtype=dtype, seed=1)
        bias = values(width, dtype=dtype, seed=2) if biased else None
        expected = call(ops, "tensordot", x, matrix, axes=1).value
        expected = expected if bias is None else expected + bias
        got = call(ops, "capabilities.linear", x, matrix, bias)
        sizes = np.tensordot(np.abs(x), np.abs(matrix), axes=1) + 1
        got.is_near(expected, 4 * eps(dtype) * sizes, dtype)

    def test_mixed_dtype_is_none_outside_of_a_region(self, ops: Any) -> None:
        """Layers would compute in half precision everywhere otherwise."""
        self.need(ops, "mixed_dtype")
        answer = ops.capabilities.mixed_dtype(ops.from_numpy(values(2, 3)))
        must(answer is None, f"`mixed_dtype` must give None here. Received: {answer!r}.")

    @by_half
    def test_multiplies_says_that_sums_are_of_float32(self, ops: Any, dtype: str) -> None:
        """A bool; True only where 4,096 ones add up, as in half precision they do not."""
        self.need(ops, "multiplies", dtype)
        x, matrix = np.ones((2, 4096), numpy_dtype(dtype)), np.ones((4096, 3), numpy_dtype(dtype))
        answer = _multiplies(ops, dtype)
        must(isinstance(answer, bool), f"`multiplies` must give a bool. Received: {answer!r}.")
        if not answer:
            pytest.skip(f"`multiplies` of {ops.name} says no for {dtype} here")
        expected = np.full((2, 3), 4096.0)
        call(ops, "matmul", x, matrix).is_near(expected, 0.0, dtype)
        call(ops, "tensordot", x, matrix, axes=1).is_near(expected, 0.0, dtype)
        if ops.capabilities.linear is not None:
            call(ops, "capabilities.linear", x, matrix, None).is_near(expected, 0.0, dtype)

    @by_half
    def test_wide_matmul_keeps_its_sums(self, ops: Any, dtype: str) -> None:
        """Of rank 4, with sums of float32 that are not rounded further."""
        self.need(ops, "wide_matmul", dtype)
        x, y = values(2, 3, 5, 300, dtype=dtype), values(2, 3, 300, 4, dtype=dtype, seed=1)
        wide = [array.astype(np.float64) for array in (x, y)]
        sizes = np.abs(wide[0]) @ np.abs(wide[1])
        got = call(ops, "capabilities.wide_matmul", x, y)
        got.is_near(wide[0] @ wide[1], 4 * eps("float32") * sizes, "float32")

    @by_half
    def test_wide_matmul_has_the_gradients_of_matmul(self, ops: Any, dtype: str) -> None:
        """In the dtype of the arrays; the gradient of the product may be rounded to it."""
        self.need(ops, "wide_matmul", "vjp", dtype)
        shapes = {"x": (2, 3, 5, 6), "y": (2, 3, 6, 4)}
        arrays = {name: values(*shape, dtype=dtype) for name, shape in shapes.items()}
        of_product = values(2, 3, 5, 4, seed=1)
        native = {name: ops.from_numpy(array) for name, array in arrays.items()}
        found = ops.capabilities.vjp(
            lambda given: ops.capabilities.wide_matmul(given["x"], given["y"]),
            native,
            ops.from_numpy(of_product),
        )[1]
        x, y = (arrays[name].astype(np.float64) for name in "xy")
        every = {"x": (of_product, y.swapaxes(-1, -2)), "y": (x.swapaxes(-1, -2), of_product)}
        for name, (left, right) in every.items():
            got = Returned(f"the gradient of wide_matmul in {name}", ops.to_numpy(found[name]))
            allowed = 2 * eps(dtype) * (np.abs(left) @ np.abs(right))
            got.is_near(left @ right, allowed, dtype)

    @by_dtype
    def test_softmax_is_the_general_softmax(self, ops: Any, dtype: str) -> None:
        """Over the last axis, where the numbers are near, far apart, or the lowest that are."""
        self.need(ops, "softmax", dtype)
        x = 3 * values(2, 3, 5, 7, dtype=dtype)
        x[0, 1] *= 1000
        x[1, 0, :2, ::2] = np.finfo(dtype).min
        x[1, 1, 3] = np.finfo(dtype).min

        def written(x: Any) -> Any:
            return softmax(general(ops), x)

        expected = call(ops, written, x).value
        got = call(ops, "capabilities.softmax", x)
        got.is_near(expected, ULPS * eps(dtype) * expected, dtype)

    @by_dtype
    def test_exp_and_sum_are_exp_and_sum(self, ops: Any, dtype: str) -> None:
        """Of logits that are masked too: exactly 0 at -inf, also where a whole row is."""
        self.need(ops, "exp_and_sum", dtype)
        x = 3 * values(2, 3, 5, 40, dtype=dtype)
        x[0, 1, :, ::3] = -np.inf
        peak = np.max(x, axis=-1, keepdims=True)
        x[1, 2, 2], peak[1, 2, 2] = -np.inf, 0

        def written(x: Any, peak: Any) -> Any:
            return ops.exp(x - peak)

        weights = call(ops, written, x, peak).value
        total = call(ops, "sum", weights, axis=-1, keepdims=True).value

        def the_weights(x: Any, peak: Any) -> Any:
            return ops.capabilities.exp_and_sum(x, peak)[0]

        def the_sums(x: Any, peak: Any) -> Any:
            return ops.capabilities.exp_and_sum(x, peak)[1]

        for function, expected in ((the_weights, weights), (the_sums, total)):
            got = call(ops, function, x.copy(), peak.copy())
            got.is_near(expected, ULPS * eps(dtype) * expected, dtype)

    @pytest.mark.parametrize("other", [0xFFFF, "array"])
    def test_bitwise_and_inplace_is_bitwise_and(self, ops: Any, other: Any) -> None:
        """Of words and an int, or of words that broadcast to them."""
        self._check_in_place(ops, "bitwise_and", other)

    @pytest.mark.parametrize("other", [-(2**31), "array"])
    def test_bitwise_xor_inplace_is_bitwise_xor(self, ops: Any, other: Any) -> None:
        """Of words and an int, or of words that broadcast to them."""
        self._check_in_place(ops, "bitwise_xor", other)

    def _check_in_place(self, ops: Any, name: str, other: Any) -> None:
        __tracebackhide__ = True
        self.need(ops, f"{name}_inplace")
        x = words(2, 3, 4)
        y = words(2, 3, 1, seed=1) if other == "array" else other
        expected = call(ops, name, x, y).value
        call(ops, f"capabilities.{name}_inplace", x.copy(), y).equals(expected)

    # --- dropout ---------------------------------------------------------------------------------
    @pytest.mark.parametrize("origin", ORIGINS, ids=str)
    def test_keep_mask_gives_the_bits_of_the_general_one(
        self, ops: Any, origin: TileOrigin | None
    ) -> None:
        """At any origin, for any seed, an int or an array, and any threshold."""
        self.need(ops, "keep_mask")
        origins = [origin]
        if origin is not None and _counts_in_arrays(ops):
            own = {name: _scalar(ops, getattr(origin, name)) for name in ("batch", "head", "query")}
            origins.append(replace(origin, **own))
        for seed in SEEDS:
            given = [seed, _scalar(ops, seed)] if -(2**31) <= seed < 2**31 else [seed]
            for one in given:
                for place in origins:
                    _same_mask(ops, one, 20000, (2, 3, 5, 8), place)
        for threshold in (1, 2**15, 2**16 - 1):
            _same_mask(ops, 3, threshold, (1, 2, 6, 16), origin)

    def test_chunk_size_is_a_number_of_words_or_none(self, ops: Any) -> None:
        """And the mask in such chunks is the same as in one piece."""
        self.need(ops, "chunk_size")
        size = ops.capabilities.chunk_size(_device(ops))
        good = size is None or (type(size) is int and size > 0)
        must(good, f"`chunk_size` must give an int above 0, or None. Received: {size!r}.")
        if size is not None and size <= 1 << 20:
            rows, keys = 2 * (size // 300 + 2), 300
            chunked = general(ops)
            chunked.capabilities = replace(chunked.capabilities, chunk_size=lambda device: size)
            expected = ops.to_numpy(keep_mask(general(ops), 5, 20000, (1, 1, rows, keys)))
            got = ops.to_numpy(keep_mask(chunked, 5, 20000, (1, 1, rows, keys)))
            Returned(f"keep_mask in chunks of {size}", got).equals(expected)

    @pytest.mark.parametrize("seed", [*SEEDS, 2**64 - 1], ids=str)
    def test_seed_array_gives_the_words_of_the_int(self, ops: Any, seed: int) -> None:
        """`seed_words` of the array are the low and the high 32 bits."""
        self.need(ops, "seed_array")
        found = ops.seed_words(ops.capabilities.seed_array(seed))
        got = [int(np.asarray(ops.to_numpy(word)).reshape(())) for word in found]
        expected = [int(np.uint32(seed >> i & 0xFFFFFFFF).view(np.int32)) for i in (0, 32)]
        must(
            got == expected,
            f"`seed_words` of `seed_array({seed})` must give {expected}. Received: {got}.",
        )

    def test_draw_seed_like_gives_another_each_time(self, ops: Any) -> None:
        """A seed of the dropout; for native dropout what `native_keep_mask` takes, None too."""
        self.need(ops, "draw_seed_like", "native_keep_mask")
        draw, like, shape = ops.capabilities.draw_seed_like, ops.from_numpy(values(1)), (1, 2, 8, 8)
        device, several = ops.device(like), range(4)
        masks = [keep_mask(ops, draw(like, False), 2**15, shape, device=device) for _ in several]
        native = [ops.native_keep_mask(draw(like, True), shape, 0.5, device) for _ in several]
        for kind, drawn in (("portable", masks), ("native", native)):
            different = {ops.to_numpy(mask).tobytes() for mask in drawn}
            must(len(different) > 1, f"Each `draw_seed_like` gave the same mask, {kind}.")

    # --- loops -----------------------------------------------------------------------------------
    def test_tile_size_is_a_number_of_logits(self, ops: Any) -> None:
        """An int above 0."""
        self.need(ops, "tile_size")
        size = ops.capabilities.tile_size(_device(ops))
        good = type(size) is int and size > 0
        must(good, f"`tile_size` must give an int above 0. Received: {size!r}.")

    @by_dtype
    @pytest.mark.parametrize("count", ROUNDS)
    def test_loop_is_a_plain_loop(self, ops: Any, dtype: str, count: int) -> None:
        """Each result stacked; the function gets the round's number, parts, and whole arrays."""
        self.need(ops, "loop", dtype)
        arrays = _loop_arrays(count, dtype)
        for name in ("context", "scores"):
            expected = call(ops, _looped(ops, _plain_loop(ops), count, dtype, name), *arrays).value
            got = call(ops, _looped(ops, ops.capabilities.loop, count, dtype, name), *arrays)
            got.is_near(expected, ULPS * eps(dtype) * np.maximum(np.abs(expected), 4), dtype)

    def test_loop_is_the_same_where_it_is_compiled(self, ops: Any) -> None:
        """Of many rounds, to which a floating array is added that is the same in all."""
        self.need(ops, "loop", "compile")
        x, whole = values(9, 4, 3), values(1, 1, seed=1)

        def function(arrays: Mapping[str, Any]) -> Any:
            def body(i: Any, own: Mapping[str, Any]) -> dict[str, Any]:
                return {"sum": own["x"] + own["whole"]}

            mapped, constant = {"x": arrays["query"]}, {"whole": arrays["whole"]}
            results = {"sum": ops.dtype("float32")}
            return ops.capabilities.loop(body, 9, mapped, constant, results)["sum"]

        arrays = {"query": ops.from_numpy(x), "whole": ops.from_numpy(whole)}
        got = compiler_of(ops)(function)(arrays)
        Returned("the compiled loop", ops.to_numpy(got)).equals(x + whole)

    @by_dtype
    @pytest.mark.parametrize("count", ROUNDS)
    def test_loop_has_the_gradients_of_a_plain_loop(self, ops: Any, dtype: str, count: int) -> None:
        """Of the arrays that go in by parts, and of those that go in whole."""
        self.need(ops, "loop", "vjp", dtype)
        *floating, mask = _loop_arrays(count, dtype)
        seen = ops.from_numpy(mask)
        cotangents = (values(count, 4, 3, dtype=dtype), values(count, 4, 1, dtype=dtype))

        def gradients(loop: Any) -> list[np.ndarray]:
            both = [_looped(ops, loop, count, dtype, name) for name in ("context", "scores")]

            def run(given: Mapping[str, Any]) -> Any:
                x, y, whole, mask = (given[name] for name in ("x", "y", "whole", "mask"))
                return tuple(function(x, y, whole, mask) for function in both)

            def function(given: Mapping[str, Any]) -> Any:
                given = {**given, "mask": seen}
                return ops.in_float64(run, given) if dtype == "float64" else run(given)

            native = dict(zip(("x", "y", "whole"), map(ops.from_numpy, floating), strict=True))
            pulled = ops.capabilities.vjp(function, native, tuple(map(ops.from_numpy, cotangents)))
            return [ops.to_numpy(pulled[1][name]) for name in native]

        every = zip(gradients(ops.capabilities.loop), gradients(_plain_loop(ops)), strict=True)
        for name, (found, expected) in zip(("x", "y", "whole"), every, strict=True):
            got = Returned(f"the gradient of loop in {name}", found)
            got.is_near(expected, 4 * ULPS * eps(dtype) * max(1, np.max(np.abs(expected))), dtype)

    def test_eager_loop_goes_round_by_round(self, ops: Any) -> None:
        """Where `eager_loop` is True, Python sees the number of each round, in order."""
        eager = ops.capabilities.eager_loop
        must(isinstance(eager, bool), f"`eager_loop` must be a bool. Received: {eager!r}.")
        self.need(ops, "eager_loop", "loop")
        seen: list[int] = []

        def function(index: Any, arrays: dict[str, Any]) -> dict[str, Any]:
            seen.append(int(index))
            return {"double": arrays["x"] + arrays["x"]}

        x = ops.from_numpy(values(5, 2))
        ops.capabilities.loop(function, 5, {"x": x}, {}, {"double": ops.float32})
        must(seen == [*range(5)], f"The rounds of `loop` must be 0 to 4. Received: {seen}.")

    @pytest.mark.parametrize("axis", [0, 1, 2, 3])
    def test_narrow_is_a_slice(self, ops: Any, axis: int) -> None:
        """Of numbers and booleans, from an int on, or an int32 array where a loop has such."""
        self.need(ops, "narrow")
        x = values(10, 11, 12, 13)

        def from_int(x: Any, start: int, length: int) -> Any:
            return ops.capabilities.narrow(x, start, length, axis=axis)

        def from_array(x: Any, start: int, length: int) -> Any:
            return ops.capabilities.narrow(x, _scalar(ops, start), length, axis=axis)

        ways = (from_int, from_array) if _counts_in_arrays(ops) else (from_int,)
        for narrow in ways:
            for start, length in ((0, 1), (0, 3), (1, 2), (x.shape[axis] - 2, 2)):
                part = (slice(None),) * axis + (slice(start, start + length),)
                for array in (x, x > 0):
                    call(ops, narrow, array, start, length).equals(array[part])

    # --- fused attention -------------------------------------------------------------------------
    @by_case
    def test_why_not_fused_gives_a_reason_or_none(self, ops: Any, case: AttentionCase) -> None:
        """A reason is a string that is not empty."""
        self.need(ops, "why_not_fused", case.dtype)
        self._why_not_fused(ops, case)

    @by_case
    def test_fused_attention_has_the_written_meaning(self, ops: Any, case: AttentionCase) -> None:
        """The context of the formula, exactly 0 where a query sees nothing."""
        self._need_fused(ops, case)
        native = {name: ops.from_numpy(array) for name, array in case.arrays().items()}
        expected = ops.to_numpy(fused.context(general(ops), WHOLE, case, native))
        found = ops.to_numpy(fused.context(ops, fused.fused_path(ops, case), case, native))
        got = Returned(f"fused_attention, {case.name}", found)
        got.is_near(expected, np.where(expected == 0, 0, _allowed(case, expected)), case.dtype)

    def test_fused_window_has_the_written_meaning(self, ops: Any) -> None:
        """A causal window of as many queries as keys, which the kernel makes itself."""
        self.need(ops, "fused_window")
        case = AttentionCase("causal window", lengths=(9, 9), window=(3, 0))
        made = ops.capabilities.fused_window(case.spec(ops), case.shape(ops))
        assert isinstance(made, bool), f"fused_window gives {made!r}, not a bool"
        self.test_fused_attention_has_the_written_meaning(ops, case)

    def test_fused_sinks_has_the_written_meaning(self, ops: Any) -> None:
        """A further logit of each head joins the softmax of its rows, and has no value."""
        self.need(ops, "fused_sinks")
        self.test_fused_attention_has_the_written_meaning(ops, AttentionCase("sinks", sinks=True))

    @by_case
    def test_fused_attention_has_the_written_gradients(self, ops: Any, case: AttentionCase) -> None:
        """Of queries, keys and values, and of the bias where it is asked for."""
        self._need_fused(ops, case)
        self.need(ops, "vjp")
        vjp = ops.capabilities.vjp
        every = fused.gradients(general(ops), WHOLE, case, vjp)
        found = fused.gradients(ops, fused.fused_path(ops, case), case, vjp)
        for name, expected in every.items():
            got = Returned(f"the gradient of {name}, {case.name}", found[name])
            got.is_near(expected, _allowed(case, expected), case.dtype)

    @by_case
    @by_half
    def test_half_precision_is_that_of_float32(
        self, ops: Any, case: AttentionCase, dtype: str
    ) -> None:
        """The context as in float32, of which each number is rounded; exactly 0 as there.

        Or in the written formula, where the backend has `wide_matmul`.
        """
        self.need(ops, "multiplies", dtype)
        shape = case.shape(ops)._replace(narrow=ops.dtype(dtype))
        path = choose_path(ops, case.spec(ops), shape, observed=False, with_scores=False)
        if case.dtype != "float32" or not path.narrow or not _multiplies(ops, dtype):
            pytest.skip(f"{ops.name} does not compute {case.name!r} in {dtype}: {path}")
        heads = ("query", "key", "value")
        arrays = replace(case, dtype=dtype).arrays()
        wide = {n: x if n == "mask" else x.astype(np.float32) for n, x in arrays.items()}
        narrow = {n: arrays[n] if n in heads else x for n, x in wide.items()}
        native = [{n: ops.from_numpy(x) for n, x in each.items()} for each in (wide, narrow)]
        if case.native:  # whose generator is the framework's own
            expected = ops.to_numpy(fused.context(general(ops), WHOLE, case, native[0]))
        else:
            expected = fused.context(general(get_backend("numpy").ops), WHOLE, case, wide)
        found = ops.to_numpy(fused.context(ops, path, case, native[1]))
        got = Returned(f"fused_attention, {case.name}, {dtype}", found)
        allowed = 4 * eps(dtype) * max(1, np.max(np.abs(expected)))
        got.is_near(expected, np.where(expected == 0, 0, allowed), dtype)

    def _need_fused(self, ops: Any, case: AttentionCase) -> None:
        """Skip the test unless the backend's kernel can do the call."""
        self.need(ops, "fused_attention", case.dtype)
        reason = self._why_not_fused(ops, case)
        if reason is None and case.sinks and not ops.capabilities.fused_sinks:
            reason = "it has no `fused_sinks`"
        if reason is not None:
            pytest.skip(f"{ops.name} does not fuse the case {case.name!r}: {reason}")

    def _why_not_fused(self, ops: Any, case: AttentionCase) -> str | None:
        why = ops.capabilities.why_not_fused(case.spec(ops), case.shape(ops))
        good = why is None or (isinstance(why, str) and why)
        must(good, f"`why_not_fused` must give a reason, or None. Received: {why!r}.")
        return why

    # --- compiling and planning ------------------------------------------------------------------
    def test_compile_gives_the_same_function(self, ops: Any) -> None:
        """For other values, for other shapes afterwards, and for the first shapes again."""
        self.need(ops, "compile")

        def function(arrays: Mapping[str, Any]) -> Any:
            product = ops.matmul(arrays["query"], arrays["query.kernel"])
            batch, length, width = ops.shape(product)
            tall = ops.reshape(product, (batch * length, width))
            shifted = ops.tanh(product) + arrays["seed"]
            return shifted, ops.sum(tall, axis=0, keepdims=True)

        compiled = compiler_of(ops)(function)
        kernel = values(4, 5, seed=1)
        lengths = [(2, 3), (2, 3), (2, 6), (1, 1), (3, 6), (5, 2), (5, 2), (4, 4), (2, 3)]
        for number, shape in enumerate(lengths):
            given = {"query": values(*shape, 4, seed=number), "query.kernel": kernel}
            given["seed"] = values(seed=number)
            native = {name: ops.from_numpy(array) for name, array in given.items()}
            every, found = function(native), compiled(native)
            good = isinstance(found, tuple) and len(found) == 2
            must(good, f"A compiled function must give the tuple. Received: {type(found)}.")
            for i in (0, 1):
                expected = ops.to_numpy(every[i])
                got = Returned(f"compile(function)(query {shape})[{i}]", ops.to_numpy(found[i]))
                allowed = ULPS * eps("float32") * max(1, np.max(np.abs(expected)))
                got.is_near(expected, allowed, "float32")

    @pytest.mark.parametrize("shape", [(2, 5, 3), (2, 1, 3), (2, 7, 2), (2, 4, 3)])
    @pytest.mark.parametrize("dtype", ["float32", "bool"])
    def test_resized_adds_zeros_and_cuts_at_the_end(
        self, ops: Any, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """Of an array of the backend and of NumPy's, which stay as they are."""
        self.need(ops, "resized")
        array = (values(2, 4, 3) + 3).astype(dtype)
        before = array.copy()
        expected = np.zeros(shape, dtype)
        corner = tuple([slice(min(n, m)) for n, m in zip(array.shape, shape, strict=True)])
        expected[corner] = array[corner]
        for given in (ops.from_numpy(array), array):
            found = ops.capabilities.resized(given, shape)
            if found is None:
                pytest.skip("`resized` does not serve this device")
            Returned(f"resized(x, {shape})", ops.to_numpy(found)).equals(expected)
            kept = array if given is array else ops.to_numpy(given)
            Returned(f"x after resized(x, {shape})", kept).equals(before)

    def test_has_values_is_true_in_an_eager_call(self, ops: Any) -> None:
        """An overflow of a cache would not be seen otherwise."""
        self.need(ops, "has_values")
        answer = ops.capabilities.has_values(ops.from_numpy(words(3)))
        must(answer is True, f"`has_values` must give True here. Received: {answer!r}.")

    def test_has_values_is_false_inside_of_a_compiler(self, ops: Any, compiler: Any) -> None:
        """A program would be of one length otherwise, or could not be compiled."""
        self.need(ops, "has_values")
        if compiler is None:
            pytest.skip(f"`has_values` of {ops.name} is not judged inside of a compiler")
        seen: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            seen.append(ops.capabilities.has_values(arrays["query"]))
            return arrays["query"] + 1.0

        compiler(function)({"query": ops.from_numpy(values(1, 2, 3))})
        must(seen and not any(seen), f"`has_values` must give False there. Received: {seen}.")

    def test_known_padding_has_the_values_of_a_mask(self, ops: Any) -> None:
        """And a number of multiplications, infinitely many inside of `vjp`."""
        self.need(ops, "known_padding")
        known, mask = ops.capabilities.known_padding, np.arange(6).reshape(2, 3) % 4 > 0
        seen, least = known(ops.from_numpy(mask))
        must(isinstance(seen, np.ndarray), f"The values must be NumPy's. Received: {type(seen)}.")
        must(np.array_equal(seen, mask), f"The values must be {mask}. Received: {seen}.")
        must(least >= 0, f"The number must not be negative. Received: {least!r}.")
        if ops.capabilities.vjp is None:
            return
        found: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            found.append(known(ops.from_numpy(mask)))
            return arrays["x"] * 2.0

        x = values(2, 3)
        ops.capabilities.vjp(function, {"x": ops.from_numpy(x)}, ops.from_numpy(x))
        must(
            all(one is None or one[1] == np.inf for one in found),
            f"Inside of `vjp` the number must be infinite. Received: {found}.",
        )

    def test_known_padding_is_none_inside_of_a_compiler(self, ops: Any, compiler: Any) -> None:
        """A program would be of one mask otherwise."""
        self.need(ops, "known_padding")
        if compiler is None:
            pytest.skip(f"`known_padding` of {ops.name} is not judged inside of a compiler")
        found: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            found.append(ops.capabilities.known_padding(arrays["mask"]))
            return arrays["query"] + 1.0

        mask = ops.from_numpy(np.ones((1, 2), bool))
        compiler(function)({"query": ops.from_numpy(values(1, 2, 3)), "mask": mask})
        must(found == [None], f"`known_padding` must give None there. Received: {found}.")

    @pytest.mark.parametrize("slot", [0, 3, (0, 3)], ids=["first", "last", "of each row"])
    @pytest.mark.parametrize("in_place", [True, False])
    def test_write_slots_writes_these_alone(self, ops: Any, slot: Any, in_place: bool) -> None:
        """Two slots of each row, from an int on or from integers (B,); NaN too."""
        self.need(ops, "write_slots")
        storage, new = values(2, 3, 5, 4), values(2, 3, 2, 4, seed=1)
        new[0, 0, 0, 0] = np.nan
        expected, place = storage.copy(), slot
        for row, at in enumerate(slot if isinstance(slot, tuple) else (slot, slot)):
            expected[row, :, at : at + 2] = new[row]
        if isinstance(slot, tuple):
            place = ops.from_numpy(np.array(slot, np.int32))
        given = ops.from_numpy(storage)
        found = ops.capabilities.write_slots(given, ops.from_numpy(new), place, in_place)
        Returned(f"write_slots(storage, new, {slot})", ops.to_numpy(found)).equals(expected)
        if not in_place:
            Returned("storage behind it", ops.to_numpy(given)).equals(storage)

    def test_writes_in_place_is_what_write_slots_does(self, ops: Any) -> None:
        """A cache is copied before each write otherwise, or after none."""
        self.need(ops, "writes_in_place", "write_slots")
        given, new = ops.from_numpy(values(2, 1, 3, 2)), ops.from_numpy(values(2, 1, 1, 2, seed=1))
        found = ops.capabilities.write_slots(given, new, 1, True)
        Returned("storage behind it", ops.to_numpy(given)).equals(ops.to_numpy(found))

    @pytest.mark.parametrize("end", [None, 5, 2, 0])
    def test_take_rows_keeps_the_slots_before_the_end(self, ops: Any, end: int | None) -> None:
        """More rows than there are, one of them twice; zero later on; NaN too."""
        self.need(ops, "take_rows")
        x, rows = values(3, 2, 5, 4), np.array([2, 0, 2, 1], np.int32)
        x[2, 0, 1, 0] = np.nan
        expected = x[rows]
        expected[:, :, 5 if end is None else end :] = 0
        given = ops.from_numpy(x.copy())
        found = ops.capabilities.take_rows(given, ops.from_numpy(rows), end)
        Returned(f"take_rows(x, rows, {end})", ops.to_numpy(found)).equals(expected)
        same = ops.capabilities.take_rows(given, ops.from_numpy(np.arange(3, dtype=np.int32)), end)
        must(
            same is not given, "`take_rows` must give a new array. Received: the one it was given."
        )

    def test_compiles_writes_is_false_in_an_eager_call(self, ops: Any) -> None:
        """There each call asks what its cache's arrays are to others."""
        self.need(ops, "compiles_writes", "write_slots")
        answer = ops.capabilities.compiles_writes()
        must(answer is False, f"`compiles_writes` must give False here. Received: {answer!r}.")

    def test_compiles_writes_is_what_a_program_does(self, ops: Any, compiler: Any) -> None:
        """A program that writes into an array that is given to it, without a gradient."""
        self.need(ops, "compiles_writes", "write_slots")
        if compiler is None:
            pytest.skip(f"`compiles_writes` of {ops.name} is judged inside of a compiler alone")
        storage, new = values(2, 1, 3, 2), values(2, 1, 1, 2, seed=1)
        seen: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            seen.append(ops.capabilities.compiles_writes())
            return ops.capabilities.write_slots(arrays["storage"], arrays["new"], 1, True)

        given = {"storage": ops.from_numpy(storage), "new": ops.from_numpy(new)}
        found = ops.to_numpy(compiler(function)(given))
        storage[:, :, 1:2] = new
        Returned("write_slots(storage, new, 1) in a program", found).equals(storage)
        must(seen and all(seen), f"`compiles_writes` must give True there. Received: {seen}.")
        Returned("storage after the program", ops.to_numpy(given["storage"])).equals(storage)

    def test_is_inference_is_false_in_an_eager_call(self, ops: Any) -> None:
        """Compiled programs would copy the arrays that such a call has made."""
        self.need(ops, "is_inference")
        answer = ops.capabilities.is_inference()
        must(answer is False, f"`is_inference` must give False here. Received: {answer!r}.")

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_choose_runs_the_function_of_the_index(self, ops: Any, index: int) -> None:
        """Of three functions of a dict of arrays; the index is an array."""
        self.need(ops, "choose")
        x = values(2, 3)
        arrays = {"x": ops.from_numpy(x)}
        functions = [lambda a, n=n: a["x"] + float(n) for n in range(3)]
        place = ops.from_numpy(np.array(index, np.int32))
        found = ops.capabilities.choose(place, functions, arrays)
        Returned(f"choose({index}, ..)", ops.to_numpy(found)).equals(x + np.float32(index))

    def test_array_key_tells_dtypes_apart(self, ops: Any) -> None:
        """Hashable, equal for arrays of one dtype, and another for another dtype."""
        self.need(ops, "array_key")
        dtypes = ["float32", "int32", "bool"]
        others = ("float16", "bfloat16", "float64")
        dtypes += [name for name in others if CAPABILITIES[name](ops, name) is None]
        keys = {}
        for name in dtypes:
            made = [values(*shape) for shape in ((2, 3), (4,))]
            arrays = [ops.from_numpy(call(ops, "astype", x, name).value) for x in made]
            keys[name], other = map(ops.capabilities.array_key, arrays)
            same = keys[name] == other and hash(keys[name]) == hash(other)
            must(same, f"`array_key` of two arrays of {name} gave {keys[name]!r} and {other!r}.")
        for number, one in enumerate(dtypes):
            for two in dtypes[:number]:
                differ = keys[one] != keys[two]
                must(differ, f"`array_key` of {one} and of {two} both gave {keys[one]!r}.")

    def test_is_tracing_is_false_in_an_eager_call(self, ops: Any) -> None:
        """Nothing would be kept otherwise, and small calls would be slow."""
        self.need(ops, "is_tracing")
        answer = ops.capabilities.is_tracing()
        must(answer is False, f"`is_tracing` must give False here. Received: {answer!r}.")

    def test_is_tracing_is_true_inside_of_a_compiler(self, ops: Any, compiler: Any) -> None:
        """Traced arrays would be kept otherwise, and found by the next call."""
        self.need(ops, "is_tracing")
        if compiler is None:
            pytest.skip(
                f"`is_tracing` of {ops.name} is not judged inside of a compiler: there is no "
                "capability `compile`. Override the fixture `compiler`."
            )
        seen: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            seen.append(ops.capabilities.is_tracing())
            return arrays["query"] + 1.0

        compiler(function)({"query": ops.from_numpy(values(1, 2, 3))})
        must(seen and all(seen), f"`is_tracing` must give True there. Received: {seen}.")

    def test_constants_are_arrays_where_a_compiler_runs_the_call(
        self, ops: Any, compiler: Any
    ) -> None:
        """NumPy's arrays as they are in an eager call; the framework's within a compiled one."""
        self.need(ops, "constants")
        constants, mask = ops.capabilities.constants, np.ones((2, 3), np.bool_)
        x = ops.from_numpy(values(2, 3))
        given = constants(x, {"mask": mask})["mask"]
        must(given is mask, f"`constants` must leave an eager call's arrays. Received: {given!r}.")
        if compiler is None:
            return
        seen: list[Any] = []

        def function(arrays: Mapping[str, Any]) -> Any:
            seen.append(constants(arrays["query"], {"mask": mask})["mask"])
            return arrays["query"] + 1.0

        compiler(function)({"query": x})
        must(
            seen and all(map(ops.is_array, seen)),
            f"`constants` must give arrays of {ops.name} there. Received: {seen}.",
        )

    # --- differentiation and weights -------------------------------------------------------------
    def test_is_differentiated_sees_what_vjp_differentiates(self, ops: Any) -> None:
        """A bool; True inside of `vjp` for its arrays, and for what is computed from them."""
        self.need(ops, "is_differentiated")
        differentiated = ops.capabilities.is_differentiated
        x = ops.from_numpy(values(2, 3))
        answer = differentiated(x)
        must(
            isinstance(answer, bool), f"`is_differentiated` must give a bool. Received: {answer!r}."
        )
        if ops.capabilities.vjp is None:
            return
        seen: list[Any] = []

        def function(given: Mapping[str, Any]) -> Any:
            y = given["x"] * 2.0
            seen.extend(map(differentiated, (given["x"], y)))
            return y

        ops.capabilities.vjp(function, {"x": x}, x)
        must(all(seen), f"`is_differentiated` must give True inside of `vjp`. Received: {seen}.")

    def test_initializer_style_is_known(self, ops: Any) -> None:
        """It is "key" or "in place"."""
        self.need(ops, "initializer_style")
        style = ops.capabilities.initializer_style
        must(
            style in INITIALIZERS,
            f"`initializer_style` must be one of {', '.join(INITIALIZERS)}. Received: {style!r}.",
        )

    @pytest.mark.parametrize("dtype", REAL)
    @pytest.mark.parametrize("shape", [(3, 7), (40,)], ids=str)
    def test_initialize_calls_an_initializer_of_its_style(
        self, ops: Any, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """The shape and the dtype are those asked for; a seed gives the same numbers again."""
        self.need(ops, "initialize", dtype)
        initializer = INITIALIZERS[ops.capabilities.initializer_style](ops)

        def made(seed: int) -> Returned:
            found = ops.capabilities.initialize(initializer, shape, dtype, seed)
            array = np.asarray(ops.to_numpy(found) if ops.is_array(found) else found)
            return Returned(f"initialize(function, {shape}, {dtype}, {seed})", array)

        first = made(2**31 - 1)
        first.has_form(dtype, shape)
        ones = np.sum(first.value == 1)
        good = 0 < ones < first.value.size == ones + np.sum(first.value == 0)
        must(good, f"{first.text} must give what the function made. Received: {first.value}.")
        first.equals(made(2**31 - 1).value)
        must(np.any(first.value != made(4).value), "Seeds 2**31 - 1 and 4 gave the same numbers.")


def _by_key(ops: Any) -> Callable[..., Any]:
    def initializer(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return ops.astype(_zeros_and_ones(ops, key, shape), dtype)

    return initializer


def _in_place(ops: Any) -> Callable[..., Any]:
    def initializer(array: Any) -> None:
        array[...] = ops.astype(_zeros_and_ones(ops, ops.draw_seed(), array.shape), array.dtype)

    return initializer


INITIALIZERS = {"key": _by_key, "in place": _in_place}
"""By style, what makes an initialiser of zeros and ones out of a backend."""


def _zeros_and_ones(ops: Any, seed: Any, shape: tuple[int, ...]) -> Any:
    mask = keep_mask(general(ops), seed, 2**15, (1, 1, 1, int(np.prod(shape))))
    return ops.reshape(mask, tuple(shape))


def _same_mask(ops: Any, seed: Any, threshold: int, shape: Any, origin: TileOrigin | None) -> None:
    __tracebackhide__ = True
    device = _device(ops)
    expected = keep_mask(general(ops), seed, threshold, shape, origin, device=device)
    found = ops.capabilities.keep_mask(seed, threshold, shape, origin, device=device)
    title = f"keep_mask({seed}, {threshold}, {shape}, {origin})"
    Returned(title, ops.to_numpy(found)).equals(ops.to_numpy(expected))


def _counts_in_arrays(ops: Any) -> bool:
    """Whether the loop's numbers are int32 arrays."""
    return ops.capabilities.loop is not None and not ops.capabilities.eager_loop


def _scalar(ops: Any, number: int) -> Any:
    return ops.from_numpy(np.array(number, np.int32))


def _device(ops: Any) -> Any:
    return ops.device(ops.from_numpy(values(1)))


def _loop_arrays(count: int, dtype: str) -> list[np.ndarray]:
    """Arrays in parts, an array that each round gets whole, and a mask that it gets whole."""
    x = values(count, 4, 3, dtype=dtype)
    y = values(count, 3, dtype=dtype, seed=1)
    whole = values(count, 4, 1, dtype=dtype, seed=2)
    return [x, y, whole, values(count, 1, 3, seed=3) > 0]


def _looped(ops: Any, loop: Any, count: int, dtype: str, result: str) -> Callable[..., Any]:
    """One result of a loop as a function of its arrays."""

    def function(index: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        counted = ops.arange(0, 3, dtype=ops.int32, device=ops.device(arrays["x"])) + index
        number = ops.astype(counted, ops.dtype(dtype))
        row, seen = (_row(ops, arrays[name], index) for name in ("whole", "mask"))
        context = ops.where(seen, ops.tanh(arrays["x"] * arrays["y"]) + row * number, 0.0)
        scores = ops.sum(arrays["x"] * arrays["y"] * row, axis=-1, keepdims=True)
        return {"context": context, "scores": scores}

    def looped(x: Any, y: Any, whole: Any, mask: Any) -> Any:
        results = dict.fromkeys(("context", "scores"), ops.dtype(dtype))
        mapped, constant = {"x": x, "y": y}, {"whole": whole, "mask": mask}
        return loop(function, count, mapped, constant, results)[result]

    return looped


def _plain_loop(ops: Any) -> Callable[..., Any]:
    """`loop` in Python."""

    def loop(function: Any, count: int, mapped: Any, constant: Any, results: Any) -> Any:
        found = []
        for index in range(count):
            parts = {name: _part(ops, x, index) for name, x in mapped.items()}
            found.append(function(index, parts | constant))
        return {name: ops.stack([each[name] for each in found], axis=0) for name in results}

    return loop


def _part(ops: Any, x: Any, index: int) -> Any:
    """``x[index]``, by slices of the form that each backend has."""
    shape = ops.shape(x)
    rest = [slice(None)] * (len(shape) - 1)
    return ops.reshape(x[(..., slice(index, index + 1), *rest)], shape[1:])


def _row(ops: Any, x: Any, index: Any) -> Any:
    """The part of a whole array that belongs to a round: by `narrow`, as the core takes it."""
    return ops.reshape(ops.capabilities.narrow(x, index, 1, axis=0), ops.shape(x)[1:])


def _multiplies(ops: Any, dtype: str) -> Any:
    """What the capability `multiplies` says where arrays are made."""
    array = ops.from_numpy(np.ones(1, numpy_dtype(dtype)))
    return ops.capabilities.multiplies(array.dtype, ops.device(array))


def _allowed(case: AttentionCase, expected: np.ndarray) -> float:
    """What rounding explains between two ways to compute attention or its gradients."""
    length = max(*case.lengths, *case.widths)
    return 2 * tolerance(case.dtype, length, 4 * max(1, np.max(np.abs(expected))))
