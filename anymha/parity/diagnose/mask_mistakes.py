"""Mistakes with masks, causality, windows, and rows that see nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import numpy as np

from anymha.parity.diagnose.changes import Maker, Row, fields, no_families
from anymha.parity.diagnose.distance_bias import of_other_distances
from anymha.parity.diagnose.measured import Family, number
from anymha.parity.diagnose.window_bias import of_other_places
from anymha.parity.oracle.recipe import (
    Arrays,
    Recipe,
    Step,
    Variants,
    allowed,
    einsum,
    reads,
    softmax,
)
from anymha.parity.stages.trace import MASKS

MOST_ROWS = 16
"""How many sequences are tried whose mask all have."""

BLOCKS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 128, 256)
"""Sizes of the blocks by which a causal rule is taken."""

LOWERED = 1e4
"""What is often subtracted from logits to hide them; a row of these alone is a softmax still."""

ROUNDED = "rounded beside a number such as 10000"
"""What rows that see nothing are where that is subtracted."""

MOST_FIRST = 32
"""How many sizes of prefixes and windows are tried."""


def _empty(recipe: Recipe) -> np.ndarray:
    """The rows that see nothing."""
    return np.logical_not(np.any(allowed(recipe), axis=-1, keepdims=True))


def with_empty_rows(make: Maker) -> Maker:
    """The same mistakes, also with other numbers in the rows that only they leave empty."""

    def variants(recipe: Recipe) -> Variants:
        empty = np.any(_empty(recipe))
        for words, wrong in make(recipe):
            yield words, wrong
            if not empty and np.any(_empty(wrong)):
                several = f"{words}; " if words else ""
                for rows, step in _ROWS.items():
                    detail = f"{several}rows that see nothing {rows}"
                    yield detail, wrong.stepping("probabilities", _in_empty_rows(step))
                detail = f"{several}rows that see nothing are not masked, but {ROUNDED}"
                yield detail, _lowered_alike(wrong)

    return variants


def _lowered_alike(wrong: Recipe) -> Recipe:
    """With the logits of rows that see nothing lowered: rounding explains more of such a bias."""
    bias = np.where(_empty(wrong), -LOWERED, 0.0)
    seen = allowed(wrong) | (bias < 0)
    return wrong.but(masks={"seen": seen}, causal=False, window=None,
                     bias=bias if wrong.bias is None else wrong.bias + bias)  # fmt: skip


def _masks(
    change: Callable[[Recipe, np.ndarray], np.ndarray | None], together: bool = False
) -> Maker:
    """A mistake with each mask alone, and then with all `together`.

    `change` gives the wrong mask; None: it is left out; the mask itself: no mistake can be made.
    """

    @with_empty_rows
    def variants(recipe: Recipe) -> Variants:
        right = recipe.masks
        wrong = {name: change(recipe, mask) for name, mask in right.items()}
        groups: list[tuple[str, ...]] = [  # segments have mistakes of their own
            (n,) for n in right if wrong[n] is not right[n] and n != "segment_ids"
        ]
        groups += [tuple(right)] if together and len(right) > 1 else []
        for group in groups:
            words = _named(group[0], recipe) if len(group) == 1 else "all masks"
            masks = {name: wrong[name] if name in group else right[name] for name in right}
            yield words, recipe.but(masks={n: m for n, m in masks.items() if m is not None})

    return variants


def _named(mask: str, recipe: Recipe) -> str:
    return f"`{mask}`" if len(recipe.masks) > 1 or mask in MASKS else "the mask"


def _added(recipe: Recipe) -> Variants:
    """A mask added to the logits as the numbers 0 and 1, or taken for additive."""
    for name, mask in recipe.masks.items():
        rest = recipe.but(masks={n: m for n, m in recipe.masks.items() if n != name})
        for words, ones in (("1 where True", mask), ("1 where False", ~mask)):
            extra = ones.astype(np.float64)
            bias = extra if recipe.bias is None else recipe.bias + extra
            yield f"{_named(name, recipe)}, {words}", rest.but(bias=bias)


def _transposed(recipe: Recipe, mask: np.ndarray) -> np.ndarray:
    turned = np.swapaxes(mask, 2, 3)
    square = mask.shape[2] == mask.shape[3] != 1
    return turned if square and not np.array_equal(turned, mask) else mask


def _of_heads(recipe: Recipe, mask: np.ndarray) -> np.ndarray:
    """A mask of the batch taken for one of the heads, or the other way round."""
    batch, heads = recipe.lengths[0], recipe.heads[0]
    turns = batch == heads and batch > 1 and {mask.shape[0], mask.shape[1]} == {1, batch}
    return np.swapaxes(mask, 0, 1) if turns else mask


def _offset(recipe: Recipe) -> np.ndarray:
    return np.zeros(1, int) if recipe.offset is None else recipe.offset


def _counts_from_an_offset(recipe: Recipe) -> bool:
    positions = recipe.causal or recipe.window is not None
    return positions and bool(np.any(_offset(recipe)))


def _other_corner(recipe: Recipe) -> Mapping[str, Any]:
    """The last query aligned with the last key, in place of the first with the first."""
    _, queries, keys = recipe.lengths
    if queries == keys:
        return {}
    own, later = _offset(recipe), keys - queries
    corner = "aligned at the bottom right, the last query with the last key"
    first = ", not at the top left, the first with the first" * (not np.any(own))
    every = {f"{corner}{first}": own + later}
    if np.any(own):
        every[f"{corner}, without the query offset"] = 0 * own + later
        every["the offset subtracted"] = later - own
    return {words: {"offset": offset} for words, offset in every.items()}


def _not_causal(recipe: Recipe) -> Mapping[str, Any]:
    if recipe.window is None:
        return {"": {"causal": False}}
    behind = allowed(recipe) | ~allowed(recipe.but(masks={}, window=None))
    masks = {**recipe.masks, "window": behind}
    return {"": {"causal": False}, "all that follows is seen, the window of earlier keys stays": {
        "causal": False, "window": None, "masks": masks}}  # fmt: skip


def _causal_reversed(recipe: Recipe) -> Mapping[str, Any]:
    _, queries, keys = recipe.lengths
    apart = np.arange(keys) - np.arange(queries)[:, None] - _offset(recipe)[:, None, None, None]
    return {
        words: {"causal": False, "masks": {**recipe.masks, "later keys": apart >= least}}
        for words, least in (("", 0), ("the query's own key is not seen", 1))
    }


def _causal_shifted(recipe: Recipe) -> Mapping[str, Any]:
    queries, keys = _counted(recipe)
    behind = (keys < queries) | ((keys == 0) & (queries == 0))
    if recipe.window is not None:  # which stays where it is
        others = {"the next key is seen too": keys <= queries + 1,
                  "the query's own key is not seen": keys < queries,
                  "the query's own key is not seen, but by the first query": behind}  # fmt: skip
        return {words: {"causal": False, "masks": {**recipe.masks, "behind": mask}}
                for words, mask in others.items()}  # fmt: skip
    return {
        "the next key is seen too": {"offset": _offset(recipe) + 1},
        "the query's own key is not seen": {"offset": _offset(recipe) - 1},
        "the query's own key is not seen, but by the first query": {
            "causal": False, "masks": {**recipe.masks, "behind": behind}},
    }  # fmt: skip


def _offset_ignored(recipe: Recipe) -> Mapping[str, Any]:
    return _by_masks_or_all(recipe, {"": None})


def _offset_wrong(recipe: Recipe) -> Mapping[str, Any]:
    own = _offset(recipe)
    every = {"subtracted, not added": -own, "added twice": 2 * own}
    if len(own) > 1:
        every |= {f"that of the {words} for all": 0 * own + one for words, one in (
            ("first sequence", own[0]), ("last sequence", own[-1]), ("longest", own.max()),
            ("shortest", own.min()))}  # fmt: skip
    return _by_masks_or_all(recipe, every)


def _by_masks_or_all(recipe: Recipe, offsets: Mapping[str, np.ndarray | None]) -> Mapping[str, Any]:
    """Other offsets, of masks and positions or of masks alone."""
    right = recipe.positions if recipe.positions is not None else recipe.places("query")
    every: dict[str, dict[str, Any]] = {words: {"offset": own} for words, own in offsets.items()}
    if recipe.options.keys() & {"rotary", "alibi"}:
        every |= {f"{words or 'ignored'}, by the masks alone": {**one, "positions": right}
                  for words, one in every.items()}  # fmt: skip
    return every


def _own_key(recipe: Recipe) -> np.ndarray:
    """Where a key stands at a query's own position."""
    queries, keys = _counted(recipe)
    return queries == keys


def _own_hidden(recipe: Recipe) -> Mapping[str, Any]:
    """Each query's own key hidden, as in a shared projection of queries and keys."""
    if recipe.causal:  # then the border of the causal rule is off by one
        return {}
    own, right = _own_key(recipe), allowed(recipe)
    rest = right & ~own
    alone = right & own & ~rest.any(-1, keepdims=True)
    every = {
        "": rest,
        **({"but where it is all that is seen": rest | alone} if alone.any() else {}),
    }
    return {words: {"masks": {**recipe.masks, "own": seen}} for words, seen in every.items()}


def _own_seen(recipe: Recipe) -> Mapping[str, Any]:
    """Each query's own key seen, whatever masks hide."""
    seen = allowed(recipe) | _own_key(recipe)
    return {"": {"masks": {"own": seen}, "causal": False, "window": None}}


def _window_shifted(recipe: Recipe) -> Mapping[str, Any]:
    window = recipe.window or 0
    narrower = {"one key fewer on each side": {"window": window - 1}} if window > 1 else {}
    later = _offset(recipe)
    return {
        "one key more on each side": {"window": window + 1}, **narrower,
        "one key more after the query": {"offset": later + 1},
        "one key more before the query": {"offset": later - 1},
    }  # fmt: skip


def _window_resized(recipe: Recipe) -> Mapping[str, Any]:
    own = recipe.window or 0
    sizes = {"twice as wide on each side": 2 * own - 1, "half as wide": (own + 1) // 2,
             "2 W": 2 * own}  # fmt: skip
    return {f"{words}: {size} in place of {own}": {"window": size}
            for words, size in sizes.items() if abs(size - own) > 1}  # fmt: skip


def _counted(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """The positions by which a window counts: queries (1 or B, 1, T, 1), keys (1 or B, 1, 1, S)."""
    _, queries, keys = recipe.lengths
    own, other = np.arange(queries)[None], np.arange(keys)[None]
    if recipe.decoded is not None and queries == keys:
        own = other = recipe.decoded.places
    return (own + _offset(recipe)[:, None])[:, None, :, None], other[:, None, None]


def _window_of_one_side(recipe: Recipe) -> Mapping[str, Any]:
    window, (own, other) = recipe.window or 0, _counted(recipe)
    apart = own - other
    every = {"all keys that follow are seen": apart < window,
             "all keys that precede are seen": apart > -window}  # fmt: skip
    return {"": {"causal": True}} | {
        words: {"window": None, "masks": {**recipe.masks, "window": seen}}
        for words, seen in every.items()
    }


def _other_windows(recipe: Recipe) -> Mapping[str, Any]:
    """The window's condition inverted; blocks in the place of a window that slides."""
    window, (own, other) = recipe.window or 1, _counted(recipe)
    apart, blocks = own - other, own // window - other // window
    ring = ", as of a ring of which slots up to the query's are seen" if recipe.decoded else ""
    every = {
        "inverted: keys beyond it are seen": np.abs(apart) >= window,
        "inverted: keys beyond it are seen, and the query's own": (np.abs(apart) >= window)
        | (apart == 0),
        f"blocks of {window} in its place{ring}": blocks == 0,
        f"blocks of {window} in its place, and the one before": (blocks == 0) | (blocks == 1),
        f"blocks of {window} in its place, and both beside": np.abs(blocks) <= 1,
    }
    if np.any(_offset(recipe)):
        alone = own - _offset(recipe)[:, None, None, None] - other
        every["counted without the query offset"] = np.abs(alone) < window
    return {words: {"window": None, "masks": {**recipe.masks, "window": seen}}
            for words, seen in every.items()}  # fmt: skip


def _padding_seen(recipe: Recipe) -> Variants:
    """Zeros before the first key, and after the last, that take part where a window reaches."""
    if recipe.window is None:
        return
    most, (own, _), keys = recipe.window - 1, _counted(recipe), recipe.lengths[2]
    behind = 0 if recipe.causal else np.clip(own + recipe.window - keys, 0, most)
    count = np.clip(most - own, 0, most) + behind  # (1 or B, 1, T, 1)
    if not np.any(count):
        return

    def split(recipe: Recipe, stages: Arrays, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shares of the keys, and that of all padding."""
        logits = stages["masked_logits"]
        padded = recipe.scale * einsum("bthk,hk->bht", stages["query"], key)[..., None]
        top = np.maximum(logits.max(-1, keepdims=True), padded)
        weights, rest = np.exp(logits - top), count * np.exp(padded - top)
        total = weights.sum(-1, keepdims=True) + rest
        return weights / np.where(total > 0, total, 1.0), rest / np.where(total > 0, total, 1.0)

    heads, context = reads(recipe), recipe.steps["context"]
    key, value = (recipe.weights.get(f"{name}.bias", np.zeros(stage.shape[2:]))[heads]
                  for name, stage in ((n, recipe.stages[n]) for n in ("key", "value")))  # fmt: skip
    zeros = recipe.stepping("probabilities", lambda r, s: split(r, s, 0 * key)[0])
    yield "keys and values of zeros", zeros
    if np.any(key) or np.any(value):

        def more(recipe: Recipe, stages: Arrays) -> np.ndarray:
            rest = split(recipe, stages, key)[1].swapaxes(1, 2)
            return context(recipe, stages) + rest * value

        of_keys = recipe.stepping("probabilities", lambda r, s: split(r, s, key)[0])
        words = "inputs of zeros, whose keys and values are the biases"
        yield words, of_keys.stepping("context", more)


def _bias_wrong(recipe: Recipe) -> Variants:
    if recipe.bias is None:
        return
    right, own = np.asarray(recipe.bias), recipe.steps["masked_logits"]
    for words, bias in {
        "left out": None,
        "added twice": 2.0 * right,
        "subtracted": -right,
        "scaled": recipe.scale * right,
        "its exponential": np.exp(right),
        "its logarithm": np.log(np.abs(right) + 1e-300),
        "its absolute value": np.abs(right),
    }.items():
        yield words, recipe.but(bias=bias)
    free = recipe.but(bias=None)

    def multiplied(_: Recipe, stages: Arrays) -> np.ndarray:
        return own(free, {**stages, "logits": stages["logits"] * right})

    def one_more(_: Recipe, stages: Arrays) -> np.ndarray:
        return own(free, {**stages, "logits": stages["logits"] * (1 + right)})

    yield "multiplied, not added", free.stepping("masked_logits", multiplied)
    yield "multiplied with 1 more, not added", free.stepping("masked_logits", one_more)
    for words, again in (("", False), (", and those divided by the sum again", True)):

        def late(recipe: Recipe, stages: Arrays, again: bool = again) -> np.ndarray:
            shares = free.steps["probabilities"](recipe, stages)
            shares = shares + np.where(allowed(recipe), right, 0.0)
            return shares / shares.sum(-1, keepdims=True) if again else shares

        yield f"added to the probabilities{words}", free.stepping("probabilities", late)


def _bias_of_others(recipe: Recipe) -> Variants:
    """A bias of other positions, heads or sequences."""
    if recipe.bias is None:
        return
    bias = np.asarray(recipe.bias)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    for words, other in itertools.chain(
        of_other_distances(bias),
        of_other_places(bias),
        _elsewhere_on_an_axis(bias),
        _turned(bias),
        _averaged(bias),
        _of_other_heads(bias),
        _in_another_order(bias),
    ):
        yield words, recipe.but(bias=other)
        yield f"{words}, subtracted", recipe.but(bias=-other)


def _turned(bias: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    *_, queries, keys = bias.shape
    if queries == keys > 1:
        yield "transposed, queries and keys exchanged", np.swapaxes(bias, 2, 3)
    elif queries > 1 < keys:
        turned = bias.reshape(*bias.shape[:2], keys, queries).swapaxes(2, 3)
        yield "reshaped to (keys, queries)", turned
    if bias.shape[0] == bias.shape[1] > 1:
        yield "transposed, sequences and heads exchanged", np.swapaxes(bias, 0, 1)


def _in_another_order(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Of a mask or a bias (B, H, T, S) its numbers, read in another order of its axes.

    A flat table, or an axis moved to another place, is viewed as if the axes stood in order.
    """
    for axis in range(4):  # one for all is broadcast after it is read
        if np.all(array == np.take(array, [0], axis)):
            array = np.take(array, [0], axis)
    several = [axis for axis in range(4) if array.shape[axis] > 1]
    flat, known = array.reshape([array.shape[axis] for axis in several]), {array.tobytes()}
    if array.shape[2] == array.shape[3]:
        known.add(np.swapaxes(array, 2, 3).tobytes())  # told as transposed
    for order in list(itertools.permutations(range(len(several))))[1:]:
        back = np.argsort(order)
        read_so = flat.reshape([flat.shape[at] for at in order]).transpose(back)
        written_so = flat.transpose(order)
        own, other = (", ".join(_AXES[several[at]] for at in axes)
                      for axes in (range(len(several)), order))  # fmt: skip
        for moved, written, read in ((written_so, other, own), (read_so, own, other)):
            if moved.tobytes() not in known:
                known.add(moved.tobytes())
                words = f"axes not transposed: written as ({written}), read as ({read})"
                yield words, moved.reshape(array.shape)


def _averaged(bias: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for axis, name in enumerate(_AXES):
        if bias.shape[axis] > 1:
            yield f"averaged over the {name}", bias.mean(axis, keepdims=True)
            yield f"added up over the {name}", bias.sum(axis, keepdims=True)


def _of_other_heads(bias: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if 1 < bias.shape[1] <= 4:
        for order in itertools.permutations(range(bias.shape[1])):
            yield f"heads permuted, to {', '.join(map(str, order))}", bias[:, list(order)]


def _bias_times(recipe: Recipe) -> Iterator[Family]:
    """A bias with any factor."""
    right = recipe.bias
    for sign in (1, -1) if right is not None else ():

        def make(power: float, sign: int = sign) -> Recipe:
            return recipe.but(bias=sign * math.exp(power) * np.asarray(right))

        def words(power: float, sign: int = sign) -> str:
            factor = number(sign * math.exp(power))
            return "subtracted" if factor == "-1" else f"multiplied by {factor}"

        yield Family(make, tuple(np.linspace(-6, 6, 13)), words)


def _keys(count: int) -> str:
    return "key is" if count == 1 else f"{count} keys are"


def _in_empty_rows(instead: Step) -> Step:
    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        empty = np.all(np.isneginf(stages["masked_logits"]), axis=-1, keepdims=True)
        return np.where(empty, instead(recipe, stages), softmax(stages["masked_logits"]))

    return step


def _empty_rows(wrong: Mapping[str, Step]) -> Maker:
    """Other probabilities in the rows that see nothing, by the words of each variant."""

    def make(recipe: Recipe) -> Variants:
        if np.any(_empty(recipe)):
            for words, instead in wrong.items():
                yield words, recipe.stepping("probabilities", _in_empty_rows(instead))

    return make


def _evenly_by_position(recipe: Recipe, stages: Arrays) -> np.ndarray:
    seen = allowed(recipe.but(masks={}))
    return np.where(seen, 1.0, 0.0) / np.maximum(seen.sum(-1, keepdims=True), 1)


def _unmasked(recipe: Recipe, stages: Arrays) -> np.ndarray:
    return softmax(stages["logits"] if recipe.bias is None else stages["logits"] + recipe.bias)


def _not_masked(recipe: Recipe) -> Variants:
    yield from _empty_rows({"": _unmasked})(recipe)
    if np.any(_empty(recipe)):
        yield ROUNDED, _lowered_alike(recipe)


def _at(place: Callable[[Recipe], np.ndarray]) -> Step:
    """All of the weight on one key of each row: on that where `place` is 1."""
    return lambda recipe, stages: np.broadcast_to(
        np.where(place(recipe), 1.0, 0.0), stages["logits"].shape)  # fmt: skip


def _by_position_alone(recipe: Recipe) -> Variants:
    """Rows that see nothing show what a causal rule or a window does, without other masks."""

    def step(recipe: Recipe, stages: Arrays) -> np.ndarray:
        free = recipe.but(masks={})
        return softmax(free.steps["masked_logits"](free, stages))

    if recipe.causal or recipe.window is not None:
        yield from _empty_rows({"all that position lets them see": step})(recipe)


def _after_the_bias(recipe: Recipe) -> Variants:
    """Zeros after the output in rows that see nothing, without the output's bias or with NaN."""
    empty = _empty(recipe).all(1)  # [B, T, 1]
    if np.any(empty):
        for words, other in (("zeros after the output, without its bias", 0.0),
                             ("NaN after the output", np.nan)):  # fmt: skip
            yield words, recipe.after(("output",), lambda y, to=other: np.where(empty, to, y))
        if recipe.inputs["query"].shape == recipe.stages["output"].shape:
            x = recipe.inputs["query"]
            yield "the query itself", recipe.after(("output",), lambda y: np.where(empty, x, y))


_ROWS: Mapping[str, Step] = {
    "take the mean of all values": lambda r, stages: np.full(1, 1 / stages["logits"].shape[-1]),
    "are not masked": _unmasked,
    "give NaN": lambda r, stages: np.full(1, np.nan),
}
"""What rows that see nothing give, where they do not give zeros."""


def _groups(recipe: Recipe) -> Iterator[tuple[str, np.ndarray, Recipe]]:
    """Masks that may be wrong together: their name, what they let see, and the rest."""
    plain = recipe.but(masks={}, causal=False, window=None)
    positions = allowed(recipe.but(masks={}))
    by_position = recipe.causal or recipe.window is not None
    for name, mask in recipe.masks.items():
        rest = {other: m for other, m in recipe.masks.items() if other != name}
        yield _named(name, recipe), mask, recipe.but(masks=rest)
    if by_position:
        yield "the mask of positions", positions, recipe.but(causal=False, window=None)
    if len(recipe.masks) + by_position > 1:
        yield "all masks", allowed(recipe), plain


@with_empty_rows
def _of_others(recipe: Recipe) -> Variants:
    """Masks of other positions, of another sequence or head, or in another order."""
    for named, mask, rest in _groups(recipe):
        for words, moved in _moved(recipe, mask):
            yield f"{named}, {words}", rest.but(masks={**rest.masks, "moved": moved})
    yield from _joined_by_or(recipe)
    yield from _chunks(recipe)


def _joined_by_or(recipe: Recipe) -> Variants:
    """Masks of which it is enough that one lets see: all of them, or two of several."""
    parts = {_named(name, recipe): mask for name, mask in recipe.masks.items()}
    if recipe.causal or recipe.window is not None:
        parts["the mask of positions"] = allowed(recipe.but(masks={}))
    if recipe.causal and recipe.window is not None:
        window, causal = (allowed(recipe.but(masks={}, **one))
                          for one in ({"causal": False}, {"window": None}))  # fmt: skip
        either = recipe.but(
            masks={**recipe.masks, "either": window | causal}, causal=False, window=None
        )
        yield "masks joined by or, not by and: the causal mask and the window", either
    free = recipe.but(causal=False, window=None)
    if len(parts) > 1:
        both = free.but(masks={"either": reduce(np.logical_or, parts.values())})
        yield "masks joined by or, not by and: a key that one of them lets see is seen", both
    for pair in itertools.combinations(parts, 2) if len(parts) > 2 else ():
        rest = {name: mask for name, mask in parts.items() if name not in pair}
        either = {**rest, "either": parts[pair[0]] | parts[pair[1]]}
        yield f"masks joined by or, not by and: {' and '.join(pair)}", free.but(masks=either)


def _moved(recipe: Recipe, mask: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A mask after what people do to its axes by mistake."""
    batch, queries, keys = recipe.lengths
    heads = recipe.heads[0]
    one_side = 1 in mask.shape[2:]
    if queries == keys and one_side and mask.shape[2:] != (1, 1):
        turned = np.swapaxes(mask, 2, 3)
        of, other = ("keys", "queries") if mask.shape[2] == 1 else ("queries", "keys")
        yield f"it hides {other}, not {of}", turned
        yield f"it hides {other} as well as {of}", mask & turned
        yield f"it hides pairs where both, {other} and {of}, are hidden", mask | turned
    if batch == queries > 1 and {mask.shape[0], mask.shape[2]} == {1, batch}:
        shapes = ("(B, S)", "(T, S)") if mask.shape[2] == 1 else ("(T, S)", "(B, S)")
        yield "of {} taken for one of {}".format(*shapes), np.swapaxes(mask, 0, 2)
    if mask.shape[2] > 1 and mask.shape[3] > 1 and queries != keys:
        yield (
            "reshaped to (keys, queries)",
            np.swapaxes(mask.reshape(*mask.shape[:2], keys, queries), 2, 3).reshape(mask.shape),
        )
    if mask.shape[3] > 1:
        yield from _as_lengths(mask)
    for axis, name in enumerate(_AXES[1:], 1):
        if mask.shape[axis] > 1:
            words = f"reduced over the {name}: what {{}} is seen"
            yield words.format("all of them see"), np.all(mask, axis, keepdims=True)
            yield words.format("one of them sees"), np.any(mask, axis, keepdims=True)
    yield from _elsewhere_on_an_axis(mask)
    for axis in (2, 3):
        for by in (1, -1) if mask.shape[axis] > 1 else ():
            later, place = _shifted(mask, by, axis), "after" if by > 0 else "before"
            yield f"one of the {_AXES[axis]} more is seen {place} each, off by one", mask | later
            yield f"one of the {_AXES[axis]} fewer is seen {place} each, off by one", mask & later
            end = np.arange(mask.shape[axis]) == (0 if by > 0 else mask.shape[axis] - 1)
            fewer = mask & later & ~end.reshape((-1, *(1,) * (3 - axis)))
            if not np.array_equal(fewer, mask & later):
                yield (
                    f"one of the {_AXES[axis]} fewer is seen {place} each, lengths one short",
                    fewer,
                )
    for axis, count in enumerate((batch, heads)):
        for at in range(count) if 1 < count <= 16 else ():
            own = (np.arange(count) == at).reshape((-1, *(1,) * (3 - axis)))
            yield f"it acts on {_ONE[axis]} {at} alone", mask | ~own
            if count > 2:
                yield f"it acts on all {_AXES[axis]} but {_ONE[axis]} {at}", mask | own
    if mask.shape[1] == 1 < mask.shape[0]:
        place = np.arange(batch * heads)
        orders = {"repeated": (place % batch).reshape(batch, heads),
                  "laid out": (place // heads).reshape(heads, batch).T}  # fmt: skip
        for words, order in orders.items():
            detail = f"{words} with batch and heads in the wrong order"
            yield detail, mask[:, 0][order]
    yield from _in_another_order(mask)


def _as_lengths(mask: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A mask with holes, or with padding in front, taken for a number of keys."""
    place, keys = np.arange(mask.shape[3]), mask.shape[3]
    count = mask.sum(-1, keepdims=True)
    hole = np.where(mask.all(-1), keys, np.argmin(mask, -1))[..., None]
    last = np.where(mask.any(-1), keys - np.argmax(mask[..., ::-1], -1), 0)[..., None]
    yield "taken for a length: as many of the first keys are seen", place < count
    yield "taken for a length: as many of the last keys are seen", place >= keys - count
    yield "taken for a length: what follows the first hidden key is hidden", place < hole
    yield "taken for a length: all up to the last key that it shows is seen", place < last


_AXES = ("sequences", "heads", "queries", "keys")
_ONE = ("sequence", "head", "query", "key")


def _elsewhere_on_an_axis(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Of a mask or a bias (B, H, T, S) what belongs to other places along one of its axes."""
    for axis, name in enumerate(_AXES):
        count = array.shape[axis]
        if count == 1:
            continue
        yield f"in reverse along the {name}", np.flip(array, axis)
        for by, words in enumerate(("one", "two", "three")[: count - 1], 1):
            moved = f"shifted by {words} of the {name}" if axis > 1 else (
                f"of another of the {name}, {by} on")  # fmt: skip
            yield moved, np.roll(array, by, axis)
            if count - by > 3:
                yield f"{moved}, backwards", np.roll(array, -by, axis)
        for at, which in ((0, "first"), (count - 1, "last")):
            yield f"that of the {which} {_ONE[axis]} for all", np.take(array, [at], axis)


def _shifted(mask: np.ndarray, by: int, axis: int) -> np.ndarray:
    """The mask moved along an axis; the ends keep theirs."""
    moved = np.roll(mask, by, axis)
    end = [slice(None)] * mask.ndim
    end[axis] = slice(0, 1) if by > 0 else slice(-1, None)
    moved[tuple(end)] = mask[tuple(end)]
    return moved


def _chunks(recipe: Recipe) -> Variants:
    """Keys at the ends that are never visited, and positions that begin anew in each chunk."""
    _, queries, keys = recipe.lengths
    place = np.arange(keys)[None, None, None]
    for count in [n for n in range(1, keys) if n < 33 or n % 64 == 0 or keys % n == 0]:
        last = recipe.but(masks={**recipe.masks, "end": place < keys - count})
        yield f"the last {_keys(count)} left out, as an incomplete chunk", last
        if count < 4:
            first = recipe.but(masks={**recipe.masks, "start": place >= count})
            yield f"the first {_keys(count)} left out", first
        if (recipe.causal or recipe.window is not None) and count > 1:
            free = recipe.but(causal=False, window=None)
            for words, distance in {
                "keys": place % count - np.arange(queries)[:, None],
                "queries": place - np.arange(queries)[:, None] % count,
            }.items():
                seen = distance <= 0 if recipe.causal else np.ones_like(distance, bool)
                if recipe.window is not None:
                    seen = seen & (np.abs(distance) < recipe.window)
                masks = {**recipe.masks, "chunks": seen}
                yield (f"positions of {words} begin anew in each chunk of {count}",
                       free.but(masks=masks))  # fmt: skip


def _weak(recipe: Recipe) -> Iterator[Family]:
    """Hidden logits that are replaced by a number, or lowered by it, in place of -inf."""
    for named, seen, rest in _groups(recipe):

        def filled(number: float, seen: np.ndarray = seen, rest: Recipe = rest) -> Recipe:
            return _filled(rest, seen, number)

        def lowered(number: float, seen: np.ndarray = seen, rest: Recipe = rest) -> Recipe:
            return rest.after(("masked_logits",), lambda x: x + np.where(seen, 0.0, number))

        def words(value: float, named: str = named) -> str:
            close = "zero" if abs(value) < 1e-4 else number(value)
            return f"{named}: hidden logits are filled with {close}, a finite number"

        def lower(value: float, named: str = named) -> str:
            return f"{named}: hidden logits are lowered by {number(-value)} only, a finite number"

        yield Family(filled, tuple(np.linspace(-30, 12, 22)), words)
        yield Family(lowered, tuple(np.linspace(-30, 12, 22)), lower)


def _filled(rest: Recipe, seen: np.ndarray, number: float) -> Recipe:
    """The recipe without a mask, with a number in the place of the logits that it hides."""
    return rest.after(("masked_logits",), lambda x: np.where(seen | np.isneginf(x), x, number))


def _elsewhere(recipe: Recipe) -> Variants:
    """A mask that acts after the softmax, or on inputs or projections."""
    for named, seen, rest in _groups(recipe):

        def step(recipe: Recipe, stages: Arrays, seen: np.ndarray = seen,
                 rest: Recipe = rest) -> np.ndarray:  # fmt: skip
            return rest.steps["probabilities"](recipe, stages) * seen

        def shown(recipe: Recipe, stages: Arrays, seen: np.ndarray = seen,
                  rest: Recipe = rest) -> np.ndarray:  # fmt: skip
            logits = rest.steps["masked_logits"](recipe, stages)
            return np.where(seen, -np.inf, np.where(np.isneginf(logits), logits, 0.0))

        def even(recipe: Recipe, stages: Arrays, seen: np.ndarray = seen,
                 rest: Recipe = rest) -> np.ndarray:  # fmt: skip
            logits = rest.steps["masked_logits"](recipe, stages)
            return np.where(seen & ~np.isneginf(logits), 0.0, -np.inf)

        def alike(recipe: Recipe, stages: Arrays, rest: Recipe = rest) -> np.ndarray:
            logits = rest.steps["masked_logits"](recipe, stages)
            return np.where(np.isneginf(logits), logits, 0.0)

        if not np.all(seen):
            yield (f"{named}: everything is hidden by a finite number, the probabilities of all "
                   "keys are alike", rest.stepping("masked_logits", alike))  # fmt: skip
        yield (f"{named}: the keys seen are hidden, the hidden ones are seen with logits of zero",
               rest.stepping("masked_logits", shown))  # fmt: skip
        yield (f"{named}: the logits of the keys seen are lost beside a great number that is added",
               rest.stepping("masked_logits", even))  # fmt: skip
        less = rest.after(("masked_logits",), lambda x, seen=seen: x - np.where(seen, 0.0, 1.0))
        yield f"{named}: hidden logits are lowered by 1 only, a finite number", less
        great = "a great positive number: hidden keys alone are seen"
        for words, one in (("zero, as by 1e-9 or a product with the mask", 0.0), (great, 1e4)):
            yield f"{named}: hidden logits are filled with {words}", _filled(rest, seen, one)
        late, values = rest.stepping("probabilities", step), seen.shape[1:3] == (1, 1)
        of = "hidden probabilities are zeroed after the softmax" + ", or hidden values" * values
        yield f"{named}: {of}, so that rows do not sum to 1", late
        if seen.shape[1:3] != (1, 1):
            continue
        of_keys = seen[:, 0, 0, :, None]  # [B, S, 1]
        every = ("query", "key", "value")
        for names in (("key", "value"), every, ("key",)):
            inputs = {n: x * of_keys if n in names else x for n, x in rest.inputs.items()
                      if n not in names or x.shape[1] == seen.shape[3]}  # fmt: skip
            if len(inputs) == 3:
                words = "inputs are" if len(names) > 1 else "keys' input is"
                also = ", those of the queries too" if "query" in names else ""
                yield (f"{named}: hidden {words} zeroed in place of masked{also}",
                       rest.but(inputs=inputs))  # fmt: skip
        for stage in ("output", "context") if seen.shape[3] == recipe.lengths[1] else ():
            keep = of_keys if stage == "output" else of_keys[..., None]
            late = recipe.after((stage,), lambda x, keep=keep: x * keep)
            yield f"{named}: the {stage} of hidden positions is zeroed too", late
        zeroed = rest.after(("key", "value"), lambda x, keep=of_keys: x * keep[..., None])
        yield f"{named}: hidden keys and values are zeroed in place of masked", zeroed


def _of_another_sequence(recipe: Recipe) -> Variants:
    """Masks of other sequences of the batch."""
    batch = recipe.lengths[0]
    for name, mask in recipe.masks.items():
        changes = {"that of the first sequence for all": mask[:1],
                   "that of the last sequence for all": mask[-1:]}  # fmt: skip
        changes |= {
            f"each of the sequences has that of the one {where}before it": np.roll(mask, n, 0)
            for n, where in ((1, ""), (2, "2 "))
            if n < batch
        }
        changes |= {f"that of sequence {n} for all": mask[n : n + 1]
                    for n in range(1, min(len(mask), MOST_ROWS) - 1)}  # fmt: skip
        changes |= {
            "what one sequence hides, all hide, as cut to the shortest": mask.all(0, keepdims=True),
            "what one sequence sees, all see, as of the longest": mask.any(0, keepdims=True),
        }
        for words, other in changes.items() if len(mask) > 1 else ():
            yield f"{_named(name, recipe)}, {words}", recipe.but(
                masks={**recipe.masks, name: other})  # fmt: skip


@with_empty_rows
def _in_place_of_another(recipe: Recipe) -> Variants:
    """A mask of queries laid on the keys, or of keys on the queries, and another mask lost."""
    _, queries, keys = recipe.lengths
    masks = {name: mask for name, mask in recipe.masks.items() if name != "segment_ids"}
    turned = {n: np.swapaxes(m, 2, 3) for n, m in masks.items() if 1 in m.shape[2:]}
    for one, other in itertools.permutations(masks, 2) if queries == keys else ():
        if one not in turned or masks[one].shape[2:] == masks[other].shape[2:]:
            continue
        rest = {n: m for n, m in recipe.masks.items() if n not in (one, other)}
        of = "keys" if turned[one].shape[2] == 1 else "queries"
        words, laid = f"`{one}` hides {of} in the place of `{other}`", {**rest, other: turned[one]}
        yield words, recipe.but(masks={**laid, one: masks[one]})
        yield f"{words}, and no {'queries' if of == 'keys' else 'keys'}", recipe.but(masks=laid)
        if other in turned and one < other:
            both = recipe.but(masks={**laid, one: turned[other]})
            yield f"`{one}` and `{other}` exchanged", both


def _first_seen(recipe: Recipe) -> Variants:
    """The first keys seen by every query, beside the causal rule or the window."""
    _, _, keys = recipe.lengths
    place, free = np.arange(keys), recipe.but(causal=False, window=None)
    near = allowed(recipe.but(masks={}, causal=False))
    behind = allowed(recipe.but(masks={}, window=None))
    for count in range(1, min(keys, MOST_FIRST + 1)):
        first = place < count
        words = f"the first {count} key{'s' if count > 1 else ''}"
        if recipe.causal:
            masks = {**recipe.masks, "first": (behind | first) & near}
            yield f"{words}, a prefix that every query sees", free.but(masks=masks)
        if recipe.window is not None:
            masks = {**recipe.masks, "first": (near | first) & behind}
            yield f"{words}, beside the window", free.but(masks=masks)
        if recipe.causal and recipe.window is not None:
            masks = {**recipe.masks, "first": near & behind | first}
            yield f"{words}, a prefix beside window and causal mask", free.but(masks=masks)


def _causal_by_blocks(recipe: Recipe) -> Variants:
    """The causal rule for whole blocks of positions, as a kernel decides which it visits."""
    if not recipe.causal or recipe.window is not None:
        return
    own, other = _counted(recipe)
    free = recipe.but(causal=False)
    for size in (n for n in BLOCKS if n < max(recipe.lengths[1:])):
        block = own // size
        for words, seen in {
            f"of {size}, each query sees its own block and those before": other // size <= block,
            f"of {size}, each query sees the blocks before its own alone": other // size < block,
            f"of {size}, each query sees the blocks before its own and itself": (
                (other // size < block) | (other == own)
            ),
            f"of {size}, each query sees as much as the first of its block": (
                other <= block * size
            ),
        }.items():
            yield words, free.but(masks={**recipe.masks, "blocks": seen})
    # Tiles that a loop skips, of other sizes for queries than for keys; each mask once.
    known = {recipe.seen.tobytes()}
    sizes = [n for n in BLOCKS if n <= max(recipe.lengths[1:])]
    for rows, columns in itertools.product(sizes, repeat=2):
        first, begin = own // rows * rows, other // columns * columns
        for words, seen in {
            "that begin after the first query of their tile are skipped": begin <= first,
            "that end after the last query of their tile are skipped": (
                begin + columns <= first + rows
            ),
        }.items():
            mark = (recipe.seen & seen).tobytes()
            if mark not in known:
                known.add(mark)
                detail = f"tiles of {rows} queries and {columns} keys: those {words}"
                yield detail, recipe.but(masks={**recipe.masks, "tiles": seen})


def _window_by_blocks(recipe: Recipe) -> Variants:
    """A window counted from the ends of the blocks in which queries or keys stand."""
    window, (own, other) = recipe.window, _counted(recipe)
    for size in (n for n in BLOCKS if n < max(recipe.lengths[1:])) if window is not None else ():
        query, key = (place // size * size for place in (own, other))  # where their blocks begin
        end = key + size - 1
        for words, apart in {
            "the first key of its block": own - key,
            "the last key of its block": own - end,
            "the first query of its block": query - other,
            "the last query of its block": query + size - 1 - other,
            "the block's nearest key": own - np.clip(own, key, end),
            "the block's farthest key": np.maximum(np.abs(own - key), np.abs(own - end)),
            "block to block, by their first positions": query - key,
            "block to block, by their nearest positions": np.maximum(
                np.abs(query - key) - size + 1, 0
            ),
        }.items():
            masks = {**recipe.masks, "window": np.abs(apart) < window}
            yield f"counted to {words}, blocks of {size}", recipe.but(window=None, masks=masks)


def _windows_of_its_own(recipe: Recipe) -> Variants:
    """A window or blocks where the reference sees everything."""
    if recipe.window is not None:
        return
    (own, other), keys = _counted(recipe), recipe.lengths[2]
    for size in range(1, min(keys, MOST_FIRST + 1)):
        yield f"of {size}", recipe.but(window=size)
        blocks = {**recipe.masks, "blocks": own // size == other // size}
        yield f"blocks of {size}", recipe.but(masks=blocks)
        if recipe.causal:
            first = {**recipe.masks, "first": (np.abs(own - other) < size) | (other == 0)}
            yield f"of {size}, beside the first key", recipe.but(masks=first)


MISTAKES: tuple[Row, ...] = (
    ("inverted mask", "Pass the opposite of the mask, `~mask`: in one of the two "
     "implementations, True means that a position may not be attended to.",
     _masks(lambda recipe, mask: ~mask, together=True)),
    ("ignored mask", "The mask never reaches the logits: pass it on, under the "
     "name that the layer knows.", _masks(lambda recipe, mask: None, together=True)),
    ("additive mask", "A mask of 0 and 1 is added to the logits: make it boolean, "
     "or 0 and -inf.", _added),
    ("transposed mask", "The mask's last two axes are (queries, keys): exchange "
     "them.", _masks(_transposed)),
    ("mask of batch and heads exchanged", "Give the mask all four axes, "
     "(batch, heads, queries, keys).", _masks(_of_heads)),
    ("mask of another sequence", "Give each sequence of the batch its own mask.",
     _of_another_sequence),
    ("causal mask ignored", "Switch the causal mask on.",
     fields(lambda r: r.causal, _not_causal)),
    ("causal mask at the other corner", "With fewer queries than keys the first "
     "query is aligned with the first key in one of the two, the last with the last in the other: "
     "pass `query_offset`, or a mask.",
     with_empty_rows(fields(lambda r: r.causal, _other_corner))),
    ("causal mask off by one", "Query i sees keys j <= i: the diagonal is included.",
     with_empty_rows(fields(lambda r: r.causal, _causal_shifted))),
    ("causal mask reversed", "Query i sees keys j <= i, not j >= i: take the "
     "lower triangle.", with_empty_rows(fields(lambda r: r.causal, _causal_reversed))),
    ("query offset ignored", "Add the offset to the positions of the queries.",
     with_empty_rows(fields(_counts_from_an_offset, _offset_ignored))),
    ("wrong query offset", "Add the offset to the positions of the queries once, each sequence's "
     "own.", with_empty_rows(fields(_counts_from_an_offset, _offset_wrong))),
    ("window off by one", "A window of W is |i - j| < W: libraries that count "
     "without the query itself take W - 1.",
     with_empty_rows(fields(lambda r: r.window is not None, _window_shifted))),
    ("window of another size", "A window of W is |i - j| < W: the query and W - 1 keys on each "
     "side.", with_empty_rows(fields(lambda r: r.window is not None, _window_resized))),
    ("window ignored", "Pass the window on.", fields(lambda r: r.window is not None, window=None)),
    ("window of one side", "The window is open on both sides unless the call is causal too.",
     fields(lambda r: r.window is not None and not r.causal, _window_of_one_side)),
    ("another kind of window", "Query i sees the keys with |i - j| < W: the window slides with the "
     "query.", with_empty_rows(fields(lambda r: r.window is not None, _other_windows))),
    ("another kind of window", "Query i sees the keys with |i - j| < W: the window slides with the "
     "query.", with_empty_rows(_window_by_blocks), no_families, True),
    ("padding beside the keys seen", "Where a window reaches beyond the first or the last key, "
     "hide what pads them with -inf.", _padding_seen, no_families, True),
    ("wrong attention bias", "The bias is added once, after the scale.",
     _bias_wrong, _bias_times),
    ("attention bias of other positions", "Give each sequence, head, query and key its own place "
     "in the bias.", _bias_of_others, no_families, True),
    ("fully masked rows give the mean of the values", "A query that sees nothing "
     "gives zeros in anymha; here its mask is a large finite number, or the softmax divides by "
     "the number of keys. Give such rows zeros, or leave them out of the comparison.",
     _empty_rows({"the mean of all values": lambda r, stages: np.full(1, 1 / r.lengths[2]),
                  "the mean of the values not masked by position": _evenly_by_position})),
    ("fully masked rows give NaN", "A query that sees nothing gives zeros in anymha: "
     "guard the softmax of a row of -inf alone.",
     _empty_rows({"": lambda r, stages: np.full(1, np.nan)})),
    ("fully masked rows are not masked", "A query that sees nothing gives zeros "
     "in anymha; here its mask shifts such a row by a constant, which a softmax ignores.",
     _not_masked),
    *(("fully masked rows are given a key", "A query that sees nothing gives zeros in anymha: show "
       "it no key in place of that, or leave such rows out of the comparison.", make)
      for make in (_empty_rows({
          "the first key": _at(lambda r: np.arange(r.lengths[2]) == 0),
          "the last key": _at(lambda r: np.arange(r.lengths[2]) == r.lengths[2] - 1),
          "their own key": _at(_own_key)}), _by_position_alone)),
    ("fully masked rows without the output's bias", "A query that sees nothing has a context of "
     "zeros, so its output is the bias of the output: zero nothing after it.", _after_the_bias),
    ("own key hidden", "A query sees its own key unless a mask hides it: leave the diagonal out of "
     "the mask.", with_empty_rows(fields(lambda r: True, _own_hidden))),
    ("own key seen in spite of the mask", "A query sees its own key only where no mask hides it: "
     "set no diagonal.", fields(lambda r: True, _own_seen)),
    ("mask applied wrongly", "Hide with -inf, before the softmax: a finite number lets hidden "
     "positions be seen, and zeros take part in the softmax.", _elsewhere, _weak),
    *(("mask of other positions", "Give each sequence, head, query and key its own place in the "
       "mask.", make, no_families, alone)
      for make, alone in ((_in_place_of_another, False), (_of_others, True))),
    ("first keys seen by all", "A prefix that all queries see, or first keys beside a window, are "
     "no rule of the layer: leave them out, or give the reference a mask.",
     with_empty_rows(_first_seen), no_families, True),
    ("causal mask by blocks", "Query i sees keys j <= i: compare positions, not the "
     "blocks in which they stand.", with_empty_rows(_causal_by_blocks), no_families, True),
    ("window not asked for", "Leave the window out, or give it to the reference too.",
     _windows_of_its_own, no_families, True),
    ("causal mask not asked for", "Switch the causal mask off; if it is meant, compare with "
     "`use_causal_mask=True`, in the command by `--cases self-causal`.",
     fields(lambda r: not r.causal, causal=True)),
)  # fmt: skip
