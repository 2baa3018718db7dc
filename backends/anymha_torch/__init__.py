"""anymha for PyTorch."""

from anymha_torch.module import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
