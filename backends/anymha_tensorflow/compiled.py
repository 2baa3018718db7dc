"""Calls compiled by `tf.function`: a program for each shape, or one for all lengths of small calls.

Tracing a program takes a hundred times as long as running it. Where the lengths vary, a program
that does not know them serves all calls that are so small that it may hold all logits at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from anymha.layer.cached import PREFIX

Tensors = Mapping[str, Any]

FEW = 3
"""So many shapes have programs of their own; after them the lengths count as varying."""

OFTEN = 16
"""After so many calls of one shape it has a program of its own all the same."""

MOST = 64
"""How many programs are kept of one kind; each takes a megabyte or two."""


class CompiledCall:
    """A function of a dict of tensors, compiled; names with a dot are those of weights.

    Args:
        function: The function; what it does follows from dtypes and shapes.
        pairs: How many pairs of a query and a key, B * T * S, a call may have that a program
            without lengths serves.
    """

    def __init__(self, function: Callable[[Tensors], Any], pairs: int) -> None:
        self._eagerly = function
        self._most_pairs = pairs
        self._function = tf.function(function, autograph=False)
        self._programs: dict[Any, Any] = {}
        self._without_lengths: dict[Any, Any] = {}
        self._calls: dict[Any, int] = {}

    def __call__(self, arrays: Tensors) -> Any:
        """The results of the function."""
        if tf.config.functions_run_eagerly():
            return self._function(arrays)
        # `tf.function` itself would look at each array in Python again.
        shapes = tuple([(name, x.dtype, tuple(x.shape)) for name, x in arrays.items()])
        program = self._programs.get(shapes)
        return (self._find(shapes, arrays) if program is None else program)(arrays)

    def _find(self, shapes: Any, arrays: Tensors) -> Any:
        calls = self._calls.get(shapes, 0) + 1
        varying = len(self._programs) >= FEW and calls < OFTEN
        varying &= 0 <= _pairs(arrays) <= self._most_pairs
        for kept, most in (
            (self._programs, MOST),
            (self._without_lengths, MOST),
            (self._calls, 4 * MOST),
        ):
            if len(kept) >= most:
                kept.clear()
        # A program has the variables of one replica, and gives those of the others no gradients.
        if any(isinstance(x, tf.distribute.DistributedValues) for x in arrays.values()):
            self._programs[shapes] = self._eagerly
            return self._eagerly
        if not varying:
            self._programs[shapes] = self._function.get_concrete_function(arrays)
            return self._programs[shapes]
        self._calls[shapes] = calls
        specs = {name: _spec(name, x) for name, x in arrays.items()}
        kind = tuple([(n, s.dtype, tuple(s.shape)) for n, s in specs.items()])
        if kind not in self._without_lengths:
            self._without_lengths[kind] = self._function.get_concrete_function(specs)
        return self._without_lengths[kind]


def _pairs(arrays: Tensors) -> int:
    """The number of pairs B * T * S, or more where there are several batch axes; -1 if unknown."""
    query = arrays.get("query")
    if query is None:
        return -1
    value = arrays.get("value", query)
    return math.prod(query.shape[:-1]) * math.prod(value.shape[1:-1])


def _spec(name: str, x: Any) -> Any:
    """A weight itself; of another array its dtype, its features, and its axes of length 1.

    The arrays of a cache keep their shapes, which are those of all calls with it.
    """
    if "." in name:
        return x
    if name.startswith(PREFIX) or not x.shape.rank:
        return tf.TensorSpec(x.shape, x.dtype)
    *lengths, last = x.shape
    if name in ("query", "key", "value"):
        return tf.TensorSpec((*[None] * len(lengths), last), x.dtype)
    return tf.TensorSpec([1 if n == 1 else None for n in x.shape], x.dtype)
