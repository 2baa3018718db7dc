"""Mistakes between the projections: scale, softmax, heads, positions, dropout, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from anymha.parity.oracle.recipe import (
    STEPS,
    Arrays,
    Recipe,
    Step,
    Variants,
    context_by,
    logits_by,
    projected,
    softmax,
)

BASE = 10_000.0
"""The base of rotary positions."""


def scale_wrong(recipe: Recipe) -> Variants:
    """Another factor of the logits."""
    width = recipe.inputs["query"].shape[2]
    heads, d_k, d_v = recipe.heads[0], _width(recipe, "query"), _width(recipe, "value")
    factors = {
        "missing": 1.0,
        "applied twice": recipe.scale**2,
        "1/sqrt(number of features)": 1 / math.sqrt(width),
        "1/sqrt(width of all heads)": 1 / math.sqrt(heads * d_k),
        "1/sqrt(width of a value head)": 1 / math.sqrt(d_v),
        "1/sqrt(number of heads)": 1 / math.sqrt(heads),
        "1/(width of a head)": 1 / d_k,
        "multiplied in place of divided": 1 / recipe.scale if recipe.scale else 0.0,
        "1/sqrt(width of a head) in place of `scale`": 1 / math.sqrt(d_k),
    }
    for words, factor in factors.items():
        if not math.isclose(factor, recipe.scale):
            yield words, recipe.but(scale=factor)


def softmax_axis(recipe: Recipe) -> Variants:
    """The softmax over queries or heads."""
    for words, axis in (("over the queries", 2), ("over the heads", 1), ("over the batch", 0)):

        def step(recipe: Recipe, stages: Arrays, axis: int = axis) -> np.ndarray:
            return softmax(stages["masked_logits"], axis)

        yield words, recipe.stepping("probabilities", step)


def softmax_missing(recipe: Recipe) -> Variants:
    """No softmax, or no division by the row's sum."""

    def raw(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return np.where(np.isneginf(stages["masked_logits"]), 0.0, stages["masked_logits"])

    def undivided(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return np.exp(np.minimum(stages["masked_logits"], 700.0))

    yield "no softmax", recipe.stepping("probabilities", raw)
    yield "rows not divided by their sum", recipe.stepping("probabilities", undivided)


def grouped_tiled(recipe: Recipe) -> Variants:
    """Key heads tiled over the query heads: h % K in place of h // (H / K)."""
    heads, shared = recipe.heads
    if 1 < shared < heads:

        def tiled(recipe: Recipe) -> np.ndarray:
            return np.arange(heads) % shared

        wrong = recipe.stepping("logits", partial(logits_by, heads=tiled))
        yield "", wrong.stepping("context", partial(context_by, heads=tiled))


def key_value_swapped(recipe: Recipe) -> Variants:
    """Keys made of the value's input, and values of the key's."""
    x = recipe.inputs
    if x["key"].shape == x["value"].shape and not np.array_equal(x["key"], x["value"]):
        yield "inputs", recipe.but(inputs={**x, "key": x["value"], "value": x["key"]})
    if x["query"].shape == x["value"].shape and not np.array_equal(x["query"], x["value"]):
        yield (
            "query and value exchanged",
            recipe.but(inputs={**x, "query": x["value"], "value": x["query"]}),
        )
    if x["key"].shape[2] == x["value"].shape[2] and not np.array_equal(x["key"], x["value"]):
        yield "the key for both", recipe.but(inputs={**x, "value": x["key"]})
        yield "the value for both", recipe.but(inputs={**x, "key": x["value"]})


def batch_and_time(recipe: Recipe) -> Variants:
    """(T, B, D) taken for (B, T, D): attention over the batch."""
    batch, queries, keys = recipe.lengths
    turned = {name: x.swapaxes(0, 1) for name, x in recipe.inputs.items()}
    if queries != keys or recipe.kept is not None or recipe.bias is not None:
        return
    fits = all(m.shape[2] in (1, batch) and m.shape[3] in (1, batch) for m in recipe.masks.values())
    masks = recipe.masks if fits and batch == queries else {}
    offset = recipe.offset if recipe.offset is not None and not np.any(recipe.offset) else None

    def back(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return STEPS["output"](recipe, stages).swapaxes(0, 1)

    wrong = recipe.but(inputs=turned, masks=masks, offset=None if offset is None else offset[:1])
    yield "", wrong.stepping("output", back)


def rotary(recipe: Recipe, pairs: bool) -> Variants:
    """Queries and keys rotated by their positions, which the layer does not do."""
    if _width(recipe, "query") % 2:
        return
    turned = recipe
    for name in ("query", "key"):

        def step(recipe: Recipe, stages: Arrays, name: str = name) -> np.ndarray:
            return rotated(projected(recipe, name), pairs)

        turned = turned.stepping(name, step)
    yield "", turned


def rotated(x: np.ndarray, pairs: bool) -> np.ndarray:
    """Rotary positions of (B, T, H, d): halves of a head, or neighbours, are turned together."""
    length, half = x.shape[1], x.shape[3] // 2
    angle = np.arange(length)[:, None, None] * BASE ** (-np.arange(half) / half)  # [T, 1, d/2]
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    one, two = a * cos - b * sin, a * sin + b * cos
    return np.stack([one, two], -1).reshape(x.shape) if pairs else np.concatenate([one, two], -1)


def dropout_wrong(recipe: Recipe) -> Variants:
    """Dropout left out where it acts, or not scaled."""
    if recipe.kept is not None:
        yield "does not act", recipe.but(kept=None)
        kept = (recipe.kept > 0).astype(np.float64)
        yield "kept probabilities are not scaled by 1/(1 - rate)", recipe.but(kept=kept)


def context_heads(recipe: Recipe) -> Variants:
    """The context's axes (heads, positions) taken for one another as heads are merged."""

    def merged(recipe: Recipe, stages: Arrays) -> np.ndarray:
        context = context_by(recipe, stages)  # (B, T, H, d)
        return context.swapaxes(1, 2).reshape(context.shape)

    yield (
        "heads and positions not exchanged before heads are merged",
        recipe.stepping("context", merged),
    )


def projections_heads(recipe: Recipe) -> Variants:
    """Heads split by a reshape without exchanging the axes: (B, T, H, d) read as (B, H, T, d)."""
    split = recipe
    for name in ("query", "key", "value"):

        def step(recipe: Recipe, stages: Arrays, name: str = name) -> np.ndarray:
            y = projected(recipe, name)
            batch, length, heads, width = y.shape
            return y.reshape(batch, heads, length, width).swapaxes(1, 2)

        split = split.stepping(name, step)
    yield "heads split by a reshape alone", split


def precision(recipe: Recipe, dtype: str) -> Variants:
    """Every stage rounded to a narrower dtype."""
    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def rounding(name: str) -> Step:
        def rounded(_: Recipe, stages: Arrays) -> np.ndarray:
            with np.errstate(over="ignore"):
                return recipe.stage(name, stages).astype(narrow).astype(np.float64)

        return rounded

    # The steps have what the sections make of a stage in them, so that this is rounded too.
    yield "", recipe.but(steps={name: rounding(name) for name in recipe.steps}, sections=())


def _width(recipe: Recipe, name: str) -> int:
    return recipe.weights[f"{name}.kernel"].shape[2]


_Maker = Callable[[Recipe], Variants]
_halves: _Maker = partial(rotary, pairs=False)
_pairs: _Maker = partial(rotary, pairs=True)

MISTAKES: tuple[tuple[str, str, _Maker], ...] = (
    ("wrong scale", "The logits are multiplied once, by 1/sqrt(width of a head) unless "
     "`scale` says otherwise.", scale_wrong),
    ("softmax over another axis", "The softmax runs over the keys, the last axis.",
     softmax_axis),
    ("no softmax", "Probabilities are exp(logits), divided by their sum over the "
     "keys.", softmax_missing),
    ("grouped heads tiled", "Query head h reads key head h // (H / K): repeat each key "
     "head, do not tile them all.", grouped_tiled),
    ("inputs exchanged", "Check the order of the arguments: Keras and anymha take query, "
     "value, key; torch, Flax and Equinox query, key, value.", key_value_swapped),
    ("batch and time exchanged", "One of the two takes (time, batch, features): pass "
     "`batch_first=True`, or exchange the axes.", batch_and_time),
    ("rotary positions, by halves", "The candidate rotates queries and keys by their "
     "positions, by halves of a head; the reference does not, or by pairs.", _halves),
    ("rotary positions, by pairs", "The candidate rotates queries and keys by their "
     "positions, by pairs of neighbours; the reference does not, or by halves.", _pairs),
    ("wrong dropout", "Both must be in training mode, with one rate and "
     "one seed; kept probabilities are divided by 1 - rate.", dropout_wrong),
    ("heads merged wrongly", "Exchange heads and positions before the heads are "
     "merged: (B, H, T, d) to (B, T, H, d).", context_heads),
    ("heads split wrongly", "Reshape to (B, T, H, d), then exchange the axes to "
     "(B, H, T, d).", projections_heads),
)  # fmt: skip

PRECISIONS = ("float32", "bfloat16", "float16")
"""Dtypes in which a stage may have been computed by mistake; the widest first."""
