"""Mistakes with masks, causality, windows, and rows that see nothing."""

from __future__ import annotations

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Variants, allowed, softmax


def _ands(name: str, recipe: Recipe) -> str:
    return f"`{name}`" if len(recipe.masks) > 1 else "the mask"


def inverted(recipe: Recipe) -> Variants:
    """True taken for "may not attend"."""
    for name, mask in recipe.masks.items():
        yield _ands(name, recipe), recipe.but(masks={**recipe.masks, name: ~mask})
    if len(recipe.masks) > 1:
        yield "all masks", recipe.but(masks={n: ~m for n, m in recipe.masks.items()})


def ignored(recipe: Recipe) -> Variants:
    """A mask left out."""
    for name in recipe.masks:
        rest = {n: m for n, m in recipe.masks.items() if n != name}
        yield _ands(name, recipe), recipe.but(masks=rest)
    if len(recipe.masks) > 1:
        yield "all masks", recipe.but(masks={})


def added(recipe: Recipe) -> Variants:
    """A mask added to the logits as the numbers 0 and 1, or taken for additive."""
    for name, mask in recipe.masks.items():
        rest = recipe.but(masks={n: m for n, m in recipe.masks.items() if n != name})
        for words, number in (("1 where True", mask), ("1 where False", ~mask)):
            extra = number.astype(np.float64)
            bias = extra if recipe.bias is None else recipe.bias + extra
            yield f"{_ands(name, recipe)}, {words}", rest.but(bias=bias)


def transposed(recipe: Recipe) -> Variants:
    """Queries and keys of a mask exchanged."""
    for name, mask in recipe.masks.items():
        turned = np.swapaxes(mask, 2, 3)
        if mask.shape[2] == mask.shape[3] != 1 and not np.array_equal(turned, mask):
            yield _ands(name, recipe), recipe.but(masks={**recipe.masks, name: turned})


def of_heads(recipe: Recipe) -> Variants:
    """A mask of the batch taken for one of the heads, or the other way round."""
    batch, heads = recipe.lengths[0], recipe.heads[0]
    for name, mask in recipe.masks.items():
        if batch == heads and batch > 1 and {mask.shape[0], mask.shape[1]} == {1, batch}:
            turned = np.swapaxes(mask, 0, 1)
            yield _ands(name, recipe), recipe.but(masks={**recipe.masks, name: turned})


def causal_ignored(recipe: Recipe) -> Variants:
    """Every key seen."""
    if recipe.causal:
        yield "", recipe.but(causal=False)


def other_corner(recipe: Recipe) -> Variants:
    """The last query aligned with the last key, in place of the first with the first."""
    _, queries, keys = recipe.lengths
    if recipe.causal and queries != keys:
        yield "", recipe.but(offset=_offset(recipe) + keys - queries)


def causal_shifted(recipe: Recipe) -> Variants:
    """Each query sees one key more, or one fewer."""
    if recipe.causal and recipe.window is None:
        yield "the next key is seen too", recipe.but(offset=_offset(recipe) + 1)
        yield "the query's own key is not seen", recipe.but(offset=_offset(recipe) - 1)


def causal_reversed(recipe: Recipe) -> Variants:
    """Queries see what comes after them."""
    if recipe.causal:
        _, queries, keys = recipe.lengths
        rows = np.arange(queries)[:, None] + _offset(recipe)[:, None, None, None]
        later = np.arange(keys) >= rows
        yield "", recipe.but(causal=False, masks={**recipe.masks, "later keys": later})


def offset_ignored(recipe: Recipe) -> Variants:
    """The first query taken for that of position 0."""
    if (recipe.causal or recipe.window is not None) and np.any(_offset(recipe)):
        yield "", recipe.but(offset=None)


def causal_added(recipe: Recipe) -> Variants:
    """A causal mask where none is asked for."""
    if not recipe.causal:
        yield "", recipe.but(causal=True)


def window_shifted(recipe: Recipe) -> Variants:
    """A window wider or narrower by one."""
    if recipe.window is not None:
        yield "one key more on each side", recipe.but(window=recipe.window + 1)
        if recipe.window > 1:
            yield "one key fewer on each side", recipe.but(window=recipe.window - 1)


def window_ignored(recipe: Recipe) -> Variants:
    """Every key seen, however far."""
    if recipe.window is not None:
        yield "", recipe.but(window=None)


def window_one_sided(recipe: Recipe) -> Variants:
    """Keys after the query not seen, as if the window were causal."""
    if recipe.window is not None and not recipe.causal:
        yield "", recipe.but(causal=True)


def bias_wrong(recipe: Recipe) -> Variants:
    """The attention bias left out, doubled, subtracted, or scaled with the logits."""
    if recipe.bias is None:
        return
    yield "left out", recipe.but(bias=None)
    for words, factor in (("added twice", 2.0), ("subtracted", -1.0), ("scaled", recipe.scale)):
        yield words, recipe.but(bias=factor * recipe.bias)


def rows_mean(recipe: Recipe) -> Variants:
    """A row that sees nothing gets the mean of the values."""

    def evenly(recipe: Recipe, stages: Arrays) -> np.ndarray:
        empty, width = _empty(stages)
        return np.where(empty, 1 / width, softmax(stages["masked_logits"]))

    yield from _for_empty_rows(recipe, "the mean of all values", evenly)

    def visibly(recipe: Recipe, stages: Arrays) -> np.ndarray:
        seen = allowed(recipe.but(masks={}))
        shares = np.where(seen, 1.0, 0.0) / np.maximum(seen.sum(-1, keepdims=True), 1)
        return np.where(_empty(stages)[0], shares, softmax(stages["masked_logits"]))

    if recipe.causal or recipe.window is not None:
        yield from _for_empty_rows(recipe, "the mean of the values not masked by position", visibly)


def rows_nan(recipe: Recipe) -> Variants:
    """A row that sees nothing becomes NaN."""

    def nan(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return np.where(_empty(stages)[0], np.nan, softmax(stages["masked_logits"]))

    yield from _for_empty_rows(recipe, "", nan)


def rows_unmasked(recipe: Recipe) -> Variants:
    """A row that sees nothing attends as if there were no mask."""

    def openly(recipe: Recipe, stages: Arrays) -> np.ndarray:
        logits = stages["logits"] if recipe.bias is None else stages["logits"] + recipe.bias
        return np.where(_empty(stages)[0], softmax(logits), softmax(stages["masked_logits"]))

    yield from _for_empty_rows(recipe, "", openly)


def _offset(recipe: Recipe) -> np.ndarray:
    return np.zeros(1, int) if recipe.offset is None else recipe.offset


def _empty(stages: Arrays) -> tuple[np.ndarray, int]:
    logits = stages["masked_logits"]
    return np.all(np.isneginf(logits), axis=-1, keepdims=True), logits.shape[-1]


def _for_empty_rows(recipe: Recipe, words: str, step: object) -> Variants:
    """The variant, where a row sees nothing; without such a row there is none."""
    if not np.all(allowed(recipe).any(-1)):
        yield words, recipe.stepping("probabilities", step)  # pyright: ignore[reportArgumentType]


MISTAKES = (
    ("inverted mask", "Pass the opposite of the mask, `~mask`: in one of the two "
     "implementations, True means that a position may not be attended to.", inverted),
    ("ignored mask", "The mask never reaches the logits: pass it on, under the "
     "name that the layer knows.", ignored),
    ("additive mask", "A mask of 0 and 1 is added to the logits: make it boolean, "
     "or 0 and -inf.", added),
    ("transposed mask", "The mask's last two axes are (queries, keys): exchange "
     "them.", transposed),
    ("mask of batch and heads exchanged", "Give the mask all four axes, "
     "(batch, heads, queries, keys).", of_heads),
    ("causal mask ignored", "Switch the causal mask on.", causal_ignored),
    ("causal mask at the other corner", "With fewer queries than keys the first "
     "query is aligned with the first key in one of the two, the last with the last in the other: "
     "pass `query_offset`, or a mask.", other_corner),
    ("causal mask off by one", "Query i sees keys j <= i: the diagonal is included.",
     causal_shifted),
    ("causal mask reversed", "Query i sees keys j <= i, not j >= i: take the "
     "lower triangle.", causal_reversed),
    ("query offset ignored", "Add the offset to the positions of the queries.",
     offset_ignored),
    ("window off by one", "A window of W is |i - j| < W: libraries that count "
     "without the query itself take W - 1.", window_shifted),
    ("window ignored", "Pass the window on.", window_ignored),
    ("window of one side", "The window is open on both sides unless the call is "
     "causal too.", window_one_sided),
    ("wrong attention bias", "The bias is added once, after the scale.",
     bias_wrong),
    ("fully masked rows give the mean of the values", "A query that sees nothing "
     "gives zeros in anymha; here its mask is a large finite number, or the softmax divides by "
     "the number of keys. Give such rows zeros, or leave them out of the comparison.", rows_mean),
    ("fully masked rows give NaN", "A query that sees nothing gives zeros in anymha: "
     "guard the softmax of a row of -inf alone.", rows_nan),
    ("fully masked rows are not masked", "A query that sees nothing gives zeros "
     "in anymha; here its mask shifts such a row by a constant, which a softmax ignores.",
     rows_unmasked),
    ("causal mask not asked for", "Switch the causal mask off.", causal_added),
)  # fmt: skip
