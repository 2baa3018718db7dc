"""The mask that a candidate has, measured from its output, where no known mistake gives it.

The context c of a head is the mean of its values v with the weights m * exp(logits), m being 0 or
1: so sum over keys of m * exp(logits) * (v - c) = 0, linear equations for m, of all heads together.
"""

from __future__ import annotations

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.oracle.recipe import Arrays, Recipe, allowed, reads

ZERO = 1e-3
"""A weight below this, of the greatest, is none."""

WELL = 1e5
"""The greatest condition of an output kernel through which the context is seen."""


def measured_mask(recipe: Recipe, reported: Arrays) -> tuple[Cause, Recipe] | None:
    """The mask, the same for all heads, with which the recipe gives what is reported."""
    context = context_of(recipe, reported)
    batch, queries, keys = recipe.lengths
    right = np.broadcast_to(allowed(recipe), (batch, recipe.heads[0], queries, keys))
    if (
        context is None
        or context.shape[2] * context.shape[3] < keys
        or np.any(right != right[:, :1])
    ):
        return None
    logits = recipe.stages["logits"] if recipe.bias is None else (
        recipe.stages["logits"] + recipe.bias)  # fmt: skip
    weights = np.exp(logits - logits.max(-1, keepdims=True))  # (B, H, T, S)
    values = recipe.stages["value"][:, :, reads(recipe)]  # (B, S, H, d)
    apart = values[:, None] - context[:, :, None]  # (B, T, S, H, d)
    rows = weights.transpose(0, 2, 3, 1)[..., None] * apart
    matrix = rows.reshape(batch, queries, keys, -1).swapaxes(2, 3)  # (B, T, H * d, S)
    if not np.all(np.isfinite(matrix)):
        return None
    solution = np.linalg.svd(matrix, full_matrices=False)[2][:, :, -1]  # (B, T, S)
    top = np.take_along_axis(solution, np.abs(solution).argmax(-1)[..., None], -1)
    share = solution / np.where(top == 0, 1.0, top)
    seen = share > ZERO
    seen[np.all(context == 0, axis=(2, 3))] = False
    if np.any(np.abs(share[seen] - 1) > 0.1) or np.array_equal(seen, right[:, 0]):
        return None
    wrong = recipe.but(masks={"measured": seen[:, None]}, causal=False, window=None)
    fix = "Give each sequence, head, query and key its own place in the mask."
    name = "mask of other positions"
    return Cause(name, _words(recipe, seen, right[:, 0]), "masked_logits", fix), wrong


def context_of(recipe: Recipe, reported: Arrays) -> np.ndarray | None:
    """The candidate's context (B, T, H, d), as it is reported or seen through the output."""
    exact = recipe.stages["context"]
    if "context" in reported and reported["context"].shape == exact.shape:
        return reported["context"]
    output = reported.get("output")
    if output is None or output.shape != recipe.stages["output"].shape:
        return None
    kernel = recipe.weights["output.kernel"]
    flat = kernel.reshape(-1, kernel.shape[-1])
    if flat.shape[0] > flat.shape[1] or np.linalg.cond(flat) > WELL:
        return None
    rest = output - recipe.weights.get("output.bias", 0.0)
    return (rest @ np.linalg.pinv(flat)).reshape(exact.shape)


def _words(recipe: Recipe, seen: np.ndarray, right: np.ndarray) -> str:
    """What differs, for the first row that does."""
    rows = np.argwhere((seen != right).any(-1))
    sequence, query = map(int, rows[0])
    extra, fewer = (np.flatnonzero(a[sequence, query] & ~b[sequence, query])
                    for a, b in ((seen, right), (right, seen)))  # fmt: skip
    words = [f"sees {_places(extra)} too"] if extra.size else []
    words += [f"does not see {_places(fewer)}"] if fewer.size else []
    return (f"measured: query {query} of sequence {sequence} {' and '.join(words)}; "
            f"{len(rows)} of {right.shape[0] * right.shape[1]} rows differ"
            f"{_pattern(recipe, seen, right)}")  # fmt: skip


def _pattern(recipe: Recipe, seen: np.ndarray, right: np.ndarray) -> str:
    """What all rows that differ have in common, where it is one of a few patterns."""
    queries, keys = right.shape[1:]
    place, other = np.arange(queries)[:, None], np.arange(keys)
    patterns = {"its own key": place == other, "the first key": other == 0,
                "the last key": other == keys - 1, "the next key": other == place + 1,
                "the key before": other == place - 1, "all keys that follow": other > place,
                "all keys before": other < place, "all keys up to its own": other <= place,
                "all keys": other >= 0}  # fmt: skip
    differ, empty = (seen != right).any(-1), ~right.any(-1)
    if not seen[differ].any():
        return ", all of which see nothing"
    nothing = np.array_equal(differ & empty, differ)
    for words, pattern in patterns.items():
        shown, hidden = (np.where(differ[..., None], a, right)
                         for a in (right | pattern, right & ~pattern))  # fmt: skip
        if np.array_equal(seen, shown):
            own = words.replace("its", "their") if nothing else words
            which = "the rows that see nothing are" if nothing else "each is"
            return f", {which} given {own}"
        if np.array_equal(seen, hidden):
            return f", {words} hidden from each"
    free = allowed(recipe.but(causal=False))[:, 0]
    for offset in range(-queries, keys) if recipe.causal else ():
        if np.all(seen == free & (other <= place + offset)):
            return f", as of a causal rule that lets query i see keys j <= i + {offset}"
    alike = np.all(seen == seen[:, :1])
    return ", all rows of a sequence see the same keys" if alike else ""


def _places(places: np.ndarray) -> str:
    shown = ", ".join(map(str, places[:8])) + (", ..." if places.size > 8 else "")
    return f"key{'s' if places.size > 1 else ''} {shown}"
