"""Tests of the layer's gradients: by the backend's own `vjp`, else by the tape of anymha."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anymha.parity.oracle.truth import expected
from anymha.testing.calls import must
from anymha.testing.capabilities import BackendTests
from anymha.testing.layer import CROSS, REAL, by_case
from anymha.testing.problems import (
    MatrixCase,
    agree,
    changed,
    dtypes,
    forward,
    gradients,
    make_problem,
    same_bits,
)

CHOSEN = ("cross", "everything", "dropout", "bfloat16", "float64", "reproducible")


class GradientTests(BackendTests):
    """Backward: of the weights, the inputs and the bias."""

    @by_case(CHOSEN)
    def test_gradients_agree_with_the_oracle(self, ops: Any, case: MatrixCase) -> None:
        """Of every weight and input, for cotangents of both output and scores."""
        self.need(ops, *dtypes(case))
        problem = make_problem(case)
        output, scores = forward(ops, problem, scores=True)
        pulled = gradients(ops, problem)
        names = {*problem.weights, *problem.inputs}
        must(set(pulled) == names, f"Gradients of {sorted(names - set(pulled))} are missing.")
        agree(ops, problem, {"output": output, "scores": scores}, pulled)

    @pytest.mark.parametrize("dtype", REAL)
    def test_fully_masked_row_has_zero_gradients(self, ops: Any, dtype: str) -> None:
        """Finite everywhere, and exactly zero for the query that attends to nothing."""
        self.need(ops, dtype)
        case = MatrixCase(
            "a row masked", {"dtype": dtype}, **CROSS, inputs={"attention_mask": (7, 9)}
        )
        problem = make_problem(case)
        problem.masks["attention_mask"][2:4] = False
        pulled = gradients(ops, problem)
        for name, gradient in pulled.items():
            must(np.all(np.isfinite(gradient)), f"The gradient of {name} is not finite.")
        masked = pulled["query"][:, 2:4]
        same_bits("the gradient of masked queries", masked, np.zeros_like(masked))

    @pytest.mark.parametrize("mask", ["value_mask", "key_mask"])
    def test_excluded_positions_have_zero_gradients(self, ops: Any, mask: str) -> None:
        """Also where they hold NaN."""
        problem = make_problem(MatrixCase("excluded", **CROSS, inputs={mask: (2, 9)}))
        unseen = ~problem.masks[mask]
        for name in ("value", "key"):
            array = problem.inputs[name].copy()
            array[unseen] = np.nan
            problem = changed(problem, **{name: array})
        pulled = gradients(ops, problem)
        for name, gradient in pulled.items():
            must(np.all(np.isfinite(gradient)), f"The gradient of {name} is not finite.")
        for name in ("value", "key"):
            got = pulled[name][unseen]
            same_bits(f"the gradient of excluded {name}", got, np.zeros_like(got))

    def test_reproducible_gradients_are_rounded_once(self, ops: Any) -> None:
        """They are the oracle's float64 gradients rounded to float32, in every bit."""
        self.need(ops, "float64")
        problem = make_problem(MatrixCase("gradients", {"compute_dtype": "float64"}, **CROSS))
        exact = expected(problem).gradients
        for name, gradient in gradients(ops, problem).items():
            if name != "key.bias":  # exactly zero, where the oracle's own sums leave noise
                wanted = exact[name].astype(np.float32)
                same_bits(f"the gradient of {name} in reproducible mode", gradient, wanted)
