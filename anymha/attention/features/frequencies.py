"""The frequencies of rotary positions, by every scaling that model configs name.

Without a scaling ``w_i = base^(-2i/r)``. Frequencies for float32 are computed step by step in
float32, as transformers computes them for the models that were trained with them; frequencies for
float64 in float64.

References:
    J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    B. Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023).
    Y. Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens" (2024).
    Llama Team, "The Llama 3 Herd of Models" (2024), section 3.4.3, for "llama3".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def frequencies(
    base: float,
    width: int,
    scaling: Mapping[str, Any],
    max_positions: int | None,
    dtype: str,
    length: int | None = None,
) -> tuple[float, ...]:
    """The angle by which one position more turns each pair, r/2 numbers.

    Args:
        base: The base.
        width: The number r of columns that are rotated.
        scaling: "rope_type" and its fields, checked.
        max_positions: The config's `max_position_embeddings`.
        dtype: "float32" or "float64".
        length: The length of the call, for scalings that depend on it; None for a short one.
    """
    real = np.dtype(dtype).type
    make = _BY_TYPE[scaling["rope_type"]]
    return tuple(make(base, width, scaling, max_positions, real, length).tolist())


def attention_factor(scaling: Mapping[str, Any], max_positions: int | None) -> float:
    """The factor of cosines and sines, 1 for most scalings."""
    kind, own = scaling["rope_type"], scaling.get("attention_factor")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if own is not None:
        return float(own)
    first = original_length(scaling, max_positions)
    factor = _factor(scaling, max_positions)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0
    one, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if one and every:
        return _mscale(factor, one) / _mscale(factor, every)
    return _mscale(factor, 1.0)


def original_length(scaling: Mapping[str, Any], max_positions: int | None) -> int:
    """The length for which the model was trained first."""
    own: Any = scaling.get("original_max_position_embeddings")
    return max_positions if own is None else own  # pyright: ignore[reportReturnType]


def dynamic_ratio(length: Any, scaling: Mapping[str, Any], most: int) -> Any:
    """What the base of "dynamic" is multiplied by at a length beyond `most`, before the power."""
    factor = scaling["factor"]
    return length * (factor / most) - (factor - 1)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factor(scaling: Mapping[str, Any], max_positions: int | None) -> float:
    own: Any = scaling.get("factor")
    first: Any = original_length(scaling, max_positions)
    most: Any = max_positions
    return most / first if own is None else own


def _powers(base: float, width: int, real: Any, of: int | None = None) -> np.ndarray:
    """``base^(2i/width)`` for the first `of` columns; the power itself in float64, rounded once."""
    exponents = np.arange(0, of or width, 2).astype(real) / real(width)
    return (base ** exponents.astype(np.float64)).astype(real)


def _default(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    return real(1) / _powers(base, width, real)


def _linear(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    return _default(base, width, s, most, real, length) / real(s["factor"])


def _dynamic(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    if length is not None and length > most:
        base = base * (s["factor"] * length / most - (s["factor"] - 1)) ** (width / (width - 2))
    return _default(base, width, s, most, real, length)


def _proportional(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    turned = int(s.get("partial_rotary_factor", 1.0) * width // 2)
    found = np.zeros(width // 2, real)
    if turned:
        found[:turned] = real(1) / _powers(base, width, real, 2 * turned)
    return found / real(s.get("factor", 1.0))


def _yarn(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    first, factor = original_length(s, most), _factor(s, most)

    def column(turns: float) -> float:
        """The column that turns so often within the first length."""
        return width * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = column(s.get("beta_fast") or 32), column(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(width // 2).astype(real) - real(low)) / real(high - low)
    own = 1 - np.clip(ramp, 0, 1)
    powers = _powers(base, width, real)
    return real(1) / (real(factor) * powers) * (1 - own) + real(1) / powers * own


def _longrope(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    is_long = length is not None and length > original_length(s, most)
    factors = np.asarray(s["long_factor" if is_long else "short_factor"], real)
    return real(1) / (factors * _powers(base, width, real))


def _llama3(base: float, width: int, s: Any, most: Any, real: Any, length: Any) -> np.ndarray:
    first, factor = original_length(s, most), real(s["factor"])
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    plain = _default(base, width, s, most, real, length)
    waves = real(2 * math.pi) / plain
    smooth = (real(first) / waves - real(low)) / real(high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    slow = np.where(waves > real(first / low), plain / factor, between)
    return np.where(waves < real(first / high), plain, slow)


_BY_TYPE: dict[str, Callable[..., np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
