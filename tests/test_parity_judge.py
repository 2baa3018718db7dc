"""The judge: honest results pass, and every planted fault is named."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from anymha.framework.registry import Backend
from anymha.parity.matrix.checkpoint import CheckpointProblem, RecordedResults, checkpoint_problems
from anymha.parity.matrix.judge import Row, judge
from anymha.parity.matrix.run import Result, run
from anymha.parity.oracle.cases import MATRIX, OracleProblem, make_problem, numpy_dtype
from anymha.parity.oracle.oracle import Truth
from anymha.parity.oracle.truth import expected
from anymha.parity.stages.limits import longest_sum, units_of
from anymha.parity.stages.structure import count_differing

DATA = Path(__file__).parent / "data"
SMALL = [case.name for case in MATRIX if "2^20" not in case.name]
REAL = ["layer 0, float32", "layer 0, float64", "layer 0, reproducible"]


@cache
def real_layers() -> dict[str, CheckpointProblem]:
    path, inputs = DATA / "minilm_attention.safetensors", DATA / "minilm_text.npz"
    found = checkpoint_problems(path, "transformers.bert", 12, "encoder.layer.0.", inputs)
    return {item.problem.case.name: item for item in found}


@cache
def known(name: str) -> tuple[OracleProblem, Truth]:
    """A case of the matrix or a real layer, and the truth about it."""
    if name in REAL:
        problem = real_layers()[name].problem
    else:
        problem = make_problem(next(case for case in MATRIX if case.name == name))
    return problem, expected(problem)


def honest(problem: OracleProblem, truth: Truth) -> Result:
    """The exact results, each rounded once to the dtype that it should have."""
    given = {**problem.weights, **problem.inputs}
    narrow = problem.d_output.dtype
    return Result(
        {"output": truth.output.astype(narrow), "scores": truth.scores.astype(narrow)},
        {name: array.astype(given[name].dtype) for name, array in truth.gradients.items()},
        False,
    )


def but(result: Result, **changes: np.ndarray | None) -> Result:
    """The result with other arrays by name, "." in it written "__"; None takes one away."""
    forward, gradients = dict(result.forward), dict(result.gradients)
    for name, array in changes.items():
        name = name.replace("__", ".")
        arrays = forward if name in ("output", "scores") else gradients
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    return dataclasses.replace(result, forward=forward, gradients=gradients)


def verdict(
    name: str, *results: Result | Exception, recorded: RecordedResults | None = None
) -> Row:
    problem, truth = known(name)
    named = {f"backend {i}": result for i, result in enumerate(results)}
    return judge(problem, truth, named, recorded)


def faults(row: Row) -> list[str]:
    return [*row.faults, *(fault for cell in row.cells.values() for fault in cell.faults)]


def everything(truth: Truth) -> dict[str, np.ndarray]:
    return {"output": truth.output, "scores": truth.scores, **truth.gradients}


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_exact_results_rounded_once_pass(name: str) -> None:
    row = verdict(name, honest(*known(name)), honest(*known(name)))
    assert row.passed, faults(row)
    assert row.differing == row.ties == 0
    assert row.compared == row.elements
    assert all(cell.units <= 0.5001 for cell in row.cells.values())


@pytest.mark.parametrize("name", ["padding holds NaN", "everything"])
def test_results_of_a_backend_pass(backend: Backend, name: str) -> None:
    problem, truth = known(name)
    row = judge(problem, truth, {backend.name: run(backend, problem)})
    assert row.passed, faults(row)
    assert row.cells[backend.name].gradients


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_one_wrong_element_of_any_quantity_is_found(name: str) -> None:
    problem, truth = known(name)
    right = honest(problem, truth)
    for quantity, exact in everything(truth).items():
        size = float(np.max(np.abs(exact)))
        array = {**right.forward, **right.gradients}[quantity].copy()
        place = np.unravel_index(exact.size // 2, exact.shape)
        budget, units = units_of(problem, truth)
        array[place] += max(0.02 * size, 3 * budget * units[quantity]) if size > 1e-9 else 1.0
        row = verdict(name, but(right, **{quantity.replace(".", "__"): array}))
        (fault,) = faults(row)
        assert fault.startswith(f"{quantity} is off by ")
        assert row.cells["backend 0"].worst == quantity


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_gradient_that_is_zero_is_found(name: str) -> None:
    problem, truth = known(name)
    right = honest(problem, truth)
    for quantity, gradient in right.gradients.items():
        if np.max(np.abs(truth.gradients[quantity])) > 1e-9:
            row = verdict(name, but(right, **{quantity.replace(".", "__"): 0 * gradient}))
            assert not row.passed, quantity


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantity", ["output", "scores", "query.kernel"])
def test_nan_or_infinity_for_a_number_is_found(quantity: str, bad: float) -> None:
    right = honest(*known("cross"))
    array = {**right.forward, **right.gradients}[quantity].copy()
    array[..., 0] = bad
    row = verdict("cross", but(right, **{quantity.replace(".", "__"): array}))
    assert faults(row) == [f"{quantity} is off by inf units, of {row.budget:.3g} allowed"]
    assert row.cells["backend 0"].units == math.inf


def test_number_where_the_oracle_has_nan_is_found() -> None:
    problem, truth = known("cross")
    output = truth.output.copy()
    output[0, 0, 0] = np.nan
    row = judge(problem, dataclasses.replace(truth, output=output), {"a": honest(problem, truth)})
    assert not row.passed
    assert row.cells["a"].worst == "output"


@pytest.mark.parametrize(
    ("quantity", "dtype"),
    [("output", "float64"), ("scores", "float16"), ("value.kernel", "float64"), ("key", "float16")],
)
def test_another_dtype_is_found(quantity: str, dtype: str) -> None:
    right = honest(*known("cross"))
    array = {**right.forward, **right.gradients}[quantity].astype(dtype)
    row = verdict("cross", but(right, **{quantity.replace(".", "__"): array}))
    assert f"{quantity} is {dtype}, not float32" in faults(row)


def test_dtype_that_is_expected_is_that_of_the_narrower_side() -> None:
    right = honest(*known("float32 in bfloat16"))
    assert right.forward["output"].dtype == numpy_dtype("bfloat16")
    assert right.gradients["query.kernel"].dtype == np.float32
    wide = right.forward["output"].astype(np.float32)
    row = verdict("float32 in bfloat16", but(right, output=wide))
    assert faults(row) == ["output is float32, not bfloat16"]


def test_another_shape_is_found_and_not_compared() -> None:
    right = honest(*known("cross"))
    row = verdict("cross", but(right, output=right.forward["output"][:1]), right)
    assert faults(row) == ["output has shape (1, 7, 12), not (2, 7, 12)"]
    assert "output" not in row.cells["backend 0"].errors
    assert row.compared == row.elements - right.forward["output"].size


def test_missing_and_unknown_quantities_are_found() -> None:
    right = honest(*known("cross"))
    assert faults(verdict("cross", but(right, key__kernel=None))) == ["key.kernel is missing"]
    assert faults(verdict("cross", but(right, scores=None))) == ["scores is missing"]
    row = verdict("cross", but(right, nothing=np.ones(3)), but(right, nothing=np.zeros(3)))
    assert faults(row) == ["nothing should not be there"] * 2


def test_no_gradients_at_all_pass_and_are_told() -> None:
    right = honest(*known("cross"))
    row = verdict("cross", dataclasses.replace(right, gradients={}))
    assert row.passed
    assert not row.cells["backend 0"].gradients


def test_exception_fails_its_backend_alone() -> None:
    right = honest(*known("cross"))
    row = verdict("cross", RuntimeError("no such kernel"), right)
    assert row.cells["backend 0"].faults == ("raised RuntimeError: no such kernel",)
    assert row.cells["backend 1"].passed
    assert not row.passed


def test_output_that_depends_on_the_scores_flag_is_found() -> None:
    right = honest(*known("cross"))
    row = verdict("cross", dataclasses.replace(right, flag_matters=True))
    assert faults(row) == ["the output changes with `return_attention_scores`"]


def _neighbours(truth: Truth) -> tuple[tuple[int, ...], np.float32, np.float32]:
    """A place where one unit in the last place is far below the tolerance, and two neighbours."""
    size = np.max(np.abs(truth.output))
    places = np.argwhere((np.abs(truth.output) < size / 8) & (np.abs(truth.output) > size / 64))
    place = tuple(int(i) for i in places[0])
    low = np.float32(truth.output[place])
    return place, low, np.nextafter(low, np.float32(np.inf))


def test_one_bit_between_backends_is_found_in_reproducible_mode() -> None:
    problem, truth = known("reproducible")
    place, low, high = _neighbours(truth)
    right = honest(problem, truth)
    output = right.forward["output"].copy()
    output[place] = high if output[place] == low else low
    row = verdict("reproducible", right, but(right, output=output), right)
    assert all(cell.passed for cell in row.cells.values()), "each alone is within its rounding"
    assert row.faults == (f"1 of {row.compared} elements differ between backends, of 0 allowed",)
    assert (row.differing, row.ties, row.passed) == (1, 0, False)


def _split(steps: int) -> Row:
    """Two backends on both sides of the middle of two neighbours, which is the exact value."""
    problem, truth = known("reproducible")
    place, low, high = _neighbours(truth)
    for _ in range(steps - 1):
        high = np.nextafter(high, np.float32(np.inf))
    exact = truth.output.copy()
    exact[place] = (float(low) + float(high)) / 2
    truth = dataclasses.replace(truth, output=exact)
    right = honest(problem, truth)
    down, up = right.forward["output"].copy(), right.forward["output"].copy()
    down[place], up[place] = low, high
    return judge(problem, truth, {"a": but(right, output=down), "b": but(right, output=up)})


def test_tie_passes_in_reproducible_mode_and_is_counted() -> None:
    row = _split(1)
    assert row.passed, faults(row)
    assert (row.differing, row.ties) == (1, 1)


def test_two_steps_apart_is_no_tie() -> None:
    row = _split(2)
    assert (row.differing, row.ties, row.passed) == (1, 0, False)


def test_bits_may_differ_outside_reproducible_mode() -> None:
    problem, truth = known("cross")
    place, _, high = _neighbours(truth)
    right = honest(problem, truth)
    output = right.forward["output"].copy()
    output[place] = np.nextafter(high, np.float32(np.inf))
    row = verdict("cross", right, but(right, output=output))
    assert row.passed
    assert (row.differing, row.ties, row.reproducible) == (1, 0, False)


def test_bits_are_counted_with_signs_of_zero_but_all_nans_alike() -> None:
    one = np.array([0.0, 1.0, np.nan, 2.0], np.float32)
    other = np.array([-0.0, 1.0, -np.nan, np.nan], np.float32)
    exact = {"x": np.zeros(4)}
    assert count_differing([{"x": one}, {"x": other}], exact) == (2, 0, 4)
    assert count_differing([{"x": one}, {"x": one}, {"x": other}], exact) == (2, 0, 4)
    assert count_differing([{"x": one}], exact) == (0, 0, 0)
    assert count_differing([{"x": one}, {}], exact) == (0, 0, 0)
    bfloat16 = one.astype(numpy_dtype("bfloat16"))
    assert count_differing([{"x": one}, {"x": bfloat16}], exact) == (0, 0, 0)
    assert count_differing([{"x": bfloat16}, {"x": -bfloat16}], exact) == (3, 0, 4)


def test_recorded_results_are_compared_where_they_count() -> None:
    item = real_layers()["layer 0, float64"]
    assert item.recorded is not None
    right = honest(*known("layer 0, float64"))
    row = verdict("layer 0, float64", right, recorded=item.recorded)
    assert row.passed, faults(row)
    assert {"recorded output", "recorded scores"} <= set(row.cells["backend 0"].errors)

    def changed(name: str, at: Any) -> RecordedResults:
        array = item.recorded.results[name].copy()  # type: ignore[union-attr]
        array[at] *= 1.01
        return dataclasses.replace(item.recorded, results={name: array})  # type: ignore[arg-type]

    padding = ~item.recorded.counts
    assert padding.any()
    assert verdict("layer 0, float64", right, recorded=changed("output", padding)).passed
    for name in ("output", "scores"):
        row = verdict("layer 0, float64", right, recorded=changed(name, 0))
        (fault,) = faults(row)
        assert fault.startswith(f"recorded {name} is off by ")


def test_recorded_result_is_allowed_the_rounding_of_its_own_dtype() -> None:
    problem, truth = known("layer 0, float64")
    counts = np.ones(truth.output.shape[:2], bool)
    narrow = RecordedResults({"output": truth.output.astype(np.float32)}, counts)
    row = verdict("layer 0, float64", honest(problem, truth), recorded=narrow)
    assert row.passed, faults(row)
    assert 0 < row.cells["backend 0"].errors["recorded output"] < 1
    wide = RecordedResults({"output": narrow.results["output"].astype(np.float64)}, counts)
    assert not verdict("layer 0, float64", honest(problem, truth), recorded=wide).passed


def test_recorded_result_is_left_where_the_shape_is_wrong() -> None:
    right = honest(*known("layer 0, float64"))
    short = but(right, output=right.forward["output"][:1])
    recorded = real_layers()["layer 0, float64"].recorded
    row = verdict("layer 0, float64", short, recorded=recorded)
    assert faults(row) == ["output has shape (1, 33, 384), not (8, 33, 384)"]


def test_longest_sum_counts_features_heads_and_positions() -> None:
    assert longest_sum(known("cross")[0]) == 24  # 4 heads of 6
    assert longest_sum(known("N-D, one axis of two")[0]) == 30  # 2 * 5 * 3 positions
    assert longest_sum(known(REAL[0])[0]) == 384


def test_unit_of_a_narrow_dtype_is_the_rounding_of_its_greatest_number_and_of_the_stages() -> None:
    for name, eps in (("reproducible", 2.0**-23), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
        problem, truth = known(name)
        budget, units = units_of(problem, truth)
        assert budget == pytest.approx(0.5, rel=0.02)
        last = eps * np.max(np.abs(truth.output))
        staged = 4 * np.max(truth.rounding["output"]) if truth.rounding else 0.0
        assert units["output"] == pytest.approx(last + staged, rel=0.03)
        assert staged <= 6 * last


def test_half_precision_may_be_as_far_off_as_its_stages_are_rounded() -> None:
    for name in ("bfloat16", "float16"):
        _, truth = known(name)
        assert set(truth.rounding) == {"output", "scores", *truth.gradients}
        eps = float(ml_dtypes.finfo(name).eps)
        for quantity, errors in truth.rounding.items():
            exact = everything(truth)[quantity]
            assert errors.size == exact.size
            if np.max(np.abs(exact)) > 1e-9:
                assert eps / 8 < np.max(errors) / np.max(np.abs(exact)) < 32 * eps, quantity
    assert known("reproducible")[1].rounding == {}


def test_row_as_json_has_no_infinity() -> None:
    row = verdict("cross", RuntimeError("no"), honest(*known("cross")))
    plain = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert plain["cells"]["backend 0"]["units"] is None
    assert plain["cells"]["backend 1"]["units"] == row.cells["backend 1"].units
    assert plain["passed"] is plain["cells"]["backend 0"]["passed"] is False
    assert plain["cells"]["backend 1"]["passed"] is True
