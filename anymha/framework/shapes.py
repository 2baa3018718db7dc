"""Shapes, whose lengths a traced program may not know: products, broadcasting, error messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anymha.errors import ShapeError
from anymha.framework.dtypes import dtype_name
from anymha.framework.protocol import Array, Dim
from anymha.text import quoted


def check_broadcast(
    x: Array, lengths: Sequence[Dim], name: str, of_keys: Sequence[Dim] | None = None
) -> None:
    """Refuse an array whose axes are neither of these lengths nor 1, aligned at the end.

    Args:
        x: The array.
        lengths: The lengths to which it must broadcast.
        name: The argument's name.
        of_keys: The lengths of a mask of keys, which is another argument.

    Raises:
        ShapeError: with the expected and the received shape.
    """
    own = tuple(x.shape)
    fits = len(own) <= len(lengths) and all(
        not is_known(n) or not is_known(m) or n == 1 or n == m  # symbols have no `in`
        for n, m in zip(reversed(own), reversed(lengths), strict=False)
    )
    if not fits:
        cure = "Give each axis that length, or 1."
        if own == of_keys:
            cure = "Pass a mask of keys, (B, S), as `value_mask`."
        raise ShapeError(
            f"`{name}` must broadcast to shape {show(lengths)}. Received: {described(x)}. {cure}"
        )


def is_known(length: Dim) -> bool:
    """Whether a length is a number now, and not a symbol of a traced program."""
    return isinstance(length, int)


def kind_of(value: Any) -> str:
    """The type of a value, for an error message."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def received(value: Any) -> str:
    """What a value is, for an error message: the value, or an array's type, dtype and shape."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{kind_of(value)} of {described(value)}" if is_array else quoted(value)


def show(shape: Sequence[Dim]) -> str:
    """A shape for an error message; lengths not known yet are ``?``."""
    sizes = [str(n) if is_known(n) else "?" for n in shape]
    return "(" + ", ".join(sizes) + ("," if len(sizes) == 1 else "") + ")"


def described(array: Array) -> str:
    """An array's shape and dtype, for an error message."""
    return f"shape {show(array.shape)}, dtype {dtype_name(array.dtype)}"


def product(lengths: Sequence[Dim]) -> Dim:
    """The product, also of symbolic lengths."""
    return math.prod(lengths)
