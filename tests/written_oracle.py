"""The oracle as a function of arrays, for tests that have no problem of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from anymha.parity.oracle.oracle import Truth, evaluate
from anymha.parity.oracle.recipe import Recipe, Section, ordered
from anymha.parity.oracle.rounding import rounding_errors


def attention_oracle(
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    *,
    scale: float,
    allowed: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    sections: tuple[Section, ...] = (),
    d_output: np.ndarray | None = None,
    d_scores: np.ndarray | None = None,
    dtype: str = "float64",
) -> Truth:
    """Multi-head attention of (B, T, D) inputs, and its gradients.

    Args:
        weights: Canonical weights; output kernel and bias with a flat output, (H, d_v, O) and (O).
        inputs: "query" (B, T, D_q), "value" (B, S, D_v) and "key" (B, S, D_k).
        scale: Factor of the logits.
        allowed: Booleans that broadcast to (B, H, T, S), True = may attend.
        bias: Added to the logits.
        kept: What the probabilities are multiplied with by dropout, (B, H, T, S).
        sections: The options of the attention that are on.
        d_output: Cotangent of the output; default zero.
        d_scores: Cotangent of the scores; default zero.
        dtype: The dtype in which the layer computes; in half precision both cotangents are needed.
    """
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
    masks = {} if allowed is None else {"allowed": np.asarray(allowed)}
    recipe = Recipe(w, x, scale, masks, bias=bias, kept=kept, sections=ordered(sections))
    found = evaluate(recipe, d_output, d_scores)
    if d_output is None or d_scores is None:
        return found
    return replace(found, rounding=rounding_errors(recipe, d_output, d_scores, dtype))
