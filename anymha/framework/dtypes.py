"""Names of dtypes, and which dtype the layer computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from anymha.errors import ConfigError

if TYPE_CHECKING:
    from anymha.framework.protocol import Ops

FLOATING = ("float16", "bfloat16", "float32", "float64")
BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


class DtypeOfTorch(Protocol):
    """What `torch.dtype` is for type checkers."""

    @property
    def is_floating_point(self) -> bool:
        """Whether it is."""
        ...


class DtypeOfTensorFlow(Protocol):
    """What `tensorflow.DType` is for type checkers."""

    @property
    def as_numpy_dtype(self) -> Any:
        """The scalar type of NumPy."""
        ...


DtypeLike: TypeAlias = str | type[Any] | np.dtype[Any] | DtypeOfTorch | DtypeOfTensorFlow
"""A dtype of any framework, or its name."""


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of any framework: ``torch.float32`` gives ``"float32"``."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2]


def checked_dtype_name(dtype: Any, argument: str) -> str:
    """`dtype_name`, or a ConfigError where that is not a floating dtype of the layer."""
    name = dtype_name(dtype)
    if name not in FLOATING:
        raise ConfigError(
            f"`{argument}` must be one of {', '.join(FLOATING)}. Received: {dtype!r}."
        )
    return name


def is_floating(name: str) -> bool:
    """Whether a dtype of that name holds real numbers that the layer computes with."""
    return name in FLOATING


def accumulation_dtype(name: str) -> str:
    """The dtype of sums and of the softmax: float64 for float64, else float32."""
    return "float64" if name == "float64" else "float32"


def working_dtype(ops: Ops, x: Any) -> Any:
    """The dtype of sums and of the softmax of an array: its own, or float32 if it is narrower."""
    return ops.float32 if BITS[dtype_name(x.dtype)] == 16 else x.dtype


def output_dtype(weights: str, compute: str) -> str:
    """The dtype of the layer's results: the narrower of the weights' and the computation's.

    Float32 weights computed in bfloat16 give bfloat16 (mixed precision); computed in float64 they
    give float32, rounded once (reproducible mode).
    """
    return compute if BITS[compute] <= BITS[weights] else weights


def multiplies(ops: Ops, dtype: str, device: Any) -> bool:
    """Whether layers keep half precision between stages: products of that dtype, sums in float32.

    Args:
        ops: The backend.
        dtype: The name of the dtype in which a layer computes.
        device: Where.
    """
    own = ops.capabilities.multiplies
    return own is not None and BITS[dtype] == 16 and own(ops.dtype(dtype), device)
