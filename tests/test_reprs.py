"""What is shown of objects that hold arrays: a few lines, with shapes and the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np

import anymha
from anymha.parity import compare, declare
from tests.support import normal

LAYER: Any = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
X = normal((2, 50, 8), "x")


def test_a_memory_shows_its_shapes() -> None:
    memory = LAYER.make_memory(X)
    keys = "shape (2, 2, 50, 4), dtype float32"
    assert repr(memory) == f"Memory(keys: {keys}; values: {keys})"
    placed = LAYER.make_memory(X, key_positions=np.arange(50))
    assert repr(placed).endswith("; key_positions: shape (1, 50), dtype int64)")


def test_declared_weights_show_their_shapes() -> None:
    def port(query: Any) -> Any:
        return query

    weights = anymha.get_weights(LAYER)
    for shown in (
        repr(declare(port, weights)),
        repr(declare(port, dict(weights), "anymha", num_heads=2)),
    ):
        assert "query.kernel (8, 2, 4), query.bias (2, 4)" in shown
        assert len(shown) < 400
    assert shown.endswith("layout='anymha', num_heads=2)")
    assert "weights: None, layout='torch.nn'" in repr(declare(port, layout="torch.nn"))


def test_a_comparison_shows_its_verdict() -> None:
    def port(query: Any) -> Any:
        return -LAYER(query)

    right, wrong = compare(LAYER, LAYER, X[:, :5]), compare(LAYER, port, X[:, :5])
    for report in (right, wrong):
        assert repr(report) == f"<Comparison: {report.verdict}>"
        assert str(report) == report.to_text()
    assert repr(wrong).startswith("<Comparison: PARITY DOES NOT HOLD: ")


def test_found_layers_show_their_layouts() -> None:
    (group,) = anymha.find_layers(dict(anymha.get_weights(LAYER)))
    assert repr(group) == "LayerGroup('', 1 layers, fits: anymha)"
