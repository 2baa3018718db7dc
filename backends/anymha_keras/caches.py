"""Caches and memories in Keras: nested structures of tensors, which the layer does not cast.

Where Keras looks into structures it sees the arrays of a cache: as inputs of functional models and
symbolic results, and in `keras.tree.map_structure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from anymha.layer.cache import Cache, Memory, flatten_linked, unflatten_linked
from anymha.layer.cached import check_fits, needs_positions
from anymha.layer.checks import check_masks
from anymha.options.config import AttentionConfig
from anymha_keras.call import result_shapes

OVER = ("attention_mask", "attention_bias")
"""The arguments of a call that have an axis of the cache's positions."""


def _register() -> None:
    """Let `keras.tree` see the arrays; on torch it sees what torch's own trees see."""
    import optree  # noqa: PLC0415  on torch Keras does without

    def flattened(value: Any) -> Any:
        leaves, static = flatten_linked(value)
        return leaves, static, static[0]

    kinds: tuple[Any, ...] = (Cache, Memory)
    for kind in kinds:
        optree.register_pytree_node(
            kind,
            flattened,
            lambda static, leaves, kind=kind: unflatten_linked(kind, static, leaves),
            namespace="keras",
        )


if keras.config.backend() != "torch":
    _register()


def symbolic_results(
    config: AttentionConfig,
    inputs: Sequence[Any],
    widths: Sequence[int | None],
    dtype: str,
    call: Mapping[str, Any],
) -> Any:
    """What a call with a cache or a memory will return, in symbolic tensors.

    Args:
        config: The options.
        inputs: Query, value and key, all of them the query (B, T, D_q) in such a call.
        widths: The widths that the kernels take, as far as they are there.
        dtype: The dtype of the results.
        call: The call's other arguments by name.

    Raises:
        AnymhaError: as for the call itself.
    """
    cache, memory = call.get("cache"), call.get("memory")
    held: Any = cache if memory is None else memory
    query, *others = inputs
    check_fits(config, query, (others[0], others[1]), call)
    widths = widths if memory is None else (widths[0], None, None)
    own = {"query_mask": call["query_mask"]} if call["query_mask"] is not None else {}
    shape, _ = result_shapes(config, [query.shape] * 3, widths, own)
    batch, queries = query.shape[:2]
    keys = held.keys.shape[2] if isinstance(held, Memory) else held.max_length
    over = {name: call[name] for name in OVER if call.get(name) is not None}
    check_masks(over, (batch,), config.num_heads, (queries,), (keys,))
    results: list[Any] = [keras.KerasTensor(shape, dtype)]
    if call.get("return_attention_scores"):
        results.append(keras.KerasTensor((batch, config.num_heads, queries, keys), dtype))
    if cache is not None:
        results.append(_appended(config, cache, call))
    return tuple(results) if len(results) > 1 else results[0]


def _appended(config: AttentionConfig, cache: Cache, call: Mapping[str, Any]) -> Cache:
    """The symbolic cache that a call gives."""
    rows = (cache.keys.shape[0], cache.keys.shape[2])
    added: dict[str, Any] = {}
    if cache.segment_ids is None and call.get("segment_ids") is not None:
        added["segment_ids"] = keras.KerasTensor(rows, call["segment_ids"].dtype)
    places = [call[n] for n in ("key_positions", "positions") if call.get(n) is not None]
    if cache.key_positions is None and places and needs_positions(config.features):
        added["key_positions"] = keras.KerasTensor(rows, places[0].dtype)

    def like(x: Any) -> Any:
        return keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))

    shapes: Any = keras.tree.map_structure(like, cache)
    return replace(shapes, **added)
