"""The oracle's answer to a problem, from the written meaning alone.

It makes one dense mask (B, H, T, S) out of every rule, folds N-D inputs by `numpy.moveaxis`, and
draws dropout in uint32; nothing here comes from the layer's own code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anymha.parity.cases import Arrays, Problem, numpy_dtype
from anymha.parity.oracle import Truth, attention_oracle


def expected(problem: Problem) -> Truth:
    """Output, scores and gradients in float64, in the shapes of the layer's results."""
    config = problem.case.config
    query = problem.inputs["query"]
    rank = query.ndim
    named: Any = config.attention_axes or range(1, rank - 1)
    attention = [axis % rank for axis in named]
    batch = [axis for axis in range(rank - 1) if axis not in attention]
    order = [*batch, *attention]
    b = len(batch)
    batches, t = [query.shape[i] for i in batch], [query.shape[i] for i in attention]
    s = [_three(problem)["value"].shape[i] for i in attention]
    count = math.prod(batches)

    def folded(array: np.ndarray, lengths: list[int]) -> np.ndarray:
        front = np.moveaxis(array, order, range(len(order)))
        return front.reshape(count, math.prod(lengths), -1)

    full = (*batches, config.num_heads, *t, *s)
    flat = (count, config.num_heads, math.prod(t), math.prod(s))
    allowed = np.ones(full, bool)
    for name, mask in problem.masks.items():
        allowed &= _spread(name, mask, b, len(t), len(s))
    allowed = allowed.reshape(flat) & _by_position(problem, flat)
    rounded = _as_computed(problem)
    x = {n: folded(a, s if n != "query" else t) for n, a in _three(problem, rounded).items()}
    for name in ("value_mask", "key_mask"):
        if name in problem.masks:
            seen = problem.masks[name].reshape(count, -1, 1)
            x |= {n: np.where(seen, x[n], 0) for n in ("value", "key")}
    bias = rounded.get("attention_bias")
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias, np.float64), full).reshape(flat)

    kernel = problem.weights["output.kernel"]
    weights = {n: rounded[n] for n in problem.weights}
    weights["output.kernel"] = weights["output.kernel"].reshape(*kernel.shape[:2], -1)
    if "output.bias" in weights:
        weights["output.bias"] = weights["output.bias"].reshape(-1)
    truth = attention_oracle(
        weights,
        x,
        scale=1 / math.sqrt(config.key_dim) if config.scale is None else config.scale,
        allowed=allowed,
        bias=bias,
        kept=_kept(problem, flat),
        d_output=folded(problem.d_output.reshape(*query.shape[:-1], -1), t),
        d_scores=problem.d_scores.reshape(flat),
    )

    def unfolded(array: np.ndarray, lengths: list[int], features: tuple[int, ...]) -> np.ndarray:
        back = array.reshape(*batches, *lengths, -1)
        back = np.moveaxis(back, range(len(order)), order)
        return back.reshape(*back.shape[: len(order)], *features)

    def shaped(arrays: Arrays) -> Arrays:
        arrays = {n: a for n, a in arrays.items() if n not in ("output", "scores")}
        for name in ("query", "value", "key"):
            lengths = t if name == "query" else s
            arrays[name] = unfolded(arrays[name], lengths, (x[name].shape[-1],))
        if problem.case.value is None:
            arrays["query"] = arrays["query"] + arrays.pop("value") + arrays.pop("key")
        if bias is not None:
            given = problem.inputs["attention_bias"].shape
            arrays["attention_bias"] = _summed(arrays["attention_bias"].reshape(full), given)
        weights = {n: arrays[n].reshape(w.shape) for n, w in problem.weights.items()}
        return {**arrays, **weights}

    output = unfolded(truth.output, t, kernel.shape[2:])
    magnitudes = {n: truth.magnitudes[n] for n in ("output", "scores")} | shaped(truth.magnitudes)
    scores = truth.scores.reshape(full)
    return Truth(output, scores, truth.stages, shaped(truth.gradients), magnitudes)


def _three(problem: Problem, arrays: Arrays | None = None) -> Arrays:
    """Query, value and key, each there."""
    given = problem.inputs if arrays is None else arrays
    value = given.get("value", given["query"])
    return {"query": given["query"], "value": value, "key": given.get("key", value)}


def _as_computed(problem: Problem) -> Arrays:
    """Weights and inputs rounded to the dtype in which the layer computes, in float64."""
    config = problem.case.config
    dtype = numpy_dtype(config.compute_dtype or config.dtype)
    given = {**problem.weights, **problem.inputs}
    return {name: array.astype(dtype).astype(np.float64) for name, array in given.items()}


def _spread(name: str, mask: np.ndarray, batch: int, queries: int, keys: int) -> np.ndarray:
    """A mask with an axis for each of (batch axes, heads, query axes, key axes)."""
    shape = list(mask.shape)
    if name == "query_mask":
        return mask.reshape(*shape[:batch], 1, *shape[batch:], *[1] * keys)
    if name in ("value_mask", "key_mask"):
        return mask.reshape(*shape[:batch], 1, *[1] * queries, *shape[batch:])
    own = mask.ndim - queries - keys
    if own in (0, batch):
        shape = [*(shape[:own] or [1] * batch), 1, *shape[own:]]
    return mask.reshape(shape)


def _by_position(problem: Problem, flat: tuple[int, ...]) -> np.ndarray:
    """Which keys causality and window let each query see, (B, 1, T, S)."""
    call, window = problem.case.call, problem.case.config.sliding_window
    offset = np.broadcast_to(call.get("query_offset", 0), flat[0])
    i = np.arange(flat[2])[None, :, None] + offset[:, None, None]
    j = np.arange(flat[3])[None, None, :]
    seen = np.ones((flat[0], flat[2], flat[3]), bool)
    if call.get("use_causal_mask"):
        seen &= j <= i
    if window is not None:
        seen &= np.abs(i - j) < window
    return seen[:, None]


def _kept(problem: Problem, flat: tuple[int, ...]) -> np.ndarray | None:
    """What dropout multiplies the probabilities with; see `anymha.dropout` for the generator."""
    config, call = problem.case.config, problem.case.call
    if not (call.get("training") and config.dropout):
        return None
    dropped = round(config.dropout * 65536)
    low, high = (np.uint32(word) for word in divmod(call["seed"], 2**32)[::-1])
    b, h, t, s = np.indices(flat, dtype=np.uint32)
    with np.errstate(over="ignore"):  # of scalars; uint32 wraps on purpose
        first = _mix(low + np.uint32(0x9E3779B9)) ^ high
        second = _mix(high + np.uint32(0x85EBCA6B)) ^ low
    first, second = _mix(first), _mix(second)
    for place in (b, h, t // 2):
        first, second = _mix(first + place), _mix(second ^ place)
    word = _mix(first + s, second)
    bits = np.where(t % 2 == 0, word & 0xFFFF, word >> 16)
    return (bits >= dropped) * (65536 / (65536 - dropped))


def _mix(x: np.ndarray | np.uint32, key: np.ndarray | int = 0) -> np.ndarray:
    x = np.atleast_1d(x)
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51) ^ np.asarray(key, np.uint32)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)


def _summed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return array.sum(axes, keepdims=True)
