"""anymha for NumPy."""

from anymha_numpy.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
