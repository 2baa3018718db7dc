"""The attention of all six layers, converted from the model's file to any framework."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from model import HEADS, LAYERS, Attention

import anymha

LAYOUT = "transformers.bert"


def layers(path: Path, framework: str) -> list[Any]:
    """The native layers of a framework, with the weights of the model's file."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "attention.safetensors"
        anymha.convert_file(path, ours, layout=LAYOUT, num_heads=HEADS, verify=False)
        return [
            anymha.load(ours, framework, prefix=f"encoder.layer.{number}.attention.")
            for number in range(LAYERS)
        ]


def attention(path: Path, framework: str) -> list[Attention]:
    """The layers as functions of NumPy arrays."""
    to, back = _ways(framework)

    def function(layer: Any) -> Attention:
        return lambda hidden, mask: back(layer(to(hidden), value_mask=to(mask)))

    return [function(layer) for layer in layers(path, framework)]


def _ways(framework: str) -> tuple[Callable[..., Any], Callable[..., np.ndarray]]:
    """From NumPy to a framework's arrays, and back."""
    if framework == "torch":
        import torch  # noqa: PLC0415

        return torch.from_numpy, lambda array: array.detach().numpy()
    if framework == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        return tf.convert_to_tensor, np.asarray
    if framework == "keras":
        import keras  # noqa: PLC0415

        return keras.ops.convert_to_tensor, keras.ops.convert_to_numpy
    if framework in ("jax", "flax", "equinox"):
        import jax.numpy as jnp  # noqa: PLC0415

        return jnp.asarray, np.asarray
    return np.asarray, np.asarray
