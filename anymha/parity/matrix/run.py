"""A problem on a backend: forward through the native layer, gradients through its autodiff.

Where the backend has none, as NumPy, `anymha.framework.autodiff` gives the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.framework.registry import Backend
from anymha.interchange.layers import set_weights
from anymha.parity.oracle.cases import Arrays, OracleProblem
from anymha.parity.stages.layer_call import gradients_of, layer_function, native
from anymha.parity.stages.trace import INPUTS


@dataclass(frozen=True)
class Result:
    """The results of a backend, as NumPy arrays in its dtypes."""

    forward: Arrays  # "output" and "scores"
    gradients: Arrays  # By the names of weights and inputs
    flag_matters: bool  # Whether the output changes, in any bit, with `return_attention_scores`


@dataclass(frozen=True)
class Skipped:
    """A problem that a backend cannot run."""

    reason: str  # Why, in words


def lacking_dtype(ops: Any, problem: OracleProblem) -> str | None:
    """Why a backend cannot run a problem: it lacks one of its dtypes; None where it has both."""
    config = problem.case.config
    for name in dict.fromkeys((config.dtype, config.compute_dtype or config.dtype)):
        reason = None if name == "float32" else why_no_dtype(ops, name)  # every backend has it
        if reason is not None:
            return f"it lacks {name}: {reason}"
    return None


def why_no_dtype(ops: Any, name: str) -> str | None:
    """Why a backend lacks a dtype; None where it has it."""
    try:
        dtype = ops.dtype(name)
    except Exception as error:  # of any framework, in its own words
        return f"ops.dtype({name!r}) raised {type(error).__name__}: {error}"
    return f"ops.dtype({name!r}) gave None" if dtype is None else None


def run(backend: Backend, problem: OracleProblem) -> Result:
    """The problem's results on a backend."""
    ops, config = backend.ops, problem.case.config
    weights, inputs = native(ops, problem.weights), native(ops, problem.inputs)
    others = native(ops, {**problem.masks, **problem.case.call})
    function = layer_function(config, weights, {**others, "return_attention_scores": True})
    if backend.has_layer:
        layer = set_weights(backend.layer(**config.to_dict()), problem.weights)
        named = {name: array for name, array in inputs.items() if name not in INPUTS}
        three = [inputs.get(name) for name in INPUTS]
        forward = layer(*three, **named, **others, return_attention_scores=True)
        alone = layer(*three, **named, **others)
    else:
        forward = function(ops, weights | inputs)
        alone = forward[0]
    cotangents = (ops.from_numpy(problem.d_output), ops.from_numpy(problem.d_scores))
    gradients = gradients_of(ops, function, weights | inputs, cotangents)
    output, scores = (ops.to_numpy(array) for array in forward)
    flag_matters = not np.array_equal(_bits(output), _bits(ops.to_numpy(alone)))
    return Result({"output": output, "scores": scores}, gradients, flag_matters)


def _bits(array: np.ndarray) -> np.ndarray:
    """The array's bytes, so that NaN equals itself and -0 differs from 0."""
    return np.ascontiguousarray(array).view(np.uint8)
