"""anymha for TensorFlow."""

from anymha_tensorflow.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
