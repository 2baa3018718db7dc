"""anymha for JAX."""

from anymha_jax.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
