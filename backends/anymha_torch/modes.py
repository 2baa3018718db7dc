"""Whether torch computes a call itself, or something that follows each operation does."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transformation of `torch.func`, or forward differentiation, is at work."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
    return functorch or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether a compiler runs the call, or a mode that watches each operation."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
