"""An independent float64 oracle: the layer and its gradients, written out by hand.

It shares no code with the layer: NumPy's einsum, one formula a line, no fast path. It is what
every backend is compared with. The forward pass is `anymha.parity.oracle.recipe`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, einsum, reads, run


@dataclass(frozen=True)
class Truth:
    """What the oracle computed, all in float64.

    Args:
        output: (B, T, O).
        scores: (B, H, T, S), the probabilities before dropout.
        stages: Each stage by name, in order.
        gradients: Of ``sum(output * d_output) + sum(scores * d_scores)``, by the names of weights
            and inputs.
        magnitudes: For "output", "scores" and each gradient, the size of the numbers that it is
            made of, however much they cancel, times that of the logits: an error is small or large
            compared with this. The size of a sum is its absolute value, or the root of the sum of
            its squared terms where that is greater, as rounding errors have random signs.
    """

    output: np.ndarray
    scores: np.ndarray
    stages: Arrays
    gradients: Arrays
    magnitudes: Arrays


def attention_oracle(
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    *,
    scale: float,
    allowed: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    d_output: np.ndarray | None = None,
    d_scores: np.ndarray | None = None,
) -> Truth:
    """Multi-head attention of (B, T, D) inputs, and its gradients.

    Args:
        weights: Canonical weights; output kernel and bias with a flat output, (H, d_v, O) and (O).
        inputs: "query" (B, T, D_q), "value" (B, S, D_v) and "key" (B, S, D_k).
        scale: Factor of the logits.
        allowed: Booleans that broadcast to (B, H, T, S), True = may attend.
        bias: Added to the logits.
        kept: What the probabilities are multiplied with by dropout, (B, H, T, S).
        d_output: Cotangent of the output; default zero.
        d_scores: Cotangent of the scores; default zero.
    """
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
    masks = {} if allowed is None else {"allowed": np.asarray(allowed)}
    recipe = Recipe(w, x, scale, masks, bias=bias, kept=kept)
    stages = run(recipe)
    scores, masked = stages["probabilities"], stages["masked_logits"]
    kept = np.ones_like(scores) if kept is None else kept
    if d_output is None:
        d_output = np.zeros_like(stages["output"])
    g_output = np.asarray(d_output, np.float64)
    g_scores = np.zeros_like(scores) if d_scores is None else np.asarray(d_scores, np.float64)

    sums = _Sums()
    gradients = _passes(recipe, scores, kept, g_output, g_scores, sums)[1]

    def absolute(arrays: Arrays) -> Arrays:
        return {name: np.abs(array) for name, array in arrays.items()}

    positive = recipe.but(weights=absolute(w), inputs=absolute(x), scale=abs(scale))
    largest, slopes = _passes(
        positive, scores, kept, np.abs(g_output), np.abs(g_scores), _Sizes(sums.results),
        cancel=False,
    )  # fmt: skip
    peak = np.max(np.abs(masked), initial=1.0, where=np.isfinite(masked))
    magnitudes = {"output": largest, "scores": scores, **slopes}
    magnitudes = {name: peak * array for name, array in magnitudes.items()}
    return Truth(stages["output"], scores, stages, gradients, magnitudes)


def _projected(w: Arrays, x: Arrays, name: str, einsum: Callable[..., np.ndarray]) -> np.ndarray:
    """(B, H, T, d)."""
    bias = w[f"{name}.bias"][:, None, :] if f"{name}.bias" in w else 0.0
    return einsum("btd,dhk->bhtk", x[name], w[f"{name}.kernel"]) + bias


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


def _passes(
    recipe: Recipe,
    scores: np.ndarray,
    kept: np.ndarray,
    g_output: np.ndarray,
    g_scores: np.ndarray,
    einsum: Callable[..., np.ndarray],
    *,
    cancel: bool = True,
) -> tuple[np.ndarray, Arrays]:
    """From the scores on: output and gradients. Without `cancel`, differences are sums."""
    w, x, scale, bias = recipe.weights, recipe.inputs, recipe.scale, recipe.bias
    heads = reads(recipe)
    q, k, v = (_projected(w, x, name, einsum) for name in ("query", "key", "value"))
    keys, values, dropped = k[:, heads], v[:, heads], scores * kept
    context = einsum("bhts,bhsv->bthv", dropped, values)
    output = einsum("bthv,hvo->bto", context, w["output.kernel"]) + w.get("output.bias", 0.0)

    gradients = {
        "output.kernel": einsum("bthv,bto->hvo", context, g_output),
        "output.bias": einsum("bto->o", g_output),
    }
    g_context = einsum("bto,hvo->bhtv", g_output, w["output.kernel"])
    g_values = einsum("bhts,bhtv->bhsv", dropped, g_context)
    g_probs = einsum("bhtv,bhsv->bhts", g_context, values) * kept + g_scores
    g_mean = einsum("bhts,bhts->bht", scores, g_probs)[..., None]
    g_logits = scores * (g_probs - g_mean if cancel else g_probs + g_mean)
    if bias is not None:
        shape = np.shape(bias)
        own = "".join(
            axis for axis, n in zip("bhts"[4 - len(shape) :], shape, strict=True) if n > 1
        )
        gradients["attention_bias"] = einsum(f"bhts->{own}", g_logits).reshape(shape)
    g_keys = scale * einsum("bhts,bhtk->bhsk", g_logits, q)
    grouped = np.eye(k.shape[1])[heads]  # [H, K]
    parts = {
        "query": scale * einsum("bhts,bhsk->bhtk", g_logits, keys),
        "key": einsum("bhsk,hg->bgsk", g_keys, grouped),
        "value": einsum("bhsv,hg->bgsv", g_values, grouped),
    }
    for name, gradient in parts.items():
        gradients[f"{name}.kernel"] = einsum("btd,bhtk->dhk", x[name], gradient)
        gradients[f"{name}.bias"] = einsum("bhtk->hk", gradient)
        gradients[name] = einsum("bhtk,dhk->btd", gradient, w[f"{name}.kernel"])
    known = {*w, *x, "attention_bias"}
    return output, {name: g for name, g in gradients.items() if name in known}
