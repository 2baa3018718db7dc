"""anymha for Keras, on whichever of its backends is set."""

from anymha_keras.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
