"""PyTorch's own attention kernel: when it has the written meaning, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._C import _get_mkldnn_enabled  # pyright: ignore
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from anymha.attention.features.base import Feature, joining_logit
from anymha.attention.masks import position_mask
from anymha.attention.spec import AttentionSpec
from anymha.execution import path as paths
from anymha.execution.path import AttentionShape
from anymha_torch import onednn_attention, products, tiled_dropout, triton_attention
from anymha_torch.native import seeded
from anymha_torch.sinks import attention as with_sinks


def why_not_fused(spec: AttentionSpec, shape: AttentionShape, /) -> str | None:
    """Why the kernel cannot do a call, or None where it can."""
    if shape.dtype == torch.float64:
        return "torch's kernel is not taken for torch.float64"
    if spec.dropout is not None and not spec.dropout.native:
        if reason := why_no_dropout(spec, shape):
            return reason
    elif spec.dropout is not None and (shape.device.type != "cuda" or shape.dtype not in HALF):
        return "torch's kernel has dropout of its own in half precision on CUDA alone"
    elif shape.value_dim != shape.key_dim:
        return "torch's kernel wants `value_dim` equal to `key_dim`"
    if any(type(feature).joining is not Feature.joining for feature in spec.features) and (
        shape.device.type != "cpu" or shape.dtype != torch.float32 or spec.dropout is not None
    ):
        return "torch's kernel has sinks in float32 on a CPU and without dropout alone"
    if shape.bias_differentiated:
        return "torch's kernel gives no gradient to a bias"
    own = spec.dropout is not None and not spec.dropout.native  # which adds in float32
    if shape.wide_bias and shape.dtype in HALF and shape.device.type != "cpu" and not own:
        return "torch's kernel in half precision would round the bias"
    compiling = torch.compiler.is_compiling()
    # `modes.transformed`, without entering one file more
    if not compiling and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
        return "torch's kernel cannot be transformed by `torch.func`"
    return None


def why_no_dropout(spec: AttentionSpec, shape: AttentionShape, /) -> str | None:
    """Why no kernel with portable dropout can do a call, or None where one can."""
    if shape.device.type != "cpu" or triton_attention.on_cpu:
        return triton_attention.why_not(spec, shape)
    if shape.dtype != torch.float32:
        return f"the tiles with dropout are computed in float32, not in {shape.dtype}"
    if torch.compiler.is_compiling():
        return "the tiles with dropout are no program for torch's compiler"
    return tiled_dropout.why_whole(spec, shape)


def fused_attention(
    spec: AttentionSpec, arrays: Mapping[str, torch.Tensor], /, *, causal: bool
) -> torch.Tensor:
    """The context (B, H, T, d_v) by the kernel; with portable dropout by one of ours."""
    query, key = arrays["query"], arrays["key"]
    drop = spec.dropout
    if drop is not None and not drop.native:
        if query.is_cpu and not triton_attention.on_cpu:
            return tiled_dropout.attention(spec, arrays)
        if paths.explaining:
            paths.report_note(triton_attention.NOTE)
        return triton_attention.attention(spec, arrays)
    if causal and spec.position_mask.left is not None:  # as `makes_window` has said
        if paths.explaining:
            paths.report_note(triton_attention.NOTE_OF_WINDOW)
        return triton_attention.attention(spec, arrays)
    if drop is not None and drop.seed is not None and torch.compiler.is_compiling():
        return tiled_dropout.in_one_piece(spec, arrays)  # a program cannot seed a generator
    mask, bias = arrays.get("mask"), arrays.get("bias")
    if bias is not None:
        if not bias.is_cpu:  # where a kernel adds float32 to half precision as it is
            bias = bias.to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    elif mask is not None and mask.__class__ is torch.Tensor and mask.is_cpu:
        mask = torch.where(mask, _SEEN, _HIDDEN)  # as the kernel does, by numbers that are kept
    value = arrays["value"]
    sinks = joining_logit(spec.features, arrays) if spec.features else None
    if sinks is not None:
        return with_sinks(spec, causal, mask, query, key, value, sinks)
    if _by_onednn(spec, causal, query, key, value, mask):
        return onednn_attention.attention(spec.scale, causal, mask, query, key, value)
    grouped = bool(query.shape[1] != key.shape[1])
    rate = 0.0 if drop is None else drop.rate
    arguments: Any = (query, key, value, mask, rate, causal)
    kernel = scaled_dot_product_attention if bias is None else _as_given
    if drop is None or drop.seed is None:
        context = kernel(*arguments, scale=spec.scale, enable_gqa=grouped)
    else:
        with seeded(drop.seed, query.device):
            context = kernel(*arguments, scale=spec.scale, enable_gqa=grouped)
    if torch.is_grad_enabled() and drop is None and not torch.compiler.is_compiling():
        node: Any = context.grad_fn
        kind = type(node)
        if kind not in _kinds:
            _kinds[kind] = kind.__name__.startswith("ScaledDotProduct")
        if _kinds[kind]:
            node.register_hook(_differentiable_again)
    if mask is not None and query.dtype in HALF and not context.is_cpu:
        # cuDNN's kernel gives a row that sees nothing other numbers than zero.
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
        context = torch.where(seen.any(-1, keepdim=True), context, 0.0)
    return context


def _by_onednn(
    spec: AttentionSpec, causal: bool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: Any,
) -> bool:  # fmt: skip
    """Whether oneDNN's products compute a call; here, so that no small call enters their file."""
    if not products.preferred or torch.compiler.is_compiling():
        return False
    own = onednn_attention
    (batch, shared, keys, _), queries, width = key.shape, query.shape[2], query.shape[3]
    return (
        min(queries, keys) >= own.SHORTEST
        and keys <= own.LONGEST
        and width >= own.NARROWEST
        and queries * keys * min(width, own.WIDTH) ** 2 >= own.LEAST
        and (not causal or queries == keys)
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype is key.dtype is value.dtype
        and query.is_cpu
        and spec.memory_budget is None
        and spec.dropout is None
        and all(type(x) is torch.Tensor for x in (query, key, value))
        and (mask is None or (type(mask) is torch.Tensor and mask.is_floating_point()))
        and _get_mkldnn_enabled()
        and products.is_plain()
        and own.is_right()
        and own.is_shared_well(batch * shared, batch * query.shape[1] * queries * keys)
    )


def _as_given(query: torch.Tensor, *arrays: Any, **options: Any) -> torch.Tensor:
    """The kernel without `torch.autocast`, which would round the bias."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return scaled_dot_product_attention(query, *arrays, **options)
    with torch.autocast(kind, enabled=False):
        return scaled_dot_product_attention(query, *arrays, **options)


HALF = (torch.bfloat16, torch.float16)

_OF_PROCESSOR = set()
if torch.backends.mkldnn.is_available():
    _CHECKS = {  # some versions lack some
        "_is_avx512_bf16_supported": (torch.cpu, torch.bfloat16),
        "_is_amx_tile_supported": (torch.cpu, torch.bfloat16),
        "_is_mkldnn_fp16_supported": (torch.ops.mkldnn, torch.float16),
    }
    _OF_PROCESSOR |= {
        dtype for name, (where, dtype) in _CHECKS.items() if getattr(where, name, bool)()
    }
"""The dtypes whose products the processor has."""


def mixed_dtype(x: torch.Tensor, /) -> torch.dtype | None:
    """The half-precision dtype of `torch.autocast` where `x` is; None where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype in HALF else None


def multiplies(dtype: torch.dtype, device: torch.device, /) -> bool:
    """Whether a device has fast products of a half-precision dtype, which it adds in float32."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_properties(device).major >= 8
    return device.type == "cpu" and dtype in _OF_PROCESSOR


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
    rest = {} if mask is None else {"bias": mask.to(torch.float32)}
    positions = position_mask(kernel._saved_is_causal, None, 0)
    spec = AttentionSpec(kernel._saved_scale, (), positions)
    needed = [gradient is not None for gradient in gradients[:3]]
    again = tiled_dropout.differentiable_in_float32(spec, rest, arrays, cotangents[0], needed)
    return (*again, *gradients[3:])
