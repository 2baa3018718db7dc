"""Checks of single options: each gives the option in its one form, or a `ConfigError`."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from anymha.errors import AnymhaError, ArgumentError, ConfigError
from anymha.framework.shapes import received

PROJECTIONS = ("query", "key", "value", "output")


def checked_size(value: Any, argument: str) -> int:
    """`value` as an int of at least 1."""
    size = _index(value)
    if size is None or size < 1:
        raise ConfigError(f"`{argument}` must be an integer of at least 1. Received: {value!r}.")
    return size


def checked_shape(value: Any, argument: str) -> tuple[int, ...] | None:
    """`value` as a tuple of sizes, from a size or several; None stays None."""
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    found = [_index(size) for size in sizes]
    if any(size is None or size < 1 for size in found):
        raise ConfigError(
            f"`{argument}` must be an integer of at least 1, or a tuple of such. "
            f"Received: {value!r}."
        )
    return tuple(size for size in found if size is not None)


def checked_axes(value: Any, argument: str, remedy: str = "") -> tuple[int, ...] | None:
    """`value` as a tuple of different integers, from one or several; None stays None."""
    if value is None:
        return None
    axes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    found = [_index(axis) for axis in axes]
    if not found or None in found or len(set(found)) < len(found):
        raise ConfigError(
            f"`{argument}` must be an integer or a tuple of integers, each once. "
            f"Received: {value!r}.{remedy}"
        )
    return tuple(axis for axis in found if axis is not None)


def checked_biases(
    value: Any, argument: str, known: tuple[str, ...] = PROJECTIONS
) -> bool | tuple[str, ...]:
    """`value` as True, False, or a tuple of some of the `known` names in their order."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (tuple, list)) and all(name in known for name in value):
        names = tuple(name for name in known if name in value)
        return True if names == known else names or False
    raise ConfigError(
        f"`{argument}` must be True, False, or names out of {', '.join(map(repr, known))}. "
        f"Received: {value!r}."
    )


def checked_rate(value: Any, argument: str) -> float:
    """`value` as a float in [0, 1)."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < 1:
        return float(value)
    raise ConfigError(
        f"`{argument}` must be a number in [0, 1), the share that is dropped. Received: {value!r}."
    )


def checked_scale(value: Any, argument: str) -> float | None:
    """`value` as a finite float; None stays None."""
    if value is None:
        return None
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not math.isfinite(scale):
        raise ConfigError(
            f"`{argument}` must be a finite number, or None for 1/sqrt(key_dim). "
            f"Received: {value!r}."
        )
    return scale


def checked_window(value: Any, argument: str) -> tuple[int | None, int | None]:
    """`value` as (left, right), each None or an int of at least 0; None is open on both sides."""
    if value is None:
        return None, None
    sides = tuple(value) if isinstance(value, (tuple, list)) else ()
    found = [None if side is None else _index(side) for side in sides]
    bad = [
        side for side, n in zip(sides, found, strict=True) if side is not None and not _counts(n)
    ]
    if len(found) != 2 or bad:
        raise ConfigError(
            f"`{argument}` must be (left, right), each None or an integer of at least 0, the "
            f"keys visible on that side of the query's own position. Received: {value!r}."
        )
    return found[0], found[1]


def checked_seed(value: Any, argument: str) -> int | None:
    """`value` as an int; None stays None."""
    if value is None:
        return None
    seed = _index(value)
    if seed is None:
        raise ConfigError(
            f"`{argument}` must be an integer, or None to draw one. Received: {value!r}."
        )
    return seed


def checked_flag(
    value: Any, argument: str, matters: bool = True, error: type[AnymhaError] = ArgumentError
) -> bool:
    """`value`, which is True or False, of Python or of NumPy, or 0 or 1; or an array of one such.

    Args:
        value: The value.
        argument: The argument's name.
        matters: Whether an array may not be traced, which hides its value; else it is False.
        error: The error for what is none of these.

    Raises:
        AnymhaError: it is none of these.
    """
    if isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    is_one = getattr(value, "shape", None) == () and "bool" in str(getattr(value, "dtype", ""))
    if is_one:
        with suppress(Exception):  # each framework has its own for a value that is traced
            return bool(value)
        if not matters:
            return False
    cure = f"Pass {argument}=True or {argument}=False."
    if is_one:
        cure = "It is traced. Make it static, as with `static_argnames` of `jax.jit`."
    raise error(f"`{argument}` must be True or False. Received: {received(value)}. {cure}")


def checked_name(value: Any, argument: str) -> str | None:
    """`value`, a string; None stays None."""
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"`{argument}` must be a string, or None for no name. Received: {value!r}.")


def checked_choice(value: Any, choices: Sequence[str], argument: str) -> str:
    """`value`, which is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ConfigError(f"`{argument}` must be one of {listed}. Received: {value!r}.")
    return value


def _counts(number: int | None) -> bool:
    return number is not None and number >= 0


def _index(value: Any) -> int | None:
    """`value` as an int, where it is an integer and not a boolean."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
