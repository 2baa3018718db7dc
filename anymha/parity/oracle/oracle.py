"""An independent float64 oracle: the layer and its gradients, written out by hand.

It shares no code with the layer: NumPy's einsum, one formula a line, no fast path. Every backend
is compared with it. The forward pass is `anymha.parity.oracle.recipe`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, einsum, reads


@dataclass(frozen=True)
class Truth:
    """The results of the oracle, all in float64."""

    output: np.ndarray  # (B, T, O)
    scores: np.ndarray  # (B, H, T, S), the probabilities before dropout
    stages: Arrays  # Each stage by name, in order
    # Of ``sum(output * d_output) + sum(scores * d_scores)``, by the names of weights and inputs
    gradients: Arrays
    # For "output", "scores" and each gradient, the size of its terms, however much they cancel,
    # times the size of the logits: errors are compared with this. The size of a sum is its absolute
    # value, or the root of the sum of its squared terms where that is greater, as rounding errors
    # have random signs
    magnitudes: Arrays
    # Likewise, how far each may be off where half precision rounds the result of each stage
    rounding: Arrays = field(default_factory=dict)


Changes = Mapping[str, Callable[..., np.ndarray]]
"""Other gradients on the way back, by the place where they act.

For "output", "context", "logits", "query", "key" and "value", and for "input of" the last three, it
takes the gradient that comes there; for "weights of" the first three what multiplies the other
factor of their gradient, (B, H, T, S); for "sharing" the last two the gradient of each query head's
own, (B, S, H, d), and it gives that of the heads that are shared; for "softmax" the probabilities
and their gradient, and it gives that of the logits.
"""


def gradients_of(recipe: Recipe, d_output: np.ndarray, changes: Changes) -> Arrays:
    """The gradients of ``sum(output * d_output)``, by name, of a backward pass with changes."""
    g_output = np.asarray(d_output, np.float64)
    features = _Features(recipe, recipe.stages, changes=changes)
    g_scores = np.zeros_like(recipe.stages["probabilities"])
    return _passes(features, recipe, g_output, g_scores, einsum)[1]


def results_of(
    recipe: Recipe,
    d_output: np.ndarray,
    d_scores: np.ndarray,
    einsum: Callable[..., np.ndarray],
    changes: Changes,
) -> Arrays:
    """Output, scores and gradients by name, by other sums, with changes on the way back."""
    stages = recipe.stages
    features = _Features(recipe, stages, changes=changes)
    gradients = _passes(features, recipe, d_output, d_scores, einsum)[1]
    return {"output": stages["output"], "scores": stages["probabilities"], **gradients}


def evaluate(
    recipe: Recipe, d_output: np.ndarray | None = None, d_scores: np.ndarray | None = None
) -> Truth:
    """The results of a recipe, and its gradients.

    The cotangents are of the output (B, T, O) and of the scores (B, H, T, S); default zero.
    """
    w, x, scale = recipe.weights, recipe.inputs, recipe.scale
    stages = recipe.stages
    scores, masked = stages["probabilities"], stages["masked_logits"]
    if d_output is None:
        d_output = np.zeros_like(stages["output"])
    g_output = np.asarray(d_output, np.float64)
    g_scores = np.zeros_like(scores) if d_scores is None else np.asarray(d_scores, np.float64)

    sums = _Sums()
    gradients = _passes(_Features(recipe, stages), recipe, g_output, g_scores, sums)[1]

    def absolute(arrays: Arrays) -> Arrays:
        return {name: np.abs(array) for name, array in arrays.items()}

    positive = recipe.but(weights=absolute(w), inputs=absolute(x), scale=abs(scale))
    largest, slopes = _passes(
        _Features(recipe, stages, cancel=False), positive, np.abs(g_output), np.abs(g_scores),
        _Sizes(sums.results),
    )  # fmt: skip
    peak = np.max(np.abs(masked), initial=1.0, where=np.isfinite(masked))
    magnitudes = {"output": largest, "scores": scores, **slopes}
    magnitudes = {name: peak * array for name, array in magnitudes.items()}
    return Truth(stages["output"], scores, stages, gradients, magnitudes)


def _projected(w: Arrays, x: Arrays, name: str, einsum: Callable[..., np.ndarray]) -> np.ndarray:
    """(B, T, H, d)."""
    bias = w.get(f"{name}.bias", 0.0)
    return einsum("btd,dhk->bthk", x[name], w[f"{name}.kernel"]) + bias


class _Sums:
    """`einsum`, which keeps its results."""

    def __init__(self) -> None:
        self.results: list[np.ndarray] = []

    def __call__(self, formula: str, *arrays: np.ndarray) -> np.ndarray:
        self.results.append(einsum(formula, *arrays))
        return self.results[-1]


class _Sizes:
    """The sizes of the sums that `_Sums` kept, from the sizes of what they are made of."""

    def __init__(self, results: Iterable[np.ndarray]) -> None:
        self.results = iter(results)

    def __call__(self, formula: str, *arrays: np.ndarray) -> np.ndarray:
        spread = np.sqrt(einsum(formula, *(array * array for array in arrays)))
        return np.maximum(spread, np.abs(next(self.results)))


class _Features:
    """The sections of a recipe on the way forward and back; or, without `cancel`, sizes in sums."""

    def __init__(
        self, recipe: Recipe, stages: Arrays, cancel: bool = True, changes: Changes | None = None
    ) -> None:
        self.recipe, self.stages, self.cancel = recipe, stages, cancel
        self.changes = changes or {}
        self.gradients: Arrays = {}

    def changed(self, place: str, gradient: np.ndarray) -> np.ndarray:
        """The gradient at a place of the backward pass."""
        return self.changes[place](gradient) if place in self.changes else gradient

    def across(
        self, name: str, formula: str, weights: np.ndarray, array: np.ndarray,
        einsum: Callable[..., np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """A product that sums over queries or keys; a change may turn its first factor."""
        place = f"weights of {name}"
        return einsum(formula, self.changed(place, weights), array)

    def shared(
        self, name: str, gradient: np.ndarray, grouped: np.ndarray,
        einsum: Callable[..., np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """The gradient of key heads from that of each query head that reads them."""
        place = f"sharing {name}"
        if place in self.changes:
            return self.changes[place](gradient)
        return einsum("bshk,hg->bsgk", gradient, grouped)

    def of_softmax(
        self, scores: np.ndarray, gradient: np.ndarray, einsum: Callable[..., np.ndarray]
    ) -> np.ndarray:
        """The gradient of the logits from that of the probabilities."""
        if "softmax" in self.changes:
            return self.changes["softmax"](scores, gradient)
        mean = einsum("bhts,bhts->bht", scores, gradient)[..., None]
        return scores * (gradient - mean if self.cancel else gradient + mean)

    def forward(self, stage: str, array: np.ndarray) -> np.ndarray:
        """A stage, or its sizes, from what its step gives."""
        if self.cancel:
            return self.stages[stage] if self.recipe.sections else array
        for section, taken in self.recipe.taken(stage, self.stages):
            array = section.sizes(stage, array, taken, self.recipe, self.stages)
            array = np.hypot(array, section.own_errors(stage, taken, self.recipe, self.stages))
        return array

    def backward(self, stage: str, gradient: np.ndarray) -> np.ndarray:
        """The gradient of what a stage's step gives, from that of the stage."""
        gradient = self.changed(stage, gradient)
        for section, taken in reversed(self.recipe.taken(stage, self.stages)):
            arguments = (stage, gradient, taken, self.recipe, self.stages, self.cancel)
            for name, own in section.own_gradients(*arguments).items():
                self.gradients[name] = self.gradients.get(name, 0.0) + own
            gradient = section.backward(*arguments)
        return gradient


def _passes(
    features: _Features,
    recipe: Recipe,
    g_output: np.ndarray,
    g_scores: np.ndarray,
    einsum: Callable[..., np.ndarray],
) -> tuple[np.ndarray, Arrays]:
    """From the scores on: output and gradients; or their sizes, as `features` says."""
    w, x, scale, bias = recipe.weights, recipe.inputs, recipe.scale, recipe.bias
    scores, heads = features.stages["probabilities"], reads(recipe)
    kept = np.ones_like(scores) if recipe.kept is None else recipe.kept
    q, k, v = (
        features.forward(name, _projected(w, x, name, einsum)) for name in ("query", "key", "value")
    )
    keys, values, dropped = k[:, :, heads], v[:, :, heads], scores * kept
    context = features.forward("context", einsum("bhts,bshv->bthv", dropped, values))
    output = einsum("bthv,hvo->bto", context, w["output.kernel"]) + w.get("output.bias", 0.0)

    g_output = features.changed("output", g_output)
    gradients = {
        "output.kernel": einsum("bthv,bto->hvo", context, g_output),
        "output.bias": einsum("bto->o", g_output),
    }
    g_context = einsum("bto,hvo->bthv", g_output, w["output.kernel"])
    g_context = features.backward("context", g_context)
    g_values = features.across("value", "bhts,bthv->bshv", dropped, g_context, einsum)
    g_probs = einsum("bthv,bshv->bhts", g_context, values) * kept + g_scores
    g_probs = features.backward("probabilities", g_probs)
    g_logits = features.of_softmax(scores, g_probs, einsum)
    g_logits = features.backward("masked_logits", g_logits)
    if bias is not None:
        shape = np.shape(bias)
        own = "".join(
            axis for axis, n in zip("bhts"[4 - len(shape) :], shape, strict=True) if n > 1
        )
        gradients["attention_bias"] = einsum(f"bhts->{own}", g_logits).reshape(shape)
    g_logits = features.backward("logits", g_logits)
    g_keys = scale * features.across("key", "bhts,bthk->bshk", g_logits, q, einsum)
    grouped = np.eye(k.shape[2])[heads]  # [H, K]
    parts = {
        "query": scale * features.across("query", "bhts,bshk->bthk", g_logits, keys, einsum),
        "key": features.shared("key", g_keys, grouped, einsum),
        "value": features.shared("value", g_values, grouped, einsum),
    }
    for name, gradient in parts.items():
        gradient = features.backward(name, gradient)
        gradients[f"{name}.kernel"] = einsum("btd,bthk->dhk", x[name], gradient)
        gradients[f"{name}.bias"] = einsum("bthk->hk", gradient)
        own = einsum("bthk,dhk->btd", gradient, w[f"{name}.kernel"])
        gradients[name] = features.changed(f"input of {name}", own)
    for name, own in features.gradients.items():
        gradients[name] = gradients.get(name, 0.0) + own
    known = {*w, *x, "attention_bias"}
    return output, {name: g for name, g in gradients.items() if name in known}
