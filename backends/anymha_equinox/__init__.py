"""anymha for Equinox."""

from anymha.framework.registry import explain_missing

try:
    from anymha_equinox.layer import MultiHeadAttention
except ModuleNotFoundError as error:
    explain_missing(__name__, error)
    raise

__all__ = ["MultiHeadAttention"]
