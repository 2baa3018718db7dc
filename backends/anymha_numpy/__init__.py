"""anymha for NumPy."""

from anymha_numpy.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
