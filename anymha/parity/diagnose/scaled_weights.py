"""Weights with a factor: which kernel or bias, of which heads, how many times; it is measured.

A projection that is told is the sum of what its kernel gives and its bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.head_maps import in_heads
from anymha.parity.diagnose.measured import number
from anymha.parity.diagnose.weight_mistakes import SCALED
from anymha.parity.oracle.recipe import Arrays, Recipe

NAME = "weights scaled"

NEAR = 1e-4
"""What factors may leave of the differences, and how near to each other they are the same."""


def scaled_weights(recipe: Recipe, reported: Arrays) -> Iterator[tuple[tuple[Cause, ...], Recipe]]:
    """The recipes whose projections have factors, where they are told."""
    changed, words = dict(recipe.weights), []
    for name in ("query", "key", "value"):
        got, exact = reported.get(name), recipe.stages[name]
        curved = recipe.options.keys() & {"query_key_norm"} and name != "value"
        if got is None or got.shape != exact.shape or curved or not np.all(np.isfinite(got)):
            continue
        found = _factors(recipe, name, got)
        if found:
            words += [f"{name}'s {what}" for what in found[0]]
            changed |= found[1]
    if not words:
        found = _of_the_output(recipe, reported)
        if found:
            words, changed = [found[0]], changed | found[1]
    if words:
        first = words[0].partition("'")[0]
        yield (Cause(NAME, "; ".join(words), first, SCALED),), recipe.but(weights=changed)


def _factors(recipe: Recipe, name: str, got: np.ndarray) -> tuple[list[str], Arrays] | None:
    """How many times a kernel and a bias are in what a projection gives, in words, and these."""
    kernel, bias = (recipe.weights.get(f"{name}.{part}") for part in ("kernel", "bias"))
    exact = recipe.stages[name]
    parts = [exact]
    if bias is not None and np.any(bias):
        rest = {n: array for n, array in recipe.weights.items() if n != f"{name}.bias"}
        without = recipe.but(weights=rest).until(name)[name]
        parts = [without, exact - without]
    heads, factors = exact.shape[2], np.ones((len(parts), exact.shape[2]))
    left = 0.0
    for head in range(heads):
        columns = np.stack([part[:, :, head].reshape(-1) for part in parts], -1)
        whole = got[:, :, head].reshape(-1)
        factors[:, head] = np.linalg.lstsq(columns, whole, rcond=None)[0]
        left += float(np.sum(np.square(whole - columns @ factors[:, head])))
    before = float(np.sum(np.square(got - exact)))
    if not before > 0 or left > NEAR**2 * before:
        return None
    short = np.round(factors, 3)
    factors = np.where(np.abs(factors - short) < NEAR, short, factors)
    both = len(parts) > 1 and np.allclose(*factors, rtol=0, atol=NEAR)
    names = ["kernel and bias"] if both else ["kernel", "bias"][: len(parts)]
    words = [f"{what}{_told(own)}" for what, own in zip(names, factors, strict=False)
             if np.any(own != 1)]  # fmt: skip
    changed = {f"{name}.kernel": np.asarray(kernel) * factors[0][:, None]}
    if bias is not None:
        changed[f"{name}.bias"] = bias * factors[-1][:, None]
    return words, changed


def _of_the_output(recipe: Recipe, reported: Arrays) -> tuple[str, Arrays] | None:
    """How many times the values' kernel and bias are in an output, in words, and these."""
    got, exact, bias = reported.get("output"), recipe.stages["output"], "value.bias"
    plain = {n: w for n, w in recipe.weights.items() if n not in (bias, "output.bias")}
    if got is None or got.shape != exact.shape or not np.any(recipe.weights.get(bias, 0.0)):
        return None
    if not np.all(np.isfinite([got, exact])) or "query_key_norm" in recipe.options:
        return None
    of_kernel = recipe.but(weights=plain).stages["output"]
    more = np.broadcast_to(recipe.weights.get("output.bias", 0.0), exact.shape)
    columns = np.stack([of_kernel, exact - more - of_kernel], -1).reshape(-1, 2)
    rest = (got - more).reshape(-1)
    factors = np.linalg.lstsq(columns, rest, rcond=None)[0]
    left, before = (float(np.sum(np.square(a))) for a in (rest - columns @ factors, got - exact))
    off = np.abs(factors - 1) > NEAR
    if not before > 0 or left > NEAR**2 * before or off.all():  # else it is the output's factor
        return None
    short = np.round(factors, 3)
    factors = np.where(np.abs(factors - short) < NEAR, short, factors)
    name = "value.kernel" if off[0] else bias
    factor = float(factors[0] if off[0] else factors[1])
    words = f"value's {name.partition('.')[2]}, {number(factor)} times"
    return words, {name: factor * recipe.weights[name]}


def _told(factors: np.ndarray) -> str:
    if np.ptp(factors) < NEAR:
        return f", {number(float(factors[0]))} times"
    return f", of which {in_heads(factors)}"
