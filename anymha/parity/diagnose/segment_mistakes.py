"""Mistakes with packed sequences: their ids, their padding, and positions that begin anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from anymha.parity.diagnose.changes import Maker, Row, no_families
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


_LENGTHS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sorted, the longest first": lambda n: np.sort(n)[::-1],
    "sorted, the shortest first": np.sort,
    "in reverse": lambda n: n[::-1],
    "each that of the segment before, the first that of the last": lambda n: np.roll(n, 1),
    "each that of the next segment, the last that of the first": lambda n: np.roll(n, -1),
    "each one longer": lambda n: n + 1,
    "each one shorter": lambda n: n - 1,
    "that of the first for all": lambda n: np.full_like(n, n[0]),
    "the longest for all": lambda n: np.full_like(n, n.max()),
    "alike, as of parts of the row": lambda n: np.full_like(n, -(-n.sum() // len(n))),
}
"""What the lengths of the segments of a row are taken for; they are in the order of the row."""

_SIDES = {"": (True, True), "of the queries, ": (True, False), "of the keys, ": (False, True)}
"""Whose segments have other lengths."""


def _other_lengths(recipe: Recipe) -> Variants:
    """Segments that stand one after another, with other lengths than their own."""
    if recipe.segments is None or recipe.key_segments is None:
        return
    ids, key_ids = recipe.segments, recipe.key_segments
    anew = recipe.positions is not None or recipe.key_positions is not None
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        words: partial(_laid_out, change=change, last=True)
        for words, change in _LENGTHS.items()}  # fmt: skip
    for words in ("each one shorter", "that of the first for all"):
        changes[f"{words}, what is left over is padding"] = partial(
            _laid_out, change=_LENGTHS[words], last=False
        )
    changes["those of the ids in ascending order"] = _ascending
    for by in (1, -1) if len(ids) > 1 or len(key_ids) > 1 else ():
        words = f"those of the {'row before' if by > 0 else 'next row'}"
        changes[words] = partial(np.roll, shift=by, axis=0)
    for words, change in changes.items():
        for side, (own, keys) in _SIDES.items():
            changed = change(ids) if own else ids, change(key_ids) if keys else key_ids
            if any(np.any(a != b) for a, b in zip(changed, (ids, key_ids), strict=True)):
                seen = _same(changed[0][:, None, :, None], changed[1][:, None, None])
                masks = {**recipe.masks, "segment_ids": seen}
                wrong = recipe.but(masks=masks)
                yield f"{side}{words}", wrong
                if anew:
                    places = {
                        "positions": _restarted(changed[0]), "key_positions": _restarted(changed[1])
                    }  # fmt: skip
                    yield f"{side}{words}, positions begin anew there", wrong.but(**places)


def _laid_out(
    ids: np.ndarray, change: Callable[[np.ndarray], np.ndarray], last: bool
) -> np.ndarray:
    """Ids (1 or B, length) whose segments have other lengths.

    What no length covers has the id of the last segment, or is padding.
    """

    def laid(tokens: np.ndarray) -> np.ndarray:
        if not tokens.size:
            return tokens
        begins = np.flatnonzero(np.diff(tokens, prepend=tokens[0] - 1))
        lengths = np.maximum(change(np.diff(begins, append=len(tokens))), 0)
        own = np.repeat(tokens[begins], lengths)[: len(tokens)]
        return np.append(own, np.full(len(tokens) - len(own), tokens[-1] if last else -1))

    return _with_tokens(ids, laid)


def _ascending(ids: np.ndarray) -> np.ndarray:
    """The ids of each row in order, as where tokens are counted by their id."""
    return _with_tokens(ids, np.sort)


def _with_tokens(ids: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What is made of the ids of each row without its padding."""
    laid = ids.copy()
    for row, own in zip(laid, ids, strict=True):
        row[own >= 0] = change(own[own >= 0])
    return laid


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
    ("segments of other lengths", "Give the lengths of the segments, or their running sums "
     "(`cu_seqlens`), in the order in which they stand in the row.",
     with_empty_rows(_other_lengths), no_families, True),
    ("positions not restarted in segments", "Pass on `positions` and `key_positions`, which begin "
     "at 0 in each segment.", _not_restarted),
)  # fmt: skip
