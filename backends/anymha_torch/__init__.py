"""anymha for PyTorch."""

from anymha_torch.layer import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
