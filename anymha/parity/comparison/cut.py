"""Large cases cut to a smaller one: stages and causes need a few positions, not all.

Stages in float64, gradients and the search for causes take time and memory with the square of the
length. They are computed for the first sequences and positions; the output alone is then compared
at the full length, which shows mistakes that short sequences do not have.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from anymha.parity.stages.trace import POSITIONS, SEGMENTS, Request

LARGEST = 1 << 15
"""The most pairs of queries and keys, over the batch, of a case that is compared whole."""

SMALL = 1 << 13
"""How many of those pairs the smaller case has."""

LONGEST = 1 << 23
"""The most of those pairs for which outputs are compared at the full length."""

BATCH = 2


def cut(request: Request) -> Request | None:
    """The request for its first sequences and positions; None where it is small enough."""
    query, value, _ = request.three
    if query.ndim != 3 or query.shape[0] * query.shape[1] * value.shape[1] <= LARGEST:
        return None
    batch = min(BATCH, query.shape[0])
    queries = min(query.shape[1], math.isqrt(SMALL // batch))
    keys = min(value.shape[1], SMALL // (batch * queries))
    # Under the causal rule the last query still sees as far as its offset says.
    keys = max(
        keys, min(value.shape[1], queries + int(np.max(request.call.get("query_offset", 0))))
    )
    if set(request.inputs) == {"query"}:
        keys = queries
    return _part(request, batch, queries, keys)


def sequences(request: Request) -> Request | None:
    """The request for its first sequences, at full length; None where even that is too large."""
    query, value, _ = request.three
    batch = min(BATCH, query.shape[0])
    if batch * query.shape[1] * value.shape[1] > LONGEST:
        return None
    return _part(request, batch, query.shape[1], value.shape[1])


def words(request: Request, part: Request) -> str:
    """What was cut, in words."""
    if request.three[0].shape == request.three[1].shape:
        sizes = [r.inputs["query"].shape[:2] for r in (part, request)]
        return f"{sizes[0]} of {sizes[1]} (batch, length)"
    sizes = [(r.inputs["query"].shape[:2], r.three[1].shape[:2]) for r in (part, request)]
    return f"queries {sizes[0][0]} of {sizes[1][0]} and keys {sizes[0][1]} of {sizes[1][1]}"


def _part(request: Request, batch: int, queries: int, keys: int) -> Request:
    lengths = {"query": queries, "value": keys, "key": keys,
               "query_mask": queries, "value_mask": keys, "key_mask": keys,
               "segment_ids": queries, "key_segment_ids": keys,
               "positions": queries, "key_positions": keys}  # fmt: skip

    def own(name: str, array: Any) -> Any:
        if name in lengths:
            own = slice(lengths[name])
            return array[own] if array.ndim == 1 else array[:batch, own]
        sizes = [batch, None, queries, keys][-array.ndim :] if array.ndim != 3 else [
            batch if name == "attention_mask" else None, queries, keys]  # fmt: skip
        return array[tuple(slice(n) for n in sizes)]

    bias, call = request.bias, dict(request.call)
    offset = call.get("query_offset")
    if isinstance(offset, np.ndarray) and offset.ndim:
        call["query_offset"] = offset[:batch]
    call |= {name: own(name, call[name]) for name in (*SEGMENTS, *POSITIONS) if name in call}
    return dataclasses.replace(
        request,
        inputs={name: own(name, array) for name, array in request.inputs.items()},
        masks={name: own(name, array) for name, array in request.masks.items()},
        bias=None if bias is None else own("attention_bias", bias),
        call=call,
        originals={name: own(name, array) for name, array in request.originals.items()},
    )
