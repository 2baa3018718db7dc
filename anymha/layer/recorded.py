"""What the core does with a backend's functions, kept as a program that does it again.

Between the products of a small call stand some two hundred Python calls: which branch, which axes,
which path. All of that follows from the kinds of the arrays (see `anymha.layer.plan`), so it is
watched once, and what is left is straight-line code of nothing but the backend's functions::

    def program(arrays):
        v0 = arrays['query.kernel']
        ..
        v12 = linear(v1, v10, v11); del v10, v11

The mathematics stays written once: the program is made of what the core did, and not beside it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from anymha.framework.protocol import Array, Ops

Program = Callable[[Mapping[str, Array]], Any]
"""Gives the results of a call from its arrays by name."""

MOST = 128
"""Of how many functions a program may consist; more of them take so long that Python does not."""


class Unrecordable(Exception):
    """What was done cannot be told by functions of arrays alone."""


class Recorded:
    """An array with a name in a program; it has the operators that the core uses."""

    __array_ufunc__ = None  # NumPy leaves its operators to this class

    def __init__(self, recorder: Recorder, value: Array, name: str) -> None:
        self.recorder, self.value, self.name = recorder, value, name

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.value.dtype

    @property
    def shape(self) -> Any:
        """The shape of the array."""
        return self.value.shape

    def __add__(self, other: Any) -> Any:
        return self.recorder.step(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self.recorder.step(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self.recorder.step(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.recorder.step(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self.recorder.step(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.recorder.step(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return self.recorder.step(operator.truediv, self, other)

    def __lt__(self, other: Any) -> Any:
        return self.recorder.step(operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return self.recorder.step(operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return self.recorder.step(operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return self.recorder.step(operator.ge, self, other)

    def __getitem__(self, index: Any) -> Any:
        return self.recorder.step(operator.getitem, self, index)


class Recorder:
    """The functions of a backend, on its arrays and on recorded ones, of which it takes notes.

    What a function gives that is no array (a shape, a reason, whether something holds) follows from
    the kinds of its arguments and is not asked again.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.lines: list[str] = []
        self.bound: dict[str, Any] = {}  # what the program names beside its own variables
        self.views: dict[str, Recorded] = {}  # by how they were made: each is made once
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.ops, name)
        if not callable(found) or isinstance(found, type):
            return found
        return lambda *args, **options: self.step(found, *args, **options)

    def named(self, value: Array, line: str) -> Recorded:
        """A new variable of the program, which `line` computes."""
        name = f"v{self.count}"
        self.count += 1
        self.lines.append(f"{name} = {line}")
        return Recorded(self, value, name)

    def step(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """``function(*args, **options)``, noted if it gives an array, or arrays in a tuple."""
        found = function(*map(plain, args), **{n: plain(x) for n, x in options.items()})
        several = isinstance(found, tuple) and any(map(self.ops.is_array, found))
        if not several and not self.ops.is_array(found):
            return found
        if len(self.lines) >= MOST:
            raise Unrecordable
        told = [self.shown(x) for x in args] + [f"{n}={self.shown(x)}" for n, x in options.items()]
        call = f"{self.constant(function)}({', '.join(told)})"
        if call in self.views:
            return self.views[call]
        if not several:
            result = self.named(found, call)
            if function in (self.ops.reshape, self.ops.permute_dims):
                self.views[call] = result
            return result
        whole = self.named(found, call)
        return tuple(self.named(x, f"{whole.name}[{i}]") for i, x in enumerate(found))

    def shown(self, x: Any) -> str:
        """An argument as the program writes it."""
        if isinstance(x, Recorded):
            return x.name
        if isinstance(x, dict):
            return "{" + ", ".join(f"{n!r}: {self.shown(one)}" for n, one in x.items()) + "}"
        if isinstance(x, (list, tuple)):
            inner = "".join(f"{self.shown(one)}, " for one in x)
            return f"[{inner}]" if isinstance(x, list) else f"({inner})"
        if callable(x) and not isinstance(x, type):
            raise Unrecordable  # a function, as the loops take it, has arrays of its own
        if self.ops.is_array(x):
            raise Unrecordable  # it came about out of sight
        if x is None or isinstance(x, (bool, int, str)):
            return repr(x)
        return repr(x) if isinstance(x, float) and math.isfinite(x) else self.constant(x)

    def constant(self, value: Any) -> str:
        """The name by which the program knows a function, or a value that stays the same."""
        for name, known in self.bound.items():
            if known is value:
                return name
        name = getattr(value, "__name__", "") if callable(value) else ""
        name = name if name.isidentifier() and name not in self.bound else f"c{len(self.bound)}"
        self.bound[name] = value
        return name

    def program(self, results: Any) -> Program:
        """The function that does again what was noted, and gives `results`."""
        given = [self.shown(x) for x in (results if isinstance(results, tuple) else (results,))]
        lines, used = [], set(given)
        for line in reversed(self.lines):
            target, *words = _words(line)
            if target not in used:
                continue
            last = sorted(set(words) - used)  # is not used any more, and let go
            used.update(words)
            lines.append(f"    {line}" + (f"; del {', '.join(last)}" if last else ""))
        returned = f"({', '.join(given)})" if isinstance(results, tuple) else given[0]
        source = "\n".join(["def program(arrays):", *reversed(lines), f"    return {returned}"])
        space = dict(self.bound)
        exec(source, space)
        return space["program"]


def _words(line: str) -> list[str]:
    """The variables in a line of a program."""
    return re.findall(r"\bv\d+\b", line)


def plain(x: Any) -> Any:
    """The array of a recorded one, also inside of a dict or a list; anything else as it is."""
    if isinstance(x, Recorded):
        return x.value
    if isinstance(x, dict):
        return {name: plain(one) for name, one in x.items()}
    return type(x)(map(plain, x)) if type(x) in (list, tuple) else x


class Replayed:
    """A function of arrays of the same kinds, from its third call on as a program.

    Args:
        ops: The backend.
        function: Takes functions in the place of `ops`, and arrays; see `record`.
    """

    def __init__(self, ops: Ops, function: Callable[[Any, Mapping[str, Any]], Any]) -> None:
        self.ops, self.function = ops, function
        self.program: Program | None = None
        self.calls = 0

    def __call__(self, arrays: Mapping[str, Array]) -> Any:
        """The results of the function."""
        if self.program is not None:
            return self.program(arrays)
        self.calls += 1
        if self.calls == 2:  # the first may be the only one of its kind
            try:
                value, self.program = record(self.ops, self.function, arrays)
                return value
            except Exception:  # cannot be told so; if it is an error, it comes again
                pass
        return self.function(self.ops, arrays)


def record(
    ops: Ops, function: Callable[[Any, dict[str, Any]], Any], arrays: Mapping[str, Array]
) -> tuple[Any, Program]:
    """``function(ops, arrays)``, and the program that gives it again for arrays of these kinds.

    Args:
        ops: A backend.
        function: Gives an array or a tuple of arrays; it must use the `ops` that it is given, and
            what it does must follow from the kinds of the arrays.
        arrays: What it takes, by name.

    Raises:
        Unrecordable: it does what is not made of the backend's functions alone.

    Example:
        >>> import anymha_numpy.ops as ops, numpy as np
        >>> value, program = record(ops, lambda ops, a: ops.exp(a["x"]) * 2, {"x": np.zeros(2)})
        >>> program({"x": np.log([3.0, 4.0])}).round(6).tolist()
        [6.0, 8.0]
    """
    recorder = Recorder(ops)
    own = {name: recorder.named(x, f"arrays[{name!r}]") for name, x in arrays.items()}
    results = function(recorder, own)
    value = tuple(map(plain, results)) if isinstance(results, tuple) else plain(results)
    return value, recorder.program(results)
