"""Padding that is left out of the computation: keys that a row of the batch does not see.

Batches of texts have keys that no query sees. Where the values of the mask are at hand, such keys
are neither projected nor attended to: rows that see the same keys are computed together, without a
mask. What such a key holds is not read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from anymha.execution import path as paths
from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known
from anymha.layer.plan import PlannedCall, path_of

NOTE = "Padding is left out: each row of the batch has its own keys."
"""What `explain` says."""

LOOKED_AT = 1 << 23
"""A mask is looked at where the keys of a row cost at least so many multiplications."""


class Group(NamedTuple):
    """Rows of the batch, one after another, that see the same keys.

    Args:
        begin: The first row.
        end: The row after the last.
        first: The first key.
        last: The key after the last.
    """

    begin: int
    end: int
    first: int
    last: int


def padding_groups(
    planned: PlannedCall, arrays: Mapping[str, Array], offset: Any
) -> list[Group] | None:
    """All rows of the batch by the keys that they see; None where padding is not to be left out.

    Args:
        planned: The call, whose only mask is one of padding.
        arrays: The call's arrays by name.
        offset: The index of the first query: an int, or an array.
    """
    plan, shape, _ = planned
    flags, known = plan.flags, plan.ops.capabilities.known_padding
    if known is None or plan.double or type(offset) is not int:
        return None
    if any(feature.depends_on_length for feature in plan.spec.features):
        return None
    if flags.activity or flags.dropping or flags.observed or not all(map(is_known, shape.folded)):
        return None
    mask, (batch, queries, keys) = arrays[shape.only_mask[0]], shape.folded  # pyright: ignore
    # Before lengths, which a compiler would take for those of all calls. A mask of another device
    # is refused later, whatever its values are.
    found = known(mask) if plan.ops.device(mask) == plan.device else None
    if found is None or mask.shape[1] != keys or 0 in (batch, queries):
        return None
    (key_heads, key_dim), (_, value_dim) = plan.heads["key"], plan.heads["value"]
    of_value, of_key = (arrays[source].shape[-1] for source in plan.sources[1:])
    # What one key costs a row: its projections, its logits, and its part of the context. Of queries
    # in their order only the last see what is hidden.
    work = key_heads * (of_value * value_dim + of_key * key_dim)
    if plan.spec.position_mask.is_open:
        work += queries * shape.heads * (key_dim + value_dim)
    if keys * work < LOOKED_AT:
        return None
    seen, least = found
    counts = seen.sum(axis=1)
    known_counts = counts.tolist()
    hidden = (keys * len(known_counts) - sum(known_counts)) * (batch // len(known_counts))
    if not hidden:
        return [Group(0, batch, 0, keys)]
    further = max(len({*known_counts}) - 1, 1)  # at least so many; one group has its slices too
    if hidden * work < further * least:
        return None
    first = seen.argmax(axis=1)
    last = keys - seen[:, ::-1].argmax(axis=1)
    last[counts == 0] = 0
    if (last - first != counts).any() or (first.any() and not plan.spec.position_mask.is_open):
        return None
    bounds = list(zip(first.tolist(), last.tolist(), strict=True))
    if len(bounds) < batch:  # a mask for all rows
        return [Group(0, batch, *bounds[0])]
    begins = [i for i in range(batch) if not i or bounds[i] != bounds[i - 1]]
    if hidden * work < (len(begins) - 1) * least:
        return None
    ends = [*begins[1:], batch]
    return [Group(i, j, *bounds[i]) for i, j in zip(begins, ends, strict=True)]


def seen_keys(ops: Ops, groups: list[Group], key: Array) -> Array:
    """The keys (1, N, D) that their row sees, one after another, of `key` (B, S, D).

    Args:
        ops: The backend.
        groups: All rows of the batch.
        key: Keys or values before their projection.
    """
    parts = [key[i, a:b] for begin, end, a, b in groups for i in range(begin, end) if a < b]
    if not parts:
        return key[:1, :0]
    return ops.reshape(ops.concat(parts, axis=0), (1, -1, key.shape[-1]))


def attention_by_groups(
    planned: PlannedCall,
    groups: list[Group],
    offset: Any,
    attention: Callable[[paths.Path, Mapping[str, Array]], tuple[Array, Array | None]],
    heads: Mapping[str, Array],
) -> tuple[Array, Array | None]:
    """The context (B, T, H, d_v), and the probabilities (B, H, T, S) if they are wanted.

    Args:
        planned: The call.
        groups: All rows of the batch.
        offset: The index of the first query.
        attention: Gives both for rows that see all of their keys, by a path.
        heads: "key" and "value" (1, N, K, d) of what is seen; "key_positions" (1 or B, S); weights
            of features; and arrays (1 or B, T, ..) such as the "query".
    """
    plan, (_, queries, keys) = planned.plan, planned.shape.folded
    ops, weights = plan.ops, plan.config.feature_weights
    contexts, scores, at = [], None, 0
    for begin, end, first, last in groups:
        batch, count = end - begin, last - first
        own = {
            name: x if name in weights or x.shape[0] == 1 else x[begin:end]
            for name, x in heads.items()
        }
        for name in ("key", "value"):
            part = heads[name][0, at : at + batch * count]
            own[name] = ops.reshape(part, (batch, count, *part.shape[1:]))
        if "key_positions" in own:
            own["key_positions"] = own["key_positions"][:, first:last]
        at += batch * count
        path = path_of(plan, (batch, queries, count), {}, False, offset)
        if paths.explaining:
            paths.report(path)
        context, probabilities = attention(path, own)
        contexts.append(context)
        if probabilities is not None:
            if scores is None:
                device = ops.device(probabilities)
                zero = ops.asarray(0.0, dtype=probabilities.dtype, device=device)
                full = planned.shape.folded[0], *probabilities.shape[1:3], keys
                scores = ops.broadcast_to(zero, full) * 1  # which has memory of its own
            scores[begin:end, :, :, first:last] = probabilities
    if paths.explaining:
        paths.report_note(NOTE)
    return contexts[0] if len(contexts) == 1 else ops.concat(contexts, axis=0), scores
