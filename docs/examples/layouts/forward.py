"""A layer's forward pass from its canonical weights, with what its family needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import anymha
from anymha.interchange.weights import Weights

Change = Callable[[np.ndarray, str], np.ndarray]


def attend(
    weights: Weights, x: np.ndarray, changes: tuple[Change, ...] = (), **call: Any
) -> np.ndarray:
    """The output for inputs x (B, T, D).

    Args:
        weights: What `anymha.get_weights` gives for a layer of another library.
        x: The inputs.
        changes: What happens to the queries and keys (B, T, heads, d_k) before the logits, in
            this order; each is told whether it has "query" or "key".
        **call: Arguments of `anymha.dot_product_attention`.
    """
    heads = {}
    for name in ("query", "key", "value"):
        heads[name] = np.tensordot(x, weights[f"{name}.kernel"], 1)  # (B, T, heads, d)
        heads[name] = heads[name] + weights.get(f"{name}.bias", 0)
    for change in changes:
        for name in ("query", "key"):
            heads[name] = change(heads[name], name)
    if "sinks" in weights.extras:
        # A key that gives the logit 0, to which the sink is added, and a value of zeros.
        call["bias"] = _with_sinks(weights.extras["sinks"], x.shape[1])
        call["is_causal"] = False
        heads |= {n: np.pad(heads[n], ((0, 0), (0, 1), (0, 0), (0, 0))) for n in ("key", "value")}
    scale = weights.config.scale_value
    context = anymha.dot_product_attention(**heads, scale=scale, **call)
    return np.tensordot(context, weights["output.kernel"], 2) + weights.get("output.bias", 0)


def rotate(width: int, pairs: bool = False, base: float = 10000.0) -> Change:
    """Rotary positions over the first `width` elements of each head.

    Args:
        width: How many elements turn.
        pairs: Element 2i turns with 2i + 1, not element i with i + width / 2.
        base: The base of the frequencies.
    """

    def change(heads: np.ndarray, name: str) -> np.ndarray:
        angles = np.arange(heads.shape[1])[:, None] * base ** (-np.arange(0, width, 2) / width)
        cos, sin = (f(angles)[None, :, None, :] for f in (np.cos, np.sin))  # (1, T, 1, width / 2)
        turned, rest = heads[..., :width], heads[..., width:]
        parts = (slice(0, None, 2), slice(1, None, 2))
        if not pairs:
            parts = (slice(None, width // 2), slice(width // 2, None))
        one, other = (turned[..., part] for part in parts)
        result = np.empty_like(turned)
        result[..., parts[0]] = one * cos - other * sin
        result[..., parts[1]] = other * cos + one * sin
        return np.concatenate([result, rest], -1)

    return change


def rms_norm(weights: Weights, plus_one: bool = False, epsilon: float = 1e-6) -> Change:
    """Each head over its root mean square, times `q_norm.weight` or `k_norm.weight`."""

    def change(heads: np.ndarray, name: str) -> np.ndarray:
        factor = weights.extras[f"{name[0]}_norm.weight"] + plus_one
        return heads / np.sqrt((heads**2).mean(-1, keepdims=True) + epsilon) * factor

    return change


def layer_norm(weights: Weights, epsilon: float = 1e-6) -> Change:
    """Each head over its deviation, times `query_ln/scale` or `key_ln/scale` (Flax)."""

    def change(heads: np.ndarray, name: str) -> np.ndarray:
        centred = heads - heads.mean(-1, keepdims=True)
        factor = weights.extras[f"{name}_ln/scale"]
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * factor

    return change


def alibi(heads: int, length: int, scale: float = 1.0) -> np.ndarray:
    """BLOOM's bias (1, H, 1, T): the slope of the head times the key's position; H a power of 2."""
    slopes = 2.0 ** (-8 / heads * np.arange(1, heads + 1))
    return scale * slopes[None, :, None, None] * np.arange(length)


def _with_sinks(sinks: np.ndarray, length: int) -> np.ndarray:
    """A causal mask and the sinks as a bias (1, H, T, T + 1)."""
    causal = np.where(np.tri(length, dtype=bool), 0.0, -np.inf)
    rows = np.broadcast_to(causal, (len(sinks), length, length))
    column = np.broadcast_to(sinks[:, None, None], (len(sinks), length, 1))
    return np.concatenate([rows, column], -1)[None].astype(sinks.dtype)
