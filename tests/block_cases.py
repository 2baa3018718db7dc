"""Calls of attention with each mask and option, and what a backend gives for them on each path."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from anymha.attention.dropout import Dropout
from anymha.attention.features.softcap import Softcap
from anymha.attention.masks import PositionMask, all_of
from anymha.attention.spec import AttentionSpec
from anymha.execution.attend import attend
from anymha.execution.path import AttentionShape, Path, choose_path
from anymha.framework import autodiff as tape
from anymha.framework.registry import Backend, get_backend
from anymha.parity.stages.tolerance import tolerance
from tests.support import Arrays, close, native, normal

B, T, S, H = 2, 9, 7, 4
BOOLEANS = np.random.default_rng(5)
LARGE = 1 << 30
"""Bytes for all logits at once."""

EVERYTHING = PositionMask()


@dataclass(frozen=True)
class Case:
    """A call without its numbers.

    Args:
        masks: Booleans that broadcast to (B, H, T, S).
        bias: Shape of the bias.
        visible: What a query sees by its position; the offset may be a NumPy array.
        softcap: As in the call.
        dropout: As in the call.
        shape: B, T, S, H, K, d_k and d_v.
        telling: Whether the context, and the value's gradient, tell what dropout keeps: the value
            and the context's cotangent have a column for each key, and for each query.
    """

    masks: tuple[np.ndarray, ...] = ()
    bias: tuple[int, ...] | None = None
    visible: PositionMask = EVERYTHING
    softcap: float | None = None
    dropout: Dropout | None = None
    shape: tuple[int, int, int, int, int, int, int] = (B, T, S, H, 2, 4, 4)
    telling: bool = False

    @cached_property
    def arrays(self) -> Arrays:
        """Query, key, value and maybe bias, in float64."""
        batch, queries, keys, heads, shared, d_k, d_v = self.shape
        shapes = {
            "query": (batch, queries, heads, d_k),
            "key": (batch, keys, shared, d_k),
            "value": (batch, keys, shared, d_v),
        } | ({} if self.bias is None else {"bias": self.bias})
        arrays = {name: normal(shape, name) for name, shape in shapes.items()}
        if self.telling:
            identity = np.eye(keys, d_v)[None, :, None]
            arrays["value"] = np.broadcast_to(identity, shapes["value"])
        return arrays

    @cached_property
    def cotangents(self) -> list[np.ndarray]:
        """Of the context and of the scores."""
        batch, queries, keys, heads, shared, _, d_v = self.shape
        shapes = [(batch, queries, heads, d_v), (batch, heads, queries, keys)]
        cotangents = [normal(shape, f"cotangent of {shape}") for shape in shapes]
        if self.telling:  # a query's column for each of the heads that share a value
            columns = np.eye(heads // shared * queries, d_v).reshape(-1, queries, d_v)
            columns = np.tile(columns, (shared, 1, 1)).transpose(1, 0, 2)  # [T, H, d_v]
            cotangents[0] = np.broadcast_to(columns, shapes[0])
        return cotangents

    @cached_property
    def stages(self) -> Arrays:
        """Each stage of the written formula in one piece, in float64."""
        found: Arrays = {}
        ops, arrays = get_backend("numpy").ops, dict(self.arrays)
        parts = [arrays.pop(name) for name in ("query", "key", "value")]
        path = Path("whole", "each stage is observed")
        attend(
            ops, self.call(ops), path, *parts, **arrays,
            mask=all_of(ops, self.masks), observe=found.__setitem__,
        )  # fmt: skip
        return found

    def call(self, ops: Any, budget: int | None = None) -> AttentionSpec:
        offset = self.visible.offset
        if isinstance(offset, np.ndarray):
            offset = ops.from_numpy(offset)
        seen = replace(self.visible, offset=offset)
        features = () if self.softcap is None else (Softcap(self.softcap),)
        return AttentionSpec(0.6, features, seen, self.dropout, budget)

    def budget(self, rows: int, dtype: str) -> int:
        """Bytes for so many queries of the heads that share a key head."""
        _, _, keys, heads, shared, _, _ = self.shape
        return np.dtype(dtype).itemsize * heads // shared * rows * keys


CAUSAL, DROPOUT = PositionMask(right=0), Dropout(20000, 11)
BY_BATCH = PositionMask(right=0, offset=np.array([3, -2], np.int32))
FULL = BOOLEANS.random((B, H, T, S)) > 0.3  # some rows of it are False throughout
CASES = {
    "plain": Case(),
    "no heads shared, other value width": Case(shape=(B, T, S, H, H, 4, 3)),
    "many heads": Case((BOOLEANS.random((9, 1, 5, 3)) > 0.4,), shape=(9, 5, 3, 2, 2, 4, 4)),
    "causal": Case(visible=CAUSAL),
    "offset by batch": Case(visible=BY_BATCH),
    "window": Case(visible=PositionMask(2, 1, offset=-1)),
    "open window": Case(visible=PositionMask(right=2, offset=-4)),
    "window after": Case(visible=PositionMask(left=1, offset=3)),
    "mask (S,)": Case((FULL[0, 0, 0],)),
    "mask (T, S)": Case((FULL[0, 0],)),
    "mask (H, T, 1)": Case((FULL[0, :, :, :1],)),
    "mask (B, 1, T, S)": Case((FULL[:, :1],)),
    "mask (B, H, T, S)": Case((FULL,)),
    "padding": Case((FULL[:, :1, :1], FULL[:, :1, :, :1]), visible=CAUSAL),
    "bias (S,)": Case(bias=(S,)),
    "bias (H, 1, S)": Case(bias=(H, 1, S), visible=CAUSAL),
    "bias (1, H, T, S)": Case(bias=(1, H, T, S)),
    "bias (B, H, T, S)": Case((FULL[:, :1],), bias=(B, H, T, S)),
    "softcap": Case(softcap=1.5),
    "dropout": Case(dropout=DROPOUT),
    "dropout, mask, window": Case((FULL[0],), visible=PositionMask(2, 1, 1), dropout=DROPOUT),
    "dropout, mask, bias": Case((FULL,), (1, H, T, S), BY_BATCH, dropout=DROPOUT),
    "all": Case(
        (FULL[:, :1], FULL[0]), (H, T, S), PositionMask(4, 1), 2.0, DROPOUT, (B, T, S, H, 2, 4, 3)
    ),
}  # fmt: skip


def found(
    backend: Backend,
    case: Case,
    dtype: str = "float32",
    *,
    budget: int | None = None,
    observed: bool = False,
    fixed: tuple[str, ...] = (),
    scores: bool = True,
) -> tuple[Arrays, Path]:
    """Context, scores and gradients by name, and the path that the context took.

    Args:
        backend: Where it is computed.
        case: The call.
        dtype: Of the arrays.
        budget: The call's memory budget.
        observed: Whether each stage is looked at, which takes the written formula in one piece.
        fixed: The arrays of which no gradient is wanted.
        scores: Whether scores are wanted.
    """
    ops = backend.ops
    arrays = native(ops, {name: x.astype(dtype) for name, x in case.arrays.items()})
    cotangents = tuple(ops.from_numpy(x.astype(dtype)) for x in case.cotangents[: 1 + scores])
    masks = [ops.from_numpy(mask) for mask in case.masks]
    path = choose_path(
        ops, case.call(ops, budget), _shape_of(ops, case, arrays, fixed),
        observed=observed, with_scores=scores,
    )  # fmt: skip
    held = {name: arrays.pop(name) for name in fixed}

    def function(ops: Any, arrays: Any) -> Any:
        def inside(arrays: Any) -> Any:
            parts = {**held, **arrays}
            parts = [parts.pop(name) for name in ("query", "key", "value")] + [parts.get("bias")]
            context, probabilities, _ = attend(
                ops, case.call(ops, budget), path, *parts[:3], bias=parts[3],
                mask=all_of(ops, masks),
                observe=(lambda *_: None) if observed else None, with_scores=scores,
            )  # fmt: skip
            return (context, probabilities) if scores else (context,)

        return ops.in_float64(inside, arrays) if dtype == "float64" else inside(arrays)

    results, gradients = _differentiated(backend, function, arrays, cotangents)
    named = dict(zip(("context", "scores"), results, strict=False))
    named |= {f"gradient of {name}": x for name, x in gradients.items()}
    return {name: ops.to_numpy(x) for name, x in named.items()}, path


def _shape_of(ops: Any, case: Case, arrays: Any, fixed: Any) -> AttentionShape:
    batch, queries, keys, heads, shared, d_k, d_v = case.shape
    tall = [x for x in (*case.masks, *([arrays["bias"]] if case.bias else [])) if len(x.shape) > 1]
    return AttentionShape(
        batch, heads, shared, queries, keys, d_k, d_v, arrays["query"].dtype,
        ops.device(arrays["query"]),
        has_mask=bool(case.masks),
        has_bias=case.bias is not None,
        per_query=any(x.shape[-2] != 1 for x in tall),
        bias_differentiated=case.bias is not None and "bias" not in fixed,
    )  # fmt: skip


def _differentiated(backend: Backend, function: Any, arrays: Any, cotangents: Any) -> Any:
    ops: Any = backend.ops
    if ops.capabilities.vjp is None:  # its results come from its own functions, not from the tape's
        return function(ops, arrays), tape.vjp(ops, function, arrays)[1](cotangents)
    differentiate = partial(ops.capabilities.vjp, partial(function, ops))
    if backend.name == "jax":  # op by op it would compile for longer
        jax = importlib.import_module("jax")
        differentiate = jax.jit(
            differentiate, compiler_options={"xla_backend_optimization_level": 0}
        )
    return differentiate(arrays, cotangents)


def agree(case: Case, one: Arrays, other: Arrays, dtype: str = "float32") -> None:
    """Fail unless two results, or as many of them as `other` has, differ by rounding alone.

    The margin is the project's (`anymha.parity.stages.tolerance`): ``eps * magnitude`` times the
    root of the length of the longest sum on the way, for each of the two. The magnitude is the
    greatest size of the result, times that of the logits where they are above 1: an exponential's
    relative error is its argument's absolute one.
    """
    batch, queries, keys, heads, shared, d_k, _ = case.shape
    lengths = dict.fromkeys(("gradient of key", "gradient of value"), queries * heads // shared)
    if case.bias is not None:
        lengths["gradient of bias"] = batch * heads * queries * keys // int(np.prod(case.bias))
    peak = max(1.0, float(np.max(np.abs(case.stages["logits"]))))
    for name, got in other.items():
        assert got.dtype == one[name].dtype == dtype
        length = max(keys, d_k, lengths.get(name, 1))
        largest = peak * float(np.max(np.abs(one[name])))
        close(got, one[name], 2 * tolerance(dtype, length, largest), name)


def kept(case: Case, results: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Booleans (B, H, T, S), what dropout left: in the context, and in the gradient of the value.

    Each number of a `telling` case's context and gradient is one probability that was dropped or
    multiplied, plus zeros, so that nothing is rounded away.
    """
    _, queries, keys, heads, shared, _, _ = case.shape
    forward = results["context"][..., :keys].transpose(0, 2, 1, 3)
    backward = results["gradient of value"]  # [B, S, K, H/K * T]
    backward = backward.reshape(*backward.shape[:3], heads // shared, queries)
    backward = backward.transpose(0, 2, 3, 4, 1).reshape(forward.shape)
    return forward != 0, backward != 0
