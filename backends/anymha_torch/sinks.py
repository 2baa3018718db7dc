"""Torch's kernel of the CPU with a further logit s in each row's softmax, which has no value.

The kernel gives the context c and the log l of the softmax's denominator. With s in it

    l' = log(exp(l) + exp(s)),  c' = c * exp(l - l')

and the kernel's backward pass, given c' and l', pulls back through just that softmax:

    dS = P' * (dC V^T - rowsum(C' * dC)),  ds = -sum(exp(s - l') * rowsum(C' * dC))

References:
    T. Dao et al., "FlashAttention" (2022), appendix B, for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha_torch import tiled_dropout

FORWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    spec: AttentionSpec,
    causal: bool,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """The context (B, H, T, d_k) in float32, differentiable twice in the last four.

    Args:
        spec: The options, without dropout.
        causal: Whether the kernel masks by causality.
        mask: Added to the logits, or True = may attend; broadcasts to (B, H, T, S).
        query: (B, H, T, d_k).
        key: (B, K, S, d_k).
        value: (B, K, S, d_k).
        sinks: (1, H, 1, 1).
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    return _Attention.apply(spec, causal, mask, query, key, value, sinks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: AttentionSpec, causal: bool, mask: Any, *arrays: torch.Tensor
    ) -> torch.Tensor:
        *heads, sinks = arrays
        context, own = FORWARD(*heads, is_causal=causal, attn_mask=mask, scale=spec.scale)
        whole = torch.logaddexp(own, sinks[..., 0])
        context = context * torch.exp(own - whole)[..., None]
        ctx.spec, ctx.causal = spec, causal
        ctx.save_for_backward(mask, *arrays, context, whole)
        return context

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        mask, *arrays, context, whole = ctx.saved_tensors
        spec, (cotangent,) = ctx.spec, cotangents
        if torch.is_grad_enabled():  # somebody differentiates the gradients
            again = AttentionSpec(spec.scale, spec.features, position_mask(ctx.causal, None, 0))
            rest = {} if mask is None else {"bias": mask}
            needed = ctx.needs_input_grad[3:]
            found = tiled_dropout.differentiable(again, rest, arrays, cotangent, needed)
            return None, None, None, *found
        *heads, sinks = arrays
        found = BACKWARD(
            cotangent, *heads, context, whole, 0.0, ctx.causal, attn_mask=mask, scale=spec.scale
        )
        taken = torch.exp(sinks[..., 0] - whole) * (cotangent * context).sum(-1)
        return None, None, None, *found, -taken.sum((0, 2)).reshape(sinks.shape)
