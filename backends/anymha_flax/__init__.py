"""anymha for Flax NNX."""

from anymha_flax.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
