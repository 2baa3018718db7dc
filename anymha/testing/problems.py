"""Problems of the layer on a module of functions, and their judgement."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from anymha.framework.protocol import Ops
from anymha.parity.matrix.judge import judge
from anymha.parity.matrix.run import Result
from anymha.parity.oracle.cases import MATRIX, Arrays, MatrixCase, OracleProblem, make_problem
from anymha.parity.oracle.truth import expected
from anymha.parity.stages.layer_call import gradients_of, layer_function, native
from anymha.testing.calls import Returned, must

CASES = tuple(case for case in MATRIX if math.prod(case.query) < 1000)
"""The matrix of cases of the parity run, but the large ones."""


def dtypes(case: MatrixCase) -> tuple[str, ...]:
    """The dtypes that a backend needs for the case."""
    return tuple(filter(None, (case.config.dtype, case.config.compute_dtype)))


def changed(problem: OracleProblem, **arrays: np.ndarray) -> OracleProblem:
    """The problem with other inputs or weights."""
    inputs, weights = dict(problem.inputs), dict(problem.weights)
    for name, array in arrays.items():
        (weights if name in weights else inputs)[name] = array
    return dataclasses.replace(problem, inputs=inputs, weights=weights)


def forward(ops: Ops, problem: OracleProblem, *, scores: bool = False, **call: Any) -> Any:
    """What the layer gives, as NumPy: the output, or with `scores` the output and the scores."""
    layer, arrays = _layer(ops, problem, scores=scores, **call)
    given = layer(ops, arrays)
    return tuple(map(ops.to_numpy, given)) if scores else ops.to_numpy(given)


def gradients(ops: Any, problem: OracleProblem) -> Arrays:
    """The gradients of weights and inputs for the problem's cotangents, as NumPy.

    A backend without `vjp` is differentiated by the tape, through its own functions.
    """
    layer, arrays = _layer(ops, problem, scores=True)
    cotangents = (ops.from_numpy(problem.d_output), ops.from_numpy(problem.d_scores))
    return gradients_of(ops, layer, arrays, cotangents)


def agree(ops: Ops, problem: OracleProblem, result: Arrays, pulled: Arrays) -> None:
    """Fail unless results and gradients are the oracle's but for rounding."""
    __tracebackhide__ = True
    held = {ops.name: Result(result, pulled, flag_matters=False)}
    faults = judge(problem, expected(problem), held).cells[ops.name].faults
    must(not faults, f"{ops.name}, case {problem.case.name!r}: {'; '.join(faults)}.")


def same_bits(title: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Fail unless both are equal bit for bit, but for the sign of zero."""
    __tracebackhide__ = True
    Returned(title, got).equals(expected)


def _layer(
    ops: Ops, problem: OracleProblem, scores: bool, **call: Any
) -> tuple[Any, dict[str, Any]]:
    """The layer as a function of the functions and of a dict of arrays, and that dict."""
    others = native(ops, {**problem.masks, **problem.case.call, **call})
    others["return_attention_scores"] = scores
    layer = layer_function(problem.case.config, problem.weights, others)
    return layer, native(ops, {**problem.weights, **problem.inputs})


__all__ = [
    "CASES", "MatrixCase", "OracleProblem", "agree", "changed", "dtypes", "forward", "gradients",
    "make_problem", "same_bits",
]  # fmt: skip
