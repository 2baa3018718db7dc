"""anymha for Flax NNX."""

from anymha.framework.registry import explain_missing

try:
    from anymha_flax.layer import MultiHeadAttention
except ModuleNotFoundError as error:
    explain_missing(__name__, error)
    raise

__all__ = ["MultiHeadAttention"]
