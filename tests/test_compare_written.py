"""What `compare` gives functions and modules is theirs to write into, and they may leave torch."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, decoding
from tests.conftest import usable

QUERY = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")


def _writes(torch: Any, how: str) -> Any:
    """A module of torch that changes its input in one way, in place or not."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            if how == "adds":
                x += 2.0
            elif how == "hides":
                x.masked_fill_(torch.zeros(x.shape, dtype=torch.bool), 0.0).add_(2.0)
            else:
                x = x + 2.0
            q = self.linear(x)
            return torch.softmax(q @ q.mT, -1) @ q

    torch.manual_seed(0)
    return Module()


@pytest.mark.parametrize("how", ["adds", "hides"])
def test_a_module_of_torch_may_write_into_its_inputs(how: str) -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")
    x = torch.from_numpy(QUERY.copy())
    for pair in (("", how), (how, "")):
        report = compare(_writes(torch, pair[0]), _writes(torch, pair[1]), x)
        assert report.passed, report.to_text()
        assert "gradient of query" in [stage.name for stage in report.stages]
    np.testing.assert_array_equal(x.numpy(), QUERY)


def test_a_function_of_torch_may_write_into_its_inputs() -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")

    def right(query: Any, attention_mask: Any) -> Any:
        logits = (query @ query.mT).masked_fill(~attention_mask, -torch.inf)
        return torch.softmax(logits, -1) @ query

    def port(query: Any, attention_mask: Any) -> Any:
        query.add_(1)
        output = right(query.sub_(1), attention_mask)
        attention_mask.logical_not_()
        return output

    x, mask = torch.from_numpy(QUERY.copy()), np.tri(QUERY.shape[1], dtype=bool)
    for one, other in ((right, port), (port, right)):
        report = compare(one, other, x, attention_mask=mask)
        assert report.passed, report.to_text()
        assert "gradient of query" in [stage.name for stage in report.stages]
    np.testing.assert_array_equal(x.numpy(), QUERY)
    np.testing.assert_array_equal(mask, np.tri(QUERY.shape[1], dtype=bool))


def test_what_a_function_writes_into_a_mask_changes_nothing_else() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)

    def port(query: Any, attention_mask: Any) -> Any:
        output = layer(query, attention_mask=attention_mask.copy())
        attention_mask[...] = True
        return output

    mask = np.broadcast_to(np.tri(QUERY.shape[1], dtype=bool), (2, *2 * QUERY.shape[1:2])).copy()
    assert compare(layer, port, QUERY, attention_mask=mask).passed


def test_a_function_of_torch_that_decodes_may_write_into_its_inputs() -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")

    def attend(query: Any, keys: Any) -> Any:
        seen = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).tril()
        logits = (query @ keys.mT).masked_fill(~seen[-query.shape[1] :], -torch.inf)
        return torch.softmax(logits, -1) @ keys

    def step(x: Any, cache: Any) -> Any:
        x *= 2
        held = x / 2 if cache is None else torch.cat([cache, x / 2], 1)
        return attend(x / 2, held), held

    def whole(x: Any, use_causal_mask: bool = True) -> Any:
        return attend(x, x)

    x = torch.from_numpy(QUERY.copy())
    report = compare(whole, decoding(step, steps=(2, 1)), x)
    assert report.passed, report.to_text()
    np.testing.assert_array_equal(x.numpy(), QUERY)


def test_a_variable_of_tensorflow_may_be_written_into() -> None:
    usable("tensorflow")
    tensorflow: Any = importlib.import_module("tensorflow")

    def right(query: Any) -> Any:
        return tensorflow.nn.softmax(query @ tensorflow.linalg.matrix_transpose(query)) @ query

    def port(query: Any) -> Any:
        output = right(query)
        query.assign_add(tensorflow.ones_like(query))
        return output

    x = tensorflow.Variable(QUERY)
    report = compare(right, port, x)
    assert report.passed, report.to_text()
    np.testing.assert_array_equal(x.numpy(), QUERY)


@pytest.mark.parametrize("first", ["batch", "time"])
@pytest.mark.parametrize("kind", ["numpy", "list"])
def test_a_module_of_torch_may_return_arrays_of_numpy(first: str, kind: str) -> None:
    usable("torch")
    torch: Any = importlib.import_module("torch")

    class Leaves(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.batch_first = inner, first == "batch"

        def forward(self, x: Any) -> Any:
            x = x if self.batch_first else x.transpose(0, 1)
            output = self.inner(x)
            output = (output if self.batch_first else output.transpose(0, 1)).detach()
            return output.numpy() if kind == "numpy" else output.tolist()

    inner = _writes(torch, "")
    leaves = Leaves(inner)
    for pair in ((inner, leaves), (leaves, inner), (leaves, leaves)):
        report = compare(*pair, QUERY)
        assert report.passed, report.to_text()
        assert any("no tensor of torch" in note for note in report.notes)
    with torch.no_grad():
        inner.linear.weight[0] += 1
    assert not compare(_writes(torch, ""), leaves, QUERY).passed
