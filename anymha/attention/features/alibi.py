"""ALiBi: logits that fall with the distance of query and key, by a slope for each head.

    logits -> logits - slope * |position of the query - position of the key|

References:
    O. Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from anymha.attention.features.base import Feature
from anymha.errors import ConfigError
from anymha.framework.dtypes import working_dtype
from anymha.framework.protocol import Array, Ops


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of the paper: ``2^(-8h/H)``, h = 1 .. H.

    Where H is no power of two: those of the next lower one, n, and then every other one of 2n.
    """
    power = 1 << (heads.bit_length() - 1)
    own = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    return tuple((own + between)[:heads])


@dataclass(frozen=True)
class Alibi(Feature):
    """The slopes of the heads.

    Args:
        slopes: One for each query head, H; none where they are an array, "alibi_slopes" (H,).
    """

    option = "alibi"
    ignores_a_constant = True
    counts_positions = True
    adds_by_position = True

    slopes: tuple[float, ...] = ()

    @classmethod
    def checked(cls, value: Any) -> tuple[float, ...] | bool:
        """True or False as they are, slopes as a tuple of finite floats; None is False.

        Raises:
            ConfigError: it is none of these.
        """
        if value is None or isinstance(value, (bool, np.bool_)):
            return bool(value)
        try:
            slopes = () if isinstance(value, (str, Mapping)) else tuple(map(float, value))
        except (TypeError, ValueError):
            slopes = ()
        if not slopes or not all(map(math.isfinite, slopes)):
            raise ConfigError(
                "`alibi` must be True for the slopes of the paper, False for none, or a finite "
                f"number for each query head. Received: {value!r}."
            )
        return slopes

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has ALiBi.

        Raises:
            ConfigError: there are not as many slopes as heads.
        """
        slopes = config.alibi
        if slopes is False:
            return None
        slopes = alibi_slopes(config.num_heads) if slopes is True else slopes
        if len(slopes) != config.num_heads:
            raise ConfigError(
                f"`alibi` must have a slope for each of the {config.num_heads} query heads. "
                f"Received: {len(slopes)}."
            )
        return cls(slopes)

    def tiled(self, ops: Ops, arrays: Mapping[str, Array], like: Array) -> dict[str, Array]:
        """The slopes, and the positions of queries and keys."""
        places, keys = arrays["positions"], arrays["key_positions"]
        dtype = working_dtype(ops, like)
        (rows, queries), (key_rows, count) = ops.shape(places), ops.shape(keys)
        if self.slopes:
            slopes = ops.asarray(self.slopes, dtype=dtype, device=ops.device(like))
        else:
            slopes = ops.astype(arrays["alibi_slopes"], dtype)
        return {
            "alibi": ops.reshape(slopes, (1, -1, 1, 1)),
            "positions": ops.reshape(places, (rows, 1, queries, 1)),
            "key_positions": ops.reshape(keys, (key_rows, 1, 1, count)),
        }

    def bias(self, ops: Ops, arrays: Mapping[str, Array], like: Array) -> Array:
        """The slope times the distance, negative."""
        distance = ops.abs(arrays["positions"] - arrays["key_positions"])
        return ops.astype(distance, working_dtype(ops, like)) * (arrays["alibi"] * -1.0)

    def why_not_fused(self, capabilities: Any) -> str | None:
        """A kernel takes a bias."""
        return None
