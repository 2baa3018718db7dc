"""A port of cached decoding to NumPy, as people write one, with faults that can be injected.

It keeps the keys of each row in a buffer, writes new ones after those that it holds, and reads
row by row. With a window the buffer is a ring. It shares nothing with the search for mistakes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import anymha

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "rotary": {"rotary": True},
    "alibi": {"alibi": True},
    "window": {"sliding_window": 4},
    "window, rotary": {"sliding_window": 4, "rotary": True},
    "window, alibi": {"sliding_window": 4, "alibi": True},
    "norm": {"query_key_norm": {"kind": "rms", "eps": 0.1}},
    "bfloat16": {"dtype": "bfloat16", "rotary": True},
}
"""The layers, by name."""


@dataclass(frozen=True)
class Fault:
    """A fault of the port, and the mistake that names it."""

    wrong: str  # What is wrong
    cause: str  # The name in the catalogue
    # What must be there: "rotary", "position" (rotary or ALiBi), "window", "linear" (no window),
    # "norm", "ragged" (padding), "float32", or a function: "join", "reorder", "truncate"
    needs: str = ""

    def shows(self, options: str, ragged: bool) -> bool:
        """Whether calls of a layer of these options, with padding or without, show it."""
        place = any(word in options for word in ("rotary", "alibi", "bfloat16"))
        there = {"position": place, "rotary": place and "alibi" not in options, "ragged": ragged,
                 "float32": "bfloat16" not in options, "window": "window" in options,
                 "linear": "window" not in options, "norm": "norm" in options}  # fmt: skip
        return all(there.get(need, True) for need in self.needs.split())


FAULTS = (
    Fault("attends before it writes", "stale keys"),
    Fault("returns the cache that it got", "stale keys"),
    Fault("writes no values after the prompt", "stale keys", "linear"),
    Fault("writes no keys after the prompt", "stale keys", "linear"),
    Fault("loses all values that are held", "stale keys", "linear"),
    Fault("hides its own position", "own position not seen", "linear"),
    Fault("exchanges keys and values that are held", "cached keys and values exchanged", "linear"),
    Fault("drops the first position in each call", "first positions dropped", "linear"),
    Fault("writes each call at slot 0", "cache overwritten", "linear"),
    Fault("clamps to the last slot", "cache overwritten", "linear"),
    Fault("moves a call back until it fits", "cache overwritten", "linear"),
    Fault("writes one slot late", "cache written off by one", "linear"),
    Fault("writes one slot early", "cache written off by one", "linear"),
    Fault("adds one too few to the lengths", "cache written off by one", "linear"),
    Fault("takes the mask of row 0", "mask of another row", "ragged"),
    Fault("takes the length of row 0", "mask of another row", "linear ragged"),
    Fault("sees as much as row 0 has", "mask of another row", "linear ragged"),
    Fault("positions of the longest row", "position from the batch's longest row",
          "position ragged"),
    Fault("query positions of the longest row", "position from the batch's longest row",
          "rotary ragged"),
    Fault("sees as much as the longest row has", "position from the batch's longest row",
          "linear ragged"),
    Fault("writes after the longest row", "position from the batch's longest row",
          "linear ragged"),
    Fault("holds padding", "padding held", "ragged"),
    Fault("holds padding of the prompt", "padding held", "ragged"),
    Fault("hides padding, and counts it", "padding held", "position ragged"),
    Fault("join rotates once more", "rotation after the join", "rotary join"),
    Fault("join rotates to the padded batch", "rotation after the join", "rotary join ragged"),
    Fault("rotates all that is held in each call", "cached keys rotated wrongly", "rotary"),
    Fault("holds keys without rotation", "cached keys rotated wrongly", "rotary"),
    Fault("norms what is held in each call", "cached keys normed again", "linear norm"),
    Fault("ring of one position fewer", "ring off by one", "window"),
    Fault("ring of one position more", "ring off by one", "window"),
    Fault("ring written before it is read", "ring off by one", "window"),
    Fault("ring whose empty slots are seen", "ring off by one", "window"),
    Fault("ring whose slots are positions", "ring off by one", "window position"),
    Fault("positions after the update", "positions read after the update", "position"),
    Fault("query positions after the update", "positions read after the update", "rotary"),
    Fault("positions from 0", "positions of a call begin at 0", "position"),
    Fault("query positions from 0", "positions of a call begin at 0", "position"),
    Fault("causal rule from slot 0", "positions of a call begin at 0", "linear"),
    Fault("sees all of a call", "later positions of a call seen"),
    Fault("sees empty slots", "empty slots seen", "linear"),
    Fault("sees the empty slots of a long cache", "empty slots seen", "linear"),
    Fault("reads the row before", "cache of another row"),
    Fault("reorder leaves keys and values", "cache of another row", "reorder"),
    Fault("reorder moves keys alone", "cache of another row", "reorder"),
    Fault("sees full pages alone", "last page not seen", "linear"),
    Fault("averages held and new keys", "held and new keys merged wrongly", "linear"),
    Fault("writes no values of single steps", "stale keys", "linear"),
    Fault("sees one empty slot", "empty slots seen", "linear"),
    Fault("reorder moves the other way", "cache of another row", "reorder"),
    Fault("truncate does nothing", "wrong with `truncate`", "linear truncate"),
    Fault("truncate leaves one too many", "wrong with `truncate`", "linear truncate"),
    Fault("holds the last of a call alone", "stale keys", "linear rotary"),
    Fault("holds new keys without rotation", "cached keys rotated wrongly", "linear rotary"),
    Fault("repeats the last value", "stale keys", "linear"),
    Fault("joins new positions in front", "cache in another order", "linear"),
    Fault("writes values one slot late", "cache written off by one", "linear"),
    Fault("joins new values in front", "cache in another order", "linear"),
    Fault("reads row 0 for all, its new positions too", "cache of another row", "linear"),
    Fault("holds float16", "cache in half precision", "linear float32"),
    Fault("one position for a call", "positions read after the update", "position"),
    Fault("positions from twice the length", "positions of a call counted wrongly", "position"),
    Fault("query positions at most seven", "positions of a call counted wrongly", "rotary"),
    Fault("rotates old and new keys in each call", "cached keys rotated wrongly", "linear rotary"),
    Fault("truncate takes one too many", "wrong with `truncate`", "linear truncate"),
    Fault("truncate to the length of row 0", "wrong with `truncate`", "linear truncate ragged"),
    Fault("reorder leaves lengths", "wrong with `reorder`", "linear reorder ragged"),
)  # fmt: skip
"""Every fault."""


@dataclass(frozen=True)
class Held:
    """A cache: keys and values (B, C, K, d), the position in each slot (B, C), lengths (B,)."""

    keys: np.ndarray
    values: np.ndarray
    places: np.ndarray  # -1: empty
    lengths: np.ndarray

    def rows(self, order: np.ndarray) -> Held:
        """The cache with rows in another order."""
        return Held(*(array[order] for array in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Port:
    """The port of a layer, right but for what is `wrong`."""

    layer: Any
    wrong: str = ""
    weights: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        weights = anymha.get_weights(self.layer)
        mine = {name: np.asarray(array, np.float32) for name, array in weights.items()}
        object.__setattr__(self, "weights", mine)

    def make_cache(self, batch_size: int, max_length: int) -> Held:
        """An empty one."""
        changes = {
            "clamps to the last slot": -3,
            "moves a call back until it fits": -4,
            "sees the empty slots of a long cache": 64 - max_length,
            "writes one slot late": 1,
            "writes values one slot late": 1,
            "ring of one position fewer": -1,
            "ring of one position more": 1,
        }
        window = self.layer.config.sliding_window
        size = (max_length if window is None else window) + changes.get(self.wrong, 0)
        shape = (batch_size, size, *self.weights["key.kernel"].shape[1:])
        zeros = np.zeros(shape, np.float32)
        return Held(zeros, zeros, np.full((batch_size, size), -1), np.zeros(batch_size, int))

    def step(self, x: Any, cache: Held, value_mask: Any = None) -> tuple[np.ndarray, Held]:
        """The outputs of new positions (B, t, D), and the cache that holds them too."""
        wrong, weights = self.wrong, self.weights
        q, k, v = (
            np.einsum("btd,dhk->bthk", np.asarray(x, np.float32), weights[f"{name}.kernel"])
            + weights[f"{name}.bias"]
            for name in ("query", "key", "value")
        )
        q, k = self._normed(q, "query"), self._normed(k, "key")
        valid = np.ones(x.shape[:2], bool) if value_mask is None else np.array(value_mask)
        if wrong == "takes the mask of row 0":
            valid = np.broadcast_to(valid[0], valid.shape)
        prompt, padding = not cache.lengths.any(), ~valid
        if wrong in ("holds padding", "hides padding, and counts it") or (
            wrong == "holds padding of the prompt" and prompt
        ):
            valid = np.ones_like(valid)
        new = Held(*(array.copy() for array in dataclasses.astuple(cache)))
        context = np.zeros(q.shape, np.float32)
        for row, columns in enumerate(map(np.flatnonzero, valid)):
            if columns.size:
                own = (array[row, columns] for array in (q, k, v))
                hide = padding[row, columns] & (wrong == "hides padding, and counts it")
                context[row, columns] = self._row(cache, new, row, *own, hide)
                if wrong == "holds the last of a call alone" and cache.lengths[row]:
                    length, end = cache.lengths[row], new.lengths[row]
                    for array in (new.keys, new.values, new.places):
                        array[row, length] = array[row, end - 1]
                    new.lengths[row] = length + 1
        output = np.einsum("bthv,hvo->bto", context, weights["output.kernel"])
        output = (output + weights["output.bias"]).astype(x.dtype)
        kept = wrong == "returns the cache that it got" and not prompt
        return output, cache if kept else new

    def _row(
        self, cache: Held, new: Held, row: int, q: Any, k: Any, v: Any, hide: np.ndarray
    ) -> np.ndarray:
        """The context of one row's new positions, whose keys are written into `new`."""
        wrong, size, count = self.wrong, cache.keys.shape[1], len(q)
        index, lengths = np.arange(count), cache.lengths
        length = {
            "takes the length of row 0": lengths[0],
            "writes after the longest row": lengths.max(),
        }.get(wrong, lengths[row])
        places = length + index
        queries, keys = self._positions(places, lengths, index)
        source = row - 1 if wrong == "reads the row before" else row
        if wrong == "exchanges keys and values that are held":
            cache = dataclasses.replace(cache, keys=cache.values, values=cache.keys)
            new.keys[row], new.values[row] = cache.keys[row], cache.values[row]
        if wrong == "loses all values that are held":
            new.values[row] = 0.0
        if wrong == "drops the first position in each call" and length:
            new.places[row, np.argmax(new.places[row] >= 0)] = -2
        old_keys, old_values = cache.keys[source], cache.values[source]
        if wrong == "rotates all that is held in each call":
            old_keys = new.keys[row] = self._rotated(old_keys, np.maximum(cache.places[row], 0))
        if wrong == "norms what is held in each call":
            old_keys = new.keys[row] = self._normed(old_keys, "key")
        q, turned = self._rotated(q, queries), self._rotated(k, keys)
        slots = places % size if self.layer.config.sliding_window else (
            self._slots(places, length, size))  # fmt: skip
        if wrong == "joins new positions in front":
            for own, old in ((new.keys, cache.keys), (new.values, cache.values),
                             (new.places, cache.places)):  # fmt: skip
                own[row, count : count + length] = old[row, :length]
        if not (wrong == "writes no keys after the prompt" and length):
            bare = wrong == "holds keys without rotation" or (
                wrong == "holds new keys without rotation" and length)  # fmt: skip
            new.keys[row, slots] = k if bare else turned
        if wrong == "rotates old and new keys in each call" and length:
            new.keys[row, : length + count] = self._rotated(
                new.keys[row, : length + count], np.arange(length + count)
            )
        if wrong == "joins new values in front":
            new.values[row, count : count + length] = old_values[:length]
        unwritten = wrong == "writes no values of single steps" and count == 1
        if not (wrong == "writes no values after the prompt" and length) and not unwritten:
            late = wrong == "writes values one slot late"
            new.values[row, index if wrong == "joins new values in front" else slots + late] = v
        if wrong == "repeats the last value" and length:
            new.values[row, slots] = old_values[length - 1]
        if wrong == "holds float16":
            new.keys[row, slots] = new.keys[row, slots].astype(np.float16)
            new.values[row, slots] = new.values[row, slots].astype(np.float16)
        new.places[row, slots] = np.where(hide, -2, keys)
        new.lengths[row] = length + count - (wrong == "adds one too few to the lengths")
        if self.layer.config.sliding_window:
            every = np.concatenate([old_keys, turned]), np.concatenate([old_values, v])
            marks = np.concatenate([cache.places[row], np.where(hide, -2, keys)])
            if wrong == "ring written before it is read":
                every, marks = (new.keys[row], new.values[row]), new.places[row]
                length += count
            return self._ring(q, queries, *every, marks, places, length, size)
        every_key, every_value = new.keys[row].copy(), new.values[row].copy()
        if source != row:
            every_key[:length], every_value[:length] = old_keys[:length], old_values[:length]
        if wrong in ("holds keys without rotation", "holds float16"):
            every_key[slots] = turned
        if wrong in ("repeats the last value", "holds float16"):
            every_value[slots] = v
        if wrong == "reads row 0 for all, its new positions too":
            every_key, every_value = new.keys[0], new.values[0]
        at = np.arange(size)
        seen = at <= self._last(places, length, lengths, size)[:, None]
        if wrong in ("sees empty slots", "sees the empty slots of a long cache"):
            seen = seen | (at >= length + count)
        if wrong == "sees full pages alone":
            seen = seen & (at < (places[:, None] + 1) // 3 * 3)
        if wrong == "sees one empty slot":
            seen = seen | (at == length + count)
        if wrong == "hides its own position":
            seen = seen & (at != places[:, None])
        seen = seen & (new.places[row] != -2)
        marks = np.maximum(new.places[row], 0) if "position" in wrong else at
        if wrong == "averages held and new keys" and length:
            held, brought = (
                self._attend(q, queries, every_key, every_value, marks, seen & part)
                for part in (at < length, at >= length)
            )
            return (held + brought) / np.float32(2)
        return self._attend(q, queries, every_key, every_value, marks, seen)

    def _positions(
        self, places: np.ndarray, lengths: np.ndarray, index: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of queries and keys."""
        other = {
            "positions of the longest row": lengths.max() + index,
            "positions after the update": places + len(index),
            "positions from 0": index,
            "one position for a call": places - index,
            "positions from twice the length": 2 * places - index,
            "positions at most seven": np.minimum(places, 7),
        }.get(self.wrong.removeprefix("query "), places)
        return other, places if self.wrong.startswith("query") else other

    def _slots(self, places: np.ndarray, length: int, size: int) -> np.ndarray:
        """Where new keys are written."""
        return {
            "writes each call at slot 0": places - length,
            "joins new positions in front": places - length,
            "clamps to the last slot": np.minimum(places, size - 1),
            "moves a call back until it fits": places + min(0, size - length - len(places)),
            "writes one slot late": places + 1,
            "writes one slot early": places - (length > 0),
        }.get(self.wrong, places)

    def _last(self, places: np.ndarray, length: int, lengths: np.ndarray, size: int) -> np.ndarray:
        """The last slot that each query sees."""
        index = places - length
        return {
            "attends before it writes": np.full_like(places, length - 1),
            "clamps to the last slot": np.minimum(places, size - 1),
            "sees as much as row 0 has": lengths[0] + index,
            "sees as much as the longest row has": lengths.max() + index,
            "causal rule from slot 0": index,
            "sees all of a call": np.full_like(places, places[-1]),
        }.get(self.wrong, places)

    def _ring(
        self, q: Any, queries: Any, keys: Any, values: Any, marks: Any, places: Any, length: int,
        size: int,
    ) -> np.ndarray:  # fmt: skip
        """The context with a window: of what the ring holds of `length` positions, and new keys."""
        wrong, at, window = self.wrong, np.arange(size), self.layer.config.sliding_window
        held = length - 1 - (length - 1 - at) % size  # the last position that has each slot
        every = np.concatenate([held, places])[: len(keys)]
        if wrong == "ring whose slots are positions":
            keys = keys.copy()
            keys[:size] = self._rotated(keys[:size], at - np.maximum(marks[:size], 0))
            marks = np.concatenate([at, places])
        width = size if wrong.startswith("ring of one") else window
        apart = places[:, None] - every
        seen = (every >= 0) & (apart >= 0) & (apart < width)
        if wrong == "sees all of a call":
            seen = (every >= 0) & (np.abs(apart) < width)
        elif wrong == "attends before it writes":
            seen = seen & (np.arange(len(every)) < size)
        elif wrong == "ring whose empty slots are seen":
            seen = seen | (every < 0)
        seen = seen & (marks != -2)
        if "position" not in wrong or wrong.startswith("ring of one"):
            marks = np.where(every < 0, np.arange(len(every)), every)
        marks = np.maximum(marks, 0)
        return self._attend(q, queries, keys, values, marks, seen)

    def _attend(
        self, q: Any, queries: Any, keys: Any, values: Any, places: Any, seen: Any
    ) -> np.ndarray:
        """The context (t, H, v) of queries over slots, by what each sees."""
        group = q.shape[1] // keys.shape[1]
        keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
        logits = np.einsum("thk,shk->hts", q, keys) / np.float32(np.sqrt(q.shape[-1]))
        if self.layer.config.alibi:
            slopes = 2.0 ** (-8 * np.arange(1, q.shape[1] + 1) / q.shape[1])
            apart = np.abs(queries[:, None] - places)
            logits = logits - (slopes[:, None, None] * apart).astype(np.float32)
        logits = np.where(seen, logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        shares = np.exp(logits - np.where(np.isfinite(top), top, 0))
        total = shares.sum(-1, keepdims=True)
        shares = shares / np.where(total == 0, 1, total)
        return np.einsum("hts,shv->thv", shares, values)

    def _rotated(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Heads (t, H, d) turned by their positions, in halves."""
        if not self.layer.config.rotary:
            return x
        half = x.shape[-1] // 2
        angles = places[:, None] * 10_000.0 ** (-np.arange(half) / half)
        turns = np.exp(1j * angles)[:, None]
        z = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([z.real, z.imag], -1).astype(x.dtype)

    def _normed(self, x: np.ndarray, name: str) -> np.ndarray:
        """Heads (..., d) divided by their root mean square, times the weight."""
        norm = self.layer.config.query_key_norm
        if norm is None:
            return x
        size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(norm.eps))
        return x / size * self.weights[f"{name}_norm.scale"]

    def join(self, caches: list[Held]) -> Held:
        """Caches of one row each as one."""
        joined = Held(
            *(
                np.concatenate(parts)
                for parts in zip(*map(dataclasses.astuple, caches), strict=True)
            )
        )
        if not self.wrong.startswith("join"):
            return joined
        shift = joined.lengths.max() - joined.lengths
        keys = [
            self._rotated(
                own,
                np.maximum(places, 0) if self.wrong == "join rotates once more"
                else np.full(len(places), by),
            )
            for own, places, by in zip(joined.keys, joined.places, shift, strict=True)
        ]  # fmt: skip
        return dataclasses.replace(joined, keys=np.stack(keys))

    def truncate(self, cache: Held, lengths: Any) -> Held:
        """The first positions of each row."""
        if self.wrong == "truncate does nothing":
            return cache
        more = self.wrong == "truncate leaves one too many"
        less = self.wrong == "truncate takes one too many"
        lengths = np.minimum(np.asarray(lengths) + more - less, cache.lengths)
        if self.wrong == "truncate to the length of row 0":
            lengths = np.minimum(lengths[0], cache.lengths)
        places = np.where(cache.places < lengths[:, None], cache.places, -1)
        return dataclasses.replace(cache, lengths=lengths, places=places)

    def reorder(self, cache: Held, indices: Any) -> Held:
        """Rows in another order."""
        order = np.asarray(indices)
        moved = cache.rows(order)
        if self.wrong == "reorder leaves keys and values":
            return dataclasses.replace(moved, keys=cache.keys, values=cache.values)
        if self.wrong == "reorder leaves lengths":
            return dataclasses.replace(moved, lengths=cache.lengths)
        if self.wrong == "reorder moves keys alone":
            return dataclasses.replace(moved, values=cache.values)
        if self.wrong == "reorder moves the other way":
            return cache.rows(np.argsort(order))
        return moved
