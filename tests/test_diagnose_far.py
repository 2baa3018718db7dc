"""What a search does not compute: of mistakes that are far off, and the thread's clock."""

from __future__ import annotations

import time

import numpy as np
import pytest

from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.trials import Trials, best
from anymha.parity.oracle.recipe import Recipe, einsum
from anymha.parity.stages.trace import Trace
from tests.support import normal
from tests.test_oracle import INPUTS, WEIGHTS


def test_a_mistake_that_is_far_off_is_completed_to_what_it_is_as_a_whole() -> None:
    recipe = Recipe(WEIGHTS, INPUTS, 0.4)
    stages = recipe.but(scale=1.0).stages
    told = {"output": stages["output"], "scores": stages["probabilities"]}
    trials = Trials(recipe, Trace("port", stages["output"]), told)
    tried = [*filter(None, trials.tried(recipe))]
    far = [one for one in tried if one.left == np.inf]
    assert len(far) > len(tried) / 2
    assert sum("output" not in one.begun.until("query") for one in far if one.begun) > len(far) / 2
    found = best(tried)
    assert found is not None
    assert found.causes[0].name == "wrong scale"
    completed = trials.completed(tried)
    for one in completed:
        whole = trials.weighed(recipe, one.causes, one.recipe.alone(), one.rank, whole=True)
        assert whole is not None
        assert (whole.left, whole.errors) == (one.left, one.errors)
        np.testing.assert_array_equal(whole.columns, one.columns)
        np.testing.assert_array_equal(whole.apart, one.apart)
    again = best(completed)
    assert again is not None
    assert (again.causes, again.alternatives) == (found.causes, found.alternatives)


def test_the_clock_of_the_thread_is_asked_once_the_time_may_be_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, own, asked = [5.0], [1.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: asked.append(own[0]) or own[0])
    until = Deadline(2.0)
    now[0], own[0] = 6.5, 2.5
    assert not until.over
    assert asked == [1.0]
    now[0], own[0] = 9.0, 2.9
    assert not until.over
    own[0] = 3.1
    assert until.over
    assert asked == [1.0, 2.9, 3.1]


@pytest.mark.parametrize(
    ("formula", "one", "other"),
    [
        ("btd,dhk->bthk", (2, 3, 4), (4, 2, 5)),
        ("bhts,bshv->bthv", (2, 3, 4, 5), (2, 5, 3, 6)),
        ("bhts,bshv->bthv", (2, 3, 4, 5), (1, 5, 3, 6)),  # an axis is repeated
        ("ab,bc->ca", (2, 3), (3, 4)),
        ("ab,ab->ab", (2, 3), (2, 3)),  # no sum
        ("btd,dhk->bthk", (0, 3, 4), (4, 2, 5)),
    ],
)
def test_products_are_those_of_einsum(
    formula: str, one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    first, second = normal(one, "first"), normal(other, "second")
    expected = np.einsum(formula, first, second)
    np.testing.assert_allclose(einsum(formula, first, second), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [(4, 2), (4, 2, 5, 1), (3, 2, 5)])
def test_arrays_of_other_axes_have_no_product(other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"axes|operand|dimension"):
        einsum("btd,dhk->bthk", normal((2, 3, 4), "first"), normal(other, "second"))
