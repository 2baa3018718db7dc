"""What is checked of a call before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from anymha.attention.masks import check_boolean
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError, WeightsError
from anymha.framework.dtypes import dtype_name, is_floating
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import check_broadcast, described, is_known, show
from anymha.layer.axes import Axes, resolve_axes
from anymha.options.config import AttentionConfig

BOOLEAN = ("attention_mask", "query_mask", "value_mask", "key_mask", "mask")
FLOATING = ("query", "key", "value", "attention_bias", "bias")


def unpack_inputs(query: Any, value: Any, key: Any) -> tuple[Any, Any, Any]:
    """Query, value and key, out of a list in the first place where there is one.

    Raises:
        ArgumentError: the list has not 1 to 3 members, or `value` or `key` is given beside it.
    """
    if isinstance(query, (list, tuple)):
        if not 1 <= len(query) <= 3 or value is not None or key is not None:
            raise ArgumentError(
                "A list in the first place must be [query], [query, value] or "
                "[query, value, key], with no `value` or `key` beside it. "
                f"Received: {len(query)} members, value={_kind(value)}, key={_kind(key)}."
            )
        query, value, key = (*query, None, None)[:3]
    value = query if value is None else value
    return query, value, value if key is None else key


def check_arrays(ops: Ops, arrays: Mapping[str, Any]) -> None:
    """Each array is of this framework, masks are boolean, inputs, biases and weights floating.

    Raises:
        MixedBackendsError: an array of another framework.
        ArgumentError: no array at all.
        DtypeError: a wrong dtype.
    """
    for name, array in arrays.items():
        if not ops.is_array(array):
            foreign = hasattr(array, "shape") and hasattr(array, "dtype")
            raise (MixedBackendsError if foreign else ArgumentError)(
                f"`{name}` must be an array of {ops.name}, like the others of this call. "
                f"Received: {_kind(array)}. Convert it first: one call takes arrays of one "
                "framework."
            )
        if name in BOOLEAN:
            check_boolean(array, name)
        elif (name in FLOATING or "." in name) and not is_floating(dtype_name(array.dtype)):
            raise DtypeError(
                f"`{name}` must be floating (float16, bfloat16, float32 or float64). "
                f"Received: {described(array)}. Cast it first."
            )


def check_inputs(
    config: AttentionConfig, query: Array, value: Array, key: Array, widths: Sequence[int | None]
) -> Axes:
    """The axes of the inputs, once their shapes fit each other and the kernels.

    Args:
        config: The layer's options.
        query: The query input.
        value: The value input.
        key: The key input.
        widths: The widths D_q, D_v and D_k that the kernels have; None where there is none yet.

    Raises:
        ShapeError: ranks, batch axes, lengths or widths do not fit.
    """
    named_axes: Any = config.attention_axes  # a tuple or None, once the config has checked it
    axes = resolve_axes(named_axes, len(query.shape))
    named = {"query": query, "value": value, "key": key}
    for (name, array), width in zip(named.items(), widths, strict=True):
        if len(array.shape) != len(query.shape):
            raise ShapeError(
                f"`{name}` must have as many axes as `query`. Received: `{name}` of "
                f"{described(array)}, and `query` of {described(query)}. Add or take away axes."
            )
        if _differ(array.shape[-1], width):
            raise ShapeError(
                f"`{name}` must have {width} features in its last axis, as the layer's weights "
                f"have. Received: {described(array)}. Pass such an array, or make a layer of "
                f"`{name}_features={array.shape[-1]}`."
            )
        if any(_differ(array.shape[i], query.shape[i]) for i in axes.batch):
            raise ShapeError(
                f"`{name}` must have the lengths of `query` in the batch axes, "
                f"{', '.join(map(str, axes.batch))}. Received: `{name}` of {described(array)}, "
                f"and `query` of {described(query)}. Repeat the shorter one."
            )
    if any(_differ(key.shape[i], value.shape[i]) for i in axes.attention):
        raise ShapeError(
            "`key` and `value` must have the same length. Received: `key` of "
            f"{described(key)}, and `value` of {described(value)}. Each key needs its value."
        )
    return axes


def check_masks(
    arrays: Mapping[str, Array],
    batch: Sequence[Dim],
    heads: int,
    queries: Sequence[Dim],
    keys: Sequence[Dim],
) -> None:
    """The masks and the bias fit (batch axes, heads, query axes, key axes).

    Raises:
        ShapeError: with the expected and the received shape.
    """
    if "attention_mask" in arrays:
        mask = arrays["attention_mask"]
        ranks = {
            len(queries) + len(keys): (*queries, *keys),
            len(batch) + len(queries) + len(keys): (*batch, *queries, *keys),
            len(batch) + 1 + len(queries) + len(keys): (*batch, heads, *queries, *keys),
        }
        if len(mask.shape) not in ranks:
            raise ShapeError(
                f"`attention_mask` must have shape {' or '.join(map(show, ranks.values()))}: "
                "queries and keys; batch before them; heads between. "
                f"Received: {described(mask)}. Add axes of length 1 to broadcast."
            )
        check_broadcast(mask, ranks[len(mask.shape)], "attention_mask")
    for name, lengths in (("query_mask", queries), ("value_mask", keys), ("key_mask", keys)):
        if name in arrays:
            if len(arrays[name].shape) != len(batch) + len(lengths):
                raise ShapeError(
                    f"`{name}` must have shape {show((*batch, *lengths))}. Received: "
                    f"{described(arrays[name])}. Pass what has more axes as `attention_mask`."
                )
            check_broadcast(arrays[name], (*batch, *lengths), name)
    if "attention_bias" in arrays:
        full = (*batch, heads, *queries, *keys)
        check_broadcast(arrays["attention_bias"], full, "attention_bias")


def check_offset(ops: Ops, offset: Any, batch: Dim) -> Any:
    """The query offset of a call: an int, or an integer array of rank 0 or of shape (B,).

    Raises:
        ArgumentError: it is neither.
        ShapeError: it has another shape.
    """
    if type(offset) is int:
        return offset
    if ops.is_array(offset) and "int" in dtype_name(offset.dtype):
        check_broadcast(offset, (batch,), "query_offset")
        return offset
    if not isinstance(offset, bool) and is_integer(offset):
        return offset if isinstance(offset, int) else operator.index(offset)
    raise ArgumentError(
        f"`query_offset` must be an int, or an integer array (B,) of {ops.name}. "
        f"Received: {_received(offset)}. Pass an int."
    )


def check_seed(ops: Ops, seed: Any) -> Any:
    """The seed of a call: None, an int, or an array of the framework that is not floating.

    Raises:
        ArgumentError: it is neither.
        MixedBackendsError: an array of another framework.
        DtypeError: a floating array.
    """
    if seed is None or isinstance(seed, int):
        return seed
    if ops.is_array(seed):
        if is_floating(dtype_name(seed.dtype)):
            raise DtypeError(
                f"`seed` must be an integer. Received: {described(seed)}. Cast it first."
            )
        return seed
    if is_integer(seed):
        return operator.index(seed)
    raise ArgumentError(
        f"`seed` must be an int, or an integer array of {ops.name}. Received: {_received(seed)}. "
        "Pass an int."
    )


def check_weights(ops: Ops, config: AttentionConfig, weights: Mapping[str, Any]) -> None:
    """Weights have the names and the shapes that the config gives them; biases may be absent.

    Raises:
        WeightsError: a name is unknown or missing, or a shape is another.
        MixedBackendsError: an array of another framework.
    """
    check_arrays(ops, weights)
    kernels = [f"{name}.kernel" for name in ("query", "key", "value", "output")]
    missing = [name for name in kernels if name not in weights]
    if missing:
        raise WeightsError(
            f"`weights` must have {', '.join(kernels)}. Received: {_names(weights)}. "
            f"Add {', '.join(missing)}."
        )
    widths = [weights[f"{name}.kernel"].shape[0] for name in ("query", "value", "key")]
    shapes = config.weight_shapes(*widths)
    unknown = [name for name in weights if name not in shapes]
    if unknown:
        raise WeightsError(
            f"`weights` must have names out of {_names(shapes)}, those of the config. Received "
            f"also: {', '.join(unknown)}. Leave them out, or change the config."
        )
    for name, array in weights.items():
        if tuple(array.shape) != shapes[name]:
            raise WeightsError(
                f"`{name}` must have shape {shapes[name]}. Received: {described(array)}. "
                "Pass such an array, or change the config."
            )


def is_integer(value: Any) -> bool:
    """Whether a value is one integer, a NumPy one included, and not an array of a framework."""
    return hasattr(value, "__index__") and not getattr(value, "shape", ())


def _differ(length: Dim, other: Dim) -> bool:
    return is_known(length) and is_known(other) and length != other


def _names(weights: Mapping[str, Any]) -> str:
    return ", ".join(weights) or "none"


def _kind(value: Any) -> str:
    """The type of a value, for an error message."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _received(value: Any) -> str:
    """What a value is, for an error message: the value, or an array's type, dtype and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return repr(value)
    return f"{_kind(value)} of {described(value)}"
