"""Keras's layer on the backend of the process, and how its results come back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Arrays, Problem

NAMES = {"query": "query", "key": "key", "value": "value", "attention_output": "output"}
"""Keras's names of the projections, and the canonical ones."""


def make_layer(problem: Problem) -> Any:
    """`keras.layers.MultiHeadAttention` with the problem's weights."""
    import keras

    case = problem.case
    if keras.config.backend() != os.environ["KERAS_BACKEND"]:
        raise RuntimeError(f"Keras runs on {keras.config.backend()}")
    layer = keras.layers.MultiHeadAttention(
        case.heads, case.key_dim, dropout=case.dropout, dtype=case.dtype
    )
    shape = (case.batch, case.length, case.features)
    layer.build(shape, shape)
    for name, variable in zip(names(layer), layer.trainable_weights, strict=True):
        variable.assign(problem.weights[name])
    return layer


def names(layer: Any) -> list[str]:
    """The canonical names of the layer's weights, in Keras's order."""
    parts = [variable.path.split("/")[-2:] for variable in layer.trainable_weights]
    return [f"{NAMES[projection]}.{part}" for projection, part in parts]


def call_options(problem: Problem, convert: Any, training: bool) -> dict[str, Any]:
    """The arguments of the layer's call.

    Args:
        problem: The problem.
        convert: Makes an array of the framework out of one of NumPy.
        training: Whether dropout acts.
    """
    case = problem.case
    found: dict[str, Any] = {"use_causal_mask": case.mask == "causal", "training": training}
    if problem.attention_mask is not None:
        found["attention_mask"] = convert(problem.attention_mask)
    if problem.padding is not None:
        found["value_mask"] = convert(problem.padding)
    if case.scores:
        found["return_attention_scores"] = True
    return found


def gradients(layer: Any, arrays: Sequence[np.ndarray]) -> Arrays:
    """Gradients by canonical name."""
    return dict(zip(names(layer), arrays, strict=True))
