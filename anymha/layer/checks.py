"""What is checked of a call before anything is computed."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anymha.attention.masks import FAR, check_boolean
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError, WeightsError
from anymha.framework.dtypes import FLOATING, dtype_name, is_floating
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import check_broadcast, described, is_known, kind_of, received, show
from anymha.layer.arguments import ARRAYS, BY_NAME, Kind
from anymha.layer.axes import PLAIN, Axes, resolve_axes
from anymha.options.config import AttentionConfig

NUMPY: Any = (np.ndarray, np.generic)
_FLOATING = (Kind.INPUT, Kind.BIAS)
_INTEGER = (Kind.POSITIONS, Kind.SEGMENTS)
_OTHER = {"mask": Kind.MASK, "bias": Kind.BIAS}
"""The arrays of `dot_product_attention` that a layer's call does not have."""


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
                f"Received: {len(query)} members, value={kind_of(value)}, key={kind_of(key)}."
            )
        query, value, key = (*query, None, None)[:3]
    value = query if value is None else value
    return query, value, value if key is None else key


class Lengths(NamedTuple):
    """The axes of a call's inputs, and the lengths of these.

    Args:
        axes: Which axes are batch, and which are attended over.
        batch: Lengths of the batch axes.
        queries: Lengths of the attention axes of the query.
        keys: Lengths of the attention axes of key and value.
    """

    axes: Axes
    batch: tuple[Dim, ...]
    queries: tuple[Dim, ...]
    keys: tuple[Dim, ...]


def check_call(
    ops: Ops,
    config: AttentionConfig,
    widths: Sequence[int | None],
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
) -> Lengths:
    """Everything that is checked of a call's arrays; `widths` as for `check_inputs`.

    Raises:
        AnymhaError: as `check_arrays`, `check_inputs` and `check_masks` say.
    """
    query, value, key = inputs
    arrays = {"query": query}
    if value is not query:
        arrays["value"] = value
    if key is not query and key is not value:
        arrays["key"] = key
    check_arrays(ops, {**arrays, **masks})
    return check_shapes(ops, config, widths, inputs, masks)


def check_shapes(
    ops: Ops,
    config: AttentionConfig,
    widths: Sequence[int | None],
    inputs: tuple[Any, Any, Any],
    masks: Mapping[str, Any],
) -> Lengths:
    """What is checked of a call whose arrays have the dtypes of one that was good.

    Raises:
        AnymhaError: as `check_inputs`, `check_masks` and `check_segments` say.
    """
    query, value, key = inputs
    lengths = lengths_of(ops, check_inputs(config, query, value, key, widths), query, value)
    if masks:
        check_masks(masks, lengths.batch, config.num_heads, lengths.queries, lengths.keys)
        check_segments(masks, value is query, "in self-attention")
    return lengths


def check_segments(arrays: Mapping[str, Array], default: bool, where: str) -> None:
    """The ids of segments are there for queries and keys, in one dtype.

    Args:
        arrays: The call's arrays by name.
        default: Whether the keys' ids may be left out, being the queries'.
        where: Where they may be, in words.

    Raises:
        ArgumentError: those of queries or of keys are missing.
        DtypeError: the two have different dtypes.
    """
    ids, key_ids = arrays.get("segment_ids"), arrays.get("key_segment_ids")
    if ids is None and key_ids is None:
        return
    if ids is None or (key_ids is None and not default):
        lacking = "segment_ids" if ids is None else "key_segment_ids"
        raise ArgumentError(
            f"`segment_ids` and `key_segment_ids` must be given together; {where} the second is by "
            f"default the first. Received: no `{lacking}`. Pass it."
        )
    if key_ids is not None and key_ids.dtype != ids.dtype:
        raise DtypeError(
            "`segment_ids` and `key_segment_ids` must have one dtype. Received: "
            f"{dtype_name(ids.dtype)} and {dtype_name(key_ids.dtype)}. Cast one."
        )


def lengths_of(ops: Ops, axes: Axes, query: Array, value: Array) -> Lengths:
    """The lengths of inputs that fit each other."""
    shape, other = ops.shape(query), ops.shape(value)
    if axes is PLAIN:
        return Lengths(axes, (shape[0],), (shape[1],), (other[1],))
    batch, queries = axes.split(shape)
    return Lengths(axes, batch, queries, axes.split(other)[1])


def check_arrays(ops: Ops, arrays: Mapping[str, Any]) -> None:
    """Each array is of this framework, masks are boolean, inputs, biases and weights floating.

    Raises:
        MixedBackendsError: an array of another framework.
        ArgumentError: no array at all.
        DtypeError: a wrong dtype.
    """
    for name, array in arrays.items():
        if not ops.is_array(array):
            if array is None:
                raise ArgumentError(
                    f"`{name}` must be an array of {ops.name}. Received: none. Pass it."
                )
            if type(array).__module__.partition(".")[0] == ops.name:
                raise ArgumentError(
                    f"`{name}` must be a dense array of {ops.name}. Received: {kind_of(array)}. "
                    "Make it dense; fill up rows of different lengths, and pass `value_mask`, True "
                    "for what was there."
                )
            foreign = hasattr(array, "shape") and hasattr(array, "dtype")
            raise (MixedBackendsError if foreign else ArgumentError)(
                f"`{name}` must be an array of {ops.name}, the framework of this call. "
                f"Received: {kind_of(array)}. Convert it first: one call takes arrays of one "
                "framework."
            )
        argument = BY_NAME.get(name)
        kind = _OTHER.get(name, Kind.INPUT) if argument is None else argument.kind
        if kind is Kind.MASK:
            check_boolean(array, name)
        elif kind in _INTEGER:
            dtype = dtype_name(array.dtype)
            if "int" not in dtype or dtype.startswith("u"):  # whose differences wrap
                raise DtypeError(
                    f"`{name}` must be signed integers. "
                    f"Received: {described(array)}. Cast it first."
                )
        elif (kind in _FLOATING or "." in name) and not _is_floating(array):
            raise DtypeError(
                f"`{name}` must be floating (float16, bfloat16, float32 or float64). "
                f"Received: {described(array)}. Cast it first."
            )


_KNOWN = {f"{prefix}{name}" for prefix in ("", "torch.") for name in FLOATING}


def _is_floating(array: Array) -> bool:
    return str(array.dtype) in _KNOWN or is_floating(dtype_name(array.dtype))


def check_inputs(
    config: AttentionConfig, query: Array, value: Array, key: Array, widths: Sequence[int | None]
) -> Axes:
    """The axes of the inputs, once their shapes fit each other and the kernels.

    `widths` are D_q, D_v and D_k of the kernels; None where there is none yet.

    Raises:
        ShapeError: ranks, batch axes, lengths or widths do not fit.
    """
    shape = query.shape
    if config.attention_axes is None and len(shape) == 3:
        axes = PLAIN
        if value is query and key is query and tuple(widths) == (shape[2],) * 3:
            return axes
    else:
        named_axes: Any = config.attention_axes  # a tuple or None, once the config has checked it
        axes = resolve_axes(named_axes, len(shape))
    named = {"query": query, "value": value, "key": key}
    for (name, array), width in zip(named.items(), widths, strict=True):
        own = array.shape
        if len(own) != len(shape):
            raise ShapeError(
                f"`{name}` must have as many axes as `query`. Received: `{name}` of "
                f"{described(array)}, and `query` of {described(query)}. Add or take away axes."
            )
        if width is not None and own[-1] != width and _differ(own[-1], width):
            raise ShapeError(
                f"`{name}` must have {width} features in its last axis, as the layer's weights "
                f"have. Received: {described(array)}. Pass such an array, or make a layer of "
                f"`{name}_features={array.shape[-1]}`."
            )
        if any(own[i] != shape[i] and _differ(own[i], shape[i]) for i in axes.batch):
            raise ShapeError(
                f"`{name}` must have the lengths of `query` in the batch axes, "
                f"{', '.join(map(str, axes.batch))}. Received: `{name}` of {described(array)}, "
                f"and `query` of {described(query)}. Repeat the shorter one."
            )
    if key is not value and any(_differ(key.shape[i], value.shape[i]) for i in axes.attention):
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
    lengths = {"B": tuple(batch), "H": (heads,), "T": tuple(queries), "S": tuple(keys)}
    for argument in ARRAYS:
        if argument.name not in arrays:
            continue
        array = arrays[argument.name]
        forms = [sum((lengths[axis] for axis in form), ()) for form in argument.axes]
        shape = forms[0]
        if argument.kind is not Kind.BIAS:
            shape = next((form for form in forms if len(form) == len(array.shape)), None)
            if shape is None:
                several = argument.kind is Kind.MASK and len(forms) > 1
                order = ": queries and keys; batch before them; heads between" if several else ""
                raise ShapeError(
                    f"`{argument.name}` must have shape {' or '.join(map(show, forms))}{order}. "
                    f"Received: {described(array)}. {argument.hint}"
                )
        of_keys = (*lengths["B"], *lengths["S"]) if argument.name == "attention_mask" else None
        check_broadcast(array, shape, argument.name, of_keys)


def check_offset(ops: Ops, offset: Any, batch: Dim | None) -> Any:
    """The query offset of a call: an int, or an integer array of rank 0 or of shape (B,).

    An int that passes all keys is brought within 32 bits, where it means the same.

    `batch` is B; None where it is not known yet.

    Raises:
        ArgumentError: it is neither.
        ShapeError: it has another shape.
    """
    offset = _of_framework(ops, offset)
    if ops.is_array(offset) and "int" in dtype_name(offset.dtype):
        if batch is not None:
            check_broadcast(offset, (batch,), "query_offset")
        return offset
    if not isinstance(offset, bool) and is_integer(offset):
        return min(max(operator.index(offset), -FAR), FAR)
    raise ArgumentError(
        f"`query_offset` must be an int, or an integer array (B,) of {ops.name}. "
        f"Received: {received(offset)}. Pass an int."
    )


def check_seed(ops: Ops, seed: Any) -> Any:
    """The seed of a call: None, an int, or one integer or one key as an array of the framework.

    NumPy's integers, one in an array too, are ints in every framework.

    Raises:
        ArgumentError: it is none of these.
        DtypeError: an array of other numbers.
        ShapeError: an array of several integers or keys, or of none.
    """
    seed = _of_framework(ops, seed)
    number = seed.item() if isinstance(seed, NUMPY) and seed.size == 1 else seed
    if number is None or isinstance(number, int):
        return number
    if ops.is_array(seed):
        return _one_seed(ops, seed)
    if is_integer(seed):
        with contextlib.suppress(TypeError, AttributeError):  # a floating array of another
            return operator.index(seed)
    raise ArgumentError(
        f"`seed` must be an int, or an integer array of {ops.name}. Received: {received(seed)}. "
        "Pass an int."
    )


def _of_framework(ops: Ops, value: Any) -> Any:
    """`value`; an array of NumPy's as one of the framework where torch compiles and it is both."""
    return ops.asarray(value) if isinstance(value, NUMPY) and ops.is_array(value) else value


def _one_seed(ops: Ops, seed: Array) -> Array:
    """An array of one integer as a scalar; a key, or the words of one, as it is."""
    name, shape = dtype_name(seed.dtype), tuple(seed.shape)
    is_key = name.startswith("key<")
    if not is_key and "int" not in name and name != "bool":
        raise DtypeError(f"`seed` must be an integer. Received: {described(seed)}. Cast it first.")
    if shape == ():
        return seed
    make = ops.capabilities.seed_array
    words = None if make is None else make(0)  # of a key, which has several in JAX alone
    if words is not None and words.shape == seed.shape and words.dtype == seed.dtype:
        return seed
    if is_key or any(is_known(n) and n != 1 for n in shape):
        raise ShapeError(
            "`seed` must be one integer, or one key of the framework. Received: "
            f"{described(seed)}. Pass an int."
        )
    return ops.reshape(seed, ())


def check_weights(ops: Ops, config: AttentionConfig, weights: Mapping[str, Any]) -> None:
    """Weights have the names and the shapes that the config gives them; biases may be absent.

    Raises:
        WeightsError: a name is unknown or missing, or a shape is another.
        MixedBackendsError: an array of another framework.
    """
    check_arrays(ops, weights)
    needed = [f"{name}.kernel" for name in config.projections]
    needed += [name for name in config.feature_weights if not name.endswith(".bias")]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise WeightsError(
            f"`weights` must have {', '.join(needed)}. Received: {_names(weights)}. "
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
    return hasattr(value, "__index__") and getattr(value, "shape", ()) == ()


def _differ(length: Dim, other: Dim) -> bool:
    return is_known(length) and is_known(other) and length != other


def _names(weights: Mapping[str, Any]) -> str:
    return ", ".join(weights) or "none"
