"""A bias over the distance of query and key, taken at another distance than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anymha.parity.oracle.recipe import Recipe

NEAR = 1e-4
"""How far a bias may be from one number at each distance, as a part of its greatest number."""

MOST = 1 << 14
"""In no greater bias are numbers of rows and distances told apart."""

MOST_DISTANCES = 64
"""Of no more distances it is looked for which bias they have."""

ALIKE = 2e-3
"""How far a measured bias may be from that of another distance, as a part of the greatest."""

SHARE = 0.5
"""What part of the distances must have the bias of another, or their own."""

SHOWN = 6
"""How many distances are told."""

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


def taken_from(recipe: Recipe, distances: np.ndarray, more: np.ndarray, told: np.ndarray) -> str:
    """From which distances of the bias a candidate takes its own, in words; empty where it is none.

    Args:
        recipe: The right one, with its bias.
        distances: Of queries less keys, in order, as positions count them.
        more: What is added at each distance (H, distances), but for a constant of each head.
        told: Where that is known (H, distances).
    """
    if recipe.bias is None or len(more) < 2 or distances.size > MOST_DISTANCES:
        return ""
    bias = np.broadcast_to(recipe.bias, recipe.stages["logits"].shape)
    *_, queries, keys = bias.shape
    own = np.concatenate([bias[0, :, :0:-1, 0], bias[0, :, 0, :]], -1)
    place = np.arange(keys) - np.arange(queries)[:, None]
    peak = float(np.abs(own).max(initial=0.0))
    if (
        not np.array_equal(-distances[::-1], np.arange(1 - queries, keys))
        or np.max(np.abs(own[:, place + queries - 1] - bias)) > NEAR * peak
    ):
        return ""
    own, told = own.T, told.T[::-1]  # from here on of keys less queries
    known = np.greater_equal(told.sum(-1), 2)  # in one head a number is that of another by chance
    theirs, at = own + more.T[::-1], np.arange(len(own))
    far = np.abs(at[:, None] - at)
    near = np.zeros_like(far, bool)
    for anchor in at[told.all(-1)]:
        for other in at:
            apart = theirs[:, None] - own - (theirs[anchor] - own[other])
            apart = np.where(told[:, None], np.abs(apart), 0.0).max(-1)
            same = (apart <= ALIKE * peak) & known[:, None]
            if np.any(same, 1).sum() > np.any(near, 1).sum():
                near = same
    found, among = np.where(near, far, far.max() + 1).argmin(1), np.any(near, 1)
    if among.sum() < max(3, SHARE * known.sum()) or np.array_equal(found[among], at[among]):
        return ""
    parts: list[tuple[int, int, int | None]] = []
    for one in at[known]:
        source = int(found[one]) if among[one] else None
        if source == one:
            continue
        first, last, of = parts[-1] if parts else (0, -2, None)
        if last == one - 1 and of == source:
            parts[-1] = first, int(one), of
        else:
            parts.append((int(one), int(one), source))
    words = [_from(*part, zero=queries - 1) for part in parts]
    return "measured, by the position of the key less that of the query: " + "; ".join(
        words[:SHOWN]) + "; ..." * (len(words) > SHOWN)  # fmt: skip


def _from(first: int, last: int, source: int | None, zero: int) -> str:
    where = f"{first - zero}" if first == last else f"{first - zero} to {last - zero}"
    if source is None:
        return f"at {where} a bias that the reference has at no distance"
    return f"at {where} the bias of {source - zero}"


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
