"""Tests of what a backend does beyond arithmetic: constants, float64, seeds, differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anymha.attention.dropout import keep_mask
from anymha.testing.calls import Returned, call, must, values
from anymha.testing.capabilities import BackendTests
from anymha.testing.known import KNOWN_MASKS, KnownMask


class FrameworkTests(BackendTests):
    """Functions that the array API standard does not have."""

    # --- float64 ---------------------------------------------------------------------------------
    def test_in_float64_computes_in_float64(self, ops: Any) -> None:
        """On float64 arrays, and on float32 arrays that are cast inside."""
        self.need(ops, "float64")
        for dtype in ("float64", "float32"):
            x = values(20, dtype=dtype)

            def scaled(given: Any) -> Any:
                return ops.astype(given["x"], ops.float64) * 1.1

            got = ops.to_numpy(ops.in_float64(scaled, {"x": ops.from_numpy(x)}))
            Returned(f"ops.in_float64(x * 1.1) of {dtype} x", got).equals(
                x.astype(np.float64) * 1.1
            )

    def test_in_float64_rounds_once(self, ops: Any) -> None:
        """Float32 in and out, float64 between: the reproducible mode."""
        self.need(ops, "float64")
        x = values(200)

        def powers(given: Any) -> Any:
            wide = ops.astype(given["x"], ops.float64)
            return ops.astype(wide * 1.1 * wide, ops.float32)

        got = ops.to_numpy(ops.in_float64(powers, {"x": ops.from_numpy(x)}))
        wide = x.astype(np.float64)
        expected = (wide * 1.1 * wide).astype(np.float32)
        Returned("ops.in_float64(float32(x * 1.1 * x))", got).equals(expected)

    def test_in_float64_passes_names_and_tuples(self, ops: Any) -> None:
        """The function gets every array by its name, masks too, and may return a tuple."""
        self.need(ops, "float64")
        given = {"x": values(3), "mask": values(3) > 0, "place": np.array([1, 2, 3], np.int32)}
        native = {name: ops.from_numpy(array) for name, array in given.items()}

        def both(arrays: Any) -> Any:
            names = sorted(arrays)
            must(names == sorted(given), f"`in_float64` passed the names {names}.")
            seen = ops.logical_and(arrays["mask"], arrays["place"] >= 2)
            return arrays["x"], ops.where(seen, arrays["x"], 0.0)

        got = ops.in_float64(both, native)
        must(isinstance(got, tuple), f"`in_float64` must give the tuple. Received: {type(got)}.")
        Returned("ops.in_float64(...)[0]", ops.to_numpy(got[0])).equals(given["x"])
        expected = np.where(given["mask"] & (given["place"] >= 2), given["x"], np.float32(0))
        Returned("ops.in_float64(...)[1]", ops.to_numpy(got[1])).equals(expected)

    # --- seeds -----------------------------------------------------------------------------------
    @pytest.mark.parametrize("known", KNOWN_MASKS, ids=str)
    def test_dropout_keeps_the_known_elements(self, ops: Any, known: KnownMask) -> None:
        """The portable generator, which is built of integer functions, gives the same bits."""
        mask = keep_mask(ops, known.seed, known.threshold, known.shape)
        title = f"keep_mask(seed={known.seed})"
        Returned(title, ops.to_numpy(mask)).equals(known.mask)

    @pytest.mark.parametrize("seed", [0, 11, -7, 2**31 - 1])
    def test_seed_words_of_an_array(self, ops: Any, seed: int) -> None:
        """An int32 array of rank 0 gives the words of the int: low, and high by its sign."""
        low, high = ops.seed_words(ops.from_numpy(np.array(seed, np.int32)))
        got = [int(np.asarray(ops.to_numpy(word)).reshape(())) for word in (low, high)]
        expected = [seed, seed >> 31]
        must(got == expected, f"`seed_words` of {seed} must give {expected}. Received: {got}.")

    def test_seed_words_of_an_array_seed_the_dropout(self, ops: Any) -> None:
        """A seed in an array gives the mask of the same int."""
        for known in KNOWN_MASKS:
            if abs(known.seed) < 2**31:
                seed = ops.from_numpy(np.array(known.seed, np.int32))
                mask = keep_mask(ops, seed, known.threshold, known.shape)
                title = f"keep_mask(seed=array({known.seed}))"
                Returned(title, ops.to_numpy(mask)).equals(known.mask)

    def test_draw_seed_gives_another_each_time(self, ops: Any) -> None:
        """An int, or an integer array of rank 0, which seeds the dropout."""
        self.need(ops, "draw_seed")
        seeds = [ops.draw_seed() for _ in range(4)]
        masks = {
            ops.to_numpy(keep_mask(ops, seed, 2**15, (1, 2, 8, 8))).tobytes() for seed in seeds
        }
        must(len(masks) > 1, f"Each `draw_seed` gave the same mask. Received: {seeds}.")

    def test_native_keep_mask_keeps_the_share(self, ops: Any) -> None:
        """Booleans of the shape, about `keep` of them True; the same seed, the same mask."""
        self.need(ops, "native_keep_mask")
        device = ops.device(ops.from_numpy(values(1)))
        shape, keep = (2, 4, 32, 32), 0.7

        def mask(seed: int) -> np.ndarray:
            return ops.to_numpy(ops.native_keep_mask(seed, shape, keep, device))

        first = Returned("ops.native_keep_mask(3, ...)", mask(3))
        first.has_form("bool", shape)
        share = np.mean(first.value)
        far = 5 * np.sqrt(keep * (1 - keep) / first.value.size)  # five standard deviations
        must(abs(share - keep) < far, f"`native_keep_mask` kept {share:.3f}, not {keep}.")
        first.equals(mask(3))
        must(not np.array_equal(first.value, mask(4)), "Seeds 3 and 4 gave the same mask.")

    # --- differentiation -------------------------------------------------------------------------
    def test_stop_gradient_keeps_the_values(self, ops: Any) -> None:
        """It is the identity but for differentiation."""
        x = values(2, 3)
        call(ops, "stop_gradient", x).equals(x)

    def test_stop_gradient_is_a_constant_for_vjp(self, ops: Any) -> None:
        """The gradient of ``x * stop_gradient(x)`` is x, not 2x."""
        self.need(ops, "vjp")
        x, c = values(2, 3), values(2, 3, seed=1)
        got = _pulled(ops, lambda given: given["x"] * ops.stop_gradient(given["x"]), c, x=x)
        Returned("the gradient of x * stop_gradient(x)", got["x"]).equals(c * x)

    def test_abs_has_the_slope_zero_at_zero(self, ops: Any) -> None:
        """Where a library may choose, all must choose alike: biases start at zero."""
        self.need(ops, "vjp")
        x, c = np.array([-2.0, 0.0, 3.0], np.float32), values(3)
        got = _pulled(ops, lambda given: ops.abs(given["x"]), c, x=x)
        Returned("the gradient of abs(x)", got["x"]).equals(c * np.sign(x))

    def test_vjp_gives_value_and_gradients_by_name(self, ops: Any) -> None:
        """The cotangent times the derivative, with respect to each array."""
        self.need(ops, "vjp")
        x, y, c = (values(2, 3, seed=seed) for seed in range(3))
        got = _pulled(ops, lambda given: given["x"] * given["y"], c, x=x, y=y)
        names = set(got) - {"the value"}
        must(names == {"x", "y"}, f"`vjp` must give gradients of x and y. Received: {names}.")
        Returned("the value of vjp(x * y)", got["the value"]).equals(x * y)
        Returned("the gradient of x * y in x", got["x"]).equals(c * y)
        Returned("the gradient of x * y in y", got["y"]).equals(c * x)

    def test_vjp_takes_a_tuple_of_results(self, ops: Any) -> None:
        """The cotangents are a tuple then, one for each result."""
        self.need(ops, "vjp")
        x, c, d = (values(2, 3, seed=seed) for seed in range(3))
        got = _pulled(ops, lambda given: (given["x"] * 2.0, given["x"] * given["x"]), (c, d), x=x)
        gradient = Returned("the gradient of (2 * x, x * x)", got["x"])
        gradient.is_near((2 * c + 2 * d * x).astype(np.float64), 1e-6)

    def test_in_float64_is_differentiated_in_float64(self, ops: Any) -> None:
        """The gradient is made in float64 too, and rounded once."""
        self.need(ops, "float64", "vjp")
        x, c = values(200), values(200, seed=1)

        def function(given: Any) -> Any:
            wide = ops.astype(given["x"], ops.float64)
            return ops.astype(wide * 1.1 * wide, ops.float32)

        got = _pulled(ops, lambda given: ops.in_float64(function, given), c, x=x)
        wide = c.astype(np.float64)
        exact = 2.2 * wide * x
        # Two ways of multiplying in float64 may differ in its last bits, which hardly ever shows.
        got = Returned("the gradient of in_float64(x * 1.1 * x)", got["x"])
        got.is_near(exact, np.spacing(np.abs(exact).astype(np.float32)) * (0.5 + 1e-6), "float32")


def _pulled(
    ops: Any, function: Callable[[Any], Any], cotangents: Any, **arrays: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradients that `vjp` gives, by name, and "the value" where it is one array."""
    several = isinstance(cotangents, tuple)
    to = tuple(map(ops.from_numpy, cotangents)) if several else ops.from_numpy(cotangents)
    given = {name: ops.from_numpy(array) for name, array in arrays.items()}
    value, gradients = ops.capabilities.vjp(function, given, to)
    got = {name: ops.to_numpy(array) for name, array in gradients.items()}
    return got if several else {**got, "the value": ops.to_numpy(value)}
