"""What MKL, with which torch computes functions on processors of Intel's kind, needs first."""

from __future__ import annotations

from collections.abc import Callable

import torch


def settle(*functions: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let MKL choose its variant of each function, in one thread.

    It does so at a function's first call. Where several threads make that call at once, one of them
    may get the variant of half the digits, for that call alone (pytorch/pytorch#188792).
    """
    for function in functions:
        for dtype in (torch.float32, torch.float64):
            function(torch.ones(16, dtype=dtype, device="cpu"))
