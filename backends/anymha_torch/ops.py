"""The ops of PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import (
    abs,
    bitwise_and,
    bitwise_right_shift,
    bitwise_xor,
    broadcast_to,
    cos,
    exp,
    float32,
    float64,
    int32,
    log,
    logical_and,
    remainder,
    reshape,
    sin,
    sqrt,
    tanh,
)
from torch import permute as permute_dims
from torch._C import _get_tracing_state

from anymha.attention.dropout import keep_mask as made_of_ops
from anymha.errors import WeightsError
from anymha.framework.capabilities import Capabilities
from anymha_torch import mkl, products, triton_attention
from anymha_torch.autograd import loop, vjp
from anymha_torch.fused import (
    fused_attention,
    mixed_dtype,
    multiplies,
    why_not_fused,
)
from anymha_torch.modes import is_traced, transformed
from anymha_torch.native import native_keep_mask
from anymha_torch.seeds import on_device
from anymha_torch.triton_attention import makes_window

bool = torch.bool
name = "torch"
_these: Any = sys.modules[__name__]
mkl.settle(cos, exp, log, sin, sqrt, tanh)


def asarray(obj, /, *, dtype=None, device=None):
    return torch.as_tensor(obj, dtype=dtype, device=device)


astype = torch.Tensor.to


# A number is made a tensor anew at each call of torch's, which takes half as long as the selection.
def where(condition, x1, x2, /):
    other: Any = x2
    if x2.__class__ is float and x2 == 0.0 and x1.__class__ is torch.Tensor and x1.is_cpu:
        if _get_tracing_state() is None and x1.numel() >= MANY:  # TorchScript has no such view
            kept = _rows_kept(condition, x1)
            if kept is not None:
                return kept
        other = _ZEROS.get(x1.dtype, x2)
    return torch.where(condition, x1, other)


def _rows_kept(condition: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """`x` with zeros in the rows where `condition` (.., 1) is False; None where torch shall do it.

    Torch selects number by number where one boolean stands for a row; the bits of a number and
    those of -1 or 0 take a third of that.
    """
    bits = _BITS.get(x.dtype)
    if bits is None or condition.shape[-1] != 1 or condition.dtype != bool:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or is_traced() or transformed():
        return None
    return (x.view(bits) & condition.to(bits).neg_()).view(x.dtype)


MANY = 8192
"""From how many numbers on an operation's own time is more than that of calling three."""

_BITS = {
    float32: int32,
    float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (float32, float64)}


def arange(start, /, stop, *, dtype, device=None):
    return torch.arange(start, stop, dtype=dtype, device=device)


def stack(arrays, /, *, axis=0):
    return torch.stack(arrays, dim=axis)


# Under `torch.autocast` products run in half precision; what follows them shall not.
def matmul(x1, x2, /):
    y = torch.matmul(x1, x2)
    return y if y.dtype == x1.dtype else y.to(x1.dtype)


def concat(arrays, /, *, axis=0):
    return torch.cat(arrays, dim=axis)


def tensordot(x1, x2, /, *, axes):
    return torch.tensordot(x1, x2, dims=axes).to(x1.dtype)


def max(x, /, *, axis, keepdims):
    return torch.amax(x, dim=axis, keepdim=keepdims)


def sum(x, /, *, axis, keepdims):
    return torch.sum(x, dim=axis, keepdim=keepdims)


def argsort(x, /, *, axis):
    return torch.argsort(x, dim=axis)


def gather(x, indices, /, *, axis):
    shape, wanted = [1] * x.ndim, list(x.shape)
    shape[0], shape[axis] = indices.shape
    wanted[0], wanted[axis] = indices.shape
    # `take_along_dim` makes constants of lengths that a compiler has as symbols.
    return torch.gather(x, axis, indices.long().reshape(shape).expand(wanted))


# Getters written in C, since a call of a Python function takes as long as a small product.
is_array = torch.is_tensor
shape = torch.Tensor.size
device = torch.Tensor.device.__get__
dtype = partial(getattr, torch)
softmax = partial(torch.softmax, dim=-1)


def chunk_size(device, /):
    if torch.compiler.is_compiling():
        return None
    return 1 << 18 if device is None or torch.device(device).type == "cpu" else 1 << 26


def is_tracing():
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch.is_inference_mode_enabled()  # its tensors are of no use outside
        or torch._C._len_torch_dispatch_stack() > 0
    )


def compiles_writes():
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_differentiated(x, /):
    return torch.is_grad_enabled() and (x.requires_grad or transformed())


def linear(x, matrix, bias, /):
    if products.linear is products.by_size:
        y = products.by_size(x, matrix.t(), bias)
    else:
        y = torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # as above


def tile_size(device, /):
    return 1 << 20 if device.type == "cpu" else 1 << 26


def narrow(x, start, length, /, *, axis):
    return x.narrow(axis, start, length)


def to_numpy(x, /):
    if x.is_meta:
        raise WeightsError(
            "A tensor on the meta device has no values. Received: "
            f"shape {tuple(x.shape)}. Load or make the weights first."
        )
    x = x.detach()
    if hasattr(x, "full_tensor"):  # a DTensor, of which this process may have a part
        x = x.full_tensor()
    x = x.cpu().resolve_conj().resolve_neg()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return x.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise WeightsError(
            "A tensor must be dense, and of a dtype that NumPy has. Received: "
            f"{x.dtype}, {x.layout}. Pass `x.to_dense()`, `x.dequantize()` or `x.float()`."
        ) from error


def from_numpy(x, /):
    """A tensor with the values of a NumPy array, bfloat16 included."""
    x = np.array(x, order="C")
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def has_values(x, /):
    traced = is_traced() or transformed() or torch._C._len_torch_dispatch_stack() > 0
    return not traced and not x.is_meta


# What is differentiated, and what inference mode has made, is not written to.
def write_slots(storage, new, slot, in_place, /):
    # What a graph has may be needed by it, also where none is recorded any more.
    differentiated = storage.requires_grad or (torch.is_grad_enabled() and new.requires_grad)
    if not in_place or differentiated or _is_of_inference(storage):
        storage = storage.clone()
    length = new.shape[2]
    if isinstance(slot, int):
        storage.narrow(2, slot, length).copy_(new)
        return storage
    rows = torch.arange(storage.shape[0], device=storage.device)[:, None]
    slots = slot.long()[:, None] + torch.arange(length, device=storage.device)
    storage[rows, :, slots] = new.transpose(1, 2)
    return storage


def take_rows(x, rows, end, /):
    found = x[:, :, :end].index_select(0, rows)
    missing = x.shape[2] - found.shape[2]
    return torch.nn.functional.pad(found, (0, 0, 0, missing)) if missing else found


def _is_of_inference(storage):
    if torch.compiler.is_compiling():  # a compiler cannot tell, and writes to nothing but copies
        return False
    return storage.is_inference() and not torch.is_inference_mode_enabled()


def stop_gradient(x, /):
    return x.detach()


def in_float64(function, arrays, /):
    return function(arrays)


def seed_words(seed, /):
    wide = seed.to(torch.int64)
    return wrap_int32(wide), wrap_int32(wide >> 32)


def wrap_int32(x):
    """The low 32 bits of int64 values as int32, which a plain cast does not promise."""
    return (((x + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def draw_seed():
    return torch.randint(2**31, (), dtype=torch.int64)


def draw_seed_like(x, native, /):
    return None if native else torch.randint(2**31, (), dtype=torch.int64, device=x.device)


def initialize(function, shape, dtype, seed, /):
    # Torch's matrices are (out, in): turned round, its functions see the right fans.
    tensor = torch.full(shape[::-1], torch.nan, dtype=getattr(torch, dtype), device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        function(tensor)
    return to_numpy(tensor).T


# Inductor takes minutes for the generator, since it doubles the expression at each use of a word,
# and the C++ that it writes overflows where the language does not say what comes of it. So the
# compiler sees one operation that runs as in eager mode.
def keep_mask(seed, threshold, shape, origin=None, /, *, device):
    device = torch.get_default_device() if device is None else torch.device(device)
    place = _FIRST if origin is None else (origin.batch, origin.head, origin.query, origin.key)
    if torch.compiler.is_compiling() and place == _FIRST:
        return _keep_mask(on_device(seed, device), threshold, shape, device)
    return _made(seed, threshold, shape, origin, place, device)


_FIRST = (0, 0, 0, 0)


def _made(seed, threshold, shape, origin, place, device):
    on_cpu = device.type == "cpu" and not triton_attention.on_cpu
    if not on_cpu and triton_attention.why_not_on(str(device)) is None:
        return triton_attention.keep_mask(seed, threshold, shape, place, device)
    if isinstance(seed, torch.Tensor) or device.type != "cpu":
        seed = on_device(seed, device)
    return made_of_ops(_these, seed, threshold, shape, origin, device=device)


@torch.library.custom_op("anymha::keep_mask", mutates_args=())
def _keep_mask(
    seed: torch.Tensor, threshold: int, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The mask of a seed, a scalar."""
    return _made(seed, threshold, shape, None, _FIRST, device).contiguous()


@_keep_mask.register_fake
def _(seed, threshold, shape, device):
    return torch.empty(shape, dtype=torch.bool, device=device)


def known_padding(mask, /):
    if mask.__class__ is not torch.Tensor or not mask.is_cpu:
        return None
    if _get_tracing_state() is not None or is_traced() or transformed():
        return None
    # Slices of an array have a gradient each, as great as the array.
    least = float("inf") if torch.is_grad_enabled() else 6e6 * torch.get_num_threads()
    return mask.numpy(), least


capabilities = Capabilities(
    array_key=attrgetter("__class__", "dtype", "device", "requires_grad"),
    is_tracing=is_tracing,
    draw_seed_like=draw_seed_like,
    vjp=vjp,
    keep_mask=keep_mask,
    has_values=has_values,
    write_slots=write_slots,
    take_rows=take_rows,
    writes_in_place=True,
    compiles_writes=compiles_writes,
    is_inference=torch.is_inference_mode_enabled,
    chunk_size=chunk_size,
    bitwise_and_inplace=torch.Tensor.bitwise_and_,
    bitwise_xor_inplace=torch.Tensor.bitwise_xor_,
    tile_size=tile_size,
    loop=loop,
    eager_loop=True,
    narrow=narrow,
    fused_attention=fused_attention,
    why_not_fused=why_not_fused,
    fused_window=makes_window,
    fused_sinks=True,
    known_padding=known_padding,
    mixed_dtype=mixed_dtype,
    multiplies=multiplies,
    linear=linear,
    softmax=softmax,
    is_differentiated=is_differentiated,
    initialize=initialize,
    initializer_style="in place",
)
