"""anymha for Keras, on whichever of its backends is set."""

from anymha_keras.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
