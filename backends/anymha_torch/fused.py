"""PyTorch's own attention kernel: when it has the written meaning, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha.execution.path import AttentionShape
from anymha_torch import tiled_dropout


def transformed() -> bool:
    """Whether a transformation of `torch.func`, or forward differentiation, is at work."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
    return functorch or forward_ad._current_level >= 0


def why_not_fused(spec: AttentionSpec, shape: AttentionShape, /) -> str | None:
    """Why the kernel cannot do a call, or None where it can."""
    if shape.dtype != torch.float32:
        return f"torch's kernel is taken for float32, not for {shape.dtype}"
    if spec.dropout is not None:
        if spec.dropout.native or shape.device.type != "cpu":
            return "torch's kernel has no dropout of that kind"
        if torch.compiler.is_compiling():
            return "the tiles with dropout are no program for torch's compiler"
    elif shape.value_dim != shape.key_dim:
        return "torch's kernel wants `value_dim` equal to `key_dim`"
    if shape.bias_differentiated:
        return "torch's kernel gives no gradient to a bias"
    if not torch.compiler.is_compiling() and transformed():
        return "torch's kernel cannot be transformed by `torch.func`"
    return None


def fused_attention(
    spec: AttentionSpec, arrays: Mapping[str, torch.Tensor], /, *, causal: bool
) -> torch.Tensor:
    """The context (B, H, T, d_v) by the kernel; with dropout tile after tile."""
    if spec.dropout is not None:
        return tiled_dropout.attention(spec, arrays)
    query, key = arrays["query"], arrays["key"]
    mask, bias = arrays.get("mask"), arrays.get("bias")
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    elif mask.__class__ is torch.Tensor and mask.is_cpu:
        mask = torch.where(mask, _SEEN, _HIDDEN)  # as the kernel does, by numbers that are kept
    value = arrays["value"]
    grouped = bool(query.shape[1] != key.shape[1])
    context = scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=spec.scale, enable_gqa=grouped
    )
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return context
    kernel: Any = context.grad_fn
    kind = type(kernel)
    if kind not in _kinds:
        _kinds[kind] = kind.__name__.startswith("ScaledDotProduct")
    if _kinds[kind]:
        kernel.register_hook(_differentiable_again)
    return context


_SEEN, _HIDDEN = torch.tensor([0.0, -torch.inf], device="cpu").unbind()

_kinds: dict[type, bool] = {}
"""Whether a node of torch's graph is one of its attention kernels, by class."""


def _differentiable_again(gradients: Any, cotangents: Any) -> Any:
    """The gradients of the kernel, which torch cannot differentiate, as ones that it can.

    Args:
        gradients: Those that the kernel gives.
        cotangents: The gradient of the context, and others.
    """
    if not torch.is_grad_enabled():  # nobody differentiates them
        return None
    kernel: Any = torch._C._current_autograd_node()
    try:  # what the kernel keeps, the hook does not keep a second time
        arrays = [kernel._saved_query, kernel._saved_key, kernel._saved_value]
    except RuntimeError:  # as of a checkpoint, which recomputes them once
        return None
    mask = getattr(kernel, "_saved_attn_mask", None)
    if mask is None:
        mask = getattr(kernel, "_saved_attn_bias", None)  # of a kernel of CUDA's
    rest = {} if mask is None else {"bias": mask}
    positions = position_mask(kernel._saved_is_causal, None, 0)
    spec = AttentionSpec(kernel._saved_scale, (), positions)
    needed = [gradient is not None for gradient in gradients[:3]]
    again = tiled_dropout.differentiable(spec, rest, arrays, cotangents[0], needed)
    return (*again, *gradients[3:])
