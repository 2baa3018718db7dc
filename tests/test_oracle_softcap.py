"""Softcap in the oracle: its formula, its gradients, its sizes, and the mistakes with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anymha.framework.registry import get_backend
from anymha.parity.diagnose.diagnosis import Search
from anymha.parity.diagnose.exercised import not_exercised
from anymha.parity.oracle.features.softcap import SoftcapSection
from anymha.parity.oracle.oracle import evaluate
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.oracle.truth import fold
from anymha.parity.stages.trace import Trace, make_request, problem_of
from tests.selftest.injected_faults import Fault, call_with_fault, option_faults
from tests.selftest.injection import make_layer
from tests.selftest.port import Port
from tests.support import normal
from tests.written_oracle import attention_oracle

B, T, S, H, K, CAP, SCALE = 2, 3, 4, 4, 2, 0.7, 0.4
WEIGHTS: Arrays = {
    "query.kernel": normal((5, H, 3), "query.kernel"),
    "query.bias": normal((H, 3), "query.bias"),
    "key.kernel": normal((6, K, 3), "key.kernel"),
    "key.bias": normal((K, 3), "key.bias"),
    "value.kernel": normal((7, K, 2), "value.kernel"),
    "value.bias": normal((K, 2), "value.bias"),
    "output.kernel": normal((H, 2, 5), "output.kernel"),
    "output.bias": normal((5,), "output.bias"),
}
INPUTS: Arrays = {
    "query": normal((B, T, 5), "query"),
    "value": normal((B, S, 7), "value"),
    "key": normal((B, S, 6), "key"),
}
BIAS = normal((H, 1, S), "bias")
ALLOWED = normal((B, H, T, S), "allowed") > -0.5
ALLOWED[0, :, 1] = False
KEPT = 1.25 * (normal((B, H, T, S), "kept") > -0.8)
D_OUTPUT = normal((B, T, 5), "d_output")
D_SCORES = normal((B, H, T, S), "d_scores")
ARRAYS: Arrays = {**WEIGHTS, **INPUTS, "attention_bias": BIAS}


def recipe_of(arrays: Arrays, cap: float = CAP) -> Recipe:
    weights = {name: arrays[name] for name in WEIGHTS}
    inputs = {name: arrays[name] for name in INPUTS}
    return Recipe(weights, inputs, SCALE, {"attention_mask": ALLOWED},
                  bias=arrays["attention_bias"], kept=KEPT,
                  sections=(SoftcapSection(cap),))  # fmt: skip


def test_logits_are_bounded_before_the_bias() -> None:
    w = WEIGHTS
    q = np.einsum("btd,dhk->bthk", INPUTS["query"], w["query.kernel"]) + w["query.bias"]
    k = np.einsum("bsd,dhk->bshk", INPUTS["key"], w["key.kernel"]) + w["key.bias"]
    products = SCALE * np.einsum("bthk,bshk->bhts", q, np.repeat(k, H // K, axis=2))
    bounded = CAP * np.tanh(products / CAP)
    found = recipe_of(ARRAYS).stages
    np.testing.assert_allclose(found["logits"], bounded, rtol=1e-12)
    seen = np.where(ALLOWED, bounded + BIAS, -np.inf)
    np.testing.assert_allclose(found["masked_logits"], seen, rtol=1e-12)
    assert np.max(np.abs(products - bounded)) > 0.3


def test_oracle_takes_the_section() -> None:
    options = {"scale": SCALE, "allowed": ALLOWED, "bias": BIAS, "kept": KEPT}
    found = attention_oracle(WEIGHTS, INPUTS, **options, sections=(SoftcapSection(CAP),))
    np.testing.assert_array_equal(found.output, recipe_of(ARRAYS).stages["output"])


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    def loss(values: np.ndarray) -> float:
        truth = evaluate(recipe_of({**ARRAYS, name: values}))
        return float((truth.output * D_OUTPUT).sum() + (truth.scores * D_SCORES).sum())

    truth, step = evaluate(recipe_of(ARRAYS), D_OUTPUT, D_SCORES), 1e-5
    gradient = truth.gradients[name]
    assert np.all(truth.magnitudes[name] >= 0.99 * np.abs(gradient))
    for place in np.ndindex(*gradient.shape):
        shift = np.zeros(gradient.shape)
        shift[place] = step
        slope = (loss(ARRAYS[name] + shift) - loss(ARRAYS[name] - shift)) / (2 * step)
        assert slope == pytest.approx(gradient[place], abs=5e-9 + 5e-9 * abs(slope)), place


def test_bias_of_the_key_matters() -> None:
    capped = evaluate(recipe_of(ARRAYS), D_OUTPUT, D_SCORES).gradients["key.bias"]
    plain = recipe_of(ARRAYS).without_section("softcap")
    free = evaluate(plain, D_OUTPUT, D_SCORES).gradients["key.bias"]
    assert np.max(np.abs(free)) < 1e-12 < 1e-3 < np.max(np.abs(capped))
    unbiased = {**ARRAYS, "key.bias": np.zeros((K, 3))}
    assert "`key.bias`: it is zero" in not_exercised(recipe_of(unbiased))
    assert not not_exercised(recipe_of(ARRAYS))


def test_a_cap_far_above_the_logits_is_not_exercised() -> None:
    assert "`softcap`" in not_exercised(recipe_of(ARRAYS, 1e6))


@pytest.mark.parametrize("cap", [0.05, 0.7, 50.0])
def test_sizes_cover_the_errors_of_float32(cap: float) -> None:
    recipe = recipe_of(ARRAYS, cap)
    raw = recipe.without_section("softcap").stages["logits"].astype(np.float32)
    rounded = np.float32(cap) * np.tanh(raw / np.float32(cap))
    error = np.abs(rounded - recipe.stages["logits"])
    assert np.all(error <= 4 * np.finfo(np.float32).eps * recipe.sizes["logits"])
    assert np.all(recipe.sizes["logits"] >= np.max(np.abs(recipe.stages["logits"])) / 4)


def _bounded(x: np.ndarray, cap: float = CAP) -> np.ndarray:
    return cap * np.tanh(x / cap)


def _outside(logits: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The output, the masked logits made from the scaled products by a function."""
    recipe = recipe_of(ARRAYS).without_section("softcap")
    wrong = recipe.stepping("masked_logits", lambda recipe, stages: logits(stages["logits"]))
    return wrong.stages["output"]


def _masked(logits: np.ndarray) -> np.ndarray:
    return np.where(ALLOWED, logits + BIAS, -np.inf)


MISTAKES = {
    "softcap left out": _masked,
    "another softcap (30.0 in place of 0.7)": lambda x: _masked(_bounded(x, 30.0)),
    "softcap too late (after the bias)": lambda x: np.where(ALLOWED, _bounded(x + BIAS), -np.inf),
    "softcap too late (after the masks, which it undoes)": lambda x: _bounded(_masked(x)),
    "softcap before the scale": lambda x: _masked(SCALE * _bounded(x / SCALE)),
    "softcap without its factors (not divided by it before the tanh)": (
        lambda x: _masked(CAP * np.tanh(x))
    ),
    "softcap without its factors (not multiplied by it after the tanh)": (
        lambda x: _masked(np.tanh(x / CAP))
    ),
    "softcap without its factors (neither divided nor multiplied by it)": (
        lambda x: _masked(np.tanh(x))
    ),
    "softcap by clipping": lambda x: _masked(np.clip(x, -CAP, CAP)),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake_is_named_from_the_output_alone(words: str) -> None:
    output = _outside(MISTAKES[words])
    found = Search(recipe_of(ARRAYS), Trace("port", output), {"output": output}).diagnose()
    assert str(found) == words
    assert found.explained
    assert found.causes[0].stage == "logits"


def test_right_softcap_fits() -> None:
    output = _outside(lambda x: _masked(_bounded(x)))
    assert Search(recipe_of(ARRAYS), Trace("port", output), {"output": output}).fits()


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(
    "fault", list(option_faults(SoftcapSection)), ids=lambda fault: fault.wrong
)
def test_injected_fault_is_named(fault: Fault, tells: bool) -> None:
    layer, weights = make_layer({}, "float64", 0)
    inputs, call = call_with_fault(fault.case, "float64", 0)
    problem = problem_of(layer.config, weights, make_request(inputs, call))
    recipe = fold(problem).recipe.with_section(SoftcapSection(fault.options["softcap"]))
    ops = get_backend("numpy").ops
    right = Port(ops, weights, sections=recipe.sections)(**inputs, **call)
    for name, array in right.items():
        expected = recipe.stages["probabilities" if name == "scores" else name]
        np.testing.assert_allclose(array, expected, rtol=1e-9, atol=1e-9)
    wrong = Port(ops, weights, {fault.wrong}, sections=recipe.sections)(**inputs, **call)
    told = wrong if tells else {"output": wrong["output"]}
    found = Search(recipe, Trace("port", wrong["output"]), told).diagnose()
    assert (found.causes[0].name, found.causes[0].stage) == (fault.cause, fault.stage)
