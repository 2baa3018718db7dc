"""Layers of torch, Keras and Flax against one another, and how their known differences are told."""

from __future__ import annotations

import numpy as np
import pytest

import anymha
from anymha.parity import compare
from tests.peer_layers import need
from tests.test_adapters import CALLS, KEY, QUERY, VALUE, converted, reference

PAIRS = [("torch", "keras"), ("keras", "nnx"), ("nnx", "torch"), ("linen", "equinox")]
EMPTY = np.arange(6) < np.array([6, 4, 0])[:, None]
MEAN = "fully masked rows give the mean of the values"


@pytest.mark.parametrize("call", ["self", "cross", "causal", "padded"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_layers_of_two_libraries_with_the_same_weights_agree(pair, call) -> None:
    one, other = (converted(reference(), kind) for kind in pair)
    inputs, others = CALLS[call]
    report = compare(one, other, inputs, **others)
    assert report.passed, report.to_text()
    assert report.diagnosis is None
    assert {"gradient of query", "output"} <= {stage.name for stage in report.stages}


def test_torch_and_keras_part_in_rows_that_see_nothing() -> None:
    one, other = (converted(reference(), kind) for kind in ("torch", "keras"))
    report = compare(one, other, [QUERY, VALUE, KEY], value_mask=EMPTY)
    assert not report.passed
    assert MEAN in str(report.diagnosis)
    assert any("averaged over the heads" in note for note in report.notes)


def test_a_reference_that_fills_such_rows_is_told_to_do_so() -> None:
    one, other = (converted(reference(), kind) for kind in ("nnx", "keras"))
    report = compare(one, other, [QUERY, VALUE, KEY], value_mask=EMPTY)
    output = next(stage for stage in report.stages if stage.name == "output")
    assert output.passed, report.to_text()
    assert any("differs from anymha's semantics" in note and MEAN in note for note in report.notes)
    report = compare(one, reference(), [QUERY, VALUE, KEY], value_mask=EMPTY)
    assert not report.passed
    assert any(MEAN in note for note in report.notes)


def test_scores_averaged_over_heads_are_named() -> None:
    layer = converted(reference(), "torch")
    torch = need("torch")

    def usual(query, value, key):
        return layer(*map(torch.as_tensor, (query, key, value)))

    report = compare(layer, lambda *x: [y.detach().numpy() for y in usual(*x)],
                     [QUERY, VALUE, KEY])  # fmt: skip
    assert report.first_divergence == "scores"
    assert "averaged over the heads" in str(report.diagnosis)


@pytest.mark.parametrize("kind", ["torch", "keras", "nnx", "equinox"])
@pytest.mark.parametrize("part", ["query", "value"])
def test_a_kernel_that_was_read_transposed_is_named(kind, part) -> None:
    layer = reference()
    weights = anymha.get_weights(layer)
    kernel = weights[f"{part}.kernel"]
    turned = kernel.reshape(8, 8).T.reshape(kernel.shape)
    wrong = anymha.set_weights(reference(), {**weights, f"{part}.kernel": turned})
    other = converted(wrong, kind)
    report = compare(layer, other, [QUERY, VALUE, KEY])
    assert report.first_divergence in (f"weight {part}.kernel", part)
    assert "transposed" in str(report.diagnosis)


def test_a_query_s_mask_that_keras_drops_is_told() -> None:
    layer = reference()
    seen = np.arange(5) < np.array([5, 3, 2])[:, None]
    report = compare(layer, converted(layer, "keras"), [QUERY, VALUE], query_mask=seen)
    assert "ignored mask" in str(report.diagnosis)
