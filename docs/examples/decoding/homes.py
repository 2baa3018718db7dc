"""The homes of the layer: what the model needs of each."""

# ruff: noqa: PLC0415  # a framework is imported where it is asked for

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

NAMES = ("numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox")


Step = Callable[..., Any]
"""A function of layers, and of arrays and caches after them."""


@dataclass(frozen=True)
class Home:
    """A framework, as the model sees it.

    Args:
        xp: Its functions, by NumPy's names.
        array: From NumPy to its arrays.
        prepared: What it does to a `Step` that is called often.
        numpy: From its arrays to NumPy.
    """

    xp: Any
    array: Callable[[np.ndarray], Any]
    prepared: Callable[[Step], Step]
    numpy: Callable[[Any], np.ndarray] = np.asarray

    def of_layers(self, step: Step, layers: Any) -> Callable[..., Any]:
        """The prepared step, with the layers in it."""
        return partial(self.prepared(step), layers)


class Flax(Home):
    """Flax: `nnx.jit` would take the layers apart at each call."""

    def of_layers(self, step: Step, layers: Any) -> Callable[..., Any]:
        """The prepared step, with the layers in it."""
        from flax import nnx

        structure, state = nnx.split(layers)

        def pure(state: Any, *arguments: Any) -> Any:
            return step(nnx.merge(structure, state), *arguments)

        return partial(self.prepared(pure), state)


def home(name: str) -> Home:
    """The home of that name, its framework imported."""
    if name == "numpy":
        return Home(np, np.asarray, lambda step: step)
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

    if name == "equinox":
        import equinox

        return Home(jax.numpy, jax.numpy.asarray, equinox.filter_jit)
    kind = Flax if name == "flax" else Home
    return kind(jax.numpy, jax.numpy.asarray, jax.jit)
