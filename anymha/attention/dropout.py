"""Dropout: which probabilities are kept, as a pure function of a seed and of positions.

One counter-based generator in 32-bit integer arithmetic, so that every framework drops the same
elements: eager or compiled, whatever the size of the tiles, the device or the sharding.

The generator, with ``^`` exclusive or, ``*`` modulo 2^32, ``>>`` filling with zeros, and

    mix(x, key=0) = x ^= x >> 17;  x *= 0xed5ad4bb;  x ^= x >> 11;  x *= 0xac4c1b51;
                    x ^= key;      x ^= x >> 15;     x *= 0x31848bab;  x ^= x >> 14

for a 64-bit seed of words (lo, hi) and the element at (b, h, t, s):

    a     = mix(mix(mix(mix(mix(lo + 0x9e3779b9) ^ hi) + b) + h) + t // 2)
    c     = mix(mix(mix(mix(mix(hi + 0x85ebca6b) ^ lo) ^ b) ^ h) ^ t // 2)
    word  = mix(a + s, key=c)
    bits  = word mod 2^16 for even t, word // 2^16 for odd t
    keep  = bits >= rate * 2^16

The position goes in by coordinates, not by one running number: no length and no number of elements
is too large, and what is kept at a place does not depend on the shape around it.

References:
    C. Wellons, "Prospecting for Hash Functions" (2018), for the constants of `mix` (triple32).
    J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), for the idea.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from anymha.attention.masks import TileOrigin
from anymha.framework.protocol import Array, Dim, Ops

STEPS = 1 << 16
"""The rate of dropout is rounded to a multiple of 1/STEPS."""


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call.

    Args:
        threshold: The rate in units of 1/65536, at least 1.
        seed: An int, or an array that the backend's `seed_words` takes; None where `native` dropout
            draws by itself.
        native: Whether the framework's own generator decides.
    """

    threshold: int
    seed: Any
    native: bool = False

    @property
    def rate(self) -> float:
        """The share that is dropped."""
        return self.threshold / STEPS

    @property
    def factor(self) -> float:
        """What kept values are multiplied with: the inverse of the keep probability, exactly."""
        return STEPS / (STEPS - self.threshold)

    def keep(
        self, ops: Ops, shape: Sequence[Dim], origin: TileOrigin | None = None, *, like: Array
    ) -> Array:
        """Booleans (B, H, T, S), True where the element of a tile stays.

        Args:
            ops: The backend.
            shape: The shape of the tile.
            origin: Where the tile begins; default at the first of all.
            like: An array on whose device the mask is made.
        """
        if self.native:
            return ops.native_keep_mask(self.seed, shape, 1.0 / self.factor, ops.device(like))
        make = ops.capabilities.keep_mask or partial(keep_mask, ops)
        return make(self.seed, self.threshold, shape, origin, device=ops.device(like))


def draw_seed(ops: Ops, like: Array, *, native: bool = False) -> Any:
    """A seed from the framework's own generator, for a call whose arrays are where `like` is.

    Raises:
        ArgumentError: the framework has no generator of its own (JAX).
    """
    draw = ops.capabilities.draw_seed_like
    return ops.draw_seed() if draw is None else draw(like, native)


def rate_threshold(rate: float) -> int:
    """`rate`, in [0, 1), in units of 1/65536; a positive rate stays positive and below 1."""
    return min(max(round(rate * STEPS), 1), STEPS - 1) if rate else 0


def keep_mask(
    ops: Ops,
    seed: Any,
    threshold: int,
    shape: Sequence[Dim],
    origin: TileOrigin | None = None,
    *,
    device: Any = None,
) -> Array:
    """Booleans, True where the element at (b, h, t, s) is kept.

    Args:
        ops: The backend.
        seed: An int of up to 64 bits, or an array that the backend's `seed_words` takes.
        threshold: The share that is dropped, in units of 1/65536.
        shape: (B, H, T, S).
        origin: Where the first element stands; default at the first of all.
        device: Where the mask is made.

    Returns:
        (B, H, T, S) booleans.
    """
    batch, heads, queries, keys = shape
    origin = origin or TileOrigin()
    low, high = _seed_words(ops, seed, device)

    def counter(count: Dim, axis: int, first: Any) -> Array:
        values = ops.arange(0, count, dtype=ops.int32, device=device) + first
        return ops.reshape(values, tuple(-1 if i == axis else 1 for i in range(4)))

    xor, pairs = ops.bitwise_xor, (queries + 1) // 2
    first = _mix(ops, xor(_mix(ops, low + _signed(0x9E3779B9)), high))
    second = _mix(ops, xor(_mix(ops, high + _signed(0x85EBCA6B)), low))
    counted = ((batch, origin.batch), (heads, origin.head), (pairs, origin.query // 2))
    for axis, (count, start) in enumerate(counted):
        here = counter(count, axis, start)
        first, second = _mix(ops, first + here), _mix(ops, xor(second, here))
    columns = counter(keys, 3, origin.key)
    chunk_size = ops.capabilities.chunk_size
    step = None if chunk_size is None else chunk_size(device)
    kept = _kept(ops, first, second, columns, threshold, step)
    return ops.reshape(kept, (batch, heads, pairs * 2, keys))[..., :queries, :]


def _kept(
    ops: Ops, first: Array, second: Array, columns: Array, threshold: int, step: int | None
) -> Array:
    """Booleans [B, H, ceil(T/2), 2, S], the last axes but one for even and odd t.

    Args:
        ops: The backend.
        first: The word `a` of each pair of rows, (B, H, ceil(T/2), 1).
        second: The word `c` of each pair of rows.
        columns: The counter s, (1, 1, 1, S).
        threshold: The share that is dropped, in units of 1/65536.
        step: How many words to make at a time, or None for all at once.
    """
    keys = ops.shape(columns)[3]
    shape = ops.shape(first)
    if step is not None and all(isinstance(n, int) for n in (*shape, keys)):
        rows, height = math.prod(shape), max(1, step // max(keys, 1))
        if rows > height:
            tall = [ops.reshape(x, (1, 1, rows, 1)) for x in (first, second)]
            starts = range(0, rows, height)
            chunks = [[x[..., i : i + height, :] for x in tall] for i in starts]
            parts = [_kept(ops, a, c, columns, threshold, rows * keys) for a, c in chunks]
            return ops.concat(parts, axis=2)
    word = _mix(ops, first + columns, second)  # [B, H, ceil(T/2), S]
    even = ops.bitwise_and(word, STEPS - 1) >= threshold
    # Unsigned order is signed order with the highest bit turned over.
    odd = _xor(ops, word, -(2**31)) >= threshold * STEPS - 2**31
    if step is not None:
        return ops.stack([even, odd], axis=-2)
    # Joined by `stack` instead, XLA takes a hundred times as long to compile the generator.
    first_of_two = ops.asarray([True, False], dtype=ops.bool, device=ops.device(word))
    batch, heads, pairs, keys = ops.shape(word)
    even, odd = (ops.reshape(x, (batch, heads, pairs, 1, keys)) for x in (even, odd))
    return ops.where(ops.reshape(first_of_two, (1, 1, 1, 2, 1)), even, odd)


def _xor(ops: Ops, x: Array, y: Any) -> Array:
    """``x ^ y``; `x` may be overwritten."""
    return (ops.capabilities.bitwise_xor_inplace or ops.bitwise_xor)(x, y)


def _and(ops: Ops, x: Array, y: Any) -> Array:
    """``x & y``; `x` may be overwritten."""
    return (ops.capabilities.bitwise_and_inplace or ops.bitwise_and)(x, y)


_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))


def _mix(ops: Ops, x: Array, key: Array | None = None) -> Array:
    """A bijection of the 32-bit integers in which each input bit changes half of the output's."""
    for number, (shift, factor) in enumerate(_ROUNDS):
        if number == 2 and key is not None:
            x = _xor(ops, x, key)
        x = _folded(ops, x, shift)
        x *= _signed(factor)
    return _folded(ops, x, 14)


def _folded(ops: Ops, x: Array, shift: int) -> Array:
    """``x ^ (x >> shift)``, `>>` filling with zeros; `x` may be overwritten."""
    # In int32 `>>` copies the sign; the mask takes the copies away.
    shifted = _and(ops, ops.bitwise_right_shift(x, shift), (1 << (32 - shift)) - 1)
    return _xor(ops, x, shifted)


def _signed(word: int) -> int:
    """The low 32 bits of `word` as a two's complement integer."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _seed_words(ops: Ops, seed: Any, device: Any) -> tuple[Array, Array]:
    """The low and high 32 bits of the seed, (1, 1, 1, 1) int32 each."""
    if isinstance(seed, numbers.Integral) and not ops.is_array(seed):
        seed = int(seed)
        words = [_signed(seed), _signed(seed >> 32)]
        low, high = (ops.asarray([w], dtype=ops.int32, device=device) for w in words)
    else:
        low, high = ops.seed_words(seed)
    return ops.reshape(low, (1, 1, 1, 1)), ops.reshape(high, (1, 1, 1, 1))
