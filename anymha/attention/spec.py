"""What one call of attention does beside its arrays."""

from __future__ import annotations

from dataclasses import dataclass

from anymha.attention.dropout import Dropout
from anymha.attention.features import Feature
from anymha.attention.masks import Visibility


@dataclass(frozen=True)
class AttentionCall:
    """What one call of attention does beside its arrays.

    Args:
        scale: Factor of the logits.
        features: The options of today's models that are switched on.
        visibility: What a query sees by its position: causality and window.
        dropout: Dropout of the probabilities, or None.
        memory_budget: How many bytes the logits of one block may take; None leaves it to the
            backend. The results mean the same for any.
    """

    scale: float
    features: tuple[Feature, ...]
    visibility: Visibility
    dropout: Dropout | None = None
    memory_budget: int | None = None
