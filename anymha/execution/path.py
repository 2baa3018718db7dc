"""Which way a call of attention takes, and why: a fused kernel, tiles of queries, or one piece.

The path follows from shapes, dtypes and options alone, and is chosen before anything is computed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from anymha.attention.features.base import Feature, adding_option
from anymha.attention.spec import AttentionSpec
from anymha.execution.tiling import Tiles, plan_tiles
from anymha.framework.protocol import Dim, Ops

MOST_OF_SEGMENTS = 1 << 22
"""So many pairs a fused kernel gets at a time where it needs a mask of segments."""

WORTHWHILE = 256
"""From so many queries on, leaving out the keys that some do not see saves time."""


class AttentionShape(NamedTuple):
    """All that is known of a call of attention before its values are.

    Args:
        batch: B.
        heads: Query heads H.
        key_heads: Key and value heads K.
        queries: T.
        keys: S.
        key_dim: d_k.
        value_dim: d_v.
        dtype: The dtype in which attention is computed.
        device: Where.
        narrow: The half-precision dtype of query, key and value as they are given, if a kernel may
            take them so; None where they are given in `dtype`.
        has_mask: Whether there is a mask beside that of positions.
        has_bias: Whether there is a bias.
        per_query: Whether a mask or the bias differs from query to query.
        bias_differentiated: Whether a gradient of the bias may be asked for.
        has_segments: Whether queries see keys of their own segment alone.
        wide_bias: Whether the bias is of another dtype than `narrow`, to which no kernel may round
            it: it is added in `float32` at least.
    """

    batch: Dim
    heads: Dim
    key_heads: Dim
    queries: Dim
    keys: Dim
    key_dim: Dim
    value_dim: Dim
    dtype: Any
    device: Any
    narrow: Any = None
    has_mask: bool = False
    has_bias: bool = False
    per_query: bool = False
    bias_differentiated: bool = False
    has_segments: bool = False
    wide_bias: bool = False


@dataclass(frozen=True)
class Path:
    """The way that a call takes.

    Args:
        kernel: "fused" for a kernel of the framework's, "tiles" for the written formula tile after
            tile of queries, "whole" for the written formula in one piece.
        why: The reason.
        tiles: The tiles of each head; none where there is one piece.
        together: Whether a tile has the queries of all heads.
        causal_kernel: Whether the fused kernel masks by causality itself.
        why_not_fused: Why no fused kernel is taken; empty where one is.
        narrow: Whether query, key and value are multiplied in half precision, as they are.
        for_scores: The path of the second pass that gives the scores beside a fused kernel.
        most_queries: Calls that differ in their lengths alone take this path too, if they have at
            most so many queries,
        most_logits: and so many logits; 0 where only the same lengths do.
    """

    kernel: str
    why: str
    tiles: tuple[Tiles, ...] = ()
    together: bool = False
    causal_kernel: bool = False
    why_not_fused: str = ""
    narrow: bool = False
    for_scores: Path | None = None
    most_queries: float = 0
    most_logits: float = 0

    def __str__(self) -> str:
        count = sum(tiles.count for tiles in self.tiles)
        text = f"{self.kernel}: {self.why}" + (", in half precision" if self.narrow else "")
        if count > 1:
            text += f"; {count} tiles of up to {max(t.height for t in self.tiles)} queries"
        return text + (f". Not fused: {self.why_not_fused}" if self.why_not_fused else "")


_REPORT: ContextVar[tuple[list[Path], dict[str, None]] | None] = ContextVar(
    "anymha_path_report", default=None
)
"""Where `explain` collects the paths of the call that it makes, and notes, each once."""

_LOCK = threading.Lock()

explaining = 0
"""How many calls of `explain` run now, in all threads: while there is none, nobody asks further."""


def report(path: Path) -> None:
    """Tell the `explain` of this thread or task, if there is one, which way a call takes."""
    collected = _REPORT.get()
    if collected is not None:
        collected[0].extend([path] if path.for_scores is None else [path, path.for_scores])


def report_note(note: str) -> None:
    """Tell it how a backend computes what is outside of the attention; it is printed once."""
    collected = _REPORT.get()
    if collected is not None:
        collected[1][note] = None


def explain(function: Callable[..., Any], *args: Any, **call: Any) -> str:
    """Make a call, and say which way it takes through the attention, and why.

    Other calls, of other threads or tasks, are not reported.

    Args:
        function: A layer of anymha, `anymha.dot_product_attention`, or what calls such.
        *args: Its arguments.
        **call: Its keyword arguments.

    Returns:
        A line for each attention that was computed: "fused" is a kernel of the framework's,
        "tiles" the written formula tile after tile of queries, "whole" the formula in one piece;
        then why, and why not a fused kernel. A last line where the backend's projections take
        another way than the framework's.

    Raises:
        AnymhaError: the call itself does; whatever it raises passes through.

    Example:
        >>> import anymha, numpy as np
        >>> layer = anymha.MultiHeadAttention(2, 4, backend="numpy", query_features=8)
        >>> print(anymha.explain(layer, np.ones((1, 3, 8), dtype="float32")))
        whole: it fits into one tile. Not fused: numpy has no kernel here with the written meaning
    """
    global explaining
    paths: list[Path] = []
    notes: dict[str, None] = {}
    token = _REPORT.set((paths, notes))
    with _LOCK:
        explaining += 1
    try:
        function(*args, **call)
    finally:
        with _LOCK:
            explaining -= 1
        _REPORT.reset(token)
    return "\n".join([*map(str, paths), *notes])


def choose_path(
    ops: Ops,
    spec: AttentionSpec,
    shape: AttentionShape,
    *,
    observed: bool,
    with_scores: bool,
    with_lse: bool = False,
) -> Path:
    """The path of a call, in which each stage is `observed`, or scores or lse are wanted."""
    if observed:
        return Path("whole", "each stage is observed")
    lengths = (shape.batch, shape.queries, shape.keys, shape.key_dim, shape.value_dim)
    if any(isinstance(n, int) and n == 0 for n in lengths):
        return Path("whole", "there is nothing to attend to")
    if spec.features and adding_option(spec.features):
        shape = shape._replace(has_bias=True, per_query=True)
    narrow, reason = False, _why_not_fused(ops, spec, shape)
    if with_lse:
        reason = reason or "the log-sum-exp is asked for"
    elif shape.narrow is not None:
        why = _why_not_fused(ops, spec, shape._replace(dtype=shape.narrow))
        narrow = why is None
        reason = reason and why
    if reason is not None:
        path = _written_path(ops, spec, shape, reason)
    else:
        taken = shape._replace(dtype=shape.narrow) if narrow else shape
        path = replace(_fused_path(ops, spec, taken), narrow=narrow)
    if reason is None and with_scores:
        second = _written_path(ops, spec, shape, "the scores are asked for")
        path = replace(
            path,
            for_scores=second,
            most_queries=min(path.most_queries, second.most_queries),
            most_logits=min(path.most_logits, second.most_logits),
        )
    if shape.narrow is not None and ops.capabilities.compile is not None:
        # The kernel may refuse other lengths, which are compiled, and so planned, anew.
        return replace(path, most_queries=0, most_logits=0)
    return path


def _why_not_fused(ops: Ops, spec: AttentionSpec, shape: AttentionShape) -> str | None:
    why_not_fused = ops.capabilities.why_not_fused
    if why_not_fused is None:
        return f"{ops.name} has no kernel here with the written meaning"
    adding = spec.features and adding_option(spec.features)
    if adding:  # TensorFlow's AutoGraph reads no assignment within an expression
        if spec.dropout is not None:
            return f"the kernels with dropout have no {adding}"
        if shape.dtype == shape.narrow:
            return f"a kernel in half precision would round {adding}"
    for feature in spec.features:
        reason = feature.why_not_fused(ops.capabilities)
        if reason:
            return reason
    if shape.has_segments and spec.dropout is not None:
        return "the kernel with dropout has no segments"
    return why_not_fused(spec, shape)


def _fused_path(ops: Ops, spec: AttentionSpec, shape: AttentionShape) -> Path:
    positions, causal = spec.position_mask, _is_made_by_kernel(ops, spec, shape)
    if spec.dropout is not None and not spec.dropout.native:
        return Path("fused", "the backend's own kernel with dropout")
    if spec.dropout is not None:
        return Path("fused", "the framework's kernel has dropout", causal_kernel=causal)
    why = "the framework's kernel has the written meaning"
    is_open = positions.left is None and positions.right is None
    if causal and positions.left is not None:  # which the kernel makes for some lengths alone
        return Path("fused", why, causal_kernel=True)
    if causal or (is_open and not shape.per_query):
        return Path("fused", why, causal_kernel=causal, most_queries=math.inf, most_logits=math.inf)
    batch, queries, keys = shape.batch, shape.queries, shape.keys
    if not all(isinstance(n, int) for n in (batch, queries, keys)):
        return Path("fused", why)
    if spec.features and adding_option(spec.features):
        # For each head; a kernel is slow in flat tiles.
        most = max(most_logits(ops, spec, shape.dtype, shape.device) // shape.heads, 1)
    else:
        most = _most_of_tile(ops, spec, shape.dtype, shape.device)
        if shape.has_segments:  # whose tiles are computed twice: few are faster
            fitting = most_logits(ops, spec, shape.dtype, shape.device)
            most = min(fitting, max(most, MOST_OF_SEGMENTS))
    if is_open and batch * queries * keys <= most:
        return Path("fused", why, most_queries=math.inf, most_logits=most)
    elements = max(most // batch, 1)
    return Path("fused", why, plan_tiles(positions, queries, keys, elements, eager_loop=True))


def _is_made_by_kernel(ops: Ops, spec: AttentionSpec, shape: AttentionShape) -> bool:
    """Whether the kernel hides positions itself: a window, where it says so, or causality.

    Every kernel knows causality where query 0 stands at key 0, and nothing else is masked.
    """
    positions, makes_window = spec.position_mask, ops.capabilities.fused_window
    if positions.left is not None:
        return makes_window is not None and makes_window(spec, shape)
    first = isinstance(positions.offset, int) and positions.offset == 0
    return positions.right == 0 and first and not shape.has_mask and not shape.has_bias


def _written_path(ops: Ops, spec: AttentionSpec, shape: AttentionShape, reason: str) -> Path:
    capabilities, positions = ops.capabilities, spec.position_mask
    narrow = (
        shape.narrow is not None
        and capabilities.wide_matmul is not None
        and all(type(feature).heads is Feature.heads for feature in spec.features)
    )

    def whole(why: str, queries: float = 0, logits: float = 0) -> Path:
        return Path("whole", why, why_not_fused=reason, narrow=narrow,
                    most_queries=queries, most_logits=logits)  # fmt: skip

    if capabilities.loop is None:
        return whole(f"{ops.name} has no loop", math.inf, math.inf)
    if spec.dropout is not None and spec.dropout.native:
        why = "the framework's generator makes the dropout's mask in one piece"
        return whole(why, math.inf, math.inf)
    queries, keys = shape.queries, shape.keys
    if not all(isinstance(n, int) for n in (shape.heads, queries, shape.key_heads, keys)):
        return whole("the lengths are not known before the program runs")
    is_open = positions.left is None and positions.right is None
    if fits(ops, spec, shape):
        most = most_logits(ops, spec, shape.dtype, shape.device)
        if is_open or not isinstance(positions.offset, int):
            return whole("it fits into one tile", math.inf, most)
        if queries < WORTHWHILE:
            return whole("it fits into one tile", WORTHWHILE - 1, most)
        tiles = plan_tiles(positions, queries, keys, queries * keys, eager_loop=False)
        return Path("tiles", "each leaves out keys that it does not see", tiles, True,
                    why_not_fused=reason, narrow=narrow)  # fmt: skip
    elements = max(
        _most_of_tile(ops, spec, shape.dtype, shape.device) // (shape.heads // shape.key_heads), 1
    )
    tiles = plan_tiles(positions, queries, keys, elements, eager_loop=capabilities.eager_loop)
    why = "small tiles stay in the cache"
    return Path("tiles", why, tiles, why_not_fused=reason, narrow=narrow)


def fits(ops: Ops, spec: AttentionSpec, shape: AttentionShape) -> bool:
    """Whether all logits are few enough to be computed in one piece."""
    lengths = (shape.batch, shape.heads, shape.queries, shape.keys)
    logits = math.prod([n for n in lengths if isinstance(n, int)])
    return logits <= most_logits(ops, spec, shape.dtype, shape.device)


def most_logits(ops: Ops, spec: AttentionSpec, dtype: Any, device: Any) -> int:
    """How many logits are computed in one piece by the written formula."""
    most = _most_of_tile(ops, spec, dtype, device)
    return most if spec.memory_budget is not None else 4 * most


def _most_of_tile(ops: Ops, spec: AttentionSpec, dtype: Any, device: Any) -> int:
    """How many logits a tile may have."""
    if spec.memory_budget is not None:
        return spec.memory_budget // (8 if dtype == ops.float64 else 4)
    tile_size = ops.capabilities.tile_size
    return 1 << 62 if tile_size is None else tile_size(device)
