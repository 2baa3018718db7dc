"""Softcap: logits that stay below a bound.

    logits -> c * tanh(logits / c)

References:
    Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from anymha.attention.features.base import Feature
from anymha.attention.masks import TileOrigin
from anymha.errors import ConfigError
from anymha.framework.protocol import Array, Ops


@dataclass(frozen=True)
class Softcap(Feature):
    """The bound of the logits.

    Args:
        cap: ``c``, above 0.
    """

    option = "softcap"

    cap: float

    @classmethod
    def checked(cls, value: Any) -> float | None:
        """`value` as a finite float above 0; None stays None.

        Raises:
            ConfigError: it is none.
        """
        if value is None:
            return None
        try:
            cap = float(value)
        except (TypeError, ValueError):
            cap = math.nan
        if isinstance(value, (bool, str)) or not (math.isfinite(cap) and cap > 0):
            raise ConfigError(
                "`softcap` must be a finite number above 0, or None for no cap. "
                f"Received: {value!r}."
            )
        return cap

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has a softcap."""
        return None if config.softcap is None else cls(config.softcap)

    def logits(
        self, ops: Ops, logits: Array, origin: TileOrigin, arrays: Mapping[str, Array]
    ) -> Array:
        """The logits between ``-c`` and ``c``."""
        return ops.tanh(logits / self.cap) * self.cap
