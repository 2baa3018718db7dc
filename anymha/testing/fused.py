"""Calls of attention, computed by the backend's fused kernel and by the written formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.attention.dropout import Dropout
from anymha.attention.features.sinks import Sinks
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.execution.attend import attend
from anymha.execution.path import AttentionShape, Path, choose_path
from anymha.framework.capabilities import Capabilities
from anymha.framework.protocol import Ops
from anymha.testing.calls import must, values

BATCH = 2
WHOLE = Path("whole", "the written formula, with which the kernel is compared")
LONG = (150, 170)

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]


class _General:
    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.capabilities = Capabilities()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


def general(ops: Ops) -> Any:
    """A backend's functions without its capabilities: the core's general way is taken."""
    return _General(ops)


@dataclass(frozen=True)
class AttentionCase:
    """A call of attention."""

    name: str  # What is special
    dtype: str = "float32"  # The dtype in which attention is computed
    lengths: Shape = (7, 9)  # T and S
    heads: Shape = (4, 4)  # H and K
    widths: Shape = (8, 8)  # D_k and d_v
    scale: float = 0.5  # Factor of the logits
    # The mask's shape; None for no mask. The queries 2 and 3 see nothing, where it differs from
    # query to query
    mask: Shape | None = None
    bias: Shape | None = None  # The bias's shape; None for no bias
    bias_hides: bool = False  # Whether the bias is -inf where the mask would be False
    bias_differentiated: bool = False  # Whether a gradient of the bias is asked for
    # Keys that a query sees before its own position and after it
    window: tuple[int | None, int | None] = (None, None)
    offset: int | Shape = 0  # Position of the first query, or one for each of the batch
    dropout: int = 0  # The dropout's threshold; 0 for none
    native: bool = False  # Whether the framework's own generator decides
    sinks: bool = False  # Whether a further logit joins each row's softmax
    budget: int | None = None  # Bytes for the logits of a tile

    def spec(self, ops: Ops) -> AttentionSpec:
        """The options of the call."""
        offset: Any = self.offset
        if not isinstance(offset, int):
            offset = ops.from_numpy(np.array(offset, np.int32))
        dropout = Dropout(self.dropout, 2**40 + 5, self.native) if self.dropout else None
        positions = PositionMask(*self.window, offset)
        features = (Sinks(),) if self.sinks else ()
        return AttentionSpec(self.scale, features, positions, dropout, self.budget)

    def arrays(self) -> Arrays:
        """What is computed from, as NumPy arrays."""
        dtype = self.dtype
        (queries, keys), (heads, shared), (d_k, d_v) = self.lengths, self.heads, self.widths
        arrays = {
            "query": values(BATCH, queries, heads, d_k, dtype=dtype),
            "key": values(BATCH, keys, shared, d_k, dtype=dtype, seed=1),
            "value": values(BATCH, keys, shared, d_v, dtype=dtype, seed=2),
        }
        if self.mask is not None:
            arrays["mask"] = _seen(self.mask)
        if self.bias is not None:
            bias = values(*self.bias, dtype=dtype, seed=3)
            if self.bias_hides:
                bias[~_seen(self.bias)] = -np.inf
            arrays["bias"] = bias
        if self.sinks:
            arrays["sinks"] = values(1, heads, 1, 1, dtype=dtype, seed=6)
        return arrays

    def shape(self, ops: Ops) -> AttentionShape:
        """What is known of the call before its values are."""
        given = [shape for shape in (self.mask, self.bias) if shape is not None]
        (queries, keys), (heads, shared), (d_k, d_v) = self.lengths, self.heads, self.widths
        return AttentionShape(
            BATCH, heads, shared, queries, keys, d_k, d_v,
            ops.dtype(self.dtype), ops.device(ops.from_numpy(values(1, dtype=self.dtype))),
            has_mask=self.mask is not None,
            has_bias=self.bias is not None,
            per_query=any(len(shape) > 1 and shape[-2] != 1 for shape in given),
            bias_differentiated=self.bias_differentiated,
        )  # fmt: skip


CASES = (
    AttentionCase("plain"),
    AttentionCase("long", lengths=LONG),
    AttentionCase("one query and key", lengths=(1, 1)),
    AttentionCase("grouped heads", heads=(4, 2)),
    AttentionCase("one key head", heads=(4, 1)),
    AttentionCase("other width of the value", widths=(8, 6)),
    AttentionCase("negative scale", scale=-1.5),
    AttentionCase("mask of keys", mask=(2, 1, 1, 9)),
    AttentionCase("mask of queries", mask=(2, 1, 7, 1)),
    AttentionCase("mask of both", mask=(7, 9)),
    AttentionCase("mask of a batch", mask=(2, 1, 7, 9)),
    AttentionCase("mask of a head", mask=(4, 7, 9)),
    AttentionCase("mask of all", mask=(2, 4, 7, 9)),
    AttentionCase("mask, grouped heads", heads=(4, 2), mask=(2, 4, 7, 9)),
    AttentionCase("long mask", lengths=LONG, mask=LONG),
    AttentionCase("bias", bias=(1, 4, 7, 9)),
    AttentionCase("bias of keys", bias=(9,)),
    AttentionCase("bias that hides", bias=(7, 9), bias_hides=True),
    AttentionCase("bias with a gradient", bias=(2, 4, 7, 9), bias_differentiated=True),
    AttentionCase("bias and mask", heads=(4, 2), mask=(2, 1, 1, 9), bias=(4, 7, 9)),
    AttentionCase("causal", window=(None, 0)),
    AttentionCase("causal, more queries", lengths=(9, 7), window=(None, 0)),
    AttentionCase("causal, grouped heads", lengths=LONG, heads=(4, 2), window=(None, 0)),
    AttentionCase("causal and mask", mask=(2, 1, 1, 9), window=(None, 0)),
    AttentionCase("causal and bias", bias=(7, 9), window=(None, 0)),
    AttentionCase("window", window=(2, 1)),
    AttentionCase("causal window", lengths=(9, 9), window=(3, 0)),
    AttentionCase(
        "long window in tiles", lengths=LONG, heads=(4, 2), window=(20, 10), budget=1 << 14
    ),
    AttentionCase("causal with an offset", window=(None, 0), offset=2),
    AttentionCase("causal, nothing to see", window=(None, 0), offset=-3),
    AttentionCase("window with offsets", window=(2, 0), offset=(0, 4)),
    AttentionCase("dropout", dropout=20000, budget=64),
    AttentionCase(
        "dropout, grouped heads",
        lengths=LONG,
        heads=(4, 2),
        widths=(8, 6),
        dropout=20000,
        budget=1 << 14,
    ),
    AttentionCase("dropout, mask", mask=(2, 4, 7, 9), dropout=20000, budget=64),
    AttentionCase("dropout, bias, window", bias=(4, 7, 9), window=(3, 1), dropout=9, budget=64),
    AttentionCase("dropout, offsets", window=(2, 0), offset=(0, 4), dropout=20000, budget=64),
    AttentionCase("native dropout", dropout=20000, native=True, budget=64),
    AttentionCase("sinks", sinks=True),
    AttentionCase("sinks, grouped heads", heads=(4, 2), mask=(2, 1, 1, 9), sinks=True),
    AttentionCase("sinks, other width of the value", widths=(8, 6), sinks=True),
    AttentionCase("sinks, mask", mask=(7, 9), sinks=True),
    AttentionCase("sinks, mask and bias", mask=(2, 4, 7, 9), bias=(4, 7, 9), sinks=True),
    AttentionCase("sinks, causal", lengths=LONG, window=(None, 0), sinks=True),
    AttentionCase("sinks, nothing to see", window=(None, 0), offset=-3, sinks=True),
    AttentionCase(
        "sinks, window in tiles",
        lengths=LONG,
        heads=(4, 2),
        window=(20, 10),
        budget=1 << 14,
        sinks=True,
    ),
    AttentionCase("sinks, dropout", dropout=20000, budget=64, sinks=True),
    AttentionCase("float64", "float64", heads=(4, 2), mask=(2, 4, 7, 9), bias=(7, 9)),
    AttentionCase("float64, causal", "float64", window=(None, 0)),
    AttentionCase("float64, dropout", "float64", window=(2, 1), dropout=20000, budget=64),
)
"""The calls for which the kernel is held against the formula."""


def fused_path(ops: Any, case: AttentionCase) -> Path:
    """The path by the kernel, for a call that it can do."""
    spec, shape = case.spec(ops), case.shape(ops)
    path = choose_path(ops, spec, shape, observed=False, with_scores=False)
    must(path.kernel == "fused", f"The kernel can do the call, but is not taken: {path}.")
    return path


def context(ops: Any, path: Path, case: AttentionCase, arrays: Mapping[str, Any]) -> Any:
    """The context (B, T, H, d_v) of a call, of the backend's arrays."""

    def run(given: Mapping[str, Any]) -> Any:
        rest = {name: given[name] for name in ("mask", "bias") if name in given}
        tiled = {"sinks": given["sinks"]} if case.sinks else None
        inputs = [given[name] for name in ("query", "key", "value")]
        return attend(ops, case.spec(ops), path, *inputs, **rest, tiled=tiled)[0]

    return ops.in_float64(run, arrays) if case.dtype == "float64" else run(arrays)


def gradients(ops: Any, path: Path, case: AttentionCase, vjp: Any) -> Arrays:
    """The gradients of what is differentiated, by a backend's `vjp`, as NumPy arrays."""
    native = {name: ops.from_numpy(array) for name, array in case.arrays().items()}
    names = ["query", "key", "value", *["bias"] * case.bias_differentiated, *["sinks"] * case.sinks]
    fixed = {name: array for name, array in native.items() if name not in names}
    shape = (BATCH, case.lengths[0], case.heads[0], case.widths[1])
    pulled = vjp(
        lambda given: context(ops, path, case, {**given, **fixed}),
        {name: native[name] for name in names},
        ops.from_numpy(values(*shape, dtype=case.dtype, seed=4)),
    )[1]
    return {name: ops.to_numpy(pulled[name]) for name in names}


def _seen(shape: Shape) -> np.ndarray:
    """Booleans, about two of three True; False for two queries."""
    seen = values(*shape, seed=5) > -0.4
    if len(shape) > 1 and shape[-2] > 1:
        seen[..., 2:4, :] = False
    return seen
