"""`compare`: where two implementations part, and why, on examples small enough to see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError
from anymha.parity import ParityError, assert_parity, compare
from anymha.parity.recipe import STEPS, run, sizes
from anymha.parity.structure import distance, structure
from anymha.parity.subjects import ours
from anymha.parity.trace import make_request, problem_of
from anymha.parity.truth import fold

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
    assert not report.diagnosis.explained
    assert str(report.diagnosis) == "no known mistake, nor any two of them, explains the difference"


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


def test_causes_are_found_where_there_is_much_to_compute(layer) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 160, 8)).astype("float32")
    mask = rng.random((3, 160, 160)) < 0.7

    def port(query, attention_mask):
        output = layer(query, attention_mask=attention_mask)
        output[2] = layer(query, attention_mask=~attention_mask)[2]
        return output

    report = compare(layer, port, x, attention_mask=mask)
    assert str(report.diagnosis) == "inverted mask (the mask)"
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
    assert "Neither tells its weights" in report.notes[0]
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
    assert "`output.bias`: it is zero" in report.untested
    assert any("`attention_mask`" in words for words in report.untested)
    assert any("one element" in words for words in report.untested)
    assert compare(layer, layer, [QUERY, VALUE], attention_mask=MASK).untested == ()


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
        (QUERY, {"causal": True}, "no argument 'causal'"),
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
    logits = np.array([1.0, -np.inf])
    assert structure("masked_logits", logits, logits[::-1]) == [
        "masks 1 places more and 1 fewer, of 2"
    ]
    assert structure("masked_logits", logits, np.array([1.0, -1e9])) == []


def test_distance_takes_equal_nan_and_masked_numbers_for_equal() -> None:
    one = np.array([np.nan, -np.inf, 1.0, np.nan, np.inf])
    other = np.array([np.nan, -1e30, 1.5, 1.0, 1.0])
    np.testing.assert_array_equal(distance(one, other), [0, 0, 0.5, np.inf, np.inf])


def test_sizes_bound_every_stage(layer) -> None:
    request = make_request([QUERY, VALUE], {"attention_mask": MASK})
    recipe = fold(problem_of(layer.config, anymha.get_weights(layer), request)).recipe
    stages = run(recipe)
    for name, size in sizes(recipe, stages).items():
        whole = stages["probabilities" if name == "scores" else name]
        assert size >= np.max(np.abs(whole[np.isfinite(whole)]))
    assert dataclasses.replace(recipe).but(scale=1.0).scale == 1.0
