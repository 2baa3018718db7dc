"""Projections of many rows by oneDNN, where MKL uses half of the processor.

Torch multiplies float32 matrices by MKL, which has AVX-512 on Intel's processors alone. oneDNN, a
part of the same torch, has it on AMD's too. It keeps half a megabyte of code for each shape; so
rows go in blocks of a few sizes, whatever the lengths of the calls.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._C import (
    _get_mkldnn_enabled,  # pyright: ignore
    _get_tracing_state,
    _is_any_autocast_enabled,  # pyright: ignore
    _len_torch_dispatch_stack,  # pyright: ignore
    _len_torch_function_stack,  # pyright: ignore
)
from torch.nn import functional

from anymha.execution import path as paths
from anymha_torch.modes import transformed

SWITCH = "ANYMHA_TORCH_ONEDNN"
"""A variable of the environment: "0" for MKL always, "1" for oneDNN wherever torch has it."""

ROWS = 256
"""Rows of the smallest block. Fewer are no faster, nor are products with"""

NUMBERS = 1 << 16
"""weights of so many numbers or fewer, or with weights that have less than"""

WIDTH = 128
"""rows or columns."""

ZEN_5 = 26
"""The family of AMD's first processors that compute 512 bits at a time, and not twice 256."""

NOTE = "projections: by oneDNN, which has AVX-512 on this processor, and MKL has not"


def is_preferred() -> bool:
    """Whether oneDNN is faster than MKL, by what torch and the system say of the processor."""
    switch = os.environ.get(SWITCH)
    if switch in ("0", "1"):
        return switch == "1"
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not wide or not torch.backends.mkl.is_available():
        return False
    family = re.search(r"family\s*:?\s*(\d+)", processor(), re.IGNORECASE)
    return "AuthenticAMD" in processor() and int(family[1] if family else 0) >= ZEN_5


def processor() -> str:
    """Maker and family of the processor, among other words of the system's."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(512)  # of the first core
    except OSError:
        return platform.processor()  # of Windows


@cache
def is_right() -> bool:
    """Whether torch has the product, and its results on small whole numbers are exact."""
    numbers = torch.arange(64.0 * 96.0, dtype=torch.float32, device="cpu")
    x, weight = (numbers % 13 - 6).reshape(96, 64), (numbers % 11 - 5).reshape(96, 64)
    try:
        found = product(x, weight, numbers[:96]), product(x.t(), weight.t())
    except (AttributeError, RuntimeError, TypeError):  # another version of torch
        return False
    expected = torch.addmm(numbers[:96], x, weight.t()), torch.mm(x.t(), weight)
    return all(map(torch.equal, found, expected))


def by_size(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x . weight^T + bias``: torch's own `linear`, or by oneDNN where that is faster.

    Args:
        x: (..., D).
        weight: (W, D).
        bias: (W,), or None.
    """
    if not (is_plain() and _is_large(x, weight, bias) and is_right()):
        return functional.linear(x, weight, bias)
    if paths.explaining:
        paths.report_note(NOTE)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Any = _Linear.apply(rows, weight, bias)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


preferred = is_preferred()
"""Whether oneDNN is faster on this processor."""

linear = by_size if preferred else functional.linear
"""What computes projections."""


def rounded(count: int) -> int:
    """The next of eight lengths to an octave: of so many, oneDNN may keep code."""
    step = max((1 << (count.bit_length() - 1)) // 8, 16)
    return -(-count // step) * step


def is_right_for(key: torch.Tensor) -> bool:
    """Whether oneDNN is taken for tiles over keys (B, K, S, d), as many as they are."""
    return (
        preferred
        and key.shape[2] >= ROWS
        and rounded(key.shape[2]) == key.shape[2]
        and key.dtype is torch.float32
        and type(key) is torch.Tensor
        and _get_mkldnn_enabled()
        and is_plain()
        and is_right()
    )


def is_plain() -> bool:
    """Whether nobody watches, traces or transforms torch's functions."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
    )


def _is_large(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN is faster for a product, if it is on this processor."""
    return (
        weight.numel() > NUMBERS
        and weight.dim() == 2
        and min(weight.shape) >= WIDTH
        and x.numel() >= ROWS * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and x.dtype is weight.dtype is torch.float32
        and (bias is None or (bias.dtype is torch.float32 and bias.shape == weight.shape[:1]))
        and x.is_cpu
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and _get_mkldnn_enabled()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _of_rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (y,) = cotangents
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # Somebody may differentiate the gradients, or transform them.
        own = not torch.is_grad_enabled() and is_plain()
        return (
            None if not of_x else _of_rows(y, weight.t()) if own else y @ weight,
            None if not of_weight else _over_rows(y, x) if own else y.t() @ x,
            y.sum(0) if of_bias else None,
        )


def _of_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x . weight^T + bias`` of (N, D) and (W, D)."""
    if x.shape[0].bit_count() == 1:
        return product(x, weight, bias)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    for block, multiply in _blocks(x.shape[0]):
        y[block] = multiply(x[block], weight, bias)
    return y


def _over_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x^T . y`` of (N, W) and (N, D)."""
    if x.shape[0].bit_count() == 1:
        return product(x.t(), y.t())
    total = x.new_zeros((x.shape[1], y.shape[1]))
    for block, multiply in _blocks(x.shape[0]):
        total += multiply(x[block].t(), y[block].t())
    return total


def _blocks(count: int) -> Iterator[tuple[slice, Callable[..., torch.Tensor]]]:
    """Blocks of rows whose numbers are powers of two, then a rest of fewer than ROWS.

    Args:
        count: How many rows there are, at least ROWS.

    Yields:
        The rows, and what multiplies them.
    """
    start = 0
    while (left := count - start) >= ROWS:
        height = 1 << (left.bit_length() - 1)
        yield slice(start, start + height), product
        start += height
    if left:
        yield slice(start, count), functional.linear


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x . weight^T + bias`` by oneDNN."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # In any other order it takes a thousand times as long.
        by_rows = weight.stride(-1) == 1
        weight = weight.contiguous() if by_rows else weight.t().contiguous().t()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
