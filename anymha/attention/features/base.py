"""`Feature`: one option of the attention, as the steps of a call that it changes.

An option of today's models (a softcap, rotary positions, sinks) is one class in one file of this
folder. Its hooks default to nothing; what a hook is not overridden for, the option leaves alone.
The order of the hooks in a call:

    heads -> products of queries and keys, scaled -> logits -> bias -> masks, visible -> softmax
    -> dropout -> values -> context
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from anymha.attention.masks import TileOrigin
from anymha.framework.protocol import Array, Dim, Ops


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

    def heads(self, ops: Ops, query: Array, key: Array) -> tuple[Array, Array]:
        """Queries (B, T, H, d_k) and keys (B, S, K, d_k), once for a call, before the products."""
        return query, key

    def logits(self, ops: Ops, logits: Array, origin: TileOrigin) -> Array:
        """The scaled logits (B, H, T, S) of a tile that begins at `origin`, before the bias."""
        return logits

    def visible(
        self, ops: Ops, origin: TileOrigin, queries: Dim, keys: Dim, like: Array
    ) -> Array | None:
        """Booleans that broadcast to (B, H, T, S) of a tile, True = may attend; None for all."""
        return None

    def context(self, ops: Ops, context: Array) -> Array:
        """The context (B, T, H, d_v), once for a call, before the output projection."""
        return context

    def why_not_fused(self) -> str | None:
        """Why a kernel without this feature cannot do the call; None where it can."""
        return f"the kernel has no {self.option}"
