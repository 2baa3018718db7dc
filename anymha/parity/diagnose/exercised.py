"""Whether the inputs of a comparison make each feature of the call matter."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.trace import POSITIONS, Request

PROJECTIONS = ("query", "key", "value", "gate", "output")
SATURATED = 0.9
"""Where a key has more than this of the probability, the others count little."""
LARGE = 1 << 20
"""Where there are more logits, nothing is computed again without each feature."""


def not_exercised(recipe: Recipe) -> list[str]:
    """The features of a call that change nothing when they are switched off, in words."""
    if recipe.stages["logits"].size > LARGE:
        return ["whether each feature matters: there is too much to compute it without each"]
    wanted = recipe.stages["output"]
    size = float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=0.0))
    silent = []
    for words, without in _switched_off(recipe):
        output = without.stages["output"]
        if np.allclose(output, wanted, rtol=0, atol=1e-6 * size, equal_nan=True):
            silent.append(words)
    batch, queries, keys = recipe.lengths
    if batch == 1:
        silent.append("the order of the axes of the batch: there is one element")
    if queries == 1 or keys == 1:
        silent.append("the softmax: there is one query or one key")
    return silent


def not_told_apart(request: Request, recipe: Recipe, reported: Collection[str]) -> list[str]:
    """What this call cannot tell apart, in words: arguments that are alike, a bias that is unseen.

    `reported` are the stages that the candidate reports.
    """
    words = []
    inputs, offset = request.inputs, request.call.get("query_offset")
    if "key" in inputs and _alike(inputs["key"], inputs["value"]):
        words.append("the order of value and key: they are the same")
    if "value" in inputs and _alike(inputs["query"], inputs["value"]):
        words.append("the order of query and value: they are the same")
    if offset is not None and not np.any(offset):
        words.append("`query_offset`: it is 0")
    elif offset is not None and not (recipe.causal or recipe.window or "rotary" in recipe.options):
        words.append("`query_offset`: without causal mask or window it changes nothing")
    mask = request.masks.get("attention_mask")
    square = mask is not None and mask.shape[-2:] == recipe.lengths[1:] and mask.shape[-1] > 1
    if square and mask is not None and _alike(mask, mask.swapaxes(-1, -2)):
        words.append("the order of the axes of `attention_mask`: it is symmetric")
    for name, mask in request.masks.items():
        several = len(mask) == recipe.lengths[0] > 1 and (name != "attention_mask" or mask.ndim > 2)
        if several and all(_alike(mask[0], other) for other in mask[1:]):
            words.append(f"the batch of `{name}`: it is the same for all sequences")
    words += _decoding_untold(recipe)
    ignored = all(section.ignores_a_constant for section in recipe.sections)
    seen = {"key", "logits", "masked_logits"} & {*reported}
    if ignored and not seen and np.any(recipe.weights.get("key.bias", 0)):
        words.append("`key.bias`: the output does not depend on it, and no earlier stage is told")
    return words


def _decoding_untold(recipe: Recipe) -> list[str]:
    """What a call that is read step by step cannot tell, in words."""
    facts, words = recipe.decoded, []
    if facts is None:
        return words
    if not facts.ragged and len(facts.valid) > 1:
        words.append("rows of unequal lengths: there is no padding, give a `value_mask`")
    elif facts.ragged and np.all(facts.begins[0] >= facts.begins):
        words.append("row 0 from the longest row: row 0 is the longest")
    counts = np.bincount(facts.calls)
    if np.all(counts[1:] < 2):
        words.append("calls of several positions after the first: give `steps`")
    window = recipe.window
    if window is not None and int(facts.places.max()) < window:
        words.append("what a ring overwrites: no row is longer than the window")
    return words


def _turned(recipe: Recipe, names: Collection[str], axis: int) -> Recipe:
    """The recipe with the heads of some projections in another order, on this axis of kernels."""
    changed = {f"{name}.kernel": np.roll(recipe.weights[f"{name}.kernel"], 1, axis)
               for name in names}  # fmt: skip
    biases = [f"{name}.bias" for name in names if axis and f"{name}.bias" in recipe.weights]
    changed |= {name: np.roll(recipe.weights[name], 1, 0) for name in biases}
    return recipe.but(weights={**recipe.weights, **changed})


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    nan = one.dtype.kind == "f"
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=nan)


def _switched_off(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    for name in recipe.masks:
        rest = {other: mask for other, mask in recipe.masks.items() if other != name}
        yield f"`{name}`: it excludes nothing that the others leave", recipe.but(masks=rest)
    if recipe.causal:
        yield "`use_causal_mask`", recipe.but(causal=False)
    if recipe.window is not None:
        yield "`sliding_window`", recipe.but(window=None)
    for name in POSITIONS:  # of segments the mask is among those of the recipe
        if getattr(recipe, name) is not None:
            yield f"`{name}`", recipe.but(**{name: None})
    if recipe.bias is not None:
        yield "`attention_bias`", recipe.but(bias=None)
    if recipe.kept is not None:
        yield "dropout", recipe.but(kept=None)
    for section in recipe.sections:
        yield f"`{section.option}`", recipe.without_section(section.option)
    if recipe.heads[0] > 1:
        yield "the order of the heads: they are alike", _turned(recipe, ("output",), 0)
    if 1 < recipe.heads[1] < recipe.heads[0]:
        alike = _turned(recipe, ("key", "value"), 1)
        yield "the order of the grouped heads of key and value: they are alike", alike
    alike = float(np.mean(np.max(recipe.stages["probabilities"], -1))) < SATURATED
    words = "the logits are about equal" if alike else "each query sees one key, the rest is 0"
    yield f"the scale: {words}", recipe.but(scale=2 * recipe.scale)
    # The key's bias adds one number to all logits of a row, which the softmax alone ignores.
    ignored = all(section.ignores_a_constant for section in recipe.sections)
    for name in PROJECTIONS:
        if f"{name}.bias" in recipe.weights and not (ignored and name == "key"):
            rest = {n: w for n, w in recipe.weights.items() if n != f"{name}.bias"}
            zero = not np.any(recipe.weights[f"{name}.bias"])
            words = "it is zero" if zero else "it changes nothing"
            yield f"`{name}.bias`: {words}", recipe.but(weights=rest)
