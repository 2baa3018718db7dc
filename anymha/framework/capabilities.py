"""What a backend may have beside `Ops`: functions that make it faster and change no meaning.

The core asks for each by name, and does without it where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from anymha.framework.protocol import Array, Dim, Ops


class Planning(Ops, Protocol):
    """The functions of a backend whose calls are checked once for arrays of the same kinds."""

    def kind(self, x: Array, /) -> Any:
        """All that is known of `x` but its values, hashable: class, shape and dtype."""
        ...

    def is_tracing(self) -> bool:
        """Whether a compiler runs the call now, for which nothing is to be kept."""
        ...


class Compiling(Planning, Protocol):
    """The functions of a backend whose single functions are slow, and compiled ones fast."""

    def compiled(self, function: Callable[[Mapping[str, Array]], Any], /) -> Callable[..., Any]:
        """The same function, compiled where it is not inside of a compiled one already."""
        ...

    def seed_array(self, seed: int, /) -> Array:
        """An array of which `seed_words` are those of an int."""
        ...


class Replaying(Planning, Protocol):
    """The functions of a backend whose calls are slow for what Python does between its functions.

    A small call of kinds of arrays that came before does again what the functions were called with
    then: which they are, and what they are given beside arrays, must follow from the kinds and the
    situation. `in_float64` must be just a call.
    """

    def situation(self) -> Any:
        """All beside a call's arrays that decides what is computed, hashable."""
        ...


class Looping(Ops, Protocol):
    """The functions of a backend that computes block after block."""

    unrolls: bool
    """Whether `map` is an ordinary loop, so that each block may have lengths of its own."""

    def block(self, device: Any, /) -> int:
        """How many logits a block has for which the backend is fastest."""
        ...

    def map(
        self,
        function: Callable[[Any, dict[str, Array]], dict[str, Array]],
        count: Dim,
        mapped: Mapping[str, Array],
        constant: Mapping[str, Array],
        results: Mapping[str, Any],
        /,
    ) -> dict[str, Array]:
        """``function(i, arrays)`` for each i below `count`, the results behind one another.

        For differentiation nothing of a round is kept but its arrays: it is computed again.

        Args:
            function: Takes the number of the round, an int or an int32 array, and arrays by name.
            count: How many rounds, at least 1.
            mapped: Arrays (count, ..), of which the i-th round gets the i-th part.
            constant: Arrays that each round gets whole.
            results: The names of what the function gives, and their dtypes.
        """
        ...

    def narrow(self, x: Array, start: Any, length: int, /, *, axis: int) -> Array:
        """`length` places along an axis, from `start` on, an int or an int32 array."""
        ...


class Fusing(Ops, Protocol):
    """The functions of a backend that has a kernel with exactly the written meaning."""

    def fused_refusal(self, call: Any, arrays: Mapping[str, Array], /) -> str | None:
        """Why the kernel cannot do a call, or None where it can; see `anymha.attention.formula`."""
        ...

    def fused_attention(self, call: Any, arrays: Mapping[str, Array], /, *, causal: bool) -> Array:
        """The context (B, H, T, d_v); masks of positions are in "mask", or `causal` says them."""
        ...


class Faster(Ops, Protocol):
    """Functions that a backend may have because they are faster than those they stand for."""

    overwriting: Any
    """`bitwise_and` and `bitwise_xor` that may write into their first argument."""

    def linear(self, x: Array, matrix: Array, bias: Array | None, /) -> Array:
        """``x . matrix + bias`` of matrices (N, D) and (D, W)."""
        ...

    def softmax(self, x: Array, /) -> Array:
        """The softmax over the last axis, of finite numbers."""
        ...

    def exp_and_sum(self, x: Array, peak: Array, /) -> tuple[Array, Array]:
        """``exp(x - peak)`` and its sums over the last axis, kept as 1; may write into `x`."""
        ...

    def is_differentiated(self, x: Array, /) -> bool:
        """Whether a gradient of `x` may be asked for."""
        ...
