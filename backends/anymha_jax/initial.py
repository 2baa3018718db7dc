"""First weights from a JAX key, also where the key is traced: under `jit`, `vmap`, `eval_shape`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from anymha.errors import ArgumentError, ConfigError
from anymha.framework.dtypes import accumulation_dtype
from anymha.layer.native import first_weights
from anymha.layer.weights import STYLES, as_matrix, part_of, word_of
from anymha.options.config import AttentionConfig
from anymha_jax import float64, ops


def first_values(config: AttentionConfig, key: Any) -> dict[str, Any]:
    """The initial values of a layer's weights by canonical name.

    Args:
        config: The layer's options; its `seed` goes before the key.
        key: One JAX key, which stands for the integer of its words: ``jax.random.key(7)`` for 7.
            None for a seed of the operating system's.

    Returns:
        Float64 arrays of NumPy; of a traced key, traced arrays of the config's dtype.

    Raises:
        ArgumentError: `key` is not one JAX key.
    """
    if key is None or config.seed is not None:
        return first_weights(config, (), lambda: np.random.SeedSequence().entropy, ops)
    words = _words(key)
    if not isinstance(words, Tracer):
        return first_weights(config, (), lambda: _integer(words), ops)
    return _traced(config, words)


def _traced(config: AttentionConfig, words: jax.Array) -> dict[str, jax.Array]:
    """The values that the words stand for: NumPy's, so that a key gives the same ones anywhere."""
    dtype = np.dtype(ops.dtype(config.dtype))
    functions = _functions(config)

    def kind(name: str) -> str:  # the option that has the initialiser of a weight
        return f"{part_of(config, name)}_initializer"

    plain = dataclasses.replace(config, **dict.fromkeys(functions, "zeros"))
    # A callback has no float64 in a float32 program; its bits have.
    split = dtype == np.float64

    def draw(words: Any) -> dict[str, Any]:
        values = first_weights(plain, (), lambda: _integer(words), ops)
        drawn = {name: value.astype(dtype) for name, value in values.items()}
        if split:
            drawn = {name: value[..., None].view(np.uint32) for name, value in drawn.items()}
        own = {n: np.uint32(word_of(n, _integer(words))) for n in values if kind(n) in functions}
        return drawn | own

    word = jax.ShapeDtypeStruct((), np.uint32)
    shapes = {
        name: jax.ShapeDtypeStruct((*shape, 2) if split else shape, np.uint32 if split else dtype)
        for name, shape in config.weight_shapes().items()
    } | {n: word for n in config.weight_shapes() if kind(n) in functions}
    drawn = jax.pure_callback(draw, shapes, words, vmap_method="sequential")
    with jax.enable_x64(split or float64.exists()):
        for name, shape in config.weight_shapes().items():
            if kind(name) in functions:
                key = jax.random.key(drawn[name])
                working = jnp.dtype(accumulation_dtype(config.dtype))
                values = functions[kind(name)](key, as_matrix(name, shape), working)
                drawn[name] = jnp.reshape(values, shape).astype(dtype)
            elif split:
                drawn[name] = jax.lax.bitcast_convert_type(drawn[name], jnp.float64)
    return drawn


def _words(key: Any) -> jax.Array:
    """The uint32 words of a key, the highest first."""
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return jax.random.key_data(key)
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return key
    shape = f", shape {key.shape}" if hasattr(key, "shape") else ""
    raise ArgumentError(
        "`key` must be one JAX key. Received: "
        f"{type(key).__module__}.{type(key).__qualname__}{shape}. Pass e.g. "
        "key=jax.random.key(0), or an int as `seed`."
    )


def _integer(words: Any) -> int:
    return int.from_bytes(np.asarray(words).astype(">u4").tobytes(), "big")


def _functions(config: AttentionConfig) -> dict[str, Any]:
    """The initialisers that are functions of the user's, by option.

    Raises:
        ConfigError: one takes no key, and so cannot draw from one that is traced.
    """
    found = {}
    for name in ("kernel_initializer", "bias_initializer"):
        initializer = getattr(config, name)
        if not dataclasses.is_dataclass(initializer):
            if "key" not in inspect.signature(initializer).parameters:
                raise ConfigError(
                    f"`{name}` is a function, which to draw from a traced key must be callable as "
                    f"{STYLES['key']}. Received: {initializer!r}. Pass `seed`, or make the layer "
                    "outside of the transformation."
                )
            found[name] = initializer
    return found
