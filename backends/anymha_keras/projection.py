"""One projection's kernel and bias as a Keras layer, with what Keras does to them."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from anymha.errors import WeightsError
from anymha.framework.dtypes import dtype_name
from anymha.options.config import AttentionConfig
from anymha.options.serialization import described


class Projection(keras.layers.EinsumDense):
    """A kernel and, maybe, a bias, where `keras.layers.MultiHeadAttention` has them.

    It can be called, takes LoRA, and can be quantised. The attention layer calls it, unless it is
    plain: then the layer computes the same from its kernel and bias.
    """

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Quantise as `keras.layers.EinsumDense`, which by default refuses classes made from it."""
        super().quantize(
            mode, type_check=type_check and type(self) is not Projection, config=config
        )


_CALL = keras.layers.EinsumDense.call


# On torch a layer is a module, too: the names of its dicts of hooks, beside those of all modules.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(dense: Any) -> bool:
    """Whether calling a projection is no more than one product with its kernel and its bias.

    LoRA is: it makes the kernel another one.
    """
    own = vars(dense)
    return (
        type(dense) is Projection
        and Projection.call is _CALL
        and "call" not in own
        and "forward" not in own
        and dense.quantization_mode is None
        and dense.activation is keras.activations.linear
        and dense.activity_regularizer is None
        and not any(own.get(name) for name in _HOOKS)
    )


def check_readable(name: str, dense: Any) -> None:
    """Refuse the weights of what stands in the place of a projection, or computes more than it.

    Raises:
        WeightsError: it is no projection of ours, is quantised, or has an activation or a call of
            its own.
    """
    if not isinstance(dense, Projection):
        raise WeightsError(
            f"`{name}` must be the layer's own projection for its weights to be read or written. "
            f"Received: {type(dense).__module__}.{type(dense).__qualname__} in its place."
        )
    if dense.quantization_mode is not None:
        raise WeightsError(
            f"`{name}` must not be quantised for its weights to be read or written: its kernel is "
            f"rounded to {dense.quantization_mode}. Read the weights before `quantize`."
        )
    own_call = type(dense).call is not _CALL or "call" in vars(dense)
    if own_call or dense.activation is not keras.activations.linear:
        raise WeightsError(
            f"`{name}` must compute ``x . kernel + bias`` for its weights to be read or written. "
            f"Received: a projection with {'a `call`' if own_call else 'an activation'} of its "
            "own, which the weights alone do not tell. Remove it first."
        )


def check_writable(name: str, dense: Any) -> None:
    """Refuse to set the weights of a projection that are not its variables.

    Raises:
        WeightsError: it has LoRA, or is no projection of ours any more.
    """
    check_readable(name, dense)
    if getattr(dense, "lora_enabled", False):
        raise WeightsError(
            f"The kernel of `{name}` cannot be set: LoRA is enabled, and makes it of three "
            "variables at each call. Set the weights before `enable_lora`, or save and load the "
            "layer, which merges them."
        )


def make_projection(
    config: AttentionConfig,
    name: str,
    shape: tuple[int, ...],
    rank: int,
    initializer: Callable[[str], Any],
    dtype: Any,
) -> Projection:
    """The projection of that canonical name, not built yet.

    Args:
        config: The options, of which regularisers and constraints count here.
        name: "query", "key", "value", "output" or "gate".
        shape: The kernel's.
        rank: The number of axes of the inputs. Keras quantises no equation that leaves it open.
        initializer: Gives that of the weight of a canonical name.
        dtype: A dtype policy of Keras.
    """
    inner = 2 if name == "output" else 1
    free, kernel = string.ascii_lowercase[: rank - 1], string.ascii_lowercase[rank - 1 :]
    kernel = kernel[: len(shape)]
    biased = name in config.biased
    return Projection(
        f"{free}{kernel[:inner]},{kernel}->{free}{kernel[inner:]}",
        output_shape=(*(None,) * (rank - 2), *shape[inner:]),
        bias_axes=kernel[inner:] if biased else None,
        kernel_initializer=initializer(f"{name}.kernel"),
        bias_initializer=initializer(f"{name}.bias") if biased else "zeros",
        kernel_regularizer=_kernel_regularizer(config, inner),
        bias_regularizer=keras.regularizers.get(described(config.bias_regularizer)),
        kernel_constraint=keras.constraints.get(described(config.kernel_constraint)),
        bias_constraint=keras.constraints.get(described(config.bias_constraint)),
        dtype=dtype,
        name="attention_output" if name == "output" else name,
    )


class Values(keras.initializers.Initializer):
    """An initialiser that gives values which are known already."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """The values, rounded to `dtype`."""
        return keras.ops.convert_to_tensor(rounded(self.values, dtype), dtype=dtype)


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The values rounded once, by NumPy, to a dtype; half precision is given as float32."""
    found = np.asarray(values).astype(dtype_name(dtype))
    return found if found.dtype.itemsize > 2 else found.astype(np.float32)


def copied(initializer: keras.initializers.Initializer) -> keras.initializers.Initializer:
    """A copy, which without a seed of its own draws other numbers."""
    return type(initializer).from_config(initializer.get_config())


def _kernel_regularizer(config: AttentionConfig, inner: int) -> Any:
    found = keras.regularizers.get(described(config.kernel_regularizer))
    if getattr(config.kernel_regularizer, "as_matrix", False):
        return _OfMatrix(found, inner)
    return found


class _OfMatrix(keras.regularizers.Regularizer):
    """A regulariser of matrices, of a kernel as the projection's matrix."""

    def __init__(self, regularizer: Any, inner: int) -> None:
        self.regularizer = regularizer
        self.inner = inner

    def __call__(self, x: Any) -> Any:
        rows = math.prod(x.shape[: self.inner])
        return self.regularizer(keras.ops.reshape(x, (rows, -1)))
