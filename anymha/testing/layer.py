"""Tests of the layer's rules on a backend: results and gradients, by the oracle or exactly.

Gradients come by the backend's own `vjp`, else by the tape of anymha.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from anymha.attention.features.softcap import Softcap
from anymha.attention.masks import PositionMask
from anymha.attention.spec import AttentionSpec
from anymha.errors import DtypeError, MixedBackendsError
from anymha.execution.attend import attend
from anymha.execution.path import Path
from anymha.framework.protocol import Ops
from anymha.framework.registry import get_backend
from anymha.parity.matrix.judge import judge
from anymha.parity.matrix.run import Result
from anymha.parity.oracle.cases import MATRIX, Arrays, MatrixCase, OracleProblem, make_problem
from anymha.parity.oracle.truth import expected
from anymha.parity.stages.layer_call import gradients_of, layer_function, native
from anymha.parity.stages.tolerance import tolerance
from anymha.testing.calls import Returned, must, values
from anymha.testing.capabilities import BackendTests

CASES = tuple(case for case in MATRIX if math.prod(case.query) < 1000)
"""The matrix of cases of the parity run, but the large ones."""
REAL = ("float16", "bfloat16", "float32", "float64")
FLAGGED = ("self", "everything", "every row masked", "dropout", "bfloat16", "reproducible")
CROSS: dict[str, Any] = {"value": (2, 9), "widths": (12, 10, 8)}


def by_case(names: tuple[str, ...] = ()) -> Any:
    """Run a test on the cases of these names, or on all."""
    chosen = [case for case in CASES if not names or case.name in names]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


class LayerTests(BackendTests):
    """Forward: values, masks, dropout, precision, refusals."""

    @by_case()
    def test_layer_agrees_with_the_oracle(self, ops: Any, case: MatrixCase) -> None:
        """Output and scores, in value, shape and dtype, are the float64 oracle's."""
        self.need(ops, *dtypes(case))
        problem = make_problem(case)
        output, scores = forward(ops, problem, scores=True)
        agree(ops, problem, {"output": output, "scores": scores}, {})

    @by_case(FLAGGED)
    def test_scores_flag_never_changes_the_output(self, ops: Any, case: MatrixCase) -> None:
        """The output is the same to the bit, whether the scores are asked for or not."""
        self.need(ops, *dtypes(case))
        problem = make_problem(case)
        with_scores = forward(ops, problem, scores=True)[0]
        same_bits("the output without scores", forward(ops, problem), with_scores)

    # --- masks -----------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", REAL)
    @pytest.mark.parametrize("dropping", [False, True], ids=["", "dropout"])
    def test_fully_masked_row_gives_exactly_the_output_bias(
        self, ops: Any, dtype: str, dropping: bool
    ) -> None:
        """And scores of exactly zero; the other rows are not touched."""
        self.need(ops, dtype)
        options = {"dtype": dtype, "dropout": 0.2 if dropping else 0.0}
        case = MatrixCase("a row masked", options, {"training": dropping, "seed": 3}, **CROSS)
        problem = make_problem(case)
        mask = np.ones((2, 7, 9), bool)
        mask[0, 2] = mask[1, 6] = False
        output, scores = forward(ops, problem, scores=True, attention_mask=mask)
        bias = problem.weights["output.bias"]
        for row in ((0, 2), (1, 6)):
            same_bits(f"the output of masked row {row}", output[row], bias)
            zeros = np.zeros((4, 9), scores.dtype)
            same_bits(f"the scores of masked row {row}", scores[row[0], :, row[1]], zeros)
        must(np.all(scores.sum((1, 3))[mask.any(2)] > 0), "A row that is not masked has no scores.")

    @pytest.mark.parametrize("filler", [math.nan, math.inf], ids=str)
    @pytest.mark.parametrize("mask", ["value_mask", "key_mask"])
    def test_excluded_positions_may_hold_anything(self, ops: Any, mask: str, filler: float) -> None:
        """What a padding mask excludes influences nothing, NaN and infinity included."""
        problem = make_problem(MatrixCase("excluded", **CROSS, inputs={mask: (2, 9)}))
        seen = problem.masks[mask][..., None]
        given = {name: problem.inputs[name] for name in ("value", "key")}
        holes = {n: np.where(seen, a, a.dtype.type(filler)) for n, a in given.items()}
        expected = forward(ops, problem, scores=True)
        got = forward(ops, changed(problem, **holes), scores=True)
        must(np.all(np.isfinite(got[0])), "What is excluded made the output NaN or infinite.")
        same_bits("the output", got[0], expected[0])
        same_bits("the scores", got[1], expected[1])

    def test_causal_mask_hides_the_future(self, ops: Any) -> None:
        """A change at position 4 changes no earlier output, not in one bit, and all later ones."""
        problem = make_problem(MatrixCase("causal", call={"use_causal_mask": True}))
        other = problem.inputs["query"].copy()
        other[:, 4] += 1
        before = forward(ops, problem)
        after = forward(ops, changed(problem, query=other))
        same_bits("outputs before the change", after[:, :4], before[:, :4])
        must(np.all(np.any(after[:, 4:] != before[:, 4:], axis=-1)), "Later outputs are the same.")

    @pytest.mark.parametrize("filler", [7.0, math.nan, math.inf], ids=str)
    def test_a_segment_changes_no_bit_of_another(self, ops: Any, filler: float) -> None:
        """Output and scores of the other segments of a row, whatever one of them holds."""
        problem, other, rest = _packed(filler)
        with np.errstate(invalid="ignore"):
            before = forward(ops, problem, scores=True)
            after = forward(ops, other, scores=True)
        must(np.all(np.isfinite(after[0][rest])), "Other segments became NaN or infinite.")
        same_bits("the output of other segments", after[0][rest], before[0][rest])
        scores = (x.swapaxes(1, 2)[rest] for x in (after[1], before[1]))
        same_bits("the scores of other segments", *scores)
        must(np.all(np.any(after[0][~rest] != before[0][~rest], -1)), "Its own output is the same.")

    def test_query_offset_moves_the_causal_mask(self, ops: Any) -> None:
        """The last queries alone, with an offset, give what they give among all."""
        problem = make_problem(MatrixCase("step", call={"use_causal_mask": True}))
        whole = problem.inputs["query"]
        step = changed(problem, query=whole[:, 5:], value=whole)
        exact = forward(ops, problem)[:, 5:]
        allowed = tolerance("float32", 12, float(np.max(np.abs(exact))) * 2)
        wanted = exact.astype(np.float64)
        for name, offset in (("an int", 5), ("an array", np.array([5, 5], np.int32))):
            got = forward(ops, step, query_offset=offset)
            Returned(f"the output with query_offset as {name}", got).is_near(wanted, allowed)

    def test_window_of_unequal_sides(self, ops: Any) -> None:
        """One key to the left and two to the right of the query's own position are seen."""
        scores = _attend(ops, PositionMask(left=1, right=2))[1]
        near = np.arange(6) - np.arange(4)[:, None]
        seen = np.broadcast_to((near >= -1) & (near <= 2), scores.shape)
        same_bits("scores above zero", scores > 0, seen)

    def test_softcap_bounds_the_logits(self, ops: Any) -> None:
        """Scores are those of ``c * tanh(logits / c)``."""
        query, key, _ = _heads()
        logits = np.einsum("bthd,bshd->bhts", query, np.repeat(key, 2, 2)).astype(np.float64)
        capped = np.exp(0.7 * np.tanh(0.5 * logits / 0.7))
        expected = capped / capped.sum(-1, keepdims=True)
        got = Returned("the scores under softcap", _attend(ops, PositionMask(), softcap=0.7)[1])
        got.is_near(expected, tolerance("float32", 6, 1.0), "float32")

    def test_log_sum_exp_is_that_of_the_logits(self, ops: Any) -> None:
        """The log of the sum of exponentials of what a query sees; -inf where it sees nothing."""
        query, key, value = _heads()
        logits = 0.5 * np.einsum("bthd,bshd->bhts", query, np.repeat(key, 2, 2)).astype(np.float64)
        seen = np.arange(6) - np.arange(4)[:, None] <= -2
        with np.errstate(divide="ignore"):
            expected = np.log(np.sum(np.exp(logits) * seen, axis=-1))
        spec = AttentionSpec(0.5, (), PositionMask(right=-2))
        arrays = map(ops.from_numpy, (query, key, value))
        lse = ops.to_numpy(
            attend(ops, spec, Path("whole", "the test's"), *arrays, with_lse=True)[2]
        )
        same_bits("lse that is -inf", np.isneginf(lse), np.isneginf(expected))
        finite = np.where(np.isneginf(expected), 0.0, expected)
        got = Returned("lse", np.where(np.isneginf(lse), lse.dtype.type(0), lse))
        got.is_near(finite, tolerance("float32", 6, float(np.max(np.abs(finite)))), "float32")

    # --- dropout ---------------------------------------------------------------------------------
    def test_dropout_acts_in_training_only(self, ops: Any) -> None:
        """Without `training` the seed does not matter; with it, another seed is another output."""
        problem = make_problem(MatrixCase("dropout", {"dropout": 0.4}))
        plain = forward(ops, problem)
        same_bits("the output, not training", forward(ops, problem, seed=1), plain)
        first, other = (forward(ops, problem, training=True, seed=seed) for seed in (1, 2))
        same_bits("the output of seed 1", forward(ops, problem, training=True, seed=1), first)
        must(np.any(first != plain), "Dropout changed nothing in training.")
        must(np.any(first != other), "Seeds 1 and 2 gave the same output.")

    # --- reproducible mode -----------------------------------------------------------------------
    @by_case(("reproducible", "reproducible, dropout"))
    def test_reproducible_mode_gives_the_bits_of_numpy(self, ops: Any, case: MatrixCase) -> None:
        """Float32 computed in float64 and rounded once is equal to NumPy's in every bit."""
        self.need(ops, "float64")
        problem = make_problem(case)
        expected = forward(get_backend("numpy").ops, problem, scores=True)
        got = forward(ops, problem, scores=True)
        same_bits("the output in reproducible mode", got[0], expected[0])
        same_bits("the scores in reproducible mode", got[1], expected[1])

    # --- refusals --------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ["float32", "int32"])
    def test_mask_that_is_not_boolean_is_refused(self, ops: Any, dtype: str) -> None:
        """Additive and 0/1 masks raise `DtypeError`."""
        problem = make_problem(MatrixCase("refused"))
        with pytest.raises(DtypeError, match="`attention_mask` must be boolean"):
            forward(ops, problem, attention_mask=np.ones((7, 7), dtype))

    def test_array_of_another_framework_is_refused(self, ops: Any) -> None:
        """`is_array` tells: one call takes arrays of one framework."""

        class Foreign:
            shape, dtype = (2, 7), "bool"

        problem = make_problem(MatrixCase("refused"))
        with pytest.raises(MixedBackendsError, match="`query_mask` must be an array of"):
            forward(ops, problem, query_mask=Foreign())


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

    def test_a_segment_changes_no_gradient_of_another(self, ops: Any) -> None:
        """Also where it holds NaN."""
        problem, other, rest = _packed(math.nan)
        with np.errstate(invalid="ignore"):
            before, after = (gradients(ops, p)["query"][rest] for p in (problem, other))
        must(np.all(np.isfinite(after)), "The gradient of other segments is not finite.")
        same_bits("the gradient of other segments", after, before)

    def test_reproducible_gradients_are_rounded_once(self, ops: Any) -> None:
        """They are the oracle's float64 gradients rounded to float32, in every bit."""
        self.need(ops, "float64")
        problem = make_problem(MatrixCase("gradients", {"compute_dtype": "float64"}, **CROSS))
        exact = expected(problem).gradients
        for name, gradient in gradients(ops, problem).items():
            if name != "key.bias":  # exactly zero, where the oracle's own sums leave noise
                wanted = exact[name].astype(np.float32)
                same_bits(f"the gradient of {name} in reproducible mode", gradient, wanted)


def _packed(filler: float) -> tuple[OracleProblem, OracleProblem, np.ndarray]:
    """A packed row; the same with a filler in one segment; and the positions (B, T) of the rest."""
    ids = np.array([[0, 0, 1, 1, 1, 2, -1], [4, 5, 4, 5, -3, 5, 4]], np.int32)
    problem = make_problem(MatrixCase("packed", call={"segment_ids": ids}))
    rest = ids != np.array([[1], [5]])
    query = problem.inputs["query"]
    held = np.where(rest[..., None], query, query.dtype.type(filler))
    return problem, changed(problem, query=held), rest


def _heads() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query (2, 4, 4, 3), and key and value (2, 6, 2, 3): two heads share each."""
    return values(2, 4, 4, 3), values(2, 6, 2, 3, seed=1), values(2, 6, 2, 3, seed=2)


def _attend(
    ops: Any, position_mask: PositionMask, softcap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Context and scores of attention without projections, with a scale of 0.5."""
    spec = AttentionSpec(0.5, () if softcap is None else (Softcap(softcap),), position_mask)
    path = Path("whole", "the test's")
    arrays = map(ops.from_numpy, _heads())
    context, scores, _ = attend(ops, spec, path, *arrays, with_scores=True)
    return ops.to_numpy(context), ops.to_numpy(scores)


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
