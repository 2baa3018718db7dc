"""The options of today's models, one file each; see `anymha.attention.features.base`."""

from anymha.attention.features.base import Feature
from anymha.attention.features.softcap import Softcap

__all__ = ["FEATURES", "Feature"]

FEATURES: tuple[type[Feature], ...] = (Softcap,)
"""The features of the layer, in the order in which a call meets them."""
