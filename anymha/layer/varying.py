"""Calls of ever new lengths, by the programs of a few: positions are added, and hidden.

Where a backend compiles a program for each shape, a length that it has not seen costs a thousand
calls. Once the lengths of a layer's calls vary, a call is lengthened to the next of a few lengths:
what is added to the queries is cut off the results, what is added to the keys is masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import is_known
from anymha.layer.arguments import BY_NAME, Kind

FEW = 3
"""So many lengths have programs of their own; after them they count as varying."""

OFTEN = 16
"""After so many calls a length has a program of its own all the same."""

MOST = 512
"""Of how many lengths the calls are counted."""

_FORMS = {"query": "BT", "value": "BS", "key": "BS"}


def longer(length: Any) -> int:
    """The next length that calls are lengthened to: of 8 to an octave, at least 8 apart."""
    if length <= 1:  # a step of decoding
        return length
    step = max(8, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


class Varying:
    """How often a plan was called with which lengths."""

    def __init__(self) -> None:
        self._own: set[tuple[Dim, ...]] = set()
        self._calls: dict[tuple[Dim, ...], int] = {}

    def has_own(self, lengths: tuple[Dim, Dim, Dim]) -> bool:
        """Whether a call of these lengths B, T and S has a program of its own; counts the call."""
        if lengths in self._own:
            return True
        _, queries, keys = lengths
        if not (is_known(queries) and is_known(keys)):  # symbols of a traced program
            return True
        if (longer(queries), longer(keys)) == (queries, keys):
            return True
        calls = self._calls[lengths] = self._calls.get(lengths, 0) + 1
        if len(self._own) < FEW or calls >= OFTEN:
            if len(self._own) >= MOST:
                self._own.clear()
            self._own.add(lengths)
            return True
        if len(self._calls) >= MOST:
            self._calls.clear()
        return False


def lengthened(
    ops: Ops,
    inputs: tuple[Array, Array, Array],
    masks: Mapping[str, Array],
    reach: int | None,
) -> tuple[tuple[Array, Array, Array], dict[str, Array]] | None:
    """The inputs and the masks of a call on (B, T, D) that has more positions.

    Args:
        ops: A backend that has the capability `resized`.
        inputs: Query, value and key.
        masks: The masks and the bias by name.
        reach: How many keys the queries see at most, by their positions; None for all.

    Returns:
        Query, value and key, and the masks by name, among them one that hides the keys that are
        added; None where an array is traced, or lies where it cannot be lengthened.
    """
    resized: Any = ops.capabilities.resized
    query, value, key = inputs
    batch, queries, _ = query.shape
    keys = value.shape[1]
    lengths = {"T": longer(queries), "S": longer(keys)}
    found: dict[str, Any] = {}
    hidden = keys == lengths["S"] or (reach is not None and reach <= keys)
    for name, x in {"query": query, "value": value, "key": key, **masks}.items():
        if name in ("value", "key") and x is query:
            found[name] = found["query"]
            continue
        if name == "key" and x is value:
            found[name] = found["value"]
            continue
        form = BY_NAME[name].axes[-1][-len(x.shape) :] if name in masks else _FORMS[name]
        shape = list(x.shape)
        for axis, letter in enumerate(form):
            # An axis of one place is spread over all.
            if letter in lengths and shape[axis] == (queries if letter == "T" else keys):
                hidden |= letter == "S" and BY_NAME[name].kind is Kind.MASK
                shape[axis] = lengths[letter]
        found[name] = resized(x, tuple(shape))
        if found[name] is None:
            return None
    if not hidden:
        found["value_mask"] = resized(np.ones((batch, keys), bool), (batch, lengths["S"]))
    inputs = tuple([found.pop(name) for name in _FORMS])
    return inputs, found


def shortened(ops: Ops, results: Any, lengths: tuple[Dim, Dim, Dim]) -> Any:
    """The output (B, T, *O), or that and the scores (B, H, T, S), without added positions."""
    _, queries, keys = lengths
    if not isinstance(results, tuple):
        return _cut(ops, results, {1: queries})
    output, scores = results
    return _cut(ops, output, {1: queries}), _cut(ops, scores, {2: queries, 3: keys})


def _cut(ops: Ops, x: Array, lengths: Mapping[int, Dim]) -> Array:
    shape = tuple([lengths.get(axis, n) for axis, n in enumerate(x.shape)])
    shorter = cast(Any, ops.capabilities.resized)(x, shape)
    # What is differentiated is cut by the framework.
    return x[tuple([slice(n) for n in shape])] if shorter is None else shorter
