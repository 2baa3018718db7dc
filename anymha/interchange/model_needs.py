"""Needs of a forward pass whose values are worked out from a model's configuration."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from anymha.attention.features.alibi import alibi_slopes
from anymha.attention.features.query_key_norm import QueryKeyNorm
from anymha.attention.features.rotary import SCALING_FIELDS, Rotary
from anymha.errors import ConfigError
from anymha.interchange.forms import Need
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.rotary_order import LAYOUT_OF

_SCALING = {name for needed, other in SCALING_FIELDS.values() for name in (*needed, *other)}
_FIRST = "original_max_position_embeddings"
_SHARES = ("partial_rotary_factor", "rotary_pct")
MAX_HEADS = 2**16
"""No layer has more; a hostile number must not cost memory."""
_WITH_LENGTHS = ("dynamic", "yarn", "longrope", "llama3")
"""Scalings that need the lengths of the training, which stand beside their fields."""


@dataclass(frozen=True)
class RotaryNeed(Need):
    """Rotary positions.

    Args:
        share: The share of each head that turns where a configuration does not state it; None where
            it is always all.
        plain: Whether they have the base 10000 and no scaling, whatever the model.
    """

    share: float | None = None
    plain: bool = False

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """See `Need.stated`."""
        if layer.rotates is None:
            return {}
        fields = self._fields(layer) if layer.rotates else None
        layout = LAYOUT_OF[self.order]
        return {self.option: None if fields is None else Rotary(**fields, layout=layout)}

    def _fields(self, layer: LayerConfig) -> dict[str, Any] | None:
        """The fields of the `Rotary` but its layout; None where there is none.

        Raises:
            ValueError: the configuration does not tell.
        """
        if self.key:
            return {"dim": layer[self.key]} if self.key in layer else {"dim": 64}
        rope = layer.rope()
        if rope is None:
            return None
        if "unknown" in rope:
            raise ValueError(rope["unknown"])
        kind = rope.pop("rope_type", rope.get("type", "default"))
        base = rope.pop("rope_theta")
        rope.pop("type", None)
        own = {name for names in SCALING_FIELDS.get(kind, ()) for name in names}
        fields: dict[str, Any] = {"base": base}
        if self.share is not None and "partial_rotary_factor" not in own:
            stated = (rope.get(name, layer.get(name)) for name in _SHARES)
            share = next((one for one in stated if one is not None), self.share)
            if share != 1:
                if layer.head_dim is None:
                    raise ValueError("the width of the heads")
                fields["dim"] = int(layer.head_dim * share)
        if kind in _WITH_LENGTHS:
            fields["max_position_embeddings"] = layer.get("max_position_embeddings")
            if kind != "dynamic" and layer.get(_FIRST) is not None:  # counts for more, as Phi-3's
                rope[_FIRST] = layer[_FIRST]
        # Fields of other scalings mean nothing there; unknown ones may mean anything.
        rope = {n: v for n, v in rope.items() if n in own or n not in (*_SCALING, *_SHARES)}
        if kind != "default" or rope:
            fields["scaling"] = {"rope_type": kind, **rope}
        return fields


@dataclass(frozen=True)
class NormNeed(Need):
    """Norms of queries and keys.

    Args:
        norm: The norm, whose `eps` counts where `key` is empty.
        switch: The name of what says in the configuration whether a layer has it; empty for always.
        rotating: Whether the layers alone have it that rotate queries and keys.
    """

    norm: QueryKeyNorm = field(default_factory=QueryKeyNorm)
    switch: str = ""
    rotating: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether arrays show that a layer has it."""
        return self.norm.scale != "none" or self.norm.use_bias

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """See `Need.stated`."""
        if (self.switch and not layer.get(self.switch, True)) or (
            self.rotating and layer.rotates is False
        ):
            return {self.option: None}
        if not self.key:
            return {self.option: self.norm}
        if self.key not in layer or (self.rotating and layer.rotates is None):
            return {}
        return {self.option: dataclasses.replace(self.norm, eps=layer[self.key])}

    def fits(self, norm: QueryKeyNorm) -> bool:
        """Whether a layer may have the norm, whatever its `eps`."""
        return dataclasses.replace(norm, eps=self.norm.eps) == self.norm


@dataclass(frozen=True)
class AlibiNeed(Need):
    """ALiBi.

    Args:
        default: Whether models have it whose configuration does not say so.
        scaled: Whether it is added before the logits are scaled, in bfloat16, as Falcon does.
    """

    default: bool = False
    scaled: bool = False

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """See `Need.stated`."""
        if "model_type" not in layer:
            return {}
        if not layer.get(self.key, self.default):
            return {self.option: False}
        counts = (layer.get(name) for name in ("num_attention_heads", "n_head", "n_heads"))
        heads, most = next(filter(None, counts), None), layer.get("alibi_bias_max", 8)
        if heads is None or (self.scaled and layer.head_dim is None):
            return {} if self.scaled or most != 8 else {self.option: True}
        if not 0 < heads <= MAX_HEADS:
            return {}
        slopes = alibi_slopes(heads)
        if most != 8:
            slopes = tuple(slope ** (most / 8) for slope in slopes)
        if self.scaled:
            rounded = np.asarray(slopes, ml_dtypes.bfloat16).astype(np.float64)
            slopes = tuple((rounded * layer.head_dim**-0.5).tolist())  # pyright: ignore
        return {self.option: True if slopes == alibi_slopes(heads) else slopes}


@dataclass(frozen=True)
class ScaleNeed(Need):
    """The factor of the logits, the inverse root of a number of the configuration."""

    def words(self) -> str:
        """See `Need.words`."""
        return f"{self.text} (pass `{self.option}=...`)"

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """See `Need.stated`."""
        number: Any = layer.get(self.key)
        known = isinstance(number, (int, float)) and number is not True and 0 < number < 2**20
        return {self.option: float(number) ** -0.5} if known else {}


@dataclass(frozen=True)
class TemperatureNeed(Need):
    """Queries multiplied by a number for each position, in layers that do not rotate (Llama 4)."""

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """See `Need.stated`."""
        if layer.rotates is None or "model_type" not in layer:
            return {}
        return {self.option: not layer.rotates and bool(layer.get(self.key, True))}


def values_of(needs: tuple[Need | str, ...], layer: LayerConfig) -> dict[str, Any]:
    """The options that a configuration states for the needs of a layout.

    What it states in another form than models do, as a scaling of several axes, is left out.
    """
    values: dict[str, Any] = {}
    for need in needs if layer.stated else ():
        with suppress(ArithmeticError, AttributeError, ConfigError, TypeError, ValueError):
            values |= need.stated(layer) if isinstance(need, Need) else {}
    return values


def need_of(needs: tuple[Need | str, ...], option: str) -> Need | None:
    """The need of an option; None where there is none."""
    found = (need for need in needs if isinstance(need, Need) and need.option == option)
    return next(found, None)
