"""What one call of attention computes, beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass

from anymha.attention.dropout import Dropout
from anymha.attention.features import Feature
from anymha.attention.masks import PositionMask


@dataclass(frozen=True)
class AttentionSpec:
    """The options of one call of attention.

    Args:
        scale: Factor of the logits.
        features: The options of today's models that are switched on.
        position_mask: What a query sees by its position: causality and window.
        dropout: Dropout of the probabilities, or None.
        memory_budget: How many bytes the logits of one tile may take; None leaves it to the
            backend. The results mean the same for any.
    """

    scale: float
    features: tuple[Feature, ...]
    position_mask: PositionMask
    dropout: Dropout | None = None
    memory_budget: int | None = None
