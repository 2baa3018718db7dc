"""Keys in parts, as flash attention, split keys and rings have them, that are merged wrongly.

Of a part p of the keys there are the maximum m of its logits, the sum s of their exponentials less
m, and the values that its own softmax gives. Right is the mean of these by s * exp(m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Step, context_by, softmax


@dataclass(frozen=True)
class _Parts:
    tops: np.ndarray  # (P, ..., 1); -inf where a part has no key that is seen
    sums: np.ndarray  # (P, ..., 1), each less its own maximum
    counts: np.ndarray  # (P, ..., 1), how many keys are seen
    own: np.ndarray | None  # (P, T, 1), whether the query stands in the part

    @cached_property
    def logs(self) -> np.ndarray:
        """The logarithms of the sums, -inf of none."""
        return self.tops + np.log(np.where(self.sums > 0, self.sums, 1.0))

    @cached_property
    def right(self) -> np.ndarray:
        """The right weights."""
        return softmax(self.logs, 0)

    def those(self, seen: np.ndarray) -> np.ndarray:
        """The right weights of some of the parts."""
        return softmax(np.where(seen, self.logs, -np.inf), 0)

    def number(self, at: int) -> np.ndarray:
        """Whether a part is that of a number."""
        return (np.arange(len(self.tops)) == at % len(self.tops)).reshape(-1, 1, 1, 1, 1)


def _by(weights: np.ndarray, total: np.ndarray | None = None) -> np.ndarray:
    """Weights divided by their sum, or by a total."""
    whole = weights.sum(0) if total is None else total
    return weights / np.where(whole == 0, 1.0, whole)


def _one_by_one(parts: _Parts, way: str) -> np.ndarray:
    """The weights where each part is merged with what there is of those before it."""
    weights, held = np.zeros_like(parts.tops), parts.logs[0]
    weights[0] = parts.counts[0] > 0
    for at in range(1, len(weights)):
        new = parts.logs[at]
        both = np.logaddexp(held, new)
        if way == "mean":
            share = np.full_like(new, 0.5)
        else:
            apart = held - new if way == "turned" else new - held
            share = 1 / (1 + np.exp(-np.where(np.isnan(apart), 0.0, apart)))
        weights[:at] *= 1 - share
        weights[at] = share
        held = {"first": held, "last": new}.get(way, both)
    return weights


def _divided_each_time(parts: _Parts) -> np.ndarray:
    """What there is is divided by the sum so far in each part, and not multiplied by it before."""
    weights = np.zeros_like(parts.tops)
    for at, top in enumerate(np.maximum.accumulate(parts.tops)):
        before = top if at == 0 else np.maximum.accumulate(parts.tops)[at - 1]
        finite = np.where(np.isfinite(top), top, 0.0)
        sums = (parts.sums * np.exp(parts.tops - finite))[: at + 1]
        total = np.where(sums.sum(0) > 0, sums.sum(0), 1.0)
        weights[:at] *= np.exp(before - finite) / total
        weights[at] = sums[at] / total
    return weights


_Way = Callable[[_Parts], np.ndarray]
_WAYS: Mapping[str, _Way] = {
    "averaged": lambda p: np.full_like(p.tops, 1 / len(p.tops)),
    "averaged over those that see a key": lambda p: _by(1.0 * (p.counts > 0)),
    "added": lambda p: np.ones_like(p.tops),
    "weighed by the softmax of their maxima": lambda p: softmax(p.tops, 0),
    "weighed by their sums, each less its own maximum": lambda p: _by(p.sums),
    "weighed by their sums, and multiplied by them again": lambda p: p.right * p.sums,
    "weighed by the softmax of maxima and sums, not of the logarithm of these": lambda p: softmax(
        p.tops + p.sums, 0
    ),
    "weighed by their sums, the maxima added to the logarithms twice": lambda p: softmax(
        p.tops + p.logs, 0
    ),
    "weighed by their numbers of keys": lambda p: _by(p.counts),
    "weighed by the logarithms of their sums": lambda p: _by(
        np.where(p.sums > 0, np.where(p.sums > 0, p.logs, 0.0), 0.0)
    ),
    "weighed by powers of 2 of the logarithms of their sums": lambda p: softmax(
        np.log(2) * p.logs, 0
    ),
    "weighed by powers of e of the logarithms of their sums to the base 2": lambda p: softmax(
        p.logs / np.log(2), 0
    ),
    "weighed by their sums, not divided by the sum of all": lambda p: np.exp(p.logs),
    "weighed by their sums less the greatest, not divided by the sum of all": lambda p: _by(
        p.right, p.right.max(0)
    ),
    "weighed by the sums of the parts in reverse": lambda p: p.right[::-1],
    "all divided by the sum of the last part": lambda p: _by(p.right, p.right[-1]),
    "all divided by the sum of the last part, less its own maximum": lambda p: _by(
        p.sums * np.exp(p.tops - p.tops.max(0)), p.sums[-1]
    ),
    "all divided by the sum of the first part": lambda p: _by(p.right, p.right[0]),
    "the last left out": lambda p: p.those(~p.number(-1)),
    "the first left out": lambda p: p.those(~p.number(0)),
    "the last left out, its sum is not": lambda p: p.right * ~p.number(-1),
    "the first left out, its sum is not": lambda p: p.right * ~p.number(0),
    "the sum of the last left out, its values are not": lambda p: _by(p.right, p.right[:-1].sum(0)),
    "the first alone": lambda p: 1.0 * (p.number(0) & (p.counts > 0)),
    "the last alone": lambda p: 1.0 * (p.number(-1) & (p.counts > 0)),
    "the last twice": lambda p: _by(p.right * (1 + p.number(-1))),
    "the first twice": lambda p: _by(p.right * (1 + p.number(0))),
    "each averaged with those before it": lambda p: _one_by_one(p, "mean"),
    "merged one by one, new and old weights exchanged": lambda p: _one_by_one(p, "turned"),
    "merged one by one, the sum stays that of the first": lambda p: _one_by_one(p, "first"),
    "merged one by one, the sum is that of the last part alone": lambda p: _one_by_one(p, "last"),
    "divided by the sum so far in each part, not multiplied by it before": _divided_each_time,
}
"""How the results of parts, each divided by its own sum, are brought together, by words."""

OF_ONE_KEY = "averaged", "added", "weighed by the softmax of their maxima"
"""How parts of one key each are merged."""

OF_HIDDEN = (
    "averaged", "added", "weighed by their numbers of keys",
    "weighed by their sums, each less its own maximum", "the first alone", "the last alone",
    "weighed by the softmax of maxima and sums, not of the logarithm of these",
    "each averaged with those before it",
)  # fmt: skip
"""How parts are merged in which those without a key that is seen count."""

_OF_RINGS: Mapping[str, Callable[[_Parts, np.ndarray], np.ndarray]] = {
    "that of the query itself alone, as if a ring did not turn":
        lambda p, own: 1.0 * (own & (p.counts > 0)),
    "that of the query itself left out": lambda p, own: p.those(~own),
    "that of the query itself twice": lambda p, own: _by(p.right * (1 + own)),
    "that after the query's left out, as of a ring that turns once too few":
        lambda p, own: p.those(~np.roll(own, 1, 0)),
    "that before the query's left out, as of a ring that turns once too few":
        lambda p, own: p.those(~np.roll(own, -1, 0)),
}  # fmt: skip
"""How rings of devices, each with a part of queries and keys, bring them together wrongly."""


_HIDDEN: Mapping[str, float] = {
    "the keys of a part in which none is seen are all alike": 1.0,
    "the keys of a part in which none is seen have weights of 1": 0.0,
}
"""What finite numbers for hidden logits make of a part without a key that is seen, by the power of
its number of keys by which it is divided."""


def parts_merged(
    keys: int, hides: bool = True
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Shares of parts of the keys, each with a softmax of its own, merged wrongly.

    With `hides` also those of parts without a key that is seen, as finite numbers for hidden logits
    leave them.
    """
    cuts = {f"{n} parts": tuple(len(p) for p in np.array_split(np.arange(keys), n))
            for n in range(2, min(keys, 9))}  # fmt: skip
    cuts |= {f"parts of {n}": (*[n] * (keys // n), *[keys % n] * (keys % n > 0))
             for n in range(1, keys) if n < 9 or n & (n - 1) == 0}  # fmt: skip
    cuts = {sizes: words for words, sizes in reversed(cuts.items())}

    def ring(way: Callable[[_Parts, np.ndarray], np.ndarray]) -> _Way:
        return lambda p: p.right if p.own is None else way(p, p.own)

    ways = {**_WAYS, **{words: ring(way) for words, way in _OF_RINGS.items()}}
    for sizes, words in cuts.items():
        parts_of = _of_the_last(np.cumsum(sizes)[:-1])
        for how, weigh in ways.items():
            if max(sizes) == 1 and how not in OF_ONE_KEY:
                continue  # it is as another mistake
            detail = f"the keys in {words}, each divided by its own sum, {how}"
            yield detail, partial(_merged, parts_of=parts_of, weigh=weigh)
            for hidden, power in _HIDDEN.items() if hides and how in OF_HIDDEN else ():
                yield f"{detail}, {hidden}", partial(
                    _merged, parts_of=parts_of, weigh=weigh, hidden=power)  # fmt: skip


def _merged(
    logits: np.ndarray, parts_of: Any, weigh: _Way, hidden: float | None = None
) -> np.ndarray:
    """The shares of parts, merged; `hidden` is the power of `_HIDDEN`, None: they are zero."""
    shares, parts = parts_of(logits)
    if hidden is not None:
        sizes = [part.shape[-1] for part in shares]
        shares = [np.where(count, own, size**-hidden) for own, count, size in zip(
            shares, parts.counts, sizes, strict=True)]  # fmt: skip
        counts = np.broadcast_to(np.reshape(sizes, (-1, 1, 1, 1, 1)), parts.counts.shape)
        parts = replace(parts, tops=np.maximum(parts.tops, -1e30), counts=counts,
                        sums=np.where(parts.counts, parts.sums, counts))  # fmt: skip
    pairs = zip(shares, weigh(parts), strict=True)
    whole = np.concatenate([own * weight for own, weight in pairs], -1)
    return np.nan_to_num(whole, nan=0.0)


def _of_the_last(at: np.ndarray) -> Callable[[np.ndarray], tuple[list[np.ndarray], _Parts]]:
    """The softmax of each part, cut at these keys, and what there is of it; kept for the ways."""
    kept: list[Any] = [None, None]

    def parts_of(logits: np.ndarray) -> tuple[list[np.ndarray], _Parts]:
        if kept[0] is not logits:
            split = np.split(logits, at, axis=-1)
            own = None
            if logits.shape[-2] == logits.shape[-1]:
                places = np.searchsorted(at, np.arange(logits.shape[-1]), "right")
                own = (np.arange(len(split))[:, None] == places)[:, None, None, :, None]
            kept[:] = logits, ([softmax(part) for part in split], _parts(split, own))
        return kept[1]

    return parts_of


def _parts(split: Sequence[np.ndarray], own: np.ndarray | None) -> _Parts:
    tops = np.stack([part.max(-1, keepdims=True) for part in split])
    seen = np.stack([np.isfinite(part).sum(-1, keepdims=True) for part in split])
    sums = np.stack([_sum(part, top) for part, top in zip(split, tops, strict=True)])
    return _Parts(tops, sums, seen, own)


def merged_by(masks: Sequence[np.ndarray]) -> Iterator[tuple[str, Callable[..., np.ndarray]]]:
    """Shares of parts of the keys that masks tell, each with its own softmax, merged wrongly."""
    for words, weigh in _WAYS.items():

        def merged(logits: np.ndarray, weigh: _Way = weigh) -> np.ndarray:
            split = [np.where(mask, logits, -np.inf) for mask in masks]
            weights = weigh(_parts(split, None))
            every = [softmax(p) * w for p, w in zip(split, weights, strict=True)]
            return np.nan_to_num(np.sum(every, axis=0), nan=0.0)

        yield words, merged


def _sum(part: np.ndarray, top: np.ndarray) -> np.ndarray:
    """The sum of the exponentials less the greatest, (..., 1)."""
    return np.exp(part - np.where(np.isfinite(top), top, 0.0)).sum(-1, keepdims=True)


def not_rescaled(keys: int) -> Iterator[tuple[str, Step]]:
    """A running softmax over chunks of the keys that is not brought to the new maximum."""
    sizes = [n for n in range(1, keys) if n < 17 or n & (n - 1) == 0]
    for size in sizes:
        for words, of_sum, of_values in (
            ("the values are", True, False), ("the sum is", False, True),
            ("values and sum are", False, False),
        ):  # fmt: skip

            def step(
                recipe: Recipe, stages: Arrays, size: int = size, of_sum: bool = of_sum,
                of_values: bool = of_values,
            ) -> np.ndarray:  # fmt: skip
                logits = stages["masked_logits"]
                starts = range(0, logits.shape[-1], size)
                tops = np.stack([logits[..., s : s + size].max(-1) for s in starts])
                running = np.maximum.accumulate(np.maximum(tops, -1e30))
                weights = np.empty_like(logits)
                for at, start in enumerate(starts):
                    part = logits[..., start : start + size]
                    weights[..., start : start + size] = np.exp(part - running[at][..., None])
                # What a chunk lacks that is not brought to the last maximum.
                lacks = np.exp(running - running[-1])
                lacks = np.repeat(np.moveaxis(lacks, 0, -1), size, axis=-1)
                lacks = lacks[..., : logits.shape[-1]]
                total = (weights * (lacks if of_sum else 1.0)).sum(-1, keepdims=True)
                shares = weights * (lacks if of_values else 1.0) / np.where(total > 0, total, 1.0)
                return context_by(recipe, {**stages, "dropped_probabilities": shares})

            yield f"{words} not rescaled to the running maximum, chunks of {size} keys", step
