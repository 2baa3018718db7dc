"""Mistakes between the projections: scale, softmax, heads, positions, dropout, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from anymha.parity.diagnose.changes import Maker, Row, fields, steps
from anymha.parity.diagnose.measured import Family, number
from anymha.parity.oracle.recipe import (
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


def _scale_wrong(recipe: Recipe) -> Variants:
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


def _any_scale(recipe: Recipe) -> Iterator[Family]:
    """Any factor of the logits, of either sign, beside the right one."""
    known = {math.log(2): "2 to the power in place of e: log2(e) is missing",
             1 / math.log(2): "log2(e) too many"}  # fmt: skip

    def words(times: float) -> str:
        for factor, meaning in known.items():
            if math.isclose(times, factor, rel_tol=1e-3):
                return f"{number(times)} times, {meaning}"
        return f"{number(times)} times"

    for sign in (1, -1):

        def make(power: float, sign: int = sign) -> Recipe:
            return recipe.but(scale=sign * recipe.scale * math.exp(power))

        def named(power: float, sign: int = sign) -> str:
            return words(sign * math.exp(power))

        yield Family(make, tuple(np.linspace(-6, 6, 25)), named)


def _bias_unscaled(recipe: Recipe) -> Variants:
    """The scale taken for the product of a projection, before its bias is added."""
    for name in ("query", "key"):
        bias = recipe.weights.get(f"{name}.bias")
        if bias is not None and recipe.scale:
            weights = {**recipe.weights, f"{name}.bias": bias / recipe.scale}
            yield f"not of the {name}'s bias", recipe.but(weights=weights)


def _shares(
    weigh: Callable[[np.ndarray], np.ndarray], more: float = 0.0, shifted: bool = True
) -> Step:
    """Probabilities as ``weigh(logits)``, divided by their sum and `more`.

    `shifted`: their greatest is subtracted from the logits before.
    """

    def step(_: Recipe, stages: Arrays) -> np.ndarray:
        logits = stages["masked_logits"]
        top = logits.max(-1, keepdims=True)
        top = np.where(np.isfinite(top) & shifted, top, 0.0)
        weights = weigh(logits - top)
        total = weights.sum(-1, keepdims=True) + more
        return np.where(np.isneginf(logits), 0.0, weights / np.where(total == 0, 1.0, total))

    return step


def _denominator(recipe: Recipe) -> Iterator[Family]:
    """Something added to the sum of the exponentials, with or without their maximum removed."""
    for shifted in (True, False):

        def make(power: float, shifted: bool = shifted) -> Recipe:
            step = _shares(np.exp, math.exp(power), shifted)
            return recipe.stepping("probabilities", step)

        def words(power: float, shifted: bool = shifted) -> str:
            rest = "" if shifted else ", the maximum not subtracted, as of one more logit"
            return f"{number(math.exp(power))} added to the denominator, the sum{rest}"

        yield Family(make, tuple(np.linspace(-20, 6, 27)), words)


def _other_softmax(recipe: Recipe) -> Variants:
    """Other functions of the logits in the place of the softmax."""

    def sigmoid(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return 1 / (1 + np.exp(-stages["masked_logits"]))

    def twice(recipe: Recipe, stages: Arrays) -> np.ndarray:
        once = softmax(stages["masked_logits"])
        return softmax(np.where(np.isneginf(stages["masked_logits"]), -np.inf, once))

    def logarithm(recipe: Recipe, stages: Arrays) -> np.ndarray:
        return np.where(np.isneginf(stages["masked_logits"]), 0.0,
                        np.log(softmax(stages["masked_logits"])))  # fmt: skip

    def scaled(recipe: Recipe, stages: Arrays) -> np.ndarray:
        whole = softmax(stages["masked_logits"])
        return whole / np.max(whole, axis=-1, keepdims=True)

    relu = partial(np.maximum, 0.0)
    keys = recipe.lengths[2]
    steps = {
        "sigmoid": sigmoid,
        "sigmoid, divided by its sum": _shares(lambda x: 1 / (1 + np.exp(-x)), shifted=False),
        "softmax twice": twice,
        "log_softmax": logarithm,
        "divided by the greatest, not by the sum": scaled,
        "relu, divided by its sum": _shares(relu, shifted=False),
        "relu, divided by the number of keys": lambda r, s: relu(s["masked_logits"]) / keys,
        "squared relu, divided by its sum": _shares(lambda x: relu(x) ** 2, shifted=False),
        "squares, divided by their sum": _shares(
            lambda x: np.where(np.isinf(x), 0.0, x) ** 2, shifted=False
        ),
        "all keys alike": _shares(lambda x: np.where(np.isneginf(x), 0.0, 1.0)),
        "the greatest alone": _shares(lambda x: np.where(x == 0, 1.0, 0.0)),
    }
    for words, step in steps.items():
        yield words, recipe.stepping("probabilities", step)
    for words, step in _chunked(keys):
        yield words, recipe.stepping("context", step)


def _chunked(keys: int) -> Iterator[tuple[str, Step]]:
    """A running softmax over chunks of the keys that is not brought to the new maximum."""
    sizes = [n for n in range(1, keys) if n < 17 or n & (n - 1) == 0]
    for size in sizes:
        for words, of_sum, of_values in (
            ("the values are", True, False), ("the sum is", False, True),
            ("values and sum are", False, False),
        ):  # fmt: skip

            def step(
                recipe: Recipe, stages: Arrays, size: int = size, of_sum: bool = of_sum,
                of_values: bool = of_values,
            ) -> np.ndarray:  # fmt: skip
                logits = stages["masked_logits"]
                starts = range(0, logits.shape[-1], size)
                tops = np.stack([logits[..., s : s + size].max(-1) for s in starts])
                running = np.maximum.accumulate(np.maximum(tops, -1e30))
                weights = np.empty_like(logits)
                for at, start in enumerate(starts):
                    part = logits[..., start : start + size]
                    weights[..., start : start + size] = np.exp(part - running[at][..., None])
                # What a chunk lacks that is not brought to the last maximum.
                lacks = np.exp(running - running[-1])
                lacks = np.repeat(np.moveaxis(lacks, 0, -1), size, axis=-1)
                lacks = lacks[..., : logits.shape[-1]]
                total = (weights * (lacks if of_sum else 1.0)).sum(-1, keepdims=True)
                shares = weights * (lacks if of_values else 1.0) / np.where(total > 0, total, 1.0)
                return context_by(recipe, {**stages, "dropped_probabilities": shares})

            yield f"{words} not rescaled to the running maximum, chunks of {size} keys", step


def _grouped_tiled(recipe: Recipe) -> Variants:
    """Key heads tiled over the query heads: h % K in place of h // (H / K)."""
    heads, shared = recipe.heads
    if 1 < shared < heads:

        def tiled(recipe: Recipe) -> np.ndarray:
            return np.arange(heads) % shared

        keys = recipe.stepping("logits", partial(logits_by, heads=tiled))
        yield "", keys.stepping("context", partial(context_by, heads=tiled))
        yield "of the keys alone", keys
        yield "of the values alone", recipe.stepping("context", partial(context_by, heads=tiled))


def _inputs_exchanged(recipe: Recipe) -> Variants:
    """An input in the place of another, wherever both have one shape and other numbers."""
    x = recipe.inputs
    for words, sources in {
        "inputs": {"key": "value", "value": "key"},
        "query and value exchanged": {"query": "value", "value": "query"},
        "the key for both": {"value": "key"},
        "the value for both": {"key": "value"},
    }.items():
        pairs = [(x[name], x[source]) for name, source in sources.items()]
        if all(a.shape == b.shape and not np.array_equal(a, b) for a, b in pairs):
            wrong = {name: x[source] for name, source in sources.items()}
            yield words, recipe.but(inputs={**x, **wrong})


def _projections(names: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray],
                 words: str = "", even: bool = False) -> Maker:  # fmt: skip
    """Projections (B, T, H, d) changed; `even`: only where a head has an even width."""

    def make(recipe: Recipe) -> Variants:
        if even and _width(recipe, "query") % 2:
            return
        for name in names:

            def step(recipe: Recipe, stages: Arrays, name: str = name) -> np.ndarray:
                return change(projected(recipe, name))

            recipe = recipe.stepping(name, step)
        yield words, recipe

    return make


def _rotated(x: np.ndarray, pairs: bool) -> np.ndarray:
    """Rotary positions of (B, T, H, d): halves of a head, or neighbours, are turned together."""
    length, half = x.shape[1], x.shape[3] // 2
    angle = np.arange(length)[:, None, None] * BASE ** (-np.arange(half) / half)  # [T, 1, d/2]
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    one, two = a * cos - b * sin, a * sin + b * cos
    return np.stack([one, two], -1).reshape(x.shape) if pairs else np.concatenate([one, two], -1)


def _no_softmax(recipe: Recipe, stages: Arrays) -> np.ndarray:
    return np.where(np.isneginf(stages["masked_logits"]), 0.0, stages["masked_logits"])


def _width(recipe: Recipe, name: str) -> int:
    return recipe.weights[f"{name}.kernel"].shape[2]


MISTAKES: tuple[Row, ...] = (
    ("wrong scale", "The logits are multiplied once, by 1/sqrt(width of a head) unless "
     "`scale` says otherwise.", _scale_wrong, _any_scale),
    ("scale before the bias", "Scale what a projection gives with its bias, or the logits.",
     _bias_unscaled),
    ("softmax over another axis", "The softmax runs over the keys, the last axis.",
     steps("probabilities", {
         "over the queries": lambda r, stages: softmax(stages["masked_logits"], 2),
         "over the heads": lambda r, stages: softmax(stages["masked_logits"], 1),
         "over the batch": lambda r, stages: softmax(stages["masked_logits"], 0)})),
    ("no softmax", "Probabilities are exp(logits), divided by their sum over the "
     "keys.", steps("probabilities", {
         "no softmax": _no_softmax,
         "rows not divided by their sum":
             lambda r, stages: np.exp(np.minimum(stages["masked_logits"], 700.0))})),
    ("another softmax", "Probabilities are exp(logits - max), divided by their sum over the keys "
     "and by nothing more; over chunks, sum and values are brought to each new maximum.",
     _other_softmax, _denominator),
    ("grouped heads tiled", "Query head h reads key head h // (H / K): repeat each key "
     "head, do not tile them all.", _grouped_tiled),
    ("inputs exchanged", "Check the order of the arguments: Keras and anymha take query, "
     "value, key; torch, Flax and Equinox query, key, value.", _inputs_exchanged),
    ("rotary positions, by halves", "The candidate rotates queries and keys by their "
     "positions, by halves of a head; the reference does not, or by pairs.",
     _projections(("query", "key"), partial(_rotated, pairs=False), even=True)),
    ("rotary positions, by pairs", "The candidate rotates queries and keys by their "
     "positions, by pairs of neighbours; the reference does not, or by halves.",
     _projections(("query", "key"), partial(_rotated, pairs=True), even=True)),
    ("wrong dropout", "Both must be in training mode, with one rate and "
     "one seed; kept probabilities are divided by 1 - rate.",
     fields(lambda r: r.kept is not None, lambda r: {
         "does not act": {"kept": None},
         "kept probabilities are not scaled by 1/(1 - rate)":
             {"kept": np.where(np.asarray(r.kept) > 0, 1.0, 0.0)}})),
)  # fmt: skip
