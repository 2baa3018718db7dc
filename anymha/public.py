"""The names of `anymha`, loaded together where the first of them is used."""

from anymha.errors import AnymhaError
from anymha.execution.path import explain
from anymha.functional import dot_product_attention, multi_head_attention
from anymha.interchange.anymha_files import load, save
from anymha.interchange.homes import MultiHeadAttention
from anymha.interchange.layers import convert, get_weights, set_weights
from anymha.interchange.layouts import from_canonical, layouts, to_canonical
from anymha.options.config import AttentionConfig

__all__ = [
    "AnymhaError",
    "AttentionConfig",
    "MultiHeadAttention",
    "convert",
    "dot_product_attention",
    "explain",
    "from_canonical",
    "get_weights",
    "layouts",
    "load",
    "multi_head_attention",
    "save",
    "set_weights",
    "to_canonical",
]
