"""anymha for Equinox."""

from anymha_equinox.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
