"""Weights that a candidate tells, and which lie on few levels: quantised ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.changes import listed
from anymha.parity.oracle.recipe import Arrays

BITS = (2, 3, 4, 5, 6, 8)
"""How many bits a weight may have."""

ON_IT = 0.01
"""How far a number may be from its level, as a part of the step between two."""

LEAST = 8
"""Fewer numbers of a group lie on levels by chance."""

MOST_GROUPS = 64
"""So many groups of a kernel are looked at."""

BLOCKS = (256, 128, 64, 32, 16)
"""How many numbers a group has, where it is neither a row nor a column."""


def quantised_kernels(right: Arrays, changed: Arrays) -> tuple[str, str] | None:
    """Name and words for kernels that are quantised, all with as many bits; None where not.

    Args:
        right: The weights of the reference.
        changed: Those of the candidate that differ, in the same shapes.
    """
    found = {name: _levels(right[name], own, name) for name, own in changed.items()}
    first = next(iter(found.values()))
    if first is None or any(one != first for one in found.values()):
        return None
    bits, groups = first
    return f"weights quantised to {bits} bits", f"{listed([*found])}, {groups}"


def _levels(right: np.ndarray, own: np.ndarray, name: str) -> tuple[int, str] | None:
    """The bits of a kernel whose groups have evenly spaced levels each, and what a group is."""
    if own.ndim != 3 or not np.all(np.isfinite(own)):
        return None
    inputs = own[..., 0].size if name.startswith("output") else own.shape[0]
    both = _groups(own.reshape(inputs, -1)), _groups(right.reshape(inputs, -1))
    for (words, groups), (_, wanted) in zip(*both, strict=True):
        bits = _bits(groups, wanted)
        if bits is not None:
            return bits, words
    return None


def _groups(kernel: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The groups (count, size) of a kernel (inputs, outputs), the greatest first."""
    inputs = len(kernel)
    yield "levels of one step for all", kernel.reshape(1, -1)
    yield "levels of a step of its own for each output", kernel.T
    yield "levels of a step of its own for each input", kernel
    for size in BLOCKS:
        for words, matrix in (("inputs", kernel.T), ("outputs", kernel)):
            if matrix.shape[1] % size == 0 and matrix.shape[1] > size:
                yield (
                    f"levels of a step of its own for each {size} {words}",
                    matrix.reshape(-1, size),
                )
        if kernel.size % size == 0 and size > inputs and size % inputs == 0:
            yield f"levels of a step of its own for each {size} numbers", kernel.T.reshape(-1, size)


def _bits(groups: np.ndarray, right: np.ndarray) -> int | None:
    """The fewest bits with which the numbers of each group are at levels, near the right ones."""
    if groups.shape[1] < LEAST:
        return None
    some = np.linspace(0, len(groups) - 1, min(len(groups), MOST_GROUPS)).astype(int)
    most = 0
    for own, wanted in zip(groups[some], right[some], strict=True):
        least, width = own.min(), np.ptp(own)
        if width == 0:
            continue
        part = (np.unique(own) - least) / width
        for count in range(1, 1 << BITS[-1]):
            if np.abs(part * count - np.round(part * count)).max() <= ON_IT:
                break
        else:
            return None
        if np.abs(own - wanted).mean() > width / count:
            return None
        most = max(most, count)
    return next((bits for bits in BITS if 0 < most < 1 << bits), None)
