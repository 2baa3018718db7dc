"""anymha for Equinox."""

from anymha_equinox.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
