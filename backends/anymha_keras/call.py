"""What of a call is Keras's: shapes without arrays, and masks, attached to arrays or in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

# Keras has no public names for these, by which its own attention layer reads and passes on masks.
from keras.src.backend import get_keras_mask, set_keras_mask

from anymha.errors import DtypeError
from anymha.layer.checks import check_inputs, check_masks, unpack_inputs
from anymha.options.config import AttentionConfig

Shape = tuple[int | None, ...]
MASKS = ("query_mask", "value_mask", "key_mask", "attention_mask")


def unpack_shapes(query: Any, value: Any, key: Any) -> tuple[Shape, Shape, Shape]:
    """The shapes of query, value and key, out of a list in the first place where there is one."""
    if query and isinstance(query[0], (tuple, list)):
        query, value, key = unpack_inputs(list(query), value, key)
    value = query if value is None else value
    key = value if key is None else key
    return tuple(query), tuple(value), tuple(key)


def any_shape(config: AttentionConfig, width: int) -> Shape:
    """A shape of inputs of that width, of a rank that has all the attention axes."""
    axes: Any = config.attention_axes or (1,)
    rank = max(3, *(axis + 2 if axis >= 0 else -axis for axis in axes))
    return (*[None] * (rank - 1), width)


def result_shapes(
    config: AttentionConfig,
    shapes: Sequence[Shape],
    widths: Sequence[int | None],
    masks: Mapping[str, Any],
) -> tuple[Shape, Shape]:
    """The shapes of output and scores.

    Args:
        config: The options.
        shapes: Of query, value and key.
        widths: The widths that the kernels take, as far as they are there.
        masks: Masks and bias by name.

    Raises:
        ShapeError: shapes do not fit.
    """
    query, value, key = (keras.KerasTensor(shape) for shape in shapes)
    axes = check_inputs(config, query, value, key, widths)
    batch, queries = axes.split(query.shape)
    keys = axes.split(value.shape)[1]
    check_masks(masks, batch, config.num_heads, queries, keys)
    out: Any = query.shape[-1:] if config.output_shape is None else config.output_shape
    return (*query.shape[:-1], *out), (*batch, config.num_heads, *queries, *keys)


def as_tensor(x: Any) -> Any:
    """An array of NumPy as a tensor of Keras's backend, which `stateless_call` does not make."""
    if not isinstance(x, np.ndarray) or keras.config.backend() == "numpy":  # whose tensors they are
        return x
    return keras.ops.convert_to_tensor(x)


def of_words(seed: Any) -> Any:
    """A seed; for two words, as `keras.random.SeedGenerator.next` gives them, one integer."""
    shape, dtype = getattr(seed, "shape", ()), str(getattr(seed, "dtype", ""))
    # JAX takes the words of a key, and has no int64.
    if keras.config.backend() == "jax" or tuple(shape) != (2,) or "int" not in dtype:
        return seed
    words: Any = keras.ops.cast(seed, "int64")
    return words[0] * 2**32 + words[1] % 2**32


def all_masks(given: Mapping[str, Any], query: Any, value: Any, key: Any) -> dict[str, Any]:
    """The boolean masks of a call: those passed, else those attached to the inputs.

    For a list of inputs Keras passes a list of masks, which does not count.
    """
    masks = {n: None if isinstance(m, (list, tuple)) else m for n, m in given.items()}
    for name, array in (("query_mask", query), ("value_mask", value), ("key_mask", key)):
        if masks[name] is None and not (name == "key_mask" and key is value):
            masks[name] = get_keras_mask(array)
    return {n: None if m is None else as_boolean(m, n) for n, m in masks.items()}


def with_mask(result: Any, mask: Any) -> Any:
    """The result of a call, a mask attached to its output if there is one."""
    if mask is not None:
        set_keras_mask(result[0] if isinstance(result, tuple) else result, mask)
    return result


def as_boolean(mask: Any, name: str) -> Any:
    """A mask of booleans, or of 0 and 1 as Keras's users have them, as booleans.

    Raises:
        DtypeError: a floating mask that holds other numbers, as an additive mask does. It can be
            seen only where values are known: not in a compiled program.
    """
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype == "bool" or isinstance(mask, keras.KerasTensor):
        return mask
    if "float" in dtype and not _holds_0_and_1(mask):
        raise DtypeError(
            f"`{name}` must be boolean, True = may attend. Received: dtype {dtype}, shape "
            f"{tuple(mask.shape)}, with numbers other than 0 and 1. Pass an additive mask as "
            "`attention_bias`."
        )
    return keras.ops.cast(mask, "bool")


def _holds_0_and_1(mask: Any) -> bool:
    """Whether all values are 0 or 1, as far as they are known."""
    try:
        values: Any = keras.ops.convert_to_numpy(mask)
    except Exception:  # each framework has its own for values that a traced program cannot see
        return True
    return bool(np.isin(values, (0, 1)).all())
