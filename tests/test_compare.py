"""`compare`: where two implementations part, and why, on examples small enough to see."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, DtypeError
from anymha.parity import ParityError, assert_parity, compare
from anymha.parity.adapters import ours
from anymha.parity.oracle.recipe import STEPS, sizes
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.structure import distance, structure
from anymha.parity.stages.trace import make_request, problem_of

pytestmark = pytest.mark.usefixtures("no_pairs", "quick_programs")

RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((2, 5, 8)).astype("float32")
VALUE = RNG.standard_normal((2, 6, 8)).astype("float32")
MASK = RNG.random((2, 5, 6)) < 0.6
MASK[..., 0] = True


@pytest.fixture
def layer():
    """A NumPy layer whose biases are not zero."""
    made = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    weights = anymha.get_weights(made)
    rng = np.random.default_rng(1)
    return anymha.set_weights(
        made, {n: rng.standard_normal(w.shape).astype(w.dtype) for n, w in weights.items()}
    )


def but(layer, **changes: np.ndarray):
    """A layer with other weights."""
    made = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    return anymha.set_weights(made, {**anymha.get_weights(layer), **changes})


def test_a_layer_agrees_with_itself_in_every_stage_and_gradient(layer) -> None:
    report = compare(layer, layer, [QUERY, VALUE], attention_mask=MASK)
    names = [stage.name for stage in report.stages]
    assert [name for name in STEPS if name not in names] == ["dropped_probabilities"]
    assert {"scores", "gradient of query", "gradient of key.kernel"} <= set(names)
    assert report.passed
    assert report.diagnosis is None
    assert all(stage.error == 0 for stage in report.stages)


def test_layers_of_two_frameworks_agree(layer, installed) -> None:
    for backend in installed:
        other = anymha.convert(layer, to=backend.name)
        report = compare(layer, other, {"query": QUERY, "value": VALUE}, use_causal_mask=True)
        assert report.passed, report.to_text()
        assert f"anymha in {backend.name}" == report.candidate


def test_inputs_of_any_framework_are_taken(layer, backend) -> None:
    arrays = [backend.ops.from_numpy(array) for array in (QUERY, VALUE)]
    assert compare(layer, layer, arrays, attention_mask=backend.ops.from_numpy(MASK)).passed


def test_axes_beyond_the_batch_are_compared_too(layer, installed) -> None:
    options = {**layer.config.to_dict(), "attention_axes": (1, 2)}
    two = anymha.MultiHeadAttention(**options, backend="numpy")
    two = anymha.set_weights(two, anymha.get_weights(layer))
    x = RNG.standard_normal((2, 3, 2, 8)).astype("float32")
    for backend in installed:
        report = compare(two, anymha.convert(two, to=backend.name), x)
        assert report.passed, report.to_text()


def test_a_weight_that_differs_is_named(layer) -> None:
    kernel = anymha.get_weights(layer)["value.kernel"].copy()
    kernel[3, 1, 2] += 0.5
    report = compare(layer, but(layer, **{"value.kernel": kernel}), QUERY)
    assert report.first_divergence == "value"
    assert "weight value.kernel" in [stage.name for stage in report.stages if not stage.passed]
    assert report.diagnosis.explained
    assert str(report.diagnosis) == "other weights (1 of 64 numbers of value.kernel)"


def test_a_function_may_tell_its_stages(layer) -> None:
    def port(query, value):
        weights = anymha.get_weights(layer)
        heads = np.einsum("btd,dhk->bthk", query, weights["query.kernel"])  # and no bias
        output, scores = layer(query, value, return_attention_scores=True)
        return {"query": heads, "output": output, "scores": scores}

    report = compare(layer, port, [QUERY, VALUE])
    stages = {stage.name: stage for stage in report.stages}
    assert report.first_divergence == "query"
    assert (stages["query"].culprit, stages["scores"].passed) == (True, True)


@pytest.mark.parametrize("fill", [-np.inf, -1e9, np.finfo("float32").min, -1e4])
def test_any_number_may_stand_for_infinity_in_rows_that_see_nothing(layer, fill) -> None:
    weights = anymha.get_weights(layer)
    mask = MASK.copy()
    mask[0, 2] = False

    def port(query, value, attention_mask, zeros=True):
        q, k, v = (
            np.einsum("btd,dhk->bthk", x, weights[f"{n}.kernel"]) + weights[f"{n}.bias"]
            for n, x in (("query", query), ("key", value), ("value", value))
        )
        seen = attention_mask[:, None]
        masked = np.where(seen, np.einsum("bthk,bshk->bhts", q, k) / 2, np.float32(fill))
        top = np.maximum(masked.max(-1, keepdims=True), np.finfo("float32").min)
        shares = np.exp(masked - top)
        shares = shares / np.maximum(shares.sum(-1, keepdims=True), np.float32(1e-9))
        shares = np.where(seen | (not zeros), shares, np.float32(0))
        context = np.einsum("bhts,bshv->bthv", shares, v)
        output = np.einsum("bthv,hvo->bto", context, weights["output.kernel"])
        return {"masked_logits": masked, "probabilities": shares, "context": context,
                "output": output + weights["output.bias"]}  # fmt: skip

    report = compare(layer, port, [QUERY, VALUE], attention_mask=mask)
    assert report.passed, report.to_text()
    if np.isfinite(fill):
        mean = functools.partial(port, zeros=False)
        wrong = compare(layer, mean, [QUERY, VALUE], attention_mask=mask)
        assert wrong.first_divergence == "probabilities"


def test_own_errors_are_those_of_the_stage_alone(layer) -> None:
    def port(query, value):
        told = {}
        weights = {n: w.astype("float64") for n, w in anymha.get_weights(layer).items()}
        for name, x in (("query", query), ("key", value), ("value", value)):
            told[name] = np.einsum("btd,dhk->bthk", x, weights[f"{name}.kernel"])
            told[name] = told[name] + weights[f"{name}.bias"]
        told["logits"] = np.einsum("bthk,bshk->bhts", told["query"], told["key"])  # no scale
        exp = np.exp(told["logits"] - told["logits"].max(-1, keepdims=True))
        told["probabilities"] = exp / exp.sum(-1, keepdims=True)
        told["context"] = np.einsum("bhts,bshv->bthv", told["probabilities"], told["value"])
        output = np.einsum("bthv,hvo->bto", told["context"], weights["output.kernel"])
        return {**told, "output": (output + weights["output.bias"]).astype("float32")}

    report = compare(layer, port, [QUERY, VALUE])
    wrong = [stage.name for stage in report.stages if stage.culprit]
    differing = [stage.name for stage in report.stages if not stage.passed]
    assert wrong == ["logits"]
    assert differing == ["logits", "probabilities", "context", "output"]
    assert str(report.diagnosis).startswith("wrong scale (missing)")


def test_gradients_that_differ_are_told(layer, monkeypatch) -> None:
    honest = ours.Ours._gradients
    candidate = anymha.convert(layer, to="numpy")

    def doubled(self, *arguments):
        found = honest(self, *arguments)
        return {**found, "query": 2 * found["query"]} if self.layer is candidate else found

    monkeypatch.setattr(ours.Ours, "_gradients", doubled)
    report = compare(layer, candidate, [QUERY, VALUE])
    assert report.first_divergence == "gradient of query"


def test_nan_is_never_equal_to_a_number(layer) -> None:
    def broken(query):
        output = layer(query)
        output[1, 2, 3] = np.nan
        return output

    report = compare(layer, broken, QUERY)
    (stage,) = [stage for stage in report.stages if stage.name == "output"]
    assert not report.passed
    assert stage.faults == ("NaN in 1 places where the reference has numbers",)
    assert stage.at == (1, 2, 3)


def test_integers_are_compared_exactly() -> None:
    whole = np.arange(24).reshape(2, 3, 4)
    assert compare(lambda x: 2 * x, lambda x: x + x, whole).passed
    assert not compare(lambda x: 2 * x, lambda x: 2 * x + (x == 7), whole).passed


@pytest.mark.parametrize("dtype", ["complex64", "object", "str"])
def test_results_that_are_no_real_numbers_are_refused_in_words(layer, dtype) -> None:
    def strange(query):
        return layer(query).astype(dtype)

    for pair, role in (((strange, layer), "reference"), ((layer, strange), "candidate")):
        with pytest.raises(DtypeError, match=r"The output of `.*strange` must be real num") as told:
            compare(*pair, QUERY)
        assert f"as the {role} was called" in told.value.__notes__[0]
    with pytest.raises(DtypeError, match=r"The scores of `.*` must be real numbers"):
        compare(layer, lambda query: (layer(query), np.ones((2, 2, 5, 5)).astype(dtype)), QUERY)


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_integers_beside_floating_numbers_are_told_by_their_dtype(layer, dtype) -> None:
    report = compare(layer, lambda query: layer(query).astype(dtype), QUERY)
    [output] = [stage for stage in report.stages if stage.name == "output"]
    assert output.faults == (f"dtype {dtype}, not float32",)


def test_nan_that_limits_the_comparison_of_gradients_is_told(layer) -> None:
    x = QUERY.copy()
    x[1, 2, 3] = np.nan
    report = compare(layer, layer, x)
    [note] = [note for note in report.notes if "NaN or infinity limits" in note]
    assert "gradient of query.kernel (64 of 64)" in note
    assert note in report.to_text()
    assert not compare(layer, layer, QUERY).notes


def test_a_reference_of_another_shape_is_told_so(layer) -> None:
    report = compare(lambda query: layer(query)[0], layer, QUERY)
    assert "shape (2, 5, 8), not (5, 8)" in report.to_text()


def test_causes_are_found_where_there_is_much_to_compute(layer) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 160, 8)).astype("float32")
    mask = rng.random((3, 160, 160)) < 0.7

    def port(query, attention_mask):
        output = layer(query, attention_mask=attention_mask)
        output[2] = layer(query, attention_mask=~attention_mask)[2]
        return output

    report = compare(layer, port, x, attention_mask=mask)
    assert str(report.diagnosis) == "inverted mask (`attention_mask`)"
    assert report.stages[0].at[0] == 2


def test_another_dtype_and_another_shape_are_told_in_words(layer) -> None:
    report = compare(layer, lambda query: layer(query).astype("float64"), QUERY)
    assert report.stages[0].faults == ("dtype float64, not float32",)
    assert str(report.diagnosis) == "returned in float64"
    report = compare(layer, lambda query: layer(query)[:, :3], QUERY)
    assert report.stages[0].faults == ("shape (2, 3, 8), not (2, 5, 8)",)
    assert report.first_divergence == "output"


def test_functions_alone_are_compared_by_their_outputs() -> None:
    def double(query):
        return 2 * query

    report = compare(double, double, QUERY)
    assert report.passed
    assert "The weights of neither are known" in report.notes[0]
    report = compare(double, lambda query: 2.001 * query, QUERY)
    assert report.first_divergence == "output"
    assert not report.passed


def test_a_reference_that_is_no_attention_is_told_so(layer) -> None:
    report = compare(lambda query: 2 * query, layer, QUERY)
    assert not report.passed
    assert "is not plain attention of its weights" in report.notes[0]


def test_where_the_reference_differs_from_the_meaning_the_cause_says_whose_it_is(layer) -> None:
    mask = MASK.copy()
    mask[0, 1] = False

    def mean(query, value, attention_mask):
        output = layer(query, value, attention_mask=attention_mask)
        empty = ~attention_mask.any(-1)
        even = layer(query * 0, value)[0, 0] * 0
        weights = anymha.get_weights(layer)
        values = np.einsum("btd,dhk->bthk", value, weights["value.kernel"]) + weights["value.bias"]
        even = np.einsum("bhk,hko->bo", values.mean(1), weights["output.kernel"])
        return np.where(empty[..., None], (even + weights["output.bias"])[:, None], output)

    inputs = [QUERY, VALUE]
    report = compare(layer, mean, inputs, attention_mask=mask)
    cause = "fully masked rows give the mean of the values (the mean of all values)"
    assert str(report.diagnosis) == cause
    assert report.first_divergence == "probabilities"
    report = compare(mean, layer, inputs, attention_mask=mask)
    assert str(report.diagnosis) == f"in the reference: {cause}"
    assert compare(mean, mean, inputs, attention_mask=mask).passed


def test_what_the_inputs_do_not_test_is_told(layer) -> None:
    zeros = np.zeros(8, "float32")
    report = compare(
        but(layer, **{"output.bias": zeros}),
        but(layer, **{"output.bias": zeros}),
        [QUERY[:1], VALUE[:1]],
        attention_mask=np.ones((1, 5, 6), bool),
    )
    assert "`output.bias`: it is zero" in report.not_exercised
    assert any("`attention_mask`" in words for words in report.not_exercised)
    assert any("one element" in words for words in report.not_exercised)
    assert compare(layer, layer, [QUERY, VALUE], attention_mask=MASK).not_exercised == ()


def test_assert_parity_fails_with_the_whole_story(layer) -> None:
    assert assert_parity(layer, layer, QUERY) is None
    with pytest.raises(ParityError, match="causal mask ignored") as failure:
        assert_parity(layer, lambda query, **_: layer(query), QUERY, use_causal_mask=True)
    assert isinstance(failure.value, AssertionError)
    assert "Switch the causal mask on." in str(failure.value)


@pytest.mark.parametrize(
    ("inputs", "call", "words"),
    [
        ({"value": VALUE}, {}, "must have a 'query'"),
        ([QUERY] * 4, {}, "at most query, value, key"),
        (QUERY, {"causal": True}, "Pass `use_causal_mask`"),
    ],
)
def test_a_wrong_request_is_told(layer, inputs, call, words) -> None:
    with pytest.raises(ArgumentError, match=words):
        compare(layer, layer, inputs, **call)


def test_what_is_no_implementation_is_told(layer) -> None:
    with pytest.raises(ArgumentError, match="a function of query, value and key"):
        compare(layer, 3, QUERY)
    with pytest.raises(ArgumentError, match="must return the output"):
        compare(layer, lambda query: {"context": query}, QUERY)


def test_structure_is_looked_at_before_numbers() -> None:
    row = np.array([[[[0.5, 0.5], [0.2, 0.8]]]])
    assert structure("probabilities", row, row) == []
    assert structure("probabilities", row, 2 * row) == ["2 of 2 rows sum to 2, not 1"]
    turned = np.full((1, 1, 3, 1), 0.01)  # limits of other axes: their greatest counts
    sums = np.array([[[[0.1, 0.1], [0.5, 0.5]]]]) + np.array([0, 0.05])
    moved = np.array([[1.0], [0.0]])  # the second row has no sink
    for limits in (0.01, np.full((1, 1, 2, 1), 0.01), turned):
        assert structure("scores", sums, sums + 0.001, limits) == []
        assert structure("scores", sums, sums + 0.015 * moved, limits) == []
        for off in (0.02 * moved, 0.015 * (1 - moved)):
            [fault] = structure("scores", sums, sums + off, limits)
            assert fault.startswith("1 of 2 rows")
    logits = np.array([1.0, -np.inf])
    assert structure("masked_logits", logits, logits[::-1]) == [
        "masks 1 places more and 1 fewer, of 2"
    ]
    assert structure("masked_logits", logits, np.array([1.0, -1e9])) == []


def test_distance_takes_equal_nan_and_masked_numbers_for_equal() -> None:
    one = np.array([np.nan, -np.inf, 1.0, np.nan, np.inf])
    other = np.array([np.nan, -1e30, 1.5, 1.0, 1.0])
    masked = distance(one, other, "masked_logits")
    np.testing.assert_array_equal(masked, [0, 0, 0.5, np.inf, np.inf])
    np.testing.assert_array_equal(distance(one, other), [0, np.inf, 0.5, np.inf, np.inf])


def test_sizes_bound_every_stage(layer) -> None:
    request = make_request([QUERY, VALUE], {"attention_mask": MASK})
    recipe = fold(problem_of(layer.config, anymha.get_weights(layer), request)).recipe
    stages = recipe.stages
    for name, size in sizes(recipe, stages).items():
        whole = np.abs(stages["probabilities" if name == "scores" else name])
        assert np.all(size >= np.where(np.isfinite(whole), whole, 0))
    assert dataclasses.replace(recipe).but(scale=1.0).scale == 1.0


def test_great_negative_numbers_are_told_apart_in_outputs() -> None:
    def constant(number):
        return lambda query: np.full((2, 5, 8), number, "float32")

    assert not compare(constant(-1e5), constant(-3e7), QUERY).passed
    assert not compare(constant(-1e5), constant(-np.inf), QUERY).passed


@pytest.mark.parametrize(("factor", "wrong"), [(300.0, 1), (1e4, 1), (1e-6, 0)])
def test_one_great_input_hides_no_error_of_another(layer, factor, wrong) -> None:
    x = QUERY.copy()
    x[0] *= np.float32(factor)

    def port(query):
        output = layer(query)
        output[wrong] *= np.float32(1.5)
        return output

    report = compare(layer, port, x)
    assert not report.passed
    assert report.stages[0].at[0] == wrong
    assert compare(layer, lambda query: layer(query), x).passed


def test_reproducible_layers_are_held_to_the_bit(layer) -> None:
    options = {**layer.config.to_dict(), "compute_dtype": "float64"}
    exact, other = (
        anymha.set_weights(
            anymha.MultiHeadAttention(**options, backend="numpy"), anymha.get_weights(layer)
        )
        for _ in range(2)
    )
    assert compare(exact, other, QUERY).passed
    weights = anymha.get_weights(layer)
    weights["output.bias"] = np.nextafter(weights["output.bias"], np.float32(9))
    report = compare(exact, anymha.set_weights(other, weights), QUERY)
    assert not report.passed
    assert any("differ in a bit" in fault for stage in report.stages for fault in stage.faults)


def test_functions_of_two_dtypes_do_not_agree() -> None:
    report = compare(lambda x: x.astype("float64"), lambda x: x, QUERY)
    assert report.stages[0].faults == ("dtype float32, not float64",)


@pytest.mark.parametrize("mask", [np.zeros((5, 5), "float32"), np.ones((5, 5), "int32")])
def test_a_mask_that_is_not_boolean_is_refused(layer, mask) -> None:
    with pytest.raises(DtypeError, match="`attention_mask` must be boolean"):
        compare(layer, layer, QUERY, attention_mask=mask)


def test_a_candidate_that_gives_another_result_each_time_fails(layer) -> None:
    calls = []

    def port(query):
        calls.append(query)
        return layer(query) * np.float32(1 + len(calls) // 2)

    report = compare(layer, port, QUERY)
    assert "two calls gave two results" in report.stages[0].faults
    assert (
        str(report.diagnosis)
        == "another result each time: dropout left on, or other random numbers"
    )

    def differs_between_calls(query):
        calls.append(query)
        return layer(query) * np.float32(1 + 1e-7 * (len(calls) % 2))

    report = compare(layer, differs_between_calls, QUERY)
    assert report.passed
    assert report.diagnosis is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda output: output * np.float32(1.01),
        lambda output: output + np.float32(0.005),
        lambda output: output + np.float32(0.01) * (np.arange(8) == 3),
    ],
)
def test_an_error_that_has_a_direction_is_not_taken_for_rounding(layer, wrong) -> None:
    report = compare(layer, lambda query: wrong(layer(query)), QUERY)
    assert not report.passed
    assert "computed in" not in str(report.diagnosis)


def test_inputs_that_hold_nan_are_compared_with_themselves(layer) -> None:
    x = QUERY.copy()
    x[1, 2] = np.nan
    assert compare(layer, layer, x).passed


def test_what_a_function_writes_into_its_inputs_changes_nothing_else(layer) -> None:
    def port(query):
        output = layer(query)
        query *= 0
        return output

    x = QUERY.copy()
    assert compare(layer, port, x).passed
    np.testing.assert_array_equal(x, QUERY)


def test_logits_that_decide_nothing_are_told(layer) -> None:
    report = compare(layer, layer, 1000 * QUERY)
    assert any("rounding explains any value" in words for words in report.not_exercised)


def test_a_bias_that_only_one_has_is_told(layer) -> None:
    without = {**layer.config.to_dict(), "use_bias": False}
    kernels = {n: w for n, w in anymha.get_weights(layer).items() if n.endswith("kernel")}
    bare = anymha.set_weights(anymha.MultiHeadAttention(**without, backend="numpy"), kernels)
    for one, other in ((layer, bare), (bare, layer)):
        names = [stage.name for stage in compare(one, other, QUERY).stages]
        assert "weight value.bias" in names


@pytest.mark.parametrize("result", [None, (1, 2, 3)])
def test_a_function_that_returns_something_else_is_told(layer, result) -> None:
    with pytest.raises(ArgumentError, match="must return the output"):
        compare(layer, lambda query: result, QUERY)


def test_nothing_is_no_proof(layer) -> None:
    with pytest.raises(ArgumentError, match=r"`query` is empty, .* shape \(0, 5, 8\)"):
        compare(layer, layer, QUERY[:0])


def test_an_error_says_whose_it_is(layer) -> None:
    def broken(query):
        raise KeyError("its own")

    for inputs in ((layer, broken), (broken, layer)):
        with pytest.raises(KeyError, match="its own") as failure:
            compare(*inputs, QUERY)
        role = "candidate" if inputs[0] is layer else "reference"
        assert f"as the {role} was called" in failure.value.__notes__[0]
