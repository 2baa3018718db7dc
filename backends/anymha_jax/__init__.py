"""anymha for JAX."""

from anymha_jax.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
