"""The oracle's answer to a problem, from the written semantics alone.

It makes one dense mask (B, H, T, S) of all rules, folds N-D inputs by `numpy.moveaxis`, and
draws dropout in uint32; nothing here comes from the layer's own code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.framework.dtypes import accumulation_dtype
from anymha.parity.oracle.cases import Arrays, OracleProblem, axes_of, numpy_dtype, trio
from anymha.parity.oracle.features import sections_of
from anymha.parity.oracle.oracle import Truth, evaluate
from anymha.parity.oracle.recipe import Recipe
from anymha.parity.oracle.rounding import rounding_errors


@dataclass(frozen=True)
class Folded:
    """A problem with its N-D inputs folded to (B, T, D), and the way back for its results."""

    problem: OracleProblem
    recipe: Recipe  # Its recipe
    order: list[int]  # The input's axes, batch axes first, attention axes last
    batches: list[int]  # Lengths of the batch axes
    queries: list[int]  # Lengths of the query's attention axes
    keys: list[int]  # Lengths of the value's

    @property
    def full(self) -> tuple[int, ...]:
        """The shape of the scores."""
        heads = self.problem.case.config.num_heads
        return (*self.batches, heads, *self.queries, *self.keys)

    def unfolded(
        self, array: np.ndarray, lengths: list[int], features: tuple[int, ...]
    ) -> np.ndarray:
        """An array (B, T, D) with all axes where they were."""
        back = array.reshape(*self.batches, *lengths, -1)
        back = np.moveaxis(back, range(len(self.order)), self.order)
        return back.reshape(*back.shape[: len(self.order)], *features)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        features = self.problem.weights["output.kernel"].shape[2:]
        return (*self.problem.inputs["query"].shape[:-1], *features)

    def output(self, array: np.ndarray) -> np.ndarray:
        """The output (B, T, O) in the shape of the layer's."""
        return self.unfolded(array, self.queries, self.problem.weights["output.kernel"].shape[2:])

    def flat(self, output: np.ndarray) -> np.ndarray:
        """An output in the shape of the layer's as (B, T, O)."""
        axes = len(self.order)
        whole = output.reshape(*output.shape[:axes], -1)
        front = np.moveaxis(whole, self.order, range(axes))
        return front.reshape(*self.recipe.lengths[:2], -1)

    def shaped(self, arrays: Arrays) -> Arrays:
        """Gradients of the recipe in the shapes of weights, inputs and bias."""
        problem, recipe = self.problem, self.recipe
        arrays = {n: a for n, a in arrays.items() if n not in ("output", "scores")}
        for name, x in recipe.inputs.items():
            lengths = self.queries if name == "query" else self.keys
            arrays[name] = self.unfolded(arrays[name], lengths, (x.shape[-1],))
        if problem.case.value is None:
            arrays["query"] = arrays["query"] + arrays.pop("value") + arrays.pop("key")
        elif problem.inputs.get("key") is problem.inputs.get("value"):  # one array of both parts
            arrays["value"] = arrays["value"] + arrays.pop("key")
        if recipe.bias is not None:
            shape = problem.inputs["attention_bias"].shape
            arrays["attention_bias"] = _summed(arrays["attention_bias"].reshape(self.full), shape)
        weights = {n: arrays[n].reshape(w.shape) for n, w in problem.weights.items()}
        return {**arrays, **weights}


def fold(problem: OracleProblem) -> Folded:
    """The recipe of a problem, in float64."""
    config, call = problem.case.config, problem.case.call
    query = problem.inputs["query"]
    batch, attention = axes_of(config, query.ndim)
    order = [*batch, *attention]
    b = len(batch)
    batches, t = [query.shape[i] for i in batch], [query.shape[i] for i in attention]
    s = [trio(problem.inputs)[1].shape[i] for i in attention]
    count = math.prod(batches)

    def folded(array: np.ndarray, lengths: list[int]) -> np.ndarray:
        front = np.moveaxis(array, order, range(len(order)))
        return front.reshape(count, math.prod(lengths), -1)

    full = (*batches, config.num_heads, *t, *s)
    flat = (count, config.num_heads, math.prod(t), math.prod(s))
    masks = {
        name: _flattened(spread_mask(name, mask, b, len(t), len(s)), full, b, len(t))
        for name, mask in problem.masks.items()
    }
    rounded = _as_computed(problem)
    three = zip(("query", "value", "key"), trio(rounded), (t, s, s), strict=True)
    x = {name: folded(array, lengths) for name, array, lengths in three}
    for name in ("value_mask", "key_mask"):
        if name in problem.masks:
            # Finite numbers stay: they matter where a mistake ignores the mask.
            seen = problem.masks[name].reshape(count, -1, 1)
            x |= {n: np.where(seen | np.isfinite(x[n]), x[n], 0) for n in ("value", "key")}
    ids = _places(call.get("segment_ids"), batches, t)
    key_ids = _places(call.get("key_segment_ids", call.get("segment_ids")), batches, s)
    if ids is not None and key_ids is not None:
        seen = (ids[:, :, None] == key_ids[:, None, :]) & (ids[:, :, None] >= 0)
        masks["segment_ids"] = seen[:, None]
        valid = {"query": ids >= 0, "key": key_ids >= 0, "value": key_ids >= 0}
        x = {n: np.where(valid[n][..., None] | np.isfinite(a), a, 0) for n, a in x.items()}
    bias = rounded.get("attention_bias")
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias, np.float64), full).reshape(flat)
    kernel = problem.weights["output.kernel"]
    weights = {n: rounded[n] for n in problem.weights}
    weights["output.kernel"] = weights["output.kernel"].reshape(*kernel.shape[:2], -1)
    if "output.bias" in weights:
        weights["output.bias"] = weights["output.bias"].reshape(-1)
    offset = np.broadcast_to(call.get("query_offset", 0), count)
    recipe = Recipe(
        weights,
        x,
        1 / math.sqrt(config.key_dim) if config.scale is None else config.scale,
        masks,
        bool(call.get("use_causal_mask")),
        config.sliding_window,
        offset,
        bias=bias,
        kept=_kept(problem, flat),
        positions=_places(call.get("positions"), batches, t),
        key_positions=_places(call.get("key_positions"), batches, s),
        segments=ids,
        key_segments=key_ids,
        sections=sections_of(config),
        batches=tuple(batches),
    )
    return Folded(problem, recipe, order, batches, t, s)


def expected(problem: OracleProblem) -> Truth:
    """Output, scores and gradients in float64, in the shapes of the layer's results."""
    folded = fold(problem)
    recipe, full = folded.recipe, folded.full
    count, t, s = recipe.lengths
    d_output = folded.flat(problem.d_output)
    d_scores = problem.d_scores.reshape(count, recipe.heads[0], t, s)
    truth = evaluate(recipe, d_output, d_scores)

    def with_gradients(arrays: Arrays) -> Arrays:
        return {n: arrays[n] for n in ("output", "scores")} | folded.shaped(arrays)

    config = problem.case.config
    rounding = rounding_errors(recipe, d_output, d_scores, config.compute_dtype or config.dtype)
    return Truth(
        folded.output(truth.output),
        truth.scores.reshape(full),
        truth.stages,
        folded.shaped(truth.gradients),
        with_gradients(truth.magnitudes),
        with_gradients(rounding) if rounding else {},
    )


def _as_computed(problem: OracleProblem) -> Arrays:
    """Weights and inputs rounded to the dtype in which the layer computes, in float64.

    The bias is rounded to that of its sums.
    """
    config = problem.case.config
    computed = config.compute_dtype or config.dtype
    arrays = {**problem.weights, **problem.inputs}
    dtypes: Any = dict.fromkeys(arrays, computed) | {"attention_bias": accumulation_dtype(computed)}
    return {n: x.astype(numpy_dtype(dtypes[n])).astype(np.float64) for n, x in arrays.items()}


def spread_mask(name: str, mask: np.ndarray, batch: int, queries: int, keys: int) -> np.ndarray:
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


def _flattened(mask: np.ndarray, full: tuple[int, ...], batch: int, queries: int) -> np.ndarray:
    """A mask with all axes as one that broadcasts to (B, H, T, S), axes of one kind together."""
    spans = [(0, batch), (batch, batch + 1), (batch + 1, batch + 1 + queries)]
    spans.append((batch + 1 + queries, len(full)))
    wanted = [
        n if any(k != 1 for k in mask.shape[a:b]) else 1
        for a, b in spans
        for n in full[a:b]
    ]  # fmt: skip
    whole = np.broadcast_to(mask, wanted)
    return whole.reshape([math.prod(whole.shape[a:b]) for a, b in spans])


def _kept(problem: OracleProblem, flat: tuple[int, ...]) -> np.ndarray | None:
    """The factors of dropout; `anymha.attention.dropout` describes the generator."""
    config, call = problem.case.config, problem.case.call
    if not (call.get("training") and config.dropout) or call.get("seed") is None:
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


def _places(given: Any, batches: list[int], lengths: list[int]) -> np.ndarray | None:
    """Positions or segments of a call as (1 or B, length)."""
    if given is None:
        return None
    given = np.asarray(given)
    own = [1] if given.ndim == len(lengths) else batches
    return np.broadcast_to(given, (*own, *lengths)).reshape(math.prod(own), -1)


def _summed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return array.sum(axes, keepdims=True)
