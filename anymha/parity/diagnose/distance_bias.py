"""A bias over the distance of query and key, taken at another distance than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

NEAR = 1e-4
"""How far a bias may be from one number at each distance, as a part of its greatest number."""

MOST = 1 << 14
"""In no greater bias are numbers of rows and distances told apart."""

MAPS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored, its sign reversed: keys before a query have what those after it should": lambda d: (
        -d
    ),
    "of the distance without its sign: keys before a query have what those after it should": np.abs,
    "of the distance without its sign: keys after a query have what those before it should": (
        lambda d: -np.abs(d)
    ),
    "of no distance for all": lambda d: 0 * d,
    "of no distance for all keys before a query": lambda d: np.maximum(d, 0),
    "of no distance for all keys after a query": lambda d: np.minimum(d, 0),
    "of a distance that is greater by 1": lambda d: d + 1,
    "of a distance that is less by 1": lambda d: d - 1,
    "of twice the distance": lambda d: 2 * d,
    "of half the distance": lambda d: np.sign(d) * (np.abs(d) // 2),
}
"""What distance is taken, from that of the key minus that of the query."""


def of_other_distances(bias: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A bias (B, H, T, S) that is one over the distance, at other distances within its own."""
    *_, queries, keys = bias.shape
    apart = np.arange(keys) - np.arange(queries)[:, None]
    most = float(np.max(np.abs(bias), initial=0.0))
    if min(queries, keys) < 2 or not np.isfinite(most):
        return
    # The first row and the first column have each distance once.
    numbers = np.concatenate([bias[..., :0:-1, 0], bias[..., 0, :]], -1)
    if np.max(np.abs(numbers[..., apart + queries - 1] - bias)) <= NEAR * most:
        for words, change in MAPS.items():
            yield words, numbers[..., np.clip(change(apart), 1 - queries, keys - 1) + queries - 1]


def without_rows(bias: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A bias over the distance without the numbers of rows, which no softmax shows; else as it is.

    Args:
        bias: (1, H, T, S).
        known: Where it is known; broadcasts to it.
    """
    *_, queries, keys = bias.shape
    known = np.broadcast_to(known, bias.shape)
    if not queries * keys <= MOST or np.any(known != known[:, :1]):
        return bias
    row, key = np.nonzero(known[0, 0])
    matrix = np.zeros((len(row), 2 * queries + keys - 1))
    place = np.arange(len(row))
    matrix[place, row] = matrix[place, queries + key - row + queries - 1] = 1.0
    numbers = np.linalg.lstsq(matrix, bias[0][:, row, key].T, rcond=None)[0]
    apart = np.abs(matrix @ numbers - bias[0][:, row, key].T)
    if np.max(apart, initial=0.0) > NEAR * max(float(np.max(np.abs(bias))), 1.0):
        return bias
    distance = np.arange(keys) - np.arange(queries)[:, None] + queries - 1
    return numbers[queries:].T[None][..., distance]
