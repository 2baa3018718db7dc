"""Whether the inputs of a comparison make each feature of the call matter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anymha.parity.oracle.recipe import Recipe

PROJECTIONS = ("query", "key", "value", "output")
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


def _switched_off(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    for name in recipe.masks:
        rest = {other: mask for other, mask in recipe.masks.items() if other != name}
        yield f"`{name}`: it excludes nothing that the others leave", recipe.but(masks=rest)
    if recipe.causal:
        yield "`use_causal_mask`", recipe.but(causal=False)
    if recipe.window is not None:
        yield "`sliding_window`", recipe.but(window=None)
    if recipe.bias is not None:
        yield "`attention_bias`", recipe.but(bias=None)
    if recipe.kept is not None:
        yield "dropout", recipe.but(kept=None)
    for section in recipe.sections:
        yield f"`{section.option}`", recipe.without_section(section.option)
    yield "the scale: the logits are about equal", recipe.but(scale=2 * recipe.scale)
    # The key's bias adds one number to all logits of a row, which the softmax alone ignores.
    ignored = all(section.ignores_a_constant for section in recipe.sections)
    for name in ("query", "value", "output") if ignored else PROJECTIONS:
        if f"{name}.bias" in recipe.weights:
            rest = {n: w for n, w in recipe.weights.items() if n != f"{name}.bias"}
            words = "it changes nothing" if name == "key" else "it is zero"
            yield f"`{name}.bias`: {words}", recipe.but(weights=rest)
