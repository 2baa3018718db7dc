"""Counts of elements that differ between backends, and of ties among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from anymha.parity.oracle.cases import Arrays


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
