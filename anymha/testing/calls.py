"""One function of a backend called on NumPy arrays, and what came back held against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from anymha.framework.protocol import Ops
from anymha.parity.oracle.cases import numpy_dtype


@dataclass(frozen=True)
class Returned:
    """What a call gave."""

    text: str  # The call, for messages: ``ops.max(float32 (2, 3), axis=-1, keepdims=True)``
    value: np.ndarray  # The result as a NumPy array

    def equals(self, expected: Any) -> None:
        """Fail unless dtype, shape and every element are those expected; NaN equals NaN."""
        __tracebackhide__ = True
        expected = np.asarray(expected)
        self.has_form(expected.dtype.name, expected.shape)
        same = self.value == expected
        if expected.dtype.kind in "fV":
            same |= np.isnan(self.value) & np.isnan(expected)
        self._report(same, expected, "exactly")

    def is_near(self, expected: np.ndarray, allowed: Any, dtype: str | None = None) -> None:
        """Fail unless every element is within `allowed` of the float64 value expected.

        And unless the result has this dtype, where one is given.
        """
        __tracebackhide__ = True
        self.has_form(dtype or self.value.dtype.name, expected.shape)
        got = self.value
        got = got.astype(np.float64) if got.dtype.kind in "fV" else got  # ml_dtypes has kind V
        with np.errstate(invalid="ignore"):
            near = (got == expected) | (np.abs(got - expected) <= allowed)
        self._report(near, expected, f"within {np.max(allowed):.3g}")

    def has_form(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Fail unless the result has this dtype and this shape."""
        __tracebackhide__ = True
        got = self.value
        must(
            got.shape == shape, f"{self.text} must have shape {shape}. Received: shape {got.shape}."
        )
        must(
            got.dtype.name == dtype,
            f"{self.text} must have dtype {dtype}. Received: {got.dtype.name}.",
        )

    def _report(self, good: np.ndarray, expected: np.ndarray, how: str) -> None:
        __tracebackhide__ = True
        if not np.all(good):
            where = tuple(int(i) for i in np.argwhere(~good)[0])
            raise AssertionError(
                f"{self.text} must give {expected[where]} {how} at {where}. "
                f"Received: {self.value[where]}. {np.sum(~good)} of {good.size} elements differ."
            )


def call(ops: Ops, function: str | Callable[..., Any], *args: Any, **options: Any) -> Returned:
    """A function of the backend, or an operator, called in the form of the arguments.

    A capability is called by "capabilities.linear". NumPy arrays, alone or in lists, become the
    backend's; a string becomes the dtype of that name. Where float64 takes part the call runs
    inside of `in_float64`, as the layer's do.
    """
    arrays: dict[str, Any] = {}

    def place(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[f"x{len(arrays)}"] = value
            return _Slot(f"x{len(arrays) - 1}")
        return [place(item) for item in value] if isinstance(value, list) else value

    placed = [place(value) for value in args]
    named = [*map(_show, args), *(f"{name}={_show(value)}" for name, value in options.items())]
    title = f"ops.{function}" if isinstance(function, str) else function.__name__

    def run(given: Mapping[str, Any]) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, list):
                return [fill(item) for item in value]
            if isinstance(value, _Slot):
                return given[value.name]
            return _dtype(ops, value) if isinstance(value, str) else value

        called = attrgetter(function)(ops) if isinstance(function, str) else function
        return called(*map(fill, placed), **{n: fill(v) for n, v in options.items()})

    named_dtypes = {value for value in (*args, *options.values()) if isinstance(value, str)}
    dtypes = {array.dtype.name for array in arrays.values()} | named_dtypes
    native = {name: ops.from_numpy(array) for name, array in arrays.items()}
    result = ops.in_float64(run, native) if "float64" in dtypes else run(native)
    return Returned(f"{title}({', '.join(named)})", ops.to_numpy(result))


def must(condition: Any, message: str) -> None:
    """Fail with the message unless the condition holds; unlike `assert`, also under ``-O``."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


def values(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Normal random numbers, the same at each call."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(numpy_dtype(dtype))


def words(*shape: int, seed: int = 0) -> np.ndarray:
    """Random int32 of the full range, the same at each call."""
    rng = np.random.default_rng([seed, *shape])
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def _dtype(ops: Ops, name: str) -> Any:
    """Dtypes of real numbers by the function, as the core gets them; the others by attribute."""
    return getattr(ops, name) if name in ("bool", "int32") else ops.dtype(name)


@dataclass(frozen=True)
class _Slot:
    name: str


def _show(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name} {value.shape}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, list) else str(value)
