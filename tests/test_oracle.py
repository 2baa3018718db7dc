"""The oracle itself: against plain loops, and its gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from anymha.parity.oracle.oracle import Truth
from tests.support import Arrays, normal
from tests.written_oracle import attention_oracle

B, T, S, H, K, D = 2, 3, 4, 4, 2, 3

WEIGHTS: Arrays = {
    "query.kernel": normal((5, H, D), "query.kernel"),
    "query.bias": normal((H, D), "query.bias"),
    "key.kernel": normal((6, K, D), "key.kernel"),
    "key.bias": normal((K, D), "key.bias"),
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


def _ask(arrays: Arrays, **changes: Any) -> Truth:
    options = {"allowed": ALLOWED, "kept": KEPT, "d_output": D_OUTPUT, "d_scores": D_SCORES}
    return attention_oracle(
        {name: arrays[name] for name in arrays if "." in name},
        {name: arrays[name] for name in INPUTS},
        scale=0.4,
        bias=arrays["attention_bias"],
        **{**options, **changes},
    )


ARRAYS: Arrays = {**WEIGHTS, **INPUTS, "attention_bias": BIAS}


def test_forward_is_that_of_plain_loops() -> None:
    truth = _ask(ARRAYS)
    w, x = WEIGHTS, INPUTS
    for b in range(B):
        for t in range(T):
            output = w["output.bias"].copy()
            for h in range(H):
                g = h // 2
                q = x["query"][b, t] @ w["query.kernel"][:, h] + w["query.bias"][h]
                weights = []
                for s in range(S):
                    k = x["key"][b, s] @ w["key.kernel"][:, g] + w["key.bias"][g]
                    logit = 0.4 * float(q @ k) + float(BIAS[h, 0, s])
                    weights.append(math.exp(logit) if ALLOWED[b, h, t, s] else 0.0)
                total = sum(weights) or 1.0
                for s in range(S):
                    v = x["value"][b, s] @ w["value.kernel"][:, g] + w["value.bias"][g]
                    score = weights[s] / total
                    assert truth.scores[b, h, t, s] == pytest.approx(score, abs=1e-14)
                    output += score * KEPT[b, h, t, s] * (v @ w["output.kernel"][h])
            np.testing.assert_allclose(truth.output[b, t], output, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    def loss(values: np.ndarray) -> float:
        truth = _ask({**ARRAYS, name: values})
        return float((truth.output * D_OUTPUT).sum() + (truth.scores * D_SCORES).sum())

    gradient, step = _ask(ARRAYS).gradients[name], 1e-5
    assert gradient.shape == ARRAYS[name].shape
    for place in np.ndindex(*gradient.shape):
        shift = np.zeros(gradient.shape)
        shift[place] = step
        slope = (loss(ARRAYS[name] + shift) - loss(ARRAYS[name] - shift)) / (2 * step)
        # The error of central differences: step^2 of truncation, eps / step of rounding.
        assert slope == pytest.approx(gradient[place], abs=2e-9 + 2e-9 * abs(slope)), place


def test_absent_bias_has_no_gradient_and_is_not_added() -> None:
    without = {name: array for name, array in ARRAYS.items() if name != "key.bias"}
    zero = {**ARRAYS, "key.bias": np.zeros((K, D))}
    assert "key.bias" not in _ask(without).gradients
    np.testing.assert_array_equal(_ask(without).output, _ask(zero).output)


def test_row_without_keys_gives_the_output_bias_and_no_gradient() -> None:
    truth = _ask(ARRAYS, allowed=np.zeros((1, 1, 1, S), bool), d_scores=None)
    assert (truth.output == WEIGHTS["output.bias"]).all()
    assert not truth.scores.any()
    for name, gradient in truth.gradients.items():
        assert np.any(gradient) == (name == "output.bias"), name
