"""A small language model, written once for all frameworks around anymha's attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEADS, BLOCKS = 96, 6, 3
WINDOW = 32
ATTENTION: dict[str, Any] = {
    "num_heads": HEADS,
    "key_dim": WIDTH // HEADS,
    "num_key_value_heads": 2,
    "query_features": WIDTH,
    "rotary": True,
    "query_key_norm": "rms",
    "use_bias": False,
}
# Every second layer sees the whole text, the others a window of it.
WINDOWS = [None if number % 2 else WINDOW for number in range(BLOCKS)]


def initial(letters: int) -> dict[str, np.ndarray]:
    """The first values of the weights around the attention layers, float32."""
    rng = np.random.default_rng(0)
    values = {"token": rng.standard_normal((letters, WIDTH)) / np.sqrt(WIDTH)}
    for number in range(BLOCKS):
        values[f"{number}.up"] = rng.standard_normal((WIDTH, 4 * WIDTH)) / np.sqrt(WIDTH)
        values[f"{number}.down"] = rng.standard_normal((4 * WIDTH, WIDTH)) / np.sqrt(4 * WIDTH)
    norms = [f"{number}.{part}" for number in range(BLOCKS) for part in ("mix", "think")]
    values |= {f"{name}.norm": np.ones(WIDTH) for name in ("token", *norms)}
    return {name: value.astype(np.float32) for name, value in values.items()}


def norm(xp: Any, x: Any, scale: Any) -> Any:
    """The RMS norm over the features."""
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def forward(
    xp: Any, layers: Sequence[Any], weights: Mapping[str, Any], hidden: Any, caches: Any = None
) -> tuple[Any, list[Any]]:
    """The logits of the letters that follow, and the caches that hold these letters, too.

    Args:
        xp: The framework's functions, by NumPy's names.
        layers: The attention layers, one for each block.
        weights: The weights around them, as arrays of the framework.
        hidden: The letters' embeddings (B, T, WIDTH).
        caches: One for each layer; None: the letters are the whole text.
    """
    new = []
    for number, attention in enumerate(layers):
        x = norm(xp, hidden, weights[f"{number}.mix.norm"])
        if caches is None:
            mixed = attention(x, use_causal_mask=True)
        else:
            mixed, cache = attention(x, cache=caches[number])
            new.append(cache)
        hidden = hidden + mixed
        x = norm(xp, hidden, weights[f"{number}.think.norm"]) @ weights[f"{number}.up"]
        hidden = hidden + (x / (1 + xp.exp(-x))) @ weights[f"{number}.down"]  # SiLU
    x = norm(xp, hidden, weights["token.norm"])
    return x @ xp.swapaxes(weights["token"], 0, 1), new
