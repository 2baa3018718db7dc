"""`Feature`: one option of the attention, as the steps of a call that it changes.

An option of today's models (a softcap, rotary positions, sinks) is one class in one file of this
folder. Its hooks default to nothing; what a hook is not overridden for, the option leaves alone.
The order of the hooks in a call:

    heads -> products of queries and keys, scaled -> logits -> bias -> masks, visible -> softmax
    -> dropout -> values -> context
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from anymha.framework.protocol import Array, Ops


class Feature:
    """The base of the features: an option that changes nothing.

    A feature is a frozen dataclass: calls with equal features share what is planned for them.

    Attributes:
        option: The name of the layer's option, a field of `AttentionConfig`.
        ignores_a_constant: Whether one number added to all logits of a row, before this feature
            sees them, changes no probability. Where all features do, the key's bias has a gradient
            of exactly zero.
    """

    option: ClassVar[str]
    ignores_a_constant: ClassVar[bool] = False

    @classmethod
    def checked(cls, value: Any) -> Any:
        """The option's value in its one form, as the config stores it.

        Raises:
            ConfigError: the option cannot have the value.
        """
        return value

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature of a config, or None where the option is switched off."""
        raise NotImplementedError

    def weight_shapes(self, config: Any, query_features: int) -> Mapping[str, tuple[int, ...]]:
        """The canonical names and the shapes of the feature's own weights."""
        return {}

    def heads(self, ops: Ops, query: Array, key: Array) -> tuple[Array, Array]:
        """Queries (B, T, H, d_k) and keys (B, S, K, d_k) as the products take them."""
        return query, key

    def logits(self, ops: Ops, logits: Array) -> Array:
        """The scaled logits (B, H, T, S), before bias and masks."""
        return logits

    def context(self, ops: Ops, context: Array) -> Array:
        """The context (B, H, T, d_v), before the output projection."""
        return context

    def why_not_fused(self) -> str | None:
        """Why a kernel without this feature cannot do the call; None where it can."""
        return f"the kernel has no {self.option}"
