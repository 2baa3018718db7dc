"""anymha for Keras, on whichever of its backends is set."""

from anymha.framework.registry import explain_missing

try:
    from anymha_keras.layer import MultiHeadAttention
except ModuleNotFoundError as error:
    explain_missing(__name__, error)
    raise

__all__ = ["MultiHeadAttention"]
