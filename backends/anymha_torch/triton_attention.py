"""Attention by Triton's kernels, with dropout or a window: where they serve, gradients."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from anymha.attention import dropout
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution.attend import written
from anymha.execution.path import AttentionShape
from anymha_torch import tiled_dropout
from anymha_torch.modes import is_traced, transformed
from anymha_torch.seeds import on_device

NOTE = "dropout: in one kernel with the attention, by Triton"
NOTE_OF_WINDOW = "window: in one kernel, by Triton, which leaves out keys that nobody sees"

FEWEST_HIDDEN = 1024
"""A window is left to the kernels where each query has so many keys that it does not see."""

WIDEST = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
"""The most features of a head: tiles of more do not fit into the fast memory of a GPU."""

NEWEST_WITHOUT = (7, 5)
"""The last capability of CUDA devices that Triton does not support."""

on_cpu = False
"""Whether the CPU's tensors go to Triton's interpreter, which is slow: only tests set this."""


def why_not(spec: AttentionSpec, shape: AttentionShape, /) -> str | None:
    """Why the kernels cannot do a call with portable dropout, or None where they can."""
    return _why_not(shape, 20000)


def _why_not(shape: AttentionShape, threshold: int | None) -> str | None:
    widest = WIDEST.get(shape.dtype)
    if widest is None:
        return f"the kernels with dropout are not for {shape.dtype}"
    if shape.key_dim > widest or shape.value_dim > widest:
        return f"the kernels with dropout take heads of up to {widest} features"
    return why_not_on(str(shape.device), shape.dtype, shape.key_dim, shape.value_dim, threshold)


def makes_window(spec: AttentionSpec, shape: AttentionShape, /) -> bool:
    """Whether the kernels make the window of a call without dropout.

    In half precision alone, of which they multiply tiles on tensor cores; and where enough keys
    are left out, since a kernel of torch's is faster where all are seen.
    """
    left, right = spec.position_mask.left, spec.position_mask.right
    if left is None or right is None:
        return False
    if spec.dropout is not None or spec.features or shape.has_segments:
        return False
    if shape.dtype not in (torch.bfloat16, torch.float16) or not isinstance(shape.keys, int):
        return False
    if shape.keys - (left + 1 + right) < (1 if on_cpu else FEWEST_HIDDEN):
        return False
    return (shape.device.type != "cpu" or on_cpu) and _why_not(shape, None) is None


def why_not_on(device: str, /, *kind: Any) -> str | None:
    """Why Triton cannot be taken on a device, or None where it can.

    Args:
        device: The device.
        *kind: Dtype, width of the keys, width of the values and threshold of the dropout (None
            without it) of the attention; none where only the mask of dropout is made.
    """
    if transformed():
        return "the kernels with dropout cannot be transformed by `torch.func`"
    if torch.device(device).type == "cpu":
        return None if on_cpu else "Triton has no kernels for this device"
    return _why_not_on(device) or (_why_wrong(device, *kind) if kind else None)


# What `torch.compiler.assume_constant_result` does, without importing the compiler.
why_not_on._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _why_not_on(device: str) -> str | None:
    """The same of a device that is no CPU, where a small mask is made and compared."""
    if torch.device(device).type != "cuda":
        return "Triton has no kernels for this device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    ops, shape = tiled_dropout.backend(), (2, 3, 7, 5)
    expected = dropout.keep_mask(ops, 2**40 + 5, 20000, shape, device="cpu")
    try:
        if torch.cuda.get_device_capability(device) <= NEWEST_WITHOUT:
            return "Triton does not support a GPU so old"
        with torch.inference_mode(False), _disable_current_modes():
            found = keep_mask(2**40 + 5, 20000, shape, (0, 0, 0, 0), torch.device(device)).cpu()
    except Exception as error:  # whatever a compiler raises that lacks something
        return f"Triton does not work here: {type(error).__name__}: {error}".splitlines()[0]
    return None if torch.equal(found, expected) else "Triton computes other masks here"


CLOSE = 0.05
"""By what share of the greatest number the small call may differ: what is wrong differs more."""


@cache
def _why_wrong(
    device: str, dtype: torch.dtype, key_dim: int, value_dim: int, threshold: int | None
) -> str | None:
    """Why the kernels cannot serve heads of a kind, of which a small call is made and compared."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, 2, 70, key_dim),
        (1, 1, 70, key_dim),
        (1, 1, 70, value_dim),
        (1, 2, 70, value_dim),
    ]
    drop = None if threshold is None else dropout.Dropout(threshold, 5)
    spec = AttentionSpec(key_dim**-0.5, (), PositionMask(None if drop else 40, 0, 0), drop)
    with torch.inference_mode(False), _disable_current_modes():
        drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
        *arrays, cotangent = (x.to(dtype) for x in drawn)
        with torch.enable_grad():
            wide = [x.float().requires_grad_() for x in arrays]
            named: dict[str, Any] = dict(zip(("query", "key", "value"), wide, strict=True))
            context = written(tiled_dropout.backend(), spec, None, named)["context"]
            gradients = torch.autograd.grad(context, wide, cotangent.float())
        expected = [context.detach(), *gradients]
        try:
            with torch.no_grad():
                q, k, v = (x.to(device) for x in arrays)
                seed = None if drop is None else on_device(5, torch.device(device))
                given, d_out = (q, k, v, None, None, None, seed), cotangent.to(device)
                options = (spec.scale, threshold, 0, spec.position_mask.left, 0)
                out, lse = _forward(*given, *options)
                found = [out, *_gradients(*given, out, lse, d_out, *options)]
        except Exception as error:  # as where a GPU has too little fast memory
            return f"Triton does not work here: {type(error).__name__}: {error}".splitlines()[0]
        for one, other in zip(found, expected, strict=True):
            if not (one.cpu().float() - other).abs().max() <= CLOSE * other.abs().max():
                return "Triton computes other numbers here"
    return None


@cache
def _kernels() -> Any:
    return importlib.import_module("anymha_torch.triton_kernels")  # which imports Triton


def keep_mask(
    seed: Any,
    threshold: int,
    shape: Sequence[int],
    origin: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """`anymha.attention.dropout.keep_mask` in one kernel."""
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=torch.bool, device=device)
    return _kernels().keep_mask(on_device(seed, device), threshold, shape, origin, device)


def attention(spec: AttentionSpec, arrays: Mapping[str, torch.Tensor], /) -> torch.Tensor:
    """The context (B, H, T, d_v), differentiable in query, key and value.

    Args:
        spec: The options, with portable dropout or none, and without features.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), "value" (B, K, S, d_v), maybe "mask"
            and "bias", which broadcast to (B, H, T, S); the bias gets no gradient.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    positions: PositionMask = spec.position_mask
    drop: Any = spec.dropout
    offset, offsets = positions.offset, None
    if isinstance(offset, torch.Tensor):
        offset, offsets = 0, offset.to(query.device, torch.int32).reshape(-1)
    plain = type(query) is torch.Tensor and not is_traced()
    function: Any = _Eager.apply if plain else _operation
    context, _ = function(
        query, key, value, arrays.get("mask"), arrays.get("bias"), offsets,
        None if drop is None else on_device(drop.seed, query.device), float(spec.scale),
        None if drop is None else drop.threshold, offset,
        positions.left, positions.right,
    )  # fmt: skip
    return context


def _options(
    scale: float, threshold: int | None, offset: int, left: int | None, right: int | None
) -> dict[str, Any]:
    return {
        "scale": scale, "threshold": threshold, "offset": offset, "left": left, "right": right,
        "factor": 1.0 if threshold is None else dropout.Dropout(threshold, None).factor,
    }  # fmt: skip


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    threshold: int | None,
    offset: int,
    left: int | None,
    right: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The context, and the log of each softmax's denominator."""
    options = _options(scale, threshold, offset, left, right)
    return _kernels().forward((query, key, value), (mask, bias, offsets), seed, options)


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    seed: torch.Tensor | None,
    context: torch.Tensor,
    lse: torch.Tensor,
    cotangent: torch.Tensor,
    scale: float,
    threshold: int | None,
    offset: int,
    left: int | None,
    right: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = _options(scale, threshold, offset, left, right)
    arrays, rest = (query, key, value), (mask, bias, offsets)
    return _kernels().backward(arrays, rest, seed, options, context, lse, cotangent)


_operation = torch.library.custom_op("anymha::dropout_attention", _forward, mutates_args=())
_gradients_operation = torch.library.custom_op(
    "anymha::dropout_attention_backward", _gradients, mutates_args=()
)


@_operation.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return tiled_dropout.heads_last((*query.shape[:3], value.shape[3]), query), lse


@_gradients_operation.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return tuple(tiled_dropout.heads_last(x.shape, x) for x in (query, key, value))


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.set_materialize_grads(False)


def _backward(gradients: Any, ctx: Any, cotangent: torch.Tensor | None, _: Any) -> Any:
    *inputs, context, lse = ctx.saved_tensors
    rest = (None,) * (4 + len(ctx.options))
    if cotangent is None:
        return None, None, None, *rest
    if torch.is_grad_enabled():  # somebody differentiates the gradients
        return *_differentiable(ctx, inputs, cotangent), *rest
    return *gradients(*inputs, context, lse, cotangent, *ctx.options), *rest


def _differentiable(ctx: Any, inputs: Any, cotangent: torch.Tensor) -> Any:
    query, key, value, mask, bias, offsets, seed = inputs
    scale, threshold, offset, left, right = ctx.options
    positions = PositionMask(left, right, offset if offsets is None else offsets)
    drop = None if threshold is None else dropout.Dropout(threshold, seed)
    spec = AttentionSpec(scale, (), positions, drop)
    rest = {name: x for name, x in (("mask", mask), ("bias", bias)) if x is not None}
    return tiled_dropout.differentiable_in_float32(
        spec, rest, (query, key, value), cotangent, ctx.needs_input_grad[:3]
    )


_operation.register_autograd(partial(_backward, _gradients_operation), setup_context=_remember)


class _Eager(torch.autograd.Function):
    """The operation without what a compiler needs of it, which takes time in each call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_remember)
    backward: Any = staticmethod(partial(_backward, _gradients))
