"""What a comparison's inputs cannot show is said under "not exercised"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare

RNG = np.random.default_rng(7)
X, Y, Z = (RNG.standard_normal((2, 5, 8)).astype(np.float32) for _ in range(3))
ROW = np.array([True, True, True, False, True])


def layer_with(heads: int = 4, shared: int | None = None, alike: bool = False) -> Any:
    layer = anymha.MultiHeadAttention(
        heads, 2, query_features=8, num_key_value_heads=shared, backend="numpy", seed=0,
        bias_initializer="random_normal",
    )  # fmt: skip
    weights = {name: np.array(array) for name, array in anymha.get_weights(layer).items()}
    for name in ("query", "key", "value") if alike else ():
        if shared is None or name != "query":
            weights[f"{name}.kernel"][:] = weights[f"{name}.kernel"][:, :1]
            weights[f"{name}.bias"][:] = weights[f"{name}.bias"][:1]
    return anymha.set_weights(layer, weights) or layer


LAYER = layer_with()
UNEVEN = RNG.random((2, 5, 5)) < 0.6
CASES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "value and key": (LAYER, [X, Y, Y.copy()], {}, "the order of value and key"),
    "query and value": (LAYER, [X, X.copy(), Z], {}, "the order of query and value"),
    "offset 0": (LAYER, X, {"use_causal_mask": True, "query_offset": 0}, "`query_offset`: it is"),
    "offset alone": (LAYER, X, {"query_offset": 2}, "`query_offset`: without"),
    "symmetric mask": (LAYER, X, {"attention_mask": np.stack([ROW[:, None] == ROW] * 2)},
                       "it is symmetric"),
    "one mask": (LAYER, X, {"value_mask": np.stack([ROW, ROW])}, "the batch of `value_mask`"),
    "heads alike": (layer_with(alike=True), X, {}, "the order of the heads"),
    "key heads alike": (layer_with(shared=2, alike=True), X, {}, "the order of the grouped heads"),
    "key bias": (LAYER, X, {}, "`key.bias`: the output does not depend on it"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_the_call_cannot_show_is_told(case: str) -> None:
    layer, inputs, call, words = CASES[case]
    report = compare(layer, lambda *inputs, **call: layer(*inputs, **call), inputs, **call)
    assert report.passed
    assert any(words in told for told in report.not_exercised), report.not_exercised


def test_a_call_that_shows_all_is_told_nothing() -> None:
    for layer in (LAYER, layer_with(shared=2)):
        call = {"attention_mask": UNEVEN, "query_offset": 2, "use_causal_mask": True}
        mask = np.stack([ROW, ~ROW])
        report = compare(layer, layer, [X, Y, Z], **call, value_mask=mask)
        assert report.not_exercised == ()
