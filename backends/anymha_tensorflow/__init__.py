"""anymha for TensorFlow."""

from anymha_tensorflow.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
