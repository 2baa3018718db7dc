"""anymha for Flax NNX."""

from anymha_flax.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
