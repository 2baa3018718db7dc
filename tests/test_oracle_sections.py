"""An option of the attention in the oracle: a toy shows that one section is all that it needs."""

from __future__ import annotations

import pkgutil
from typing import Any

import numpy as np
import pytest

from anymha.framework.registry import get_backend
from anymha.options.config import AttentionConfig
from anymha.parity import compare
from anymha.parity.diagnose.diagnosis import Search
from anymha.parity.diagnose.exercised import not_exercised
from anymha.parity.diagnose.mistakes import catalogue, other_options
from anymha.parity.oracle import features
from anymha.parity.oracle.cases import MatrixCase, make_problem, option_cases
from anymha.parity.oracle.features import SECTIONS, sections_of
from anymha.parity.oracle.oracle import evaluate
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, reads
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import Trace, make_request, problem_of
from tests.selftest.injected_faults import Fault, call_with_fault, option_faults
from tests.selftest.injection import make_layer
from tests.selftest.port import Port
from tests.support import normal

B, T, S, H, K = 2, 3, 4, 4, 2
WEIGHTS: Arrays = {
    "query.kernel": normal((5, H, 3), "query.kernel"),
    "query.bias": normal((H, 3), "query.bias"),
    "key.kernel": normal((6, K, 3), "key.kernel"),
    "key.bias": normal((K, 3), "key.bias"),
    "value.kernel": normal((7, K, 2), "value.kernel"),
    "output.kernel": normal((H, 2, 5), "output.kernel"),
    "sinks": normal((H,), "sinks"),
    "gate": normal((5, H), "gate"),
}
INPUTS: Arrays = {
    "query": normal((B, T, 5), "query"),
    "value": normal((B, S, 7), "value"),
    "key": normal((B, S, 6), "key"),
}
BIAS = normal((H, 1, S), "bias")
ALLOWED = normal((B, H, T, S), "allowed") > -0.5
KEPT = 1.25 * (normal((B, H, T, S), "kept") > -0.8)
D_OUTPUT = normal((B, T, 5), "d_output")
D_SCORES = normal((B, H, T, S), "d_scores")
OPS = get_backend("numpy").ops
ARRAYS: Arrays = {**WEIGHTS, **INPUTS, "attention_bias": BIAS}


def _doubled(section: Toy, recipe: Recipe) -> Variants:
    yield "by two", recipe.with_section(Toy(2 * section.value))


class Toy(Section):
    """An option that changes every stage that may be changed; at the logits l + l^2 value / 10."""

    option = "memory_budget"  # an option of the layer that the oracle knows nothing of
    examples = (5,)
    usual = (5, 7)
    mistakes = (("toy doubled", "Halve it.", _doubled),)
    faults = (
        ("toy left out", "memory_budget left out", "query"),
        ("another toy", "another memory_budget", "logits"),
        ("toy doubled", "toy doubled", "logits"),
    )

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        if stage == "query":
            return np.tanh(array)
        if stage == "logits":
            return array + array**2 * self.value / 10
        if stage == "probabilities" and "sinks" in recipe.weights:
            total = np.sum(np.exp(stages["masked_logits"]), -1, keepdims=True)
            return array * total / (total + np.exp(recipe.weights["sinks"])[:, None, None])
        if stage == "context" and "gate" in recipe.weights:
            return array * _gate(recipe)
        return array

    def backward(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:
        if stage == "query":
            return gradient * (1 - np.tanh(array) ** 2)
        if stage == "logits":
            slope = 1 + array * self.value / 5
            return gradient * (slope if cancel else np.abs(slope))
        if stage == "context" and "gate" in recipe.weights:
            return gradient * (_gate(recipe) if cancel else np.abs(_gate(recipe)))
        return gradient

    def own_gradients(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> Arrays:
        sign = -1 if cancel else 1
        if stage == "probabilities" and "sinks" in recipe.weights:
            kept = stages["probabilities"]
            lost = 1 - kept.sum(-1)
            return {"sinks": sign * np.einsum("bhts,bhts,bht->h", kept, gradient, lost)}
        if stage == "context" and "gate" in recipe.weights:
            g = np.einsum("bthv,bthv->bth", gradient, array if cancel else np.abs(array))
            query, gate = recipe.inputs["query"], recipe.weights["gate"]
            if not cancel:
                query, gate = np.abs(query), np.abs(gate)
            return {
                "gate": np.einsum("btd,bth->dh", query, g),
                "query": np.einsum("bth,dh->btd", g, gate),
            }
        return {}

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        return 1000 * sizes if stage == "logits" else sizes

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        if "toy left out" in port.wrong:
            return array
        if place == "query":
            return ops.tanh(array)
        if place == "logits":
            factor = 7 if "another toy" in port.wrong else self.value
            factor *= 2 if "toy doubled" in port.wrong else 1
            return array + array * array * (factor / 10)
        return array


def _gate(recipe: Recipe) -> np.ndarray:
    return np.einsum("btd,dh->bth", recipe.inputs["query"], recipe.weights["gate"])[..., None]


def recipe_of(arrays: Arrays, value: int = 5) -> Recipe:
    weights = {name: arrays[name] for name in WEIGHTS}
    inputs = {name: arrays[name] for name in INPUTS}
    masks = {"allowed": ALLOWED}
    return Recipe(weights, inputs, 0.4, masks, bias=arrays["attention_bias"], kept=KEPT,
                  sections=(Toy(value),))  # fmt: skip


def meant(layer: Any, weights: Arrays, inputs: Arrays, call: dict[str, Any]) -> Recipe:
    """What the oracle computes for a call of a layer."""
    return fold(problem_of(layer.config, weights, make_request(inputs, call))).recipe


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle knows the toy, and no other option."""
    for option in reversed(list(SECTIONS)):
        monkeypatch.delitem(SECTIONS, option)
    monkeypatch.setitem(SECTIONS, Toy.option, Toy)


def test_every_file_of_the_folder_is_a_section() -> None:
    names = {module.name for module in pkgutil.iter_modules(features.__path__)}
    assert {section.__module__.rpartition(".")[2] for section in SECTIONS.values()} == names
    assert all(section.option == option for option, section in SECTIONS.items())


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_gradient_through_a_section_is_that_of_finite_differences(name: str) -> None:
    def loss(values: np.ndarray) -> float:
        truth = evaluate(recipe_of({**ARRAYS, name: values}))
        return float((truth.output * D_OUTPUT).sum() + (truth.scores * D_SCORES).sum())

    truth, step = evaluate(recipe_of(ARRAYS), D_OUTPUT, D_SCORES), 1e-5
    gradient = truth.gradients[name]
    assert gradient.shape == ARRAYS[name].shape
    assert np.all(truth.magnitudes[name] > 0.99 * np.abs(gradient))
    for place in np.ndindex(*gradient.shape):
        shift = np.zeros(gradient.shape)
        shift[place] = step
        slope = (loss(ARRAYS[name] + shift) - loss(ARRAYS[name] - shift)) / (2 * step)
        assert slope == pytest.approx(gradient[place], abs=1e-8 + 1e-8 * abs(slope)), place


def test_sections_change_their_stages_alone_and_can_be_switched_off() -> None:
    recipe = recipe_of(ARRAYS)
    plain = recipe.without_section("memory_budget")
    assert recipe.options == {"memory_budget": 5}
    assert plain.options == {}
    assert plain.with_section(Toy(7)).with_section(Toy(5)).options == recipe.options
    heads = reads(recipe)
    raw = np.einsum("bthk,bshk->bhts", np.tanh(plain.stages["query"]),
                    plain.stages["key"][:, :, heads]) * 0.4  # fmt: skip
    np.testing.assert_allclose(recipe.stages["logits"], raw + raw**2 / 2, rtol=1e-12)
    np.testing.assert_array_equal(recipe.stages["value"], plain.stages["value"])


def test_sizes_ask_the_section() -> None:
    recipe = recipe_of(ARRAYS)
    largest = np.max(np.abs(recipe.stages["logits"]), axis=(1, 3), keepdims=True)
    assert np.all(recipe.sizes["logits"] > 500 * largest)


@pytest.mark.usefixtures("toy")
def test_fold_takes_an_option_that_is_on() -> None:
    config = AttentionConfig(2, 3, query_features=4, memory_budget=7)
    assert [type(section) for section in sections_of(config)] == [Toy]
    assert sections_of(AttentionConfig(2, 3)) == ()
    assert sections_of(object()) == ()
    problem = make_problem(MatrixCase("toy", {"memory_budget": 7}))
    assert fold(problem).recipe.options == {"memory_budget": 7}


@pytest.mark.usefixtures("toy")
def test_an_option_that_changes_nothing_is_told() -> None:
    recipe = recipe_of(ARRAYS)
    assert "`memory_budget`" not in not_exercised(recipe)
    zero = {**ARRAYS, "query.kernel": 0 * ARRAYS["query.kernel"], "key.bias": np.zeros((K, 3))}
    zero |= {"query.bias": np.zeros((H, 3)), "gate": zero["gate"], "sinks": zero["sinks"]}
    plain = recipe_of(zero)
    weights = {n: w for n, w in plain.weights.items() if n not in ("gate", "sinks")}
    told = not_exercised(plain.but(weights=weights))
    assert "`memory_budget`" in told
    assert "`key.bias`: it is zero" in told


@pytest.mark.usefixtures("toy")
def test_mistakes_with_an_option_are_in_the_catalogue_and_are_found() -> None:
    names = [mistake.name for mistake in catalogue()]
    expected = ["memory_budget left out", "toy doubled", "another memory_budget"]
    assert [name for name in names if name in expected] == expected
    recipe = recipe_of(ARRAYS)
    wrong = {
        "memory_budget left out": recipe.without_section("memory_budget"),
        "another memory_budget (7 in place of 5)": recipe.with_section(Toy(7)),
        "toy doubled (by two)": recipe.with_section(Toy(10)),
    }
    for words, made in wrong.items():
        told = {name: made.stages[name] for name in ("output",)}
        trace = Trace("port", made.stages["output"])
        found = Search(recipe, trace, told).diagnose()
        assert str(found).partition(" (or")[0] == words
        assert found.causes[0].fix
        assert found.causes[0].stage in ("query", "logits")


@pytest.mark.usefixtures("toy")
def test_an_option_that_the_candidate_alone_has_otherwise_is_named() -> None:
    recipe = recipe_of(ARRAYS)
    config = AttentionConfig(2, 3, memory_budget=9)
    [(mistake, detail, wrong)] = other_options(recipe, config)
    assert (mistake.name, detail) == ("another memory_budget", "9 in place of 5")
    assert wrong.options == {"memory_budget": 9}
    [(mistake, detail, _)] = other_options(recipe.without_section("memory_budget"), config)
    assert (mistake.name, detail) == ("memory_budget not asked for", "memory_budget=9")
    assert not list(other_options(recipe, AttentionConfig(2, 3)))
    assert not list(other_options(recipe, None))


@pytest.mark.usefixtures("toy")
def test_compare_tells_that_a_layer_leaves_the_option_out() -> None:
    layer, _ = make_layer({"memory_budget": 5}, "float32", 0)
    inputs, call = call_with_fault(("mask",), "float32", 0)
    report = compare(layer, layer, inputs, **call)
    assert report.passed
    assert any("memory_budget left out" in note for note in report.notes)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("fault", list(option_faults(Toy)), ids=lambda fault: fault.wrong)
def test_the_port_has_the_option_and_its_faults(fault: Fault) -> None:
    layer, weights = make_layer(fault.options, "float64", 0)
    inputs, call = call_with_fault(fault.case, "float64", 0)
    made = meant(layer, weights, inputs, call)
    right = Port(OPS, weights, sections=made.sections)(**inputs, **call)
    np.testing.assert_allclose(right["output"], made.stages["output"], rtol=1e-9, atol=1e-9)
    wrong = Port(OPS, weights, {fault.wrong}, sections=made.sections)(**inputs, **call)
    assert np.max(np.abs(wrong["logits"] - made.stages["logits"])) > 0.1
    told = {"output": wrong["output"]}
    found = Search(made, Trace("port", wrong["output"]), told).diagnose()
    assert found.causes[0].name == fault.cause
    assert found.causes[0].stage == fault.stage


@pytest.mark.usefixtures("toy")
def test_the_matrix_gets_cases_with_the_option() -> None:
    cases = list(option_cases(Toy))
    assert len({case.name for case in cases}) == len(cases) > 3
    assert all(case.config.memory_budget == 5 for case in cases)
    assert {case.config.dtype for case in cases} == {"float32", "float16", "bfloat16"}
    for case in cases:
        assert fold(make_problem(case)).recipe.options == {"memory_budget": 5}
