"""`Feature`: one option of the attention, as the steps of a call that it changes.

An option of today's models (a softcap, rotary positions, sinks) is one class in one file of this
folder. Its hooks default to nothing; what a hook is not overridden for, the option leaves alone.
Their last argument has the call's arrays by name, the feature's own weights in the dtype in which
attention is computed, and what its own projections give; in a tile the tile's part of them.
The order of the hooks in a call:

    heads -> products of queries and keys, scaled -> logits -> bias, the call's bias
    -> masks, visible -> softmax with joining
    -> dropout -> values -> context
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from anymha.attention.masks import TileOrigin
from anymha.framework.protocol import Array, Dim, Ops


@dataclass(frozen=True)
class Weight:
    """A weight that a feature has.

    Args:
        shape: Its shape.
        part: "kernel" or "bias" for one that starts, is penalised and is constrained as those of
            the projections. Empty for one that the options of training leave alone.
        initial: How it starts where `part` is empty: the name or the config dict of an initialiser.
        shifts_keys: Whether it adds one vector to all keys of a head, and so one number to all
            logits of a row: its gradient is exactly zero where all that follows ignores that.
    """

    shape: tuple[int, ...]
    part: str = ""
    initial: Any = "zeros"
    shifts_keys: bool = False


class FeatureOptions:
    """The base of an option's value that has fields: a subclass is a frozen dataclass."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore


class Feature:
    """The base of the features: an option that changes nothing.

    A feature is a frozen dataclass: calls with equal features share what is planned for them.

    Attributes:
        option: The name of the layer's option, a field of `AttentionConfig`.
        ignores_a_constant: Whether one number added to all logits of a row, before this feature
            sees them, changes no probability. Where all features do, the key's bias has a gradient
            of exactly zero.
        counts_positions: Whether `arrays` must have "positions" (1 or B, T) and "key_positions"
            (1 or B, S), integers.
        adds_by_position: Whether `tiled` asks for "key_positions", of a cache's keys too.
    """

    option: ClassVar[str]
    ignores_a_constant: ClassVar[bool] = False
    counts_positions: ClassVar[bool] = False
    adds_by_position: ClassVar[bool] = False

    @property
    def after(self) -> str:
        """The option after which the feature acts; empty for its place in `FEATURES`."""
        return ""

    @property
    def depends_on_length(self) -> bool:
        """Whether `heads` gives other keys for another length; a cache holds them without it then.

        `arrays` may have that length as "lengths": an int, or integers (B,).
        """
        return False

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

    def weights(self, config: Any, query_features: int) -> dict[str, Weight]:
        """The feature's weights by canonical name; the names depend on the config alone.

        Args:
            config: The layer's options.
            query_features: The width D_q of the query input.
        """
        return {}

    def projections(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Projections of the query input that the feature has beside the layer's four, by name.

        Each has the weights "name.kernel" (D_q, *axes) and, as `use_bias` says, "name.bias" (axes):
        weights as those of the four, and called as these are.

        Args:
            config: The layer's options.

        Returns:
            The axes of what each gives, heads first.
        """
        return {}

    def activated(self, ops: Ops, name: str, y: Array) -> Array:
        """What `arrays` has of a projection of the feature, from what that gives (B, T, *axes).

        Args:
            ops: The backend.
            name: The projection's name.
            y: In the dtype of what goes from stage to stage.
        """
        return y

    def free_columns(self, width: int) -> tuple[bool, ...]:
        """Which columns of the key's bias only add one number to all logits of a row.

        Args:
            width: The number d_k of the columns.
        """
        return (self.ignores_a_constant,) * width

    def by_position(self, ops: Ops, positions: Array, like: Array) -> dict[str, Array]:
        """What `heads` makes of the positions alone, by names of their own.

        Decoding makes it for many steps at a time, and gives `heads` the part of one step.

        Args:
            ops: The backend.
            positions: Integers (1 or B, T), of queries and keys.
            like: An array beside which it is made, of the dtype of the queries.

        Returns:
            Arrays whose second axis is that of the positions.
        """
        return {}

    def heads(
        self, ops: Ops, query: Array, key: Array, arrays: Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """Queries (B, T, H, d_k) and keys (B, S, K, d_k), once for a call, before the products."""
        return query, key

    def tiled(self, ops: Ops, arrays: Mapping[str, Array], like: Array) -> dict[str, Array]:
        """What the hooks of a tile need of the call's arrays, by names of their own.

        Args:
            ops: The backend.
            arrays: The call's arrays by name.
            like: The queries; the logits are of their `working_dtype`.

        Returns:
            Arrays that broadcast to (B, H, T, S); a tile gets its part of them.
        """
        return {}

    def joining(self, arrays: Mapping[str, Array]) -> Array | None:
        """A further logit of each row, (1, H, 1, 1), that joins its softmax; None for no such."""
        return None

    def logits(
        self, ops: Ops, logits: Array, origin: TileOrigin, arrays: Mapping[str, Array]
    ) -> Array:
        """The scaled logits (B, H, T, S) of a tile that begins at `origin`, before the bias."""
        return logits

    def bias(self, ops: Ops, arrays: Mapping[str, Array], like: Array) -> Array | None:
        """What is added to the logits of a tile after `logits`, (B, H, T, S); None for nothing.

        Args:
            ops: The backend.
            arrays: The tile's arrays by name.
            like: An array beside which it is made; it is of its `working_dtype`.
        """
        return None

    def visible(
        self,
        ops: Ops,
        origin: TileOrigin,
        queries: Dim,
        keys: Dim,
        like: Array,
        arrays: Mapping[str, Array],
    ) -> Array | None:
        """Booleans that broadcast to (B, H, T, S) of a tile, True = may attend; None for all."""
        return None

    def context(self, ops: Ops, context: Array, arrays: Mapping[str, Array]) -> Array:
        """The context (B, T, H, d_v), once for a call, before the output projection."""
        return context

    def why_not_fused(self, capabilities: Any) -> str | None:
        """Why a backend's kernel cannot do the call with this feature; None where it can.

        Args:
            capabilities: The backend's `anymha.framework.capabilities.Capabilities`.
        """
        return f"the kernel has no {self.option}"


def adding_option(features: Iterable[Feature]) -> str:
    """The option that adds to the logits of each query and key; empty where none does."""
    return next((f.option for f in features if type(f).bias is not Feature.bias), "")


def bias_of(
    features: Iterable[Feature], ops: Ops, arrays: Mapping[str, Array], like: Array
) -> Array | None:
    """The sum of what features add to the logits of a tile; None where none does."""
    total = None
    for feature in features:
        own = feature.bias(ops, arrays, like)
        if own is not None:
            total = own if total is None else total + own
    return total


def joining_logit(features: Iterable[Feature], arrays: Mapping[str, Array]) -> Array | None:
    """The logit (1, H, 1, 1) that joins the softmax of each row, of the feature that has one."""
    for feature in features:
        logit = feature.joining(arrays)
        if logit is not None:
            return logit
    return None
