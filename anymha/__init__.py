"""One multi-head attention layer, the same in every framework, and proof that it is."""

from anymha.config import AttentionConfig
from anymha.errors import AnymhaError
from anymha.functional import dot_product_attention, multi_head_attention
from anymha.interchange.layers import convert, get_weights, set_weights
from anymha.interchange.layers import new_layer as MultiHeadAttention

__version__ = "0.1.0"

__all__ = [
    "AnymhaError",
    "AttentionConfig",
    "MultiHeadAttention",
    "__version__",
    "convert",
    "dot_product_attention",
    "get_weights",
    "multi_head_attention",
    "set_weights",
]
