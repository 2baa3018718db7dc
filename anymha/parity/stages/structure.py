"""Arrays compared: faults of structure, distances between numbers, differing bits and ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from anymha.parity.oracle.recipe import Arrays


def structure(
    name: str, reference: np.ndarray, candidate: np.ndarray, allowed: np.ndarray | float = 0.0
) -> list[str]:
    """Faults of structure: another shape, NaN, other masked places, other sums of rows.

    `allowed`, the error of each number that rounding explains, widens the sums of rows from which a
    sink has taken a part: see `_sum_limits`.
    """
    if candidate.shape != reference.shape:
        return [f"shape {candidate.shape}, not {reference.shape}"]
    faults = []
    nan, other = np.isnan(candidate), np.isnan(reference)
    if not np.array_equal(nan, other):
        more, fewer = int(np.sum(nan & ~other)), int(np.sum(other & ~nan))
        faults.append(f"NaN in {more} places where the reference has numbers" if more else
                      f"numbers in {fewer} places where the reference has NaN")  # fmt: skip
    hidden, unseen = is_masked(candidate), is_masked(reference)
    if name == "masked_logits" and not np.array_equal(hidden, unseen):
        more, fewer = int(np.sum(hidden & ~unseen)), int(np.sum(unseen & ~hidden))
        faults.append(f"masks {more} places more and {fewer} fewer, of {hidden.size}")
    if name in ("probabilities", "scores") and not nan.any():
        sums, wanted = candidate.sum(-1), reference.sum(-1)
        off = ~(np.abs(sums - wanted) <= _sum_limits(reference, wanted, allowed))
        if off.any():
            faults.append(f"{int(off.sum())} of {off.size} rows sum to {sums[off][0]:.3g}, not "
                          f"{wanted[off][0]:.3g}")  # fmt: skip
    return faults


def _sum_limits(reference: np.ndarray, sums: np.ndarray, allowed: np.ndarray | float) -> np.ndarray:
    """How far the sums of rows of probabilities may be off.

    Errors of logits move probability from key to key, which changes no sum. Where a sink has the
    share s = 1 - sum, errors d_j move

        s sum_j p_j d_j

    to it. Each ``p_j d_j`` is at most the row's `allowed`, and their signs are random: S of them
    add up to its ``sqrt(S)``-fold.
    """
    row = np.max(spread_limits(np.asarray(allowed), reference.shape), axis=-1, initial=0.0)
    share = np.clip(1 - sums, 0.0, 1.0)
    moved = np.multiply(share, row, out=np.zeros(row.shape), where=share > 0)
    return 0.02 + 1e-5 * np.abs(sums) + math.sqrt(reference.shape[-1]) * moved


def spread_limits(limits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Limits of each number, in the shape of a stage; their greatest where they do not fit it."""
    try:
        return np.broadcast_to(limits, shape)
    except ValueError:  # a mistake turned the axes
        return np.full(shape, np.max(limits, initial=0.0))


def is_masked(logits: np.ndarray) -> np.ndarray:
    """Which logits are masked: -inf, or the large negative numbers that stand for it."""
    return logits <= -9e3


def distance(one: np.ndarray, other: np.ndarray, stage: str = "") -> np.ndarray:
    """The absolute difference of each element; infinite where one alone is finite.

    Among masked logits, -inf and the large negative numbers that stand for it are equal.
    """
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    numbers = np.isfinite(apart)
    if stage != "masked_logits" and numbers.all():
        return apart
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if stage == "masked_logits":
        same |= is_masked(one) & is_masked(other)
    return np.where(same, 0.0, np.where(numbers, apart, np.inf))


def looks_like_rounding(observed: np.ndarray | None, exact: np.ndarray) -> bool:
    """Whether errors are spread over all numbers and have no direction, as those of roundings."""
    if observed is None or observed.shape != exact.shape:
        return observed is None
    numbers = np.isfinite(observed) & np.isfinite(exact)
    error, value = (observed - exact)[numbers], exact[numbers]
    most = float(np.max(np.abs(error), initial=0.0))
    if most == 0:
        return True
    size = float(np.sqrt(np.mean(error**2)))
    along = float(np.abs(error @ value)) / (np.linalg.norm(error) * np.linalg.norm(value) or 1.0)
    spread = float(np.mean(np.abs(error) > most / 50))
    return bool(along < 0.9 and abs(float(error.mean())) < 0.9 * size and spread > 0.2)


def count_differing(
    results: Sequence[Mapping[str, np.ndarray]],
    exact: Arrays,
    close: Mapping[str, float] | None = None,
) -> tuple[int, int, int]:
    """How many elements differ in any bit between some two results, of those ties, of how many.

    A NaN differs from every number, and from no NaN. A quantity is not counted where the results
    have different shapes or dtypes. A tie is an element for which the backends gave two neighbours
    in float32, and whose exact value is as close to the middle between them as float64 resolves:
    `close` says by name how far the float64 that a backend rounds may be from the exact one;
    without it there are no ties.
    """
    differing = ties = compared = 0
    for name in exact:
        arrays = [one[name] for one in results if name in one]
        if len(arrays) < 2 or len({(a.shape, a.dtype) for a in arrays}) > 1:
            continue
        unlike = np.any([_bits(a) != _bits(arrays[0]) for a in arrays[1:]], axis=0)
        differing, compared = differing + int(unlike.sum()), compared + unlike.size
        if close and arrays[0].dtype == np.float32 and exact[name].shape == unlike.shape:
            tied = _tied([a[unlike] for a in arrays], exact[name][unlike], close[name])
            ties += int(tied.sum())
    return differing, ties, compared


def _tied(arrays: Sequence[np.ndarray], exact: np.ndarray, close: float) -> np.ndarray:
    numbers = np.all(np.isfinite(arrays), axis=0)
    low, high = np.fmin.reduce(arrays), np.fmax.reduce(arrays)
    low, high = np.where(numbers, low, 0), np.where(numbers, high, 0)
    middle = (low.astype(np.float64) + high) / 2
    return numbers & (np.nextafter(low, high) == high) & (np.abs(exact - middle) <= close)


def _bits(array: np.ndarray) -> np.ndarray:
    """Each element's bits as an integer, all NaNs as one."""
    one = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return np.ascontiguousarray(one).view(f"u{array.dtype.itemsize}")
