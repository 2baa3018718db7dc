"""Two arrays compared: faults of structure, and distances between numbers."""

from __future__ import annotations

import numpy as np


def structure(name: str, reference: np.ndarray, candidate: np.ndarray) -> list[str]:
    """Faults of structure: another shape, NaN, other masked places, other sums of rows."""
    if candidate.shape != reference.shape:
        return [f"shape {candidate.shape}, not {reference.shape}"]
    faults = []
    nan, other = np.isnan(candidate), np.isnan(reference)
    if not np.array_equal(nan, other):
        more, fewer = int(np.sum(nan & ~other)), int(np.sum(other & ~nan))
        faults.append(f"NaN in {more} places where the reference has numbers" if more else
                      f"numbers in {fewer} places where the reference has NaN")  # fmt: skip
    hidden, unseen = _masked(candidate), _masked(reference)
    if name == "masked_logits" and not np.array_equal(hidden, unseen):
        more, fewer = int(np.sum(hidden & ~unseen)), int(np.sum(unseen & ~hidden))
        faults.append(f"masks {more} places more and {fewer} fewer, of {hidden.size}")
    if name in ("probabilities", "scores") and not nan.any():
        sums, wanted = candidate.sum(-1), reference.sum(-1)
        off = ~np.isclose(sums, wanted, atol=0.02, equal_nan=True)
        if off.any():
            faults.append(f"{int(off.sum())} of {off.size} rows sum to {sums[off][0]:.3g}, not "
                          f"{wanted[off][0]:.3g}")  # fmt: skip
    return faults


def _masked(logits: np.ndarray) -> np.ndarray:
    """Which logits are masked: -inf, or the large negative numbers that stand for it."""
    return logits <= -9e3


def distance(one: np.ndarray, other: np.ndarray, stage: str = "") -> np.ndarray:
    """The absolute difference of each element; infinite where one alone is finite.

    Among masked logits, -inf and the large negative numbers that stand for it are equal.
    """
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if stage == "masked_logits":
        same |= _masked(one) & _masked(other)
    return np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))


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
