"""PyTorch's own attention kernel: when it has the written meaning, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transformation of `torch.func`, or forward differentiation, is at work."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
    return functorch or forward_ad._current_level >= 0


def fused_refusal(call: Any, arrays: Mapping[str, torch.Tensor], /) -> str | None:
    """Why the kernel cannot do a call, or None where it can."""
    query, bias = arrays["query"], arrays.get("bias")
    if query.dtype != torch.float32:
        return f"torch's kernel is taken for float32, not for {query.dtype}"
    if call.dropout is not None and (call.dropout.native or query.device.type != "cpu"):
        return "torch's kernel has no dropout of that kind"
    if call.dropout is not None and torch.compiler.is_compiling():
        return "the blocks with dropout are no program for torch's compiler"
    for feature in call.features:
        if reason := feature.why_not_fused():
            return reason
    if call.dropout is None and arrays["value"].shape[3] != query.shape[3]:
        return "torch's kernel wants `value_dim` equal to `key_dim`"
    if bias is not None and bias.requires_grad:
        return "torch's kernel gives no gradient to a bias"
    if not torch.compiler.is_compiling() and transformed():
        return "torch's kernel cannot be transformed by `torch.func`"
    return None


def attention(call: Any, arrays: Mapping[str, torch.Tensor], causal: bool) -> torch.Tensor:
    """The context (B, H, T, d_v) by the kernel."""
    query, key = arrays["query"], arrays["key"]
    mask, bias = arrays.get("mask"), arrays.get("bias")
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        arrays["value"],
        attn_mask=mask,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
