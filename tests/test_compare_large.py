"""Large cases are cut to a smaller one, and the outputs compared at the full length too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare
from anymha.parity.comparison.cut import LARGEST, cut, sequences
from anymha.parity.stages.saved_case import load_case
from anymha.parity.stages.trace import make_request

RNG = np.random.default_rng(9)
LAYER = anymha.MultiHeadAttention(
    2, 4, query_features=8, backend="numpy", seed=0, bias_initializer="random_normal"
)
LONG = RNG.standard_normal((3, 300, 8)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_every_argument_is_cut_to_the_same_positions() -> None:
    call: dict[str, Any] = {
        "attention_mask": RNG.random((3, 300, 400)) < 0.5, "value_mask": RNG.random((3, 400)) < 0.5,
        "query_mask": RNG.random((3, 300)) < 0.5, "attention_bias": normal(2, 300, 400),
        "use_causal_mask": True, "query_offset": np.array([0, 100, 3]),
    }  # fmt: skip
    request = make_request([LONG, normal(3, 400, 8)], call)
    part = cut(request)
    assert part is not None
    (batch, queries, _), keys = part.three[0].shape, part.three[1].shape[1]
    assert batch * queries * keys <= LARGEST
    assert keys >= queries + 100, "the last query sees as far as its offset says"
    assert part.masks["attention_mask"].shape == (batch, queries, keys)
    assert part.masks["value_mask"].shape == (batch, keys)
    assert part.masks["query_mask"].shape == (batch, queries)
    assert part.bias is not None
    assert part.bias.shape == (2, queries, keys)
    np.testing.assert_array_equal(part.call["query_offset"], [0, 100])
    np.testing.assert_array_equal(part.originals["query"], LONG[:batch, :queries])
    assert cut(part) is None
    full = sequences(request)
    assert full is not None
    assert full.three[0].shape == (2, 300, 8)


@pytest.mark.parametrize(
    ("shape", "is_cut"),
    [((2, 128, 8), False), ((2, 3, 90, 8), False), ((64, 30, 8), True), ((1, 200, 8), True)],
)
def test_small_cases_and_those_of_several_axes_stay_whole(shape: Any, is_cut: bool) -> None:
    assert (cut(make_request(normal(*shape), {})) is not None) is is_cut


def test_large_case_says_what_was_compared() -> None:
    report = compare(LAYER, LAYER, LONG, use_causal_mask=True)
    assert report.passed
    assert report.stages[-1].name == "output at full length"
    assert report.notes[0].endswith("The outputs agree at (2, 300) of (3, 300) (batch, length).")
    report = compare(LAYER, lambda query, use_causal_mask: LAYER(query), LONG, use_causal_mask=True)
    assert str(report.diagnosis) == "causal mask ignored"
    assert "(2, 64) of (3, 300)" in report.to_text()


def test_mistake_of_long_sequences_alone_is_found(tmp_path: Any) -> None:
    def forgets(query: Any) -> Any:
        return np.concatenate([LAYER(query[:, :256]), LAYER(query)[:, 256:]], 1)

    report = compare(LAYER, forgets, LONG)
    assert report.first_divergence == "output at full length"
    assert str(report.diagnosis) == "a mistake that long sequences alone show"
    report.to_html(tmp_path / "a.html")
    report.save(tmp_path / "a.npz")
    assert load_case(tmp_path / "a.npz").inputs["query"].shape == LONG.shape


def test_what_takes_one_length_alone_is_compared_whole() -> None:
    def fixed(query: Any) -> Any:
        if query.shape[1] != 200:
            raise ValueError("a window of 200")
        return LAYER(query)

    report = compare(LAYER, fixed, LONG[:1, :200])
    assert report.passed
    assert "output at full length" not in {stage.name for stage in report.stages}
