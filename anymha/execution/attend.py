"""Attention of all queries: a kernel of the framework's, tile after tile, or in one piece.

`anymha.execution.path` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anymha.attention.dropout import Place
from anymha.attention.formula import Observer, formula, unobserved
from anymha.attention.masks import all_of
from anymha.attention.spec import AttentionCall
from anymha.execution.loops import by_blocks, by_fused_kernel, by_rows
from anymha.execution.path import Path, choose_path
from anymha.framework.protocol import Array, Ops


def attend(
    ops: Ops,
    call: AttentionCall,
    query: Array,
    key: Array,
    value: Array,
    *,
    masks: Sequence[Array | None] = (),
    bias: Array | None = None,
    observe: Observer = unobserved,
    with_scores: bool = True,
) -> tuple[Array, Array | None]:
    """The context of each query head, and the probabilities.

    Args:
        ops: The backend.
        call: The options.
        query: (B, T, H, d_k) in the accumulation dtype.
        key: (B, S, K, d_k); K divides H, and query head h reads key head ``h // (H // K)``.
        value: (B, S, K, d_v).
        masks: Booleans that broadcast to (B, H, T, S), True = may attend; their AND holds.
        bias: Added to the logits; broadcasts to (B, H, T, S).
        observe: Is told each stage.
        with_scores: Whether the probabilities are wanted; the context has the same bits without.

    Returns:
        The context (B, T, H, d_v), and the probabilities before dropout (B, H, T, S) or None.
    """
    heads_first = (0, 2, 1, 3)
    arrays = {
        "query": ops.permute_dims(query, heads_first),  # [B, H, T, d_k]
        "key": ops.permute_dims(key, heads_first),  # [B, K, S, d_k]
        "value": ops.permute_dims(value, heads_first),  # [B, K, S, d_v]
    }
    mask = all_of(ops, masks)
    if mask is not None:
        arrays["mask"] = _of_rank_4(ops, mask)
    if bias is not None:
        arrays["bias"] = _of_rank_4(ops, bias)
    path = choose_path(ops, call, arrays, observed=observe is not unobserved)
    if path.kernel == "fused":
        found = {"context": by_fused_kernel(ops, call, path.runs, arrays)}
        if with_scores:  # in a second pass, so that the context has the same bits
            del arrays["value"]
            path = choose_path(ops, call, arrays, fused=False)
            found |= written(ops, call, path, arrays, observe, True)
    else:
        found = written(ops, call, path, arrays, observe, with_scores)
    context = ops.permute_dims(found["context"], heads_first)  # [B, T, H, d_v]
    observe("context", context)
    return context, found.get("scores")


def written(
    ops: Ops,
    call: AttentionCall,
    path: Path | None,
    arrays: Mapping[str, Array],
    observe: Observer = unobserved,
    with_scores: bool = False,
) -> dict[str, Array]:
    """The context (B, H, T, d_v) and the scores (B, H, T, S), as far as wanted, by the formula."""

    def of_place(
        call: AttentionCall, arrays: Mapping[str, Array], place: Place
    ) -> dict[str, Array]:
        return formula(ops, call, arrays, place, observe, with_scores)

    if path is not None and path.together:
        return by_rows(ops, call, path.runs, arrays, of_place)
    if path is not None and path.runs:
        wanted = ["context"] * ("value" in arrays) + ["scores"] * with_scores
        return by_blocks(ops, call, path.runs, arrays, of_place, wanted)
    return of_place(call, arrays, Place())


def _of_rank_4(ops: Ops, x: Array) -> Array:
    """`x`, which broadcasts to (B, H, T, S), with all of its axes."""
    lacking = 4 - len(x.shape)
    return ops.reshape(x, (*(1,) * lacking, *ops.shape(x))) if lacking else x
