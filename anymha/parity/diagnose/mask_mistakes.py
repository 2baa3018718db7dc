"""Mistakes with masks, causality, windows, and rows that see nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anymha.parity.diagnose.changes import Maker, fields
from anymha.parity.oracle.recipe import Arrays, Recipe, Step, Variants, allowed, softmax


def _masks(
    change: Callable[[Recipe, np.ndarray], np.ndarray | None], together: bool = False
) -> Maker:
    """A mistake with each mask alone, and then with all `together`.

    `change` gives the wrong mask; None: it is left out; the mask itself: no mistake can be made.
    """

    def variants(recipe: Recipe) -> Variants:
        right = recipe.masks
        wrong = {name: change(recipe, mask) for name, mask in right.items()}
        groups: list[tuple[str, ...]] = [
            (name,) for name in right if wrong[name] is not right[name]
        ]
        groups += [tuple(right)] if together and len(right) > 1 else []
        for group in groups:
            words = _named(group[0], recipe) if len(group) == 1 else "all masks"
            masks = {name: wrong[name] if name in group else right[name] for name in right}
            yield words, recipe.but(masks={n: m for n, m in masks.items() if m is not None})

    return variants


def _named(mask: str, recipe: Recipe) -> str:
    return f"`{mask}`" if len(recipe.masks) > 1 else "the mask"


def _added(recipe: Recipe) -> Variants:
    """A mask added to the logits as the numbers 0 and 1, or taken for additive."""
    for name, mask in recipe.masks.items():
        rest = recipe.but(masks={n: m for n, m in recipe.masks.items() if n != name})
        for words, number in (("1 where True", mask), ("1 where False", ~mask)):
            extra = number.astype(np.float64)
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


def _other_corner(recipe: Recipe) -> Mapping[str, Any]:
    """The last query aligned with the last key, in place of the first with the first."""
    _, queries, keys = recipe.lengths
    return {} if queries == keys else {"": {"offset": _offset(recipe) + keys - queries}}


def _causal_reversed(recipe: Recipe) -> Mapping[str, Any]:
    _, queries, keys = recipe.lengths
    later = np.arange(keys) >= np.arange(queries)[:, None] + _offset(recipe)[:, None, None, None]
    return {"": {"causal": False, "masks": {**recipe.masks, "later keys": later}}}


def _causal_shifted(recipe: Recipe) -> Mapping[str, Any]:
    if recipe.window is not None:
        return {}
    return {
        "the next key is seen too": {"offset": _offset(recipe) + 1},
        "the query's own key is not seen": {"offset": _offset(recipe) - 1},
    }


def _window_shifted(recipe: Recipe) -> Mapping[str, Any]:
    window = recipe.window or 0
    narrower = {"one key fewer on each side": {"window": window - 1}} if window > 1 else {}
    return {"one key more on each side": {"window": window + 1}, **narrower}


def _bias_wrong(recipe: Recipe) -> Mapping[str, Any]:
    right = np.asarray(recipe.bias)
    return {
        "left out": {"bias": None},
        "added twice": {"bias": 2.0 * right},
        "subtracted": {"bias": -right},
        "scaled": {"bias": recipe.scale * right},
    }


def _empty_rows(wrong: Mapping[str, Step]) -> Maker:
    """Other probabilities in the rows that see nothing, by the words of each variant."""

    def make(recipe: Recipe) -> Variants:
        if np.all(allowed(recipe).any(-1)):
            return
        for words, instead in wrong.items():

            def step(recipe: Recipe, stages: Arrays, instead: Step = instead) -> np.ndarray:
                empty = np.all(np.isneginf(stages["masked_logits"]), axis=-1, keepdims=True)
                return np.where(empty, instead(recipe, stages), softmax(stages["masked_logits"]))

            yield words, recipe.stepping("probabilities", step)

    return make


def _evenly_by_position(recipe: Recipe, stages: Arrays) -> np.ndarray:
    seen = allowed(recipe.but(masks={}))
    return np.where(seen, 1.0, 0.0) / np.maximum(seen.sum(-1, keepdims=True), 1)


def _unmasked(recipe: Recipe, stages: Arrays) -> np.ndarray:
    return softmax(stages["logits"] if recipe.bias is None else stages["logits"] + recipe.bias)


MISTAKES: tuple[tuple[str, str, Maker], ...] = (
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
    ("causal mask ignored", "Switch the causal mask on.", fields(lambda r: r.causal, causal=False)),
    ("causal mask at the other corner", "With fewer queries than keys the first "
     "query is aligned with the first key in one of the two, the last with the last in the other: "
     "pass `query_offset`, or a mask.", fields(lambda r: r.causal, _other_corner)),
    ("causal mask off by one", "Query i sees keys j <= i: the diagonal is included.",
     fields(lambda r: r.causal, _causal_shifted)),
    ("causal mask reversed", "Query i sees keys j <= i, not j >= i: take the "
     "lower triangle.", fields(lambda r: r.causal, _causal_reversed)),
    ("query offset ignored", "Add the offset to the positions of the queries.",
     fields(lambda r: (r.causal or r.window is not None) and np.any(_offset(r)), offset=None)),
    ("window off by one", "A window of W is |i - j| < W: libraries that count "
     "without the query itself take W - 1.",
     fields(lambda r: r.window is not None, _window_shifted)),
    ("window ignored", "Pass the window on.", fields(lambda r: r.window is not None, window=None)),
    ("window of one side", "The window is open on both sides unless the call is "
     "causal too.", fields(lambda r: r.window is not None and not r.causal, causal=True)),
    ("wrong attention bias", "The bias is added once, after the scale.",
     fields(lambda r: r.bias is not None, _bias_wrong)),
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
     _empty_rows({"": _unmasked})),
    ("causal mask not asked for", "Switch the causal mask off.",
     fields(lambda r: not r.causal, causal=True)),
)  # fmt: skip
