"""The homes of the layer: what the model needs of each."""

# ruff: noqa: PLC0415  # a framework is imported where it is asked for

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NAMES = ("numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox")


@dataclass(frozen=True)
class Home:
    """A framework, as the model sees it.

    Args:
        xp: Its functions, by NumPy's names.
        array: From NumPy to its arrays.
        prepared: What it does to a function of arrays, layers and caches that is called often.
        numpy: From its arrays to NumPy.
    """

    xp: Any
    array: Callable[[np.ndarray], Any]
    prepared: Callable[[Callable[..., Any]], Callable[..., Any]]
    numpy: Callable[[Any], np.ndarray] = np.asarray


def home(name: str) -> Home:
    """The home of that name, its framework imported."""
    if name == "numpy":
        return Home(np, np.asarray, lambda function: function)
    if name == "torch":
        import torch

        return Home(torch, torch.from_numpy, torch.inference_mode())
    if name == "tensorflow":
        import tensorflow as tf

        return Home(tf.experimental.numpy, tf.constant, tf.function(jit_compile=True))
    if name == "keras":
        import torch
        from keras import ops

        return Home(ops, ops.convert_to_tensor, torch.no_grad(), ops.convert_to_numpy)
    import jax

    prepared = jax.jit
    if name == "flax":
        from flax import nnx

        prepared = nnx.jit
    if name == "equinox":
        import equinox

        prepared = equinox.filter_jit
    return Home(jax.numpy, jax.numpy.asarray, prepared)
