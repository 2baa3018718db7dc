"""Mistakes with packed sequences: their ids, their padding, and positions that begin anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from anymha.parity.diagnose.changes import Maker, Row
from anymha.parity.diagnose.mask_mistakes import with_empty_rows
from anymha.parity.oracle.recipe import Recipe, Variants

Seen = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Where queries see keys, from the ids (1 or B, 1, T, 1) and (1 or B, 1, 1, S)."""


def _same(ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
    return (ids == key_ids) & (ids >= 0)


def _shifted(by: int, keys_by: int, ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
    return _same(np.roll(ids, by, 2), np.roll(key_ids, keys_by, 3))


def _bounds(by: int, keys_by: int, ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
    """Where segments begin one position later or earlier; the end of the row has the last id."""

    def moved(array: np.ndarray, by: int, axis: int) -> np.ndarray:
        index = np.clip(np.arange(array.shape[axis]) - by, 0, array.shape[axis] - 1)
        return np.take(array, index, axis)

    return _same(moved(ids, by, 2), moved(key_ids, keys_by, 3))


def _pieces(by: int, ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
    """Pieces of a row that begin one position late or early, with the id of their begin."""
    rows, index = ids[:, 0, :, 0], np.arange(ids.shape[2])
    if not np.array_equal(rows, key_ids[:, 0, 0]):
        return _same(ids, key_ids)
    run = np.cumsum(np.diff(rows, axis=1, prepend=rows[:, :1]) != 0, axis=1)
    run = run[:, np.clip(index - by, 0, len(index) - 1)]
    begins = np.diff(run, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    pieces = np.where(np.take_along_axis(rows, first, 1) < 0, -1, run)
    return _same(pieces[:, None, :, None], pieces[:, None, None])


def _lost(first: bool, padding: bool, ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
    """All but the first or the last segment of each row; `padding` may be that one."""
    rows = key_ids[:, 0, 0]
    if padding and np.all(rows >= 0):
        return _same(ids, key_ids)
    counted = np.ones_like(rows, bool) if padding else rows >= 0
    at = np.argmax(counted if first else counted[:, ::-1], axis=1)
    at = at if first else rows.shape[1] - 1 - at
    own = np.take_along_axis(rows, at[:, None], 1)[:, None, None]
    return _same(ids, key_ids) & (key_ids != own)


def _seen(variants: dict[str, Seen]) -> Maker:
    """Other keys that are seen, by the words of each variant."""

    def make(recipe: Recipe) -> Variants:
        if recipe.segments is None or recipe.key_segments is None:
            return
        ids, key_ids = recipe.segments[:, None, :, None], recipe.key_segments[:, None, None]
        for words, seen in variants.items():
            yield words, recipe.but(masks={**recipe.masks, "segment_ids": seen(ids, key_ids)})

    return make


def _of_the_other_side(recipe: Recipe) -> Variants:
    """The ids of queries for keys or those of keys for queries, and those of one sequence."""
    if recipe.segments is None or recipe.key_segments is None:
        return
    ids, key_ids = recipe.segments, recipe.key_segments
    pairs = dict[str, tuple[np.ndarray, np.ndarray]]()
    for way, fitted in {"": _with_the_last, ", begun again": _begun_again}.items():
        pairs[f"those of the queries for the keys{way}"] = ids, fitted(ids, key_ids.shape[1])
        pairs[f"those of the keys for the queries{way}"] = fitted(key_ids, ids.shape[1]), key_ids
    pairs["those of the first sequence for all"] = ids[:1], key_ids[:1]
    pairs["of the queries those of the first sequence for all"] = ids[:1], key_ids
    pairs["of the keys those of the first sequence for all"] = ids, key_ids[:1]
    for words, (own, keys) in pairs.items():
        seen = _same(own[:, None, :, None], keys[:, None, None])
        yield words, recipe.but(masks={**recipe.masks, "segment_ids": seen})


def _with_the_last(ids: np.ndarray, length: int) -> np.ndarray:
    """The ids (1 or B, length): cut, or with the last one after them."""
    return ids[:, np.minimum(np.arange(length), ids.shape[1] - 1)]


def _begun_again(ids: np.ndarray, length: int) -> np.ndarray:
    """The ids (1 or B, length): cut, or once more after them."""
    return ids[:, np.arange(length) % ids.shape[1]]


def _not_restarted(recipe: Recipe) -> Variants:
    """Indices of the row in place of the positions that the call gives, or the other way round."""
    if recipe.segments is None or recipe.key_segments is None:
        return
    if recipe.positions is not None or recipe.key_positions is not None:
        yield "", recipe.but(positions=None, key_positions=None)
    else:
        places = {"positions": _restarted(recipe.segments),
                  "key_positions": _restarted(recipe.key_segments)}  # fmt: skip
        yield "they begin anew, and the call does not say so", recipe.but(**places)


def _restarted(ids: np.ndarray) -> np.ndarray:
    """Positions (1 or B, length) that begin anew where the id changes."""
    index = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begins = np.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)


MISTAKES: tuple[Row, ...] = (
    ("segments ignored", "Pass `segment_ids` on: a query sees keys of its own segment alone.",
     _seen({"": lambda ids, key_ids: np.ones_like(ids == key_ids),
            "padding stays hidden": lambda ids, key_ids: (ids >= 0) & (key_ids >= 0),
            "ids are a mask, those of 0 are hidden": lambda ids, key_ids: (
                (key_ids != 0) | np.zeros_like(ids, bool)),
            "ids are a mask, those of 0 or less are hidden": lambda ids, key_ids: (
                (key_ids > 0) | np.zeros_like(ids, bool))})),
    ("segment ids shifted by one", "Each position has the id of its own segment: check where "
     "segments begin.",
     _seen({f"those of the {words}, {by:+d}": partial(_shifted, n * by, m * by)
            for words, n, m in (("queries and keys", 1, 1), ("queries", 1, 0), ("keys", 0, 1))
            for by in (1, -1)} |
           {f"{words} begin one position {'late' if by > 0 else 'early'}": partial(
                _bounds, n * by, m * by)
            for words, n, m in (("segments", 1, 1), ("those of the queries", 1, 0),
                                ("those of the keys", 0, 1)) for by in (1, -1)} |
           {f"segments begin one position {words}, each has the id of its first position": partial(
                _pieces, by) for words, by in (("late", 1), ("early", -1))})),
    ("segment left out", "Each segment attends, the first and the last of a row too: join the ends "
     "of the row to the places where ids change.",
     with_empty_rows(_seen({f"the {words} of each row{more}": partial(_lost, first, padding)
            for words, first in (("last", False), ("first", True))
            for more, padding in (("", False), (", padding counted", True))} |
           {f"the first and the last of each row{more}": lambda ids, key_ids, padding=padding: (
                _lost(True, padding, ids, key_ids) & _lost(False, padding, ids, key_ids))
            for more, padding in (("", False), (", padding counted", True))}))),
    ("segments joined", "Segments that stand beside each other see nothing of each other.",
     _seen({"each with its neighbours": lambda ids, key_ids: (
                (np.abs(ids - key_ids) <= 1) & (ids >= 0) & (key_ids >= 0)),
            **{f"two and two, from {n} on": lambda ids, key_ids, n=n: (
                ((ids + n) // 2 == (key_ids + n) // 2) & (ids >= 0) & (key_ids >= 0))
               for n in (0, 1)}})),
    ("padding of segments seen", "A negative id sees and is seen by nothing.",
     _seen({"": lambda ids, key_ids: ids == key_ids,
            "all padding is one segment": lambda ids, key_ids: (
                (ids == key_ids) | ((ids < 0) & (key_ids < 0))),
            "every query sees it": lambda ids, key_ids: _same(ids, key_ids) | (key_ids < 0)})),
    ("segments compared by order", "A query sees keys of an equal id, not of a lower or a higher "
     "one.",
     _seen({"keys of lower ids are seen": lambda ids, key_ids: (ids >= key_ids) & (key_ids >= 0),
            "keys of higher ids are seen": lambda ids, key_ids: (ids <= key_ids) & (ids >= 0)})),
    ("segments of the other side", "Queries have the ids of `segment_ids`, keys those of "
     "`key_segment_ids`, and each sequence its own.", with_empty_rows(_of_the_other_side)),
    ("positions not restarted in segments", "Pass on `positions` and `key_positions`, which begin "
     "at 0 in each segment.", _not_restarted),
)  # fmt: skip
