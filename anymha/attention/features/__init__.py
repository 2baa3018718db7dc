"""The options of today's models, one file each; see `anymha.attention.features.base`."""

from typing import Any

from anymha.attention.features.alibi import Alibi
from anymha.attention.features.base import Feature
from anymha.attention.features.gate import Gate
from anymha.attention.features.query_key_norm import HeadNorm
from anymha.attention.features.rotary import RotaryPositions
from anymha.attention.features.sinks import Sinks
from anymha.attention.features.softcap import Softcap

__all__ = [
    "FEATURES", "Alibi", "Feature", "Gate", "HeadNorm", "RotaryPositions", "Sinks", "Softcap",
    "features_of",
]  # fmt: skip

FEATURES: tuple[type[Feature], ...] = (HeadNorm, RotaryPositions, Softcap, Alibi, Sinks, Gate)
"""The features of the layer, in the order in which a call meets them."""


def features_of(config: Any) -> tuple[Feature, ...]:
    """The features that a config switches on, in the order in which a call meets them."""
    places = {kind.option: float(place) for place, kind in enumerate(FEATURES)}

    def place(feature: Feature) -> float:
        after = places.get(feature.after)
        return places[feature.option] if after is None else after + 0.5

    made = [kind.from_config(config) for kind in FEATURES]
    return tuple(sorted((feature for feature in made if feature is not None), key=place))
