"""Which way a call of attention takes, and why: a fused kernel, blocks of queries, or one piece."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anymha.attention.spec import AttentionCall
from anymha.execution.tiling import Run, plan_runs
from anymha.framework.dtypes import dtype_name
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known


@dataclass(frozen=True)
class Path:
    """The way that a call takes.

    Args:
        kernel: "fused" for a kernel of the framework's, "blocks" for the written formula block
            after block of queries, "whole" for the written formula in one piece.
        why: The reason.
        runs: The blocks of each head; none where there is one piece.
        together: Whether a block has the rows of all heads.
        why_not_fused: Why no fused kernel is taken; empty where one is.
    """

    kernel: str
    why: str
    runs: tuple[Run, ...] = ()
    why_not_fused: str = ""
    together: bool = False

    def __str__(self) -> str:
        blocks = sum(run.count for run in self.runs)
        told = f"{self.kernel}: {self.why}"
        if blocks > 1:
            told += f"; {blocks} blocks of up to {max(run.rows for run in self.runs)} queries"
        return told + (f". Not fused: {self.why_not_fused}" if self.why_not_fused else "")


_told: list[Path] | None = None


@contextlib.contextmanager
def told_paths() -> Iterator[list[Path]]:
    """The paths that are taken inside of the `with`, in a list."""
    global _told
    before, _told = _told, []
    try:
        yield _told
    finally:
        _told = before


def explain(function: Callable[..., Any], *args: Any, **call: Any) -> str:
    """Which way a call takes through the attention, and why: the call is made, and told of.

    Args:
        function: A layer of anymha, `anymha.dot_product_attention`, or what calls such.
        *args: Its arguments.
        **call: Its keyword arguments.

    Returns:
        A line for each attention that was computed: "fused" is a kernel of the framework's,
        "blocks" the written formula block after block of queries, "whole" the formula in one
        piece; then why, and why not a fused kernel.

    Example:
        >>> import anymha, numpy as np
        >>> layer = anymha.MultiHeadAttention(2, 4, backend="numpy", query_features=8)
        >>> print(anymha.explain(layer, np.ones((1, 3, 8), dtype="float32")))
        whole: it fits into one block. Not fused: numpy has no kernel here with the written meaning
    """
    with told_paths() as paths:
        function(*args, **call)
    return "\n".join(map(str, paths))


def are_told() -> bool:
    """Whether somebody listens; then nothing that was planned before is used."""
    return _told is not None


def choose_path(
    ops: Ops,
    call: AttentionCall,
    arrays: Mapping[str, Array],
    *,
    observed: bool = False,
    fused: bool = True,
) -> Path:
    """The path of a call.

    Args:
        ops: The backend.
        call: The options.
        arrays: "query" (B, H, T, d_k), "key" (B, K, S, d_k), maybe "mask" and "bias", which
            broadcast to (B, H, T, S).
        observed: Whether each stage is to be seen.
        fused: Whether a fused kernel may be taken.
    """
    if observed:
        return _tell(Path("whole", "each stage is observed"))
    lengths = (*arrays["query"].shape, *arrays["key"].shape)
    if any(is_known(n) and n == 0 for n in lengths):
        return _tell(Path("whole", "there is nothing to attend to"))
    refusal = _refusal(ops, call, arrays) if fused else "the scores are asked for"
    if refusal is None and call.dropout is not None and _fits(ops, call, arrays):
        refusal = "the probabilities are few enough to be kept"
    if refusal is None:
        return _tell(_fused_path(ops, call, arrays))
    return _tell(_written_path(ops, call, arrays, refusal))


def _tell(path: Path) -> Path:
    if _told is not None:
        _told.append(path)
    return path


def _refusal(ops: Any, call: AttentionCall, arrays: Mapping[str, Array]) -> str | None:
    refusal = getattr(ops, "fused_refusal", None)
    if refusal is None:
        return f"{ops.name} has no kernel here with the written meaning"
    return refusal(call, arrays)


def _fused_path(ops: Any, call: AttentionCall, arrays: Mapping[str, Array]) -> Path:
    why = "the framework's kernel has the written meaning"
    visible, query = call.visibility, arrays["query"]
    tall = [name for name in ("mask", "bias") if name in arrays and arrays[name].shape[2] != 1]
    if call.dropout is not None:
        return Path("fused", "the backend's own blocks with dropout")
    if is_plain_causal(call, arrays) or (visible.everything and not tall):
        return Path("fused", why)
    batch, _, queries, _ = query.shape
    keys = arrays["key"].shape[2]
    if not all(map(is_known, (batch, queries, keys))):
        return Path("fused", why)
    most = _most(ops, call, query)
    if visible.everything and batch * queries * keys <= most:
        return Path("fused", why)
    elements = max(most // batch, 1)
    return Path("fused", why, plan_runs(visible, queries, keys, elements, unrolled=True))


def is_plain_causal(call: AttentionCall, arrays: Mapping[str, Array]) -> bool:
    """Whether nothing is masked but what causality masks, query 0 standing at key 0."""
    visible = call.visibility
    causal = visible.left is None and visible.right == 0
    first = isinstance(visible.offset, int) and visible.offset == 0
    return causal and first and "mask" not in arrays and "bias" not in arrays


WORTHWHILE = 256
"""From so many queries on, leaving out the keys that some do not see saves time."""


def _written_path(ops: Any, call: AttentionCall, arrays: Mapping[str, Array], refusal: str) -> Path:
    def whole(why: str) -> Path:
        return Path("whole", why, (), refusal)

    if not hasattr(ops, "block"):
        return whole(f"{ops.name} has no loop")
    if call.dropout is not None and call.dropout.native:
        return whole("the framework's generator makes the dropout's mask in one piece")
    query = arrays["query"]
    _, heads, queries, _ = query.shape
    _, shared, keys, _ = arrays["key"].shape
    if not all(map(is_known, (heads, queries, shared, keys))):
        return whole("the lengths are not known before the program runs")
    if _fits(ops, call, arrays):
        visible = call.visibility
        if queries < WORTHWHILE or visible.everything or not isinstance(visible.offset, int):
            return whole("it fits into one block")
        runs = plan_runs(visible, queries, keys, queries * keys, unrolled=False)
        return Path("blocks", "each leaves out keys that it does not see", runs, refusal, True)
    elements = max(_most(ops, call, query) // (heads // shared), 1)
    runs = plan_runs(call.visibility, queries, keys, elements, unrolled=ops.unrolls)
    return Path("blocks", "small blocks stay in the cache", runs, refusal)


def _fits(ops: Any, call: AttentionCall, arrays: Mapping[str, Array]) -> bool:
    """Whether all logits are few enough to be computed in one piece."""
    lengths = (*arrays["query"].shape[:3], arrays["key"].shape[2])
    logits = math.prod([n for n in lengths if is_known(n)])
    most = _most(ops, call, arrays["query"])
    return logits <= (most if call.memory_budget is not None else 4 * most)


def _most(ops: Any, call: AttentionCall, query: Array) -> int:
    """How many logits a block may have."""
    if call.memory_budget is None:
        return ops.block(ops.device(query))
    return call.memory_budget // (8 if dtype_name(query.dtype) == "float64" else 4)
