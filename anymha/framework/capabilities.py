"""What a backend may have beside `Ops`: functions that make it faster and change no meaning.

A backend declares them by one object, `capabilities = Capabilities(linear=linear, ...)` in its
module; what is not named there, the core does without. A name that does not exist is an error where
the backend is imported. The conformance tests compare each with the core's general way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import ConfigError
from anymha.framework.protocol import Array

Function = Callable[..., Any]

TOGETHER = (
    ("compile", "array_key"),
    ("compile", "seed_array"),
    ("compiles_writes", "write_slots"),
    ("loop", "tile_size"),
    ("loop", "narrow"),
    ("fused_attention", "why_not_fused"),
    ("wide_matmul", "multiplies"),
    ("bitwise_and_inplace", "bitwise_xor_inplace"),
    ("initialize", "initializer_style"),
)
"""The capability in the first place needs the one in the second."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The optional functions of a backend; None where it does not have one.

    Args:
        array_key: ``array_key(x)`` is all that is known of an array but its shape and its values,
            hashable: class, dtype, device. Calls of equal keys and shapes are checked once.
        is_tracing: ``is_tracing()``: whether a compiler runs the call now, for which nothing is to
            be kept.
        constants: ``constants(query, arrays)`` is the dict `arrays` of a call's masks, with NumPy's
            arrays as the framework's where `query` is traced.
        compile: ``compile(function, pairs)`` of a function of a dict of arrays is the same
            function, compiled; for backends whose single functions are slow. One program may serve
            calls of several lengths that have at most so many pairs of a query and a key,
            B * T * S: all their logits are few enough to be held at a time.
        has_values: ``has_values(x)``: whether `to_numpy` can say the values of `x` now: not where
            a compiler or a transformation runs the program.
        write_slots: ``write_slots(storage, new, slot, in_place)`` is `storage` (B, K, C, d) with
            `new` (B, K, T, d) in T slots of each row, from `slot` on, an int or int32 integers
            (B,); all are below C. With `in_place` it may write into `storage`.
        writes_in_place: Whether `write_slots` does so.
        take_rows: ``take_rows(x, rows, end)`` is a new array of the rows `rows`, int32 (N,), of `x`
            (B, K, C, d), zero in its slots from `end` on; an `end` of None stands for C.
        compiles_writes: ``compiles_writes()``: whether a compiler runs the call now, in whose
            program `write_slots` may write into arrays that are given to it.
        is_inference: ``is_inference()``: whether arrays that are made now, by no compiled program,
            can be written in regions such as this one alone, as in torch's inference mode.
        choose: ``choose(index, functions, arrays)`` is ``functions[index](arrays)`` of an int32
            scalar, in one program that runs the chosen function alone.
        resized: ``resized(x, shape)`` is `x`, maybe NumPy's, as an array with more or fewer places
            at the end of each axis, the new ones zero, made without compiling; None where `x` is
            traced, or where that would cost more than a call. For backends that compile a program
            for each shape: programs of a few lengths then compute calls of ever new lengths.
        seed_array: ``seed_array(seed)`` of an int is an array that `seed_words` turns into the
            words of that int.
        draw_seed_like: ``draw_seed_like(x, native)`` is `draw_seed` where the array `x` is; None if
            `native`, and `native_keep_mask` draws by itself where it gets None as a seed.
        vjp: ``vjp(function, arrays, cotangents)`` is the value of ``function(arrays)``, an array
            or a tuple, and by the names of `arrays`, a dict of floating arrays, the gradients of
            ``sum(cotangents * value)``.
        keep_mask: `anymha.attention.dropout.keep_mask` in the backend's own way, without `ops`.
        chunk_size: ``chunk_size(device)``: how many random words to make at a time where each
            function runs by itself, since so many stay in the processor's cache; None for all.
        bitwise_and_inplace: `bitwise_and` that may write into its first argument.
        bitwise_xor_inplace: `bitwise_xor` that may write into its first argument.
        tile_size: ``tile_size(device)``: the number of logits of a tile with which the backend is
            fastest.
        loop: ``loop(function, count, mapped, constant, results)`` is ``function(i, arrays)`` for
            each i below `count`, the results stacked. `function` takes the number of the round (an
            int or an int32 array) and a dict of arrays: of the arrays (count, ..) in `mapped` the
            i-th part, those in `constant` whole. `results` has the names of what it gives and
            their dtypes. For differentiation nothing of a round is kept but its arrays: the round
            is computed again.
        eager_loop: Whether `loop` is an ordinary loop, so that each tile may have its own lengths.
        narrow: ``narrow(x, start, length, axis=axis)``: `length` places along an axis, from
            `start` on, an int or an int32 array.
        fused_attention: ``fused_attention(spec, arrays, causal=flag)`` is the context
            (B, H, T, d_v) by a kernel with exactly the written meaning; masks of positions are in
            "mask", or `causal` says them.
        fused_window: ``fused_window(spec, shape)``: whether the kernel itself hides all that the
            window of `spec` hides; then `causal` tells it so.
        fused_sinks: Whether the kernel takes a further logit of each row's softmax, which has no
            value, as `anymha.attention.features.base.joining_logit` gives it.
        why_not_fused: ``why_not_fused(spec, shape)`` says why the kernel cannot do a call, an
            `anymha.execution.path.AttentionShape`; None where it can.
        mixed_dtype: ``mixed_dtype(x)``: the half-precision dtype in which a region of the
            framework's mixed precision lets calls compute where `x` is; None outside of one.
        multiplies: ``multiplies(dtype, device)``: whether layers in a half-precision dtype shall
            multiply arrays of that dtype as they are, since the device adds such products in
            float32 and is faster so. Without it they are computed in float32 and rounded once.
        wide_matmul: ``wide_matmul(x1, x2)`` is `matmul` of half-precision arrays, with its sums as
            they are, in float32. With it the written formula multiplies half precision too.
        linear: ``linear(x, matrix, bias)`` is ``x . matrix + bias`` of (N, D) and (D, W).
        softmax: ``softmax(x)`` over the last axis, of finite numbers.
        exp_and_sum: ``exp_and_sum(x, peak)`` is ``exp(x - peak)`` and its sums over the last axis,
            kept as 1; it may write into `x`.
        known_padding: ``known_padding(mask)``: the booleans `mask` (B, S) as an array of NumPy's,
            and how many multiplications must be spared for each group of rows that is then
            computed by itself, infinitely many where gradients may be asked for; None where the
            values of the mask are not at hand. The backend's arrays take ``x[a:b] = y``.
        is_differentiated: ``is_differentiated(x)``: whether a gradient of `x` may be asked for.
        initialize: ``initialize(function, shape, dtype, seed)`` is what an initialiser in the
            style of the framework's users gives; `seed` has 31 bits.
        initializer_style: "key" for ``f(key, shape, dtype)``, "in place" for ``f(array)``.
    """

    array_key: Callable[[Array], Hashable] | None = None
    is_tracing: Callable[[], bool] | None = None
    constants: Function | None = None
    compile: Function | None = None
    has_values: Callable[[Array], bool] | None = None
    write_slots: Function | None = None
    writes_in_place: bool = False
    take_rows: Function | None = None
    compiles_writes: Callable[[], bool] | None = None
    is_inference: Callable[[], bool] | None = None
    choose: Function | None = None
    resized: Function | None = None
    seed_array: Callable[[int], Array] | None = None
    draw_seed_like: Callable[[Array, bool], Any] | None = None
    vjp: Function | None = None
    keep_mask: Function | None = None
    chunk_size: Callable[[Any], int | None] | None = None
    bitwise_and_inplace: Function | None = None
    bitwise_xor_inplace: Function | None = None
    tile_size: Callable[[Any], int] | None = None
    loop: Function | None = None
    eager_loop: bool = False
    narrow: Function | None = None
    fused_attention: Function | None = None
    fused_window: Callable[[Any, Any], bool] | None = None
    fused_sinks: bool = False
    why_not_fused: Callable[[Any, Any], str | None] | None = None
    mixed_dtype: Callable[[Array], Any] | None = None
    multiplies: Callable[[Any, Any], bool] | None = None
    wide_matmul: Function | None = None
    linear: Function | None = None
    softmax: Callable[[Array], Array] | None = None
    exp_and_sum: Function | None = None
    known_padding: Callable[[Array], tuple[np.ndarray, float] | None] | None = None
    is_differentiated: Callable[[Array], bool] | None = None
    initialize: Function | None = None
    initializer_style: str | None = None

    def __post_init__(self) -> None:
        for name, other in TOGETHER:
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ConfigError(
                    f"A backend that has the capability `{name}` needs `{other}` too. "
                    f"Received: {', '.join(self.names) or 'none'}. Pass both, or neither."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the capabilities that are there."""
        fields = dataclasses.fields(self)
        return tuple(f.name for f in fields if getattr(self, f.name) not in (None, False))
