"""The layer as data and a pipeline of stages, in float64 NumPy, which may be changed to be wrong.

The oracle runs it unchanged. The comparison runs it with a known mistake in it, to see whether that
explains what a candidate gives, and one stage alone, to see what it makes of a candidate's own
earlier stages.

    query, key, value     -> x . kernel + bias                          (B, T, H, d_k), ...
    logits                -> scale * query . key                        (B, H, T, S)
    masked_logits         -> logits + bias, -inf where not allowed
    probabilities         -> softmax over the keys; zeros for a row of -inf
    dropped_probabilities -> what dropout leaves of them
    context               -> dropped_probabilities . value              (B, T, H, d_v)
    output                -> context . kernel + bias                    (B, T, O)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce

import numpy as np

Arrays = dict[str, np.ndarray]
einsum = partial(np.einsum, optimize=True)


@dataclass(frozen=True)
class Recipe:
    """What is computed: data in float64, and the steps that use them.

    Args:
        weights: Canonical weights; output kernel and bias with a flat output, (H, d_v, O) and (O).
        inputs: "query" (B, T, D_q), "value" (B, S, D_v) and "key" (B, S, D_k).
        scale: Factor of the logits.
        masks: Booleans by the name of their argument, each of which broadcasts to (B, H, T, S);
            True = may attend; their AND holds.
        causal: Whether query i sees only keys ``j <= i + offset``.
        window: Query i sees only keys with ``|i + offset - j| < window``.
        offset: Position of the first query among the keys, of each member of the batch (B,).
        bias: Added to the logits, broadcasts to (B, H, T, S).
        kept: What dropout multiplies the probabilities with, (B, H, T, S).
        steps: What computes each stage, in order.
    """

    weights: Arrays
    inputs: Arrays
    scale: float
    masks: Arrays = field(default_factory=dict)
    causal: bool = False
    window: int | None = None
    offset: np.ndarray | None = None
    bias: np.ndarray | None = None
    kept: np.ndarray | None = None
    steps: Mapping[str, Step] = field(default_factory=lambda: STEPS)

    @cached_property
    def stages(self) -> Arrays:
        """Every stage by name, in order; computed once."""
        return run(self)

    @cached_property
    def sizes(self) -> Arrays:
        """How great the numbers are that each stage is made of; computed once."""
        return sizes(self, self.stages)

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads and of key heads."""
        return self.weights["query.kernel"].shape[1], self.weights["key.kernel"].shape[1]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        (batch, queries, _), keys = self.inputs["query"].shape, self.inputs["key"].shape[1]
        return batch, queries, keys

    def but(self, **changes: object) -> Recipe:
        """The same with other fields."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def of_batch(self, at: int) -> Recipe:
        """The same for one element of the batch."""

        def own(array: np.ndarray | None) -> np.ndarray | None:
            return array if array is None or len(array) == 1 else array[at : at + 1]

        inputs = {name: array[at : at + 1] for name, array in self.inputs.items()}
        masks = {
            n: m if m.ndim < 4 or len(m) == 1 else m[at : at + 1] for n, m in self.masks.items()
        }
        return self.but(inputs=inputs, masks=masks, offset=own(self.offset), bias=own(self.bias),
                        kept=own(self.kept))  # fmt: skip

    def stepping(self, stage: str, step: Step) -> Recipe:
        """The same with another step for a stage."""
        return replace(self, steps={**self.steps, stage: step})


Step = Callable[[Recipe, Arrays], np.ndarray]
"""Makes a stage from a recipe and the stages before it."""


def run(recipe: Recipe) -> Arrays:
    """Every stage by name, in order."""
    stages: Arrays = {}
    for name, step in recipe.steps.items():
        stages[name] = step(recipe, stages)
    return stages


def projected(recipe: Recipe, name: str) -> np.ndarray:
    """An input's heads, (B, T, H, d)."""
    y = einsum("btd,dhk->bthk", recipe.inputs[name], recipe.weights[f"{name}.kernel"])
    return y + recipe.weights.get(f"{name}.bias", 0.0)


def reads(recipe: Recipe) -> np.ndarray:
    """The key head that each query head reads."""
    heads, shared = recipe.heads
    return np.arange(heads) // (heads // shared)


def allowed(recipe: Recipe) -> np.ndarray:
    """What each query may attend to, by masks and by position, broadcasts to (B, H, T, S)."""
    seen = reduce(np.logical_and, recipe.masks.values(), np.ones((1, 1, 1, 1), bool))
    _, queries, keys = recipe.lengths
    offset = np.zeros(1, int) if recipe.offset is None else recipe.offset
    distance = np.arange(keys) - (np.arange(queries)[:, None] + offset[:, None, None, None])
    if recipe.causal:
        seen = seen & (distance <= 0)
    if recipe.window is not None:
        seen = seen & (np.abs(distance) < recipe.window)
    return seen


def logits_by(
    recipe: Recipe, stages: Arrays, heads: Callable[[Recipe], np.ndarray] = reads
) -> np.ndarray:
    """The scaled products of queries and keys; `heads` says which key head a query head reads."""
    keys = stages["key"][:, :, heads(recipe)]
    return recipe.scale * einsum("bthk,bshk->bhts", stages["query"], keys)


def masked(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The logits with the bias, and -inf where nothing may be seen."""
    logits = stages["logits"] if recipe.bias is None else stages["logits"] + recipe.bias
    return np.where(allowed(recipe), logits, -np.inf)


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    """Over an axis; where all of it is -inf, zeros."""
    empty = np.all(np.isneginf(logits), axis=axis, keepdims=True)
    safe = np.where(empty, 0.0, logits)
    weights = np.exp(safe - safe.max(axis, keepdims=True, initial=-np.inf))
    return np.where(empty, 0.0, weights / weights.sum(axis, keepdims=True))


def dropped(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The probabilities that dropout leaves."""
    whole = stages["probabilities"]
    return whole if recipe.kept is None else whole * recipe.kept


def context_by(
    recipe: Recipe, stages: Arrays, heads: Callable[[Recipe], np.ndarray] = reads
) -> np.ndarray:
    """The mean of the values that each head sees; `heads` as for `logits_by`."""
    values = stages["value"][:, :, heads(recipe)]
    return einsum("bhts,bshv->bthv", stages["dropped_probabilities"], values)


def output(recipe: Recipe, stages: Arrays) -> np.ndarray:
    """The heads brought together."""
    y = einsum("bthv,hvo->bto", stages["context"], recipe.weights["output.kernel"])
    return y + recipe.weights.get("output.bias", 0.0)


STEPS: Mapping[str, Step] = {
    "query": lambda recipe, stages: projected(recipe, "query"),
    "key": lambda recipe, stages: projected(recipe, "key"),
    "value": lambda recipe, stages: projected(recipe, "value"),
    "logits": logits_by,
    "masked_logits": masked,
    "probabilities": lambda recipe, stages: softmax(stages["masked_logits"]),
    "dropped_probabilities": dropped,
    "context": context_by,
    "output": output,
}
"""The steps of the layer as it is meant."""


def sizes(recipe: Recipe, stages: Arrays) -> Arrays:
    """How great the numbers are that each stage is made of, however much they cancel.

    A sum has the root of the sum of its squared terms, or its own value where that is greater, as
    rounding errors have random signs. What comes after the logits has the size of what their errors
    make of it.

    Returns:
        By stage, and for "scores", an array that broadcasts to it: one size for each position of
        each element of the batch.
    """

    def size(sums: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """Of each element, from the sum of its squared terms."""
        finite = np.nan_to_num(np.abs(stage), nan=0.0, posinf=0.0, neginf=0.0)
        if sums.shape != finite.shape:  # a mistake turned the axes
            sums = np.max(sums, initial=0.0)
        return np.maximum(np.sqrt(sums), finite)

    found = {}
    for name in ("query", "key", "value"):
        x, w = recipe.inputs[name], recipe.weights[f"{name}.kernel"]
        found[name] = size(_squared("btd,dhk->bthk", x, w), stages[name])
    heads = reads(recipe)
    products = _squared("bthk,bshk->bhts", found["query"], found["key"][:, :, heads])
    logits = size(recipe.scale**2 * products, stages["logits"])
    found["logits"] = logits
    masked = found["masked_logits"] = size(np.square(logits), stages["masked_logits"])
    shares = size(np.zeros(1), stages["probabilities"])
    # A logit that is off by d changes its share p by p (1 - p) d, and each other share q by q p d.
    others = np.sum(np.square(shares * masked), axis=-1, keepdims=True)
    spread = np.sqrt(1 + np.square(masked) + others)
    found["probabilities"] = shares * spread
    dropped = found["dropped_probabilities"] = spread * size(
        np.zeros(1), stages["dropped_probabilities"]
    )
    values = found["value"][:, :, heads]
    found["context"] = size(_squared("bhts,bshv->bthv", dropped, values), stages["context"])
    found["output"] = size(
        _squared("bthv,hvo->bto", found["context"], recipe.weights["output.kernel"]),
        stages["output"],
    )
    axes = {"output": (2,), "context": (2, 3), "query": (2, 3), "key": (2, 3), "value": (2, 3)}
    rows = {name: _rows(array, axes.get(name, (1, 3))) for name, array in found.items()}
    return {**rows, "scores": rows["probabilities"]}


def _rows(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The greatest of each position."""
    return np.max(array, axis=axes, keepdims=True, initial=0.0)


def _squared(formula: str, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sums of the squared terms of a product; what is not a number counts for nothing."""
    one, other = (np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (one, other))
    return einsum(formula, one * one, other * other)
