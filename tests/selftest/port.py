"""A port of the layer, step by step in any framework, into which faults can be injected.

It is written apart from the layer, the oracle and the catalogue: the search for mistakes is not
tested with the code that makes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.attention.dropout import Dropout, rate_threshold
from anymha.parity.oracle.cases import Arrays
from anymha.parity.oracle.recipe import Section

RATE = 0.3
"""The rate of a dropout that was left on."""


@dataclass
class Port:
    """A function of query, value and key, to be compared.

    Args:
        ops: The framework.
        weights: Canonical weights in NumPy.
        wrong: The faults in it, by the names of `tests.selftest.injected_faults`.
        reports_stages: Whether it reports its stages, or returns the output and the scores alone.
        window: Its window.
        dropout: Its share of dropped probabilities.
        sections: The options of the attention that it has.
    """

    ops: Any
    weights: Arrays
    wrong: Collection[str] = ()
    reports_stages: bool = True
    window: int | None = None
    dropout: float = 0.0
    sections: Sequence[Section] = ()
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    places: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        *,
        attention_mask: Any = None,
        attention_bias: Any = None,
        use_causal_mask: bool = False,
        query_offset: int = 0,
        segment_ids: Any = None,
        key_segment_ids: Any = None,
        positions: Any = None,
        key_positions: Any = None,
        training: bool = False,
        seed: int = 0,
    ) -> Any:
        """The stages by name, or output and scores."""
        ops, wrong = self.ops, self.wrong
        value = query if value is None else value
        key = value if key is None else key
        self.places = self._numbers(query=positions, key=key_positions)
        if "positions not restarted" in wrong:
            self.places = {}
        if "positions of the first sequence" in wrong:
            self.places = {name: own[:1] for name, own in self.places.items()}
        if "key positions ignored" in wrong:
            self.places = {"query": self.places["query"]}
        if "key and value exchanged" in wrong:
            key, value = value, key
        if "memory of the first sequence" in wrong:
            key, value = (ops.concat([x[:1]] * x.shape[0], axis=0) for x in (key, value))
        if "batch and time exchanged" in wrong:
            query, key, value = (ops.permute_dims(x, (1, 0, 2)) for x in (query, key, value))
        dtype = query.dtype
        for narrow in ("float32", "bfloat16"):
            if narrow in wrong:
                query, key, value = (
                    ops.astype(ops.astype(x, ops.dtype(narrow)), dtype) for x in (query, key, value)
                )
        if "inputs normalized" in wrong:
            query, key, value = (self._normalized(x) for x in (query, key, value))
        if "inputs scaled" in wrong:
            query, key, value = (3.0 * x for x in (query, key, value))
        if "positions added" in wrong:
            query, key, value = (self._placed(x) for x in (query, key, value))
        q, k, v = (self._heads(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value")))
        for pairs in ("rotary halves", "rotary pairs"):
            if pairs in wrong:
                q, k = self._rotated(q, pairs), self._rotated(k, pairs)
        self.inputs = {"query": query, "value": value, "key": key}
        q, k, v = (self._with("query", q), self._with("key", k), self._with("value", v))
        if "values cut at a half" in wrong:
            v = self._of_numbers(v, lambda x: np.clip(x, -0.5, 0.5))
        if "keys in whole numbers" in wrong:
            k = self._of_numbers(k, lambda x: np.clip(np.round(x * 64), -128, 127) / 64)
        if "keys averaged by group" in wrong:
            mean = [(k[:, :, h : h + 1] + k[:, :, h + 1 : h + 2]) / 2 for h in (0, 2)]
            k = ops.concat([mean[0], mean[0], mean[1], mean[1]], axis=2)
        self.projected = q
        stages = {"query": q, "key": k, "value": v}
        group = q.shape[2] // k.shape[2]
        keys, values = self._repeated(k, group), self._repeated(v, group)

        q, keys, values = (ops.permute_dims(x, (0, 2, 1, 3)) for x in (q, keys, values))
        logits = ops.matmul(q * self.scale, ops.permute_dims(keys, (0, 1, 3, 2)))
        if "scale by the logarithm of the position" in wrong:
            grown = np.log(np.arange(1, logits.shape[2] + 1)) / np.log(logits.shape[3])
            logits = logits * ops.from_numpy(grown[:, None].astype(np.float32))
        logits = self._with("logits", logits)
        stages["logits"] = logits
        raw = logits
        if attention_bias is not None and "bias of the heads reversed" in wrong:
            heads = range(attention_bias.shape[0])
            attention_bias = ops.concat([attention_bias[h : h + 1] for h in reversed(heads)])
        if attention_bias is not None and "bias left out" not in wrong:
            logits = logits + attention_bias * (2.0 if "bias doubled" in wrong else 1.0)
        logits = self._with("biased_logits", logits)
        seen = self._seen(attention_mask, use_causal_mask, query_offset, logits)
        ids = self._numbers(query=segment_ids, key=key_segment_ids)
        if ids and "segments ignored" not in wrong:
            seen = ops.logical_and(seen, ops.from_numpy(self._of_segments(**ids)))
        if "mask added" in wrong:
            number = ops.astype(self._mask(attention_mask), dtype)
            logits = logits + number
        hidden = -5.0 if "hidden logits filled" in wrong else -math.inf
        masked = self._with("masked_logits", ops.where(seen, logits, hidden))
        stages["masked_logits"] = self.masked_logits = masked
        scores = self._with("probabilities", self._softmax(masked, raw))
        stages["probabilities"] = scores
        kept = scores
        if "dropout left on" in wrong:
            keep = ops.from_numpy(self.rng.random(tuple(scores.shape)) >= RATE)
            kept = ops.where(keep, scores / (1 - RATE), 0.0)
        if training and self.dropout and "dropout does not act" not in wrong:
            drop = Dropout(rate_threshold(self.dropout), seed)
            factor = 1.0 if "dropout not scaled" in wrong else drop.factor
            keep = drop.keep(ops, tuple(scores.shape), like=scores)
            kept = ops.where(keep, scores * factor, 0.0)
        stages["dropped_probabilities"] = kept
        self.shares, self.values = kept, values
        if "probabilities transposed" in wrong:
            kept = ops.permute_dims(kept, (0, 1, 3, 2))
        context = ops.permute_dims(ops.matmul(kept, values), (0, 2, 1, 3))
        if "attention over the heads" in wrong:
            rows = ops.matmul(stages["query"] * self.scale, ops.permute_dims(k, (0, 1, 3, 2)))
            weights = ops.exp(rows)
            context = ops.matmul(weights / ops.sum(weights, axis=-1, keepdims=True), v)
        if "heads merged without exchange" in wrong:
            shape = tuple(context.shape)
            context = ops.reshape(ops.permute_dims(context, (0, 2, 1, 3)), shape)
        if "heads averaged" in wrong:
            mean = ops.sum(context, axis=2, keepdims=True) / context.shape[2]
            context = ops.concat([mean] * context.shape[2], axis=2)
        if "query left in" in self.wrong:
            context = context + stages["query"]
        context = self._with("context", context)
        stages["context"] = context
        output = self._with("output", self._output(context))
        if "output reversed" in wrong:
            places = [output[:, i : i + 1] for i in reversed(range(output.shape[1]))]
            output = ops.concat(places, axis=1)
        if "batch and time exchanged" in wrong:
            output = ops.permute_dims(output, (1, 0, 2))
        returned = scores
        if "scores averaged" in wrong:
            returned = ops.sum(scores, axis=1, keepdims=False) / scores.shape[1]
        if "scores after dropout" in wrong:
            returned = kept
        if "batch and time exchanged" in wrong:
            return output
        return (
            {**stages, "output": output, "scores": returned}
            if self.reports_stages
            else (output, returned)
        )

    def _with(self, place: str, array: Any) -> Any:
        """An array as the options change it."""
        orders = {"norm on the other side of rotary", "alibi before the softcap"}
        other_side = orders & {*self.wrong}
        for section in self.sections[::-1] if other_side else self.sections:
            array = section.ported(self.ops, place, array, self)
        return array

    def _heads(self, x: Any, name: str, again: bool = False) -> Any:
        """(B, T, H, d)."""
        ops = self.ops
        kernel = self.weights[f"{name}.kernel"]
        _, heads, width = kernel.shape
        flat = ops.from_numpy(np.ascontiguousarray(kernel.reshape(kernel.shape[0], -1)))
        y = ops.tensordot(x, flat, axes=1)
        bias = self.weights.get(f"{name}.bias")
        if bias is not None and f"{name} bias left out" not in self.wrong:
            factor = 2.0 if f"{name} bias doubled" in self.wrong else 1.0
            factor = -1.0 if f"{name} bias subtracted" in self.wrong else factor
            if name == "query" and "query scaled before its bias" in self.wrong:
                factor /= self.scale
            y = y + ops.from_numpy(np.ascontiguousarray(bias.reshape(-1))) * factor
        if f"{name} projected twice" in self.wrong and not again:
            return self._heads(y, name, again=True)
        if f"{name} activated" in self.wrong:
            y = ops.where(y > 0, y, 0.0)
        batch, length, _ = y.shape
        if "heads split without exchange" in self.wrong:
            split = ops.reshape(y, (batch, heads, length, width))
            return ops.permute_dims(split, (0, 2, 1, 3))
        return ops.reshape(y, (batch, length, heads, width))

    def _of_numbers(self, x: Any, function: Any) -> Any:
        """What a function of NumPy's makes of an array."""
        own = self.ops.to_numpy(x)
        return self.ops.from_numpy(function(own).astype(own.dtype))

    def _normalized(self, x: Any) -> Any:
        """A layer norm without weights."""
        ops, width = self.ops, x.shape[-1]
        apart = x - ops.sum(x, axis=-1, keepdims=True) / width
        variance = ops.sum(apart * apart, axis=-1, keepdims=True) / width
        return apart / ops.sqrt(variance + 1e-5)

    def _placed(self, x: Any) -> Any:
        """With the sines and cosines of positions, side by side."""
        _, length, width = x.shape
        angle = np.outer(np.arange(length), 1e4 ** (-np.arange(0, width, 2) / width))
        table = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, width)
        return x + self.ops.from_numpy(table.astype(self.ops.to_numpy(x).dtype))

    def _repeated(self, x: Any, group: int) -> Any:
        """Key or value heads for every query head."""
        if group == 1:
            return x
        ops, (batch, length, shared, width) = self.ops, x.shape
        if "grouped heads tiled" in self.wrong:
            return ops.concat([x] * group, axis=2)
        many = ops.stack([x] * group, axis=3)
        return ops.reshape(many, (batch, length, shared * group, width))

    def _rotated(self, x: Any, kind: str) -> Any:
        ops, (batch, length, heads, width) = self.ops, tuple(x.shape)
        half = width // 2
        angle = np.outer(np.arange(length), 10_000.0 ** (-np.arange(half) / half))
        cos, sin = (
            ops.from_numpy(f(angle)[:, None, :].astype(ops.to_numpy(x).dtype))
            for f in (np.cos, np.sin)
        )
        last = 3 if kind == "rotary halves" else 4
        parts = (2, half) if kind == "rotary halves" else (half, 2)
        both = ops.reshape(x, (batch, length, heads, *parts))
        one, two = (both[..., 0, :], both[..., 1, :]) if last == 3 else (both[..., 0], both[..., 1])
        turned = [one * cos - two * sin, one * sin + two * cos]
        return ops.reshape(ops.stack(turned, axis=last), (batch, length, heads, width))

    @property
    def scale(self) -> float:
        """The factor of the products of queries and keys."""
        width, value_width = (self.weights[f"{n}.kernel"].shape[2] for n in ("query", "value"))
        factors = {
            "scale missing": 1.0,
            "norm of scaled queries": 1.0,
            "scale twice": 1 / width,
            "scale by the model's width": 1 / math.sqrt(self.weights["query.kernel"].shape[0]),
            "scale by the value's width": 1 / math.sqrt(value_width),
        }
        own = [factor for name, factor in factors.items() if name in self.wrong]
        return own[0] if own else 1 / math.sqrt(width)

    def _mask(self, mask: Any) -> Any:
        """With all axes."""
        ops, rank = self.ops, len(mask.shape)
        shape = tuple(mask.shape)
        if rank == 2:
            return ops.reshape(mask, (1, 1, *shape))
        if rank == 3 and "mask of another sequence" in self.wrong:
            mask = ops.concat([mask[1:], mask[:1]], axis=0)
        if rank == 3 and "mask of the heads" in self.wrong:
            return ops.reshape(mask, (1, *shape))
        return ops.reshape(mask, (shape[0], 1, *shape[1:])) if rank == 3 else mask

    def _seen(self, mask: Any, causal: bool, offset: int, logits: Any) -> Any:
        ops, wrong = self.ops, self.wrong
        queries, keys = logits.shape[2:]
        i, j = np.arange(queries)[:, None], np.arange(keys)[None]
        shift = 0 if "offset ignored" in wrong else offset
        if "offset taken off" in wrong:
            shift = -offset
        if "other corner" in wrong:
            shift += keys - queries
        seen = np.ones((1, 1, queries, keys), bool)
        if (causal and "causal ignored" not in wrong) or "causal not asked for" in wrong:
            distance = j - i - shift
            late = 1 if "next key seen" in wrong else -1 if "own key not seen" in wrong else 0
            rule = distance >= 0 if "causal reversed" in wrong else distance <= late
            rule = j // 3 <= (i + shift) // 3 if "causal by blocks" in wrong else rule
            seen = seen & (rule | (j < 3) if "the first keys seen by all" in wrong else rule)
        if self.window is not None and "window ignored" not in wrong:
            size = self.window + ("window wider" in wrong) - ("window narrower" in wrong)
            size *= 1 + ("window twice as wide" in wrong)
            near = np.abs(j - i - shift) < size
            if "window open to the right" in wrong:
                near = i + shift - j < size
            if "the first keys seen beside the window" in wrong:
                near = near | (j < 2)
            if "window inverted" in wrong:
                near = ~near
            if "window by blocks" in wrong:
                near = (i + shift) // size == j // size
            seen = seen & near
            if "window of one side" in wrong:
                seen = seen & (j <= i + shift)
        if "window not asked for" in wrong:
            seen = seen & (np.abs(j - i) < 4)
        own = j == i + shift
        seen = ops.from_numpy(seen & ~own if "own key hidden" in wrong else seen)
        if mask is None or "mask ignored" in wrong or "mask added" in wrong:
            return seen
        mask = self._mask(mask)
        if "lengths one short" in wrong:
            end = ops.from_numpy(np.zeros((*mask.shape[:-1], 1), bool))
            mask = ops.logical_and(mask, ops.concat([mask[..., 1:], end], axis=-1))
        if "mask transposed" in wrong:
            mask = ops.permute_dims(mask, (0, 1, 3, 2))
        if "mask inverted" in wrong:
            mask = ops.logical_and(ops.from_numpy(np.ones((1, 1, 1, 1), bool)), mask == False)  # noqa: E712
        seen = ops.logical_and(seen, mask)
        shown = ops.from_numpy(own & ("own key shown" in wrong))
        return ops.where(shown, shown, seen)

    def _numbers(self, **arrays: Any) -> dict[str, np.ndarray]:
        """Those integers that are there, in NumPy."""
        return {n: np.asarray(x) for n, x in arrays.items() if x is not None}

    def _of_segments(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """(B, 1, T, S) booleans."""
        wrong, rows, columns = self.wrong, query[:, None, :, None], key[:, None, None, :]
        if "segment ids shifted" in wrong:
            columns = np.roll(columns, 1, 3)
        if "lengths of key segments reversed" in wrong:
            lengths = np.bincount(key[0][key[0] >= 0])
            own = np.repeat(np.arange(len(lengths)), lengths[::-1])
            columns = np.pad(own, (0, key.shape[1] - len(own)), constant_values=-1)
        if "lower segments seen" in wrong:
            return (rows >= columns) & (columns >= 0)
        if "segments of the queries for the keys" in wrong:
            last = np.minimum(np.arange(key.shape[1]), query.shape[1] - 1)
            columns = query[:, None, None, last]
        if "segments two and two" in wrong:
            return (rows // 2 == columns // 2) & (columns >= 0)
        if "padding of segments seen" in wrong:
            return rows == columns
        if "last segment left out" in wrong:
            columns = np.where(columns == columns.max(-1, keepdims=True), -1, columns)
        return (rows == columns) & (columns >= 0)

    def _softmax(self, logits: Any, raw: Any) -> Any:
        ops, wrong = self.ops, self.wrong
        axis = 2 if "softmax over queries" in wrong else 1 if "softmax over heads" in wrong else -1
        if "no softmax" in wrong:
            return ops.where(logits > -math.inf, logits, 0.0)
        peak = ops.max(logits, axis=axis, keepdims=True)
        empty = peak == -math.inf
        safe = ops.where(empty, 0.0, logits) if "rows NaN" not in wrong else logits
        peak = ops.where(empty, 0.0, peak) if "rows NaN" not in wrong else peak
        weights = ops.exp(safe - peak)
        more = 0.01 if "sum with an epsilon" in wrong else 0.0
        if "zeros before the first key" in wrong:
            reach = (self.window or 1) - 1 - np.arange(logits.shape[2])[:, None]
            more = ops.from_numpy(np.maximum(reach, 0).astype(np.float32)) * ops.exp(-1.0 * peak)
        even = weights / (ops.sum(weights, axis=axis, keepdims=True) + more)
        if "rows NaN" in wrong or "rows mean" in wrong:
            return even
        if "rows unmasked" in wrong:
            top = ops.exp(raw - ops.max(raw, axis=-1, keepdims=True))
            return ops.where(empty, top / ops.sum(top, axis=-1, keepdims=True), even)
        if "rows the first key" in wrong:
            first = ops.from_numpy(np.arange(logits.shape[3]) == 0)
            return ops.where(empty, ops.where(first, 0.0 * weights + 1.0, 0.0), even)
        if "last head even" in wrong:
            ones = ops.where(safe > -math.inf, 0.0 * weights + 1.0, 0.0)
            mean = ones / ops.sum(ones, axis=-1, keepdims=True)
            even = ops.concat([even[:, :-1], mean[:, -1:]], axis=1)
        return ops.where(empty, 0.0, even)

    def _output(self, context: Any) -> Any:
        ops, kernel = self.ops, self.weights["output.kernel"]
        heads, width, features = kernel.shape
        if "heads merged late" in self.wrong:
            context = ops.permute_dims(context, (0, 2, 1, 3))
            context = ops.reshape(context, (context.shape[0], -1, heads, width))
        if "output by the first head" in self.wrong:
            kernel = np.repeat(kernel[:1], heads, axis=0)
        batch, length, *_ = context.shape
        y = ops.reshape(context, (batch, length, heads * width))
        if "output left out" in self.wrong:
            return y
        flat = np.ascontiguousarray(kernel.reshape(heads * width, features))
        y = ops.tensordot(y, ops.from_numpy(flat), axes=1)
        bias = self.weights.get("output.bias")
        if bias is None or "output bias left out" in self.wrong:
            return y
        often = heads if "output bias for each head" in self.wrong else 1
        y, heads_alone = y + ops.from_numpy(bias) * float(often), y
        if "rows without the output's bias" in self.wrong:
            return ops.where(heads_alone == 0.0, 0.0, y)
        return y
