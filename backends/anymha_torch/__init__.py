"""anymha for PyTorch."""

from anymha.framework.registry import explain_missing

try:
    from anymha_torch.layer import MultiHeadAttention
except ModuleNotFoundError as error:
    explain_missing(__name__, error)
    raise

__all__ = ["MultiHeadAttention"]
