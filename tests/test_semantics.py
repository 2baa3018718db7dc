"""What holds whatever the options: empty rows, the scores flag, excluded positions, symmetries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anymha.attention.dropout import keep_mask, rate_threshold
from anymha.framework.registry import Backend, get_backend
from anymha.interchange.layers import set_weights
from tests.conftest import BACKENDS, usable
from tests.pairs import pairs
from tests.support import Arrays, Problem, Result, bits, check, compilers, make, native, normal, run

B, T, S, H = 2, 5, 6, 4
MODES: dict[str, dict[str, str]] = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "reproducible": {"compute_dtype": "float64"},
    "float32 in bfloat16": {"compute_dtype": "bfloat16"},
}


def modes_but_quickly(*names: str) -> Any:
    """Each mode; JAX compiles for less long in these."""
    users = pytest.mark.as_users_compile
    return pytest.mark.parametrize(
        "mode", [pytest.param(name, marks=[users] * (name not in names)) for name in MODES]
    )


def _empty_rows() -> np.ndarray:
    """A mask (B, T, S) with some rows, and all of the second batch, without keys."""
    mask = normal((B, T, S), "rows") > -0.5
    mask[0, 1] = mask[0, 4] = False
    mask[1] = False
    return mask


ROWS = _empty_rows()
EMPTY = ~ROWS.any(-1)
EMPTYING: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "attention mask": ({"attention_mask": ROWS}, EMPTY),
    "value mask": (
        {"value_mask": np.array([[True] * S, [False] * S])},
        np.array([[False] * T, [True] * T]),
    ),
    "query mask": ({"query_mask": ~EMPTY}, EMPTY),
    "causal": (
        {"use_causal_mask": True, "query_offset": -2},
        np.array([[True, True, False, False, False]] * B),
    ),
    "bias": ({"attention_bias": np.where(ROWS, 1.0, -np.inf)[:, None]}, EMPTY),
    "masks that meet nowhere": (
        {
            "value_mask": np.array([[True] * 3 + [False] * 3] * B),
            "key_mask": np.array([[False] * 3 + [True] * 3] * B),
        },
        np.ones((B, T), bool),
    ),
}


ROW_CASES = {"name": EMPTYING, "mode": MODES, "dropping": [False, True]}


@pytest.mark.parametrize(
    ("backend", "name", "mode", "dropping"),
    [
        *((backend, *case) for backend in ("numpy", "torch") for case in pairs(**ROW_CASES)),
        *pairs(backend=["tensorflow", "jax"], **ROW_CASES),  # which take longer
    ],
    indirect=["backend"],
)
def test_row_without_keys_gives_exactly_the_output_bias(
    backend: Backend, name: str, mode: str, dropping: bool
) -> None:
    call, empty = EMPTYING[name]
    problem = make(dropout=0.5 if dropping else 0.0, **MODES[mode])
    problem = problem.calling(**call, training=dropping, seed=3)
    result = run(backend, problem)
    bias = problem.weights["output.bias"].astype(result.output.dtype)
    assert (result.output[empty] == bias).all()
    assert not (result.output[~empty] == bias).all(-1).any()
    assert not result.scores.transpose(0, 2, 1, 3)[empty].any()
    for name, gradient in result.gradients.items():
        assert np.isfinite(gradient.astype(np.float64)).all(), name
    assert not result.gradients["query"][empty].any()
    alone = _output(backend, problem, scores=False)
    assert (alone[empty] == bias).all()


def _output(backend: Backend, problem: Problem, scores: bool) -> np.ndarray:
    """The output of the native layer, where scores are asked for or not."""
    layer = set_weights(backend.layer(**problem.config.to_dict()), problem.weights)
    arrays = native(backend.ops, {**problem.inputs, **problem.call})
    result = layer(**arrays, return_attention_scores=scores)
    return backend.ops.to_numpy(result[0] if scores else result)


def test_all_rows_empty_without_biases_give_zeros(backend: Backend) -> None:
    problem = make(use_bias=False).calling(attention_mask=np.zeros((1, S), bool))
    result = check(backend, problem, allowed=np.zeros((1, 1, 1, S), bool))
    assert not result.output.any()
    assert all(not gradient.any() for gradient in result.gradients.values())


@pytest.mark.parametrize(
    ("backend", "mode", "dropping"),
    pairs(backend=BACKENDS, mode=MODES, dropping=[False, True]),
    indirect=["backend"],
)
def test_output_does_not_depend_on_the_scores_flag(
    backend: Backend, mode: str, dropping: bool
) -> None:
    problem = make((3, 17), (3, 23), (16, 12, 8), dropout=0.3, **MODES[mode])
    offset = -2 if dropping else 6  # the first two queries see no key, or all see some
    problem = problem.calling(use_causal_mask=True, query_offset=offset, training=dropping, seed=1)
    alone, with_scores = (_output(backend, problem, scores) for scores in (False, True))
    assert bits(alone).tolist() == bits(with_scores).tolist()


@pytest.mark.parametrize("mode", ["float32", "reproducible"])
def test_compiled_output_does_not_depend_on_the_scores_flag(backend: Backend, mode: str) -> None:
    problem = make((3, 17), (3, 23), (16, 12, 8), dropout=0.3, **MODES[mode])
    layer = set_weights(backend.layer(**problem.config.to_dict()), problem.weights)
    arrays = native(backend.ops, problem.inputs)
    call = {"use_causal_mask": True, "query_offset": 6, "training": True, "seed": 1}

    def alone(arrays: Any) -> Any:
        return layer(**arrays, **call)

    def with_scores(arrays: Any) -> Any:
        return layer(**arrays, **call, return_attention_scores=True)[0]

    pairs = zip(compilers(backend, alone), compilers(backend, with_scores), strict=True)
    for one, other in pairs:
        a, b = (backend.ops.to_numpy(function(arrays)) for function in (one, other))
        assert bits(a).tolist() == bits(b).tolist()


@pytest.mark.usefixtures("quick_programs")
def test_scores_are_those_before_dropout(backend: Backend) -> None:
    problem = make(dropout=0.5)
    dropped = run(backend, problem.calling(training=True, seed=1), gradients=False)
    plain = run(backend, problem, gradients=False)
    assert dropped.scores.tobytes() == plain.scores.tobytes()
    assert not np.array_equal(dropped.output, plain.output)


def _kept(rate: float, seed: int) -> np.ndarray:
    threshold = rate_threshold(rate)
    kept = keep_mask(get_backend("numpy").ops, seed, threshold, (B, H, T, S))
    return kept * (65536 / (65536 - threshold))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("mode", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("heads", [4, 2])
def test_dropout_agrees_with_oracle(backend: Backend, mode: str, heads: int) -> None:
    problem = make(dropout=0.4, num_key_value_heads=heads, **MODES[mode])
    problem = problem.calling(training=True, seed=-7, attention_mask=ROWS)
    check(backend, problem, allowed=ROWS[:, None], kept=_kept(0.4, -7))


@pytest.mark.parametrize("call", [{}, {"training": False}, {"training": None}], ids=str)
def test_dropout_acts_in_training_only(backend: Backend, call: dict[str, Any]) -> None:
    problem = make(dropout=0.9).calling(**call)
    check(backend, problem)


JUNK = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf}
VALUE_MASK = np.array([[True, True, False, True, False, False], [True] * 4 + [False] * 2])


def _same(clean: Result, dirty: Result, names: set[str] | None = None) -> None:
    for name in names or set(clean.all):
        got = dirty.all[name].astype(np.float64)
        assert np.isfinite(got).all(), name
        assert clean.all[name].tobytes() == dirty.all[name].tobytes(), name


@lru_cache
def _masked(name: str, mode: str, which: str) -> tuple[Problem, Result]:
    """A problem with excluded keys, and what the backend of that name gives for it."""
    problem = make(**MODES[mode]).calling(**{which: VALUE_MASK})
    return problem, run(usable(name), problem)


@pytest.mark.parametrize(
    ("backend", "mode", "junk", "which"),
    pairs(backend=BACKENDS, mode=MODES, junk=JUNK, which=["value_mask", "key_mask"]),
    indirect=["backend"],
)
def test_excluded_keys_and_values_influence_nothing(
    backend: Backend, mode: str, junk: str, which: str
) -> None:
    problem, clean = _masked(backend.name, mode, which)
    inputs = dict(problem.inputs)
    for name in ("value", "key"):
        inputs[name] = np.where(VALUE_MASK[..., None], inputs[name], JUNK[junk])
        inputs[name] = inputs[name].astype(problem.inputs[name].dtype)
    dirty = run(backend, problem.but(inputs=inputs))
    _same(clean, dirty)
    for name in ("value", "key"):
        assert not dirty.gradients[name][~VALUE_MASK].any()


@pytest.mark.usefixtures("quick_programs")
@modes_but_quickly("bfloat16", "float64", "float32 in bfloat16")
def test_excluded_queries_influence_nothing(backend: Backend, mode: str) -> None:
    mask = np.array([[True, False, True, True, False], [False] * 2 + [True] * 3])
    problem = make(**MODES[mode]).calling(query_mask=mask)
    query = np.where(mask[..., None], problem.inputs["query"], np.nan)
    query = query.astype(problem.inputs["query"].dtype)
    clean = run(backend, problem)
    dirty = run(backend, problem.but(inputs={**problem.inputs, "query": query}))
    _same(clean, dirty)
    assert not dirty.gradients["query"][~mask].any()


@pytest.mark.usefixtures("quick_programs")
@modes_but_quickly("float16", "float32", "reproducible")
def test_excluded_positions_of_self_attention_influence_no_other(
    backend: Backend, mode: str
) -> None:
    mask = np.array([[True, True, False, True, False], [True] * 3 + [False] * 2])
    problem = make(value=None, **MODES[mode])
    query = np.where(mask[..., None], problem.inputs["query"], np.nan)
    dirty = problem.but(inputs={"query": query.astype(problem.inputs["query"].dtype)})
    # Excluded as keys alone: as queries they still give their own rows, and no other's.
    a = run(backend, problem.calling(value_mask=mask), gradients=False)
    b = run(backend, dirty.calling(value_mask=mask), gradients=False)
    assert np.array_equal(a.output[mask], b.output[mask])
    rows_a, rows_b = (r.scores.transpose(0, 2, 1, 3)[mask] for r in (a, b))
    assert np.array_equal(rows_a, rows_b)
    # Excluded as both: nothing of them is anywhere, forward or backward.
    both = {"value_mask": mask, "query_mask": mask}
    _same(run(backend, problem.calling(**both)), run(backend, dirty.calling(**both)))


def test_without_its_mask_the_junk_would_be_everywhere(backend: Backend) -> None:
    problem = make()
    value = np.where(VALUE_MASK[..., None], problem.inputs["value"], np.nan).astype(np.float32)
    result = run(backend, problem.but(inputs={**problem.inputs, "value": value}), gradients=False)
    assert np.isnan(result.output).all()


def _float64(**call: Any) -> Problem:
    return make(dtype="float64").calling(**call)


def _near(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("quick_programs")
@given(order=st.permutations(range(S)))
def test_order_of_keys_is_of_no_account(backend: Backend, order: list[int]) -> None:
    mask, bias = normal((B, H, T, S), "m") > -1, normal((T, S), "b")
    problem = _float64(attention_mask=mask, value_mask=VALUE_MASK, attention_bias=bias)
    inputs: Arrays = {
        "query": problem.inputs["query"],
        "value": problem.inputs["value"][:, order],
        "key": problem.inputs["key"][:, order],
        "attention_bias": bias[:, order],
    }
    call = {"attention_mask": mask[..., order], "value_mask": VALUE_MASK[:, order]}
    moved = problem.but(inputs=inputs, call=call, d_scores=problem.d_scores[..., order])
    a, b = run(backend, problem), run(backend, moved)
    _near(a.output, b.output)
    _near(a.scores[..., order], b.scores)
    for name, gradient in a.gradients.items():
        if name in ("value", "key"):
            gradient = gradient[:, order]
        _near(gradient[..., order] if name == "attention_bias" else gradient, b.gradients[name])


@pytest.mark.usefixtures("quick_programs")
@given(order=st.permutations(range(T)))
def test_order_of_queries_is_that_of_outputs(backend: Backend, order: list[int]) -> None:
    problem = _float64()
    moved = problem.but(inputs={**problem.inputs, "query": problem.inputs["query"][:, order]})
    a, b = (run(backend, p, gradients=False) for p in (problem, moved))
    _near(a.output[:, order], b.output)


@pytest.mark.usefixtures("quick_programs")
@given(order=st.permutations(range(H)))
def test_order_of_heads_is_of_no_account(backend: Backend, order: list[int]) -> None:
    problem = _float64()
    weights = {
        name: array if name == "output.bias"
        else array[order] if name == "output.kernel"
        else array[..., order, :]
        for name, array in problem.weights.items()
    }  # fmt: skip
    a, b = (run(backend, p, gradients=False) for p in (problem, problem.but(weights=weights)))
    _near(a.output, b.output)
    _near(a.scores[:, order], b.scores)


@given(place=st.integers(0, B - 1))
def test_batch_places_do_not_see_each_other(backend: Backend, place: int) -> None:
    problem = make().calling(use_causal_mask=True)
    inputs = {name: array.copy() for name, array in problem.inputs.items()}
    for array in inputs.values():
        array[place] = np.nan
    a, b = (run(backend, p, gradients=False) for p in (problem, problem.but(inputs=inputs)))
    others = np.arange(B) != place
    assert np.array_equal(a.output[others], b.output[others])
    assert np.isnan(b.output[place]).all()


@pytest.mark.usefixtures("quick_programs")
@given(shift=st.floats(-50, 50))
def test_a_bias_of_one_number_is_of_no_account(backend: Backend, shift: float) -> None:
    plain = _float64()
    moved = _float64(attention_bias=np.full((T, 1), shift))
    a, b = (run(backend, p, gradients=False) for p in (plain, moved))
    _near(a.output, b.output)


def test_scores_of_a_row_sum_to_one(backend: Backend) -> None:
    scores = run(backend, _float64(), gradients=False).scores
    assert (scores >= 0).all()
    _near(scores.sum(-1), np.ones(scores.shape[:-1]))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_large_logits_stay_finite(backend: Backend, dtype: str) -> None:
    # Logits of some 10,000, whose exp would overflow in any dtype.
    problem = make(dtype=dtype, scale=1e4)
    result = run(backend, problem)
    for name, array in result.all.items():
        assert np.isfinite(array.astype(np.float64)).all(), name
    assert result.scores.astype(np.float64).max() == 1
