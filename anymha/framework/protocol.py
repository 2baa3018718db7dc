"""What the core may ask of a framework: the `Ops` protocol.

A backend is a module of functions; no class, no inheritance. Functions of the Python array API
standard (2024.12) have its names and are called as it says; what it lets one name or place, the
core places. Of an array object the core uses only ``+ - * /`` and comparisons, with an array or a
number on the right, ``.shape``, ``.dtype``, and slices of the forms ``x[..., a:b]`` and
``x[..., a:b, :]``. Products and sums of int32 wrap. Half precision reaches only `astype`, `gather`,
`concat`, `where`, slices and the conversions, unless the backend has the capability `multiplies`:
the core computes it in float32.

References:
    Consortium for Python Data API Standards, "Python array API standard", v2024.12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex

Array = Any
"""An array of any framework."""

Index = SupportsIndex
"""An integer, of Python or of NumPy."""


class Shaped(Protocol):
    """An array of any framework, for type checkers of calls: no text and no number."""

    @property
    def shape(self) -> Any:
        """The lengths of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """The framework's dtype."""
        ...


Dim = Any
"""A length: an ``int``, or a symbol where a traced program does not know it yet."""


class Ops(Protocol):
    """The functions of a backend.

    The first group is the array API standard's; the second is what the standard does not have.
    """

    name: str
    capabilities: Any  # an `anymha.framework.capabilities.Capabilities`
    float32: Any
    float64: Any
    int32: Any
    bool: Any

    # --- the array API standard, 2024.12 -------------------------------------------------------
    def asarray(self, obj: Any, /, *, dtype: Any = None, device: Any = None) -> Array: ...
    def astype(self, x: Array, dtype: Any, /) -> Array: ...
    def arange(self, start: Dim, stop: Dim, /, *, dtype: Any, device: Any = None) -> Array: ...
    def reshape(self, x: Array, shape: tuple[Dim, ...], /) -> Array: ...
    def permute_dims(self, x: Array, axes: tuple[int, ...], /) -> Array: ...
    def broadcast_to(self, x: Array, shape: tuple[Dim, ...], /) -> Array: ...
    def stack(self, arrays: list[Array], /, *, axis: int = 0) -> Array: ...
    def concat(self, arrays: list[Array], /, *, axis: int = 0) -> Array: ...
    def matmul(self, x1: Array, x2: Array, /) -> Array: ...
    def tensordot(self, x1: Array, x2: Array, /, *, axes: int) -> Array: ...
    def where(self, condition: Array, x1: Any, x2: Any, /) -> Array: ...
    def abs(self, x: Array, /) -> Array: ...
    def exp(self, x: Array, /) -> Array: ...
    def log(self, x: Array, /) -> Array: ...
    def cos(self, x: Array, /) -> Array: ...
    def sin(self, x: Array, /) -> Array: ...
    def sqrt(self, x: Array, /) -> Array: ...
    def tanh(self, x: Array, /) -> Array: ...
    def max(self, x: Array, /, *, axis: int, keepdims: bool) -> Array: ...
    def sum(self, x: Array, /, *, axis: int, keepdims: bool) -> Array: ...
    def logical_and(self, x1: Array, x2: Array, /) -> Array: ...
    def bitwise_and(self, x1: Array, x2: Any, /) -> Array: ...
    def bitwise_xor(self, x1: Array, x2: Any, /) -> Array: ...
    def bitwise_right_shift(self, x1: Array, x2: Any, /) -> Array: ...
    def remainder(self, x1: Array, x2: Any, /) -> Array: ...
    def argsort(self, x: Array, /, *, axis: int) -> Array: ...

    # --- beyond the standard -------------------------------------------------------------------
    def is_array(self, x: Any, /) -> bool:
        """Whether `x` is an array of this framework, traced ones included."""
        ...

    def shape(self, x: Array, /) -> tuple[Dim, ...]:
        """The shape; an axis whose length is not known yet gives a scalar that holds it."""
        ...

    def device(self, x: Array, /) -> Any:
        """What `arange` and `asarray` take as ``device`` to make an array beside `x`, or None."""
        ...

    def gather(self, x: Array, indices: Array, /, *, axis: int) -> Array:
        """Of each member b of the first axis the places ``indices[b]`` along `axis`, not the first.

        `indices` are integers (B, N), none below 0 or past the end.
        """
        ...

    def dtype(self, name: str, /) -> Any:
        """The framework's dtype of that name, "bfloat16" and "float16" included.

        Raises:
            Exception: of any kind, where the framework has no such dtype.
        """
        ...

    def to_numpy(self, x: Array, /) -> Any:
        """The values as a NumPy array of the same dtype, exactly."""
        ...

    def from_numpy(self, x: Any, /) -> Array:
        """An array with the values and the dtype of a NumPy array, exactly."""
        ...

    def stop_gradient(self, x: Array, /) -> Array:
        """`x` as a constant for differentiation."""
        ...

    def in_float64(
        self, function: Callable[[Mapping[str, Any]], Any], arrays: Mapping[str, Any], /
    ) -> Any:
        """``function(arrays)`` where float64 exists, differentiable in each floating array.

        Most frameworks just call. JAX enters its float64 mode, forward and backward.
        """
        ...

    def seed_words(self, seed: Any, /) -> tuple[Any, Any]:
        """The low and the high 32 bits of an array `seed`, as int32 scalars (or int32 arrays)."""
        ...

    def draw_seed(self) -> Any:
        """A seed from the framework's own generator: an int or an integer array of rank 0.

        Raises:
            ArgumentError: the framework has no generator of its own (JAX).
        """
        ...

    def native_keep_mask(
        self, seed: Any, shape: Sequence[Dim], keep: float, device: Any, /
    ) -> Array:
        """Booleans, True with probability `keep`, by the framework's own generator.

        Raises:
            ArgumentError: the framework has none.
        """
        ...
