"""Blocks of queries: the results are those of one piece, forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.blocks import plan_runs, seen_keys
from anymha.dropout import Dropout, Place
from anymha.masks import Visibility
from anymha.paths import Path, told_paths
from anymha.registry import Backend
from tests.support import Arrays, native, normal

B, T, S, H = 2, 34, 40, 4
SMALL, LARGE = 256, 1 << 30  # bytes: 64 logits, and all of them

BOOLEANS = np.random.default_rng(5)
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "causal, later": ({}, {"is_causal": True, "query_offset": 7}),
    "offset by batch": ({"query_offset": np.array([3, 9], np.int32)}, {"is_causal": True}),
    "window": ({}, {"window": (3, 2), "query_offset": -5}),
    "open window": ({}, {"window": (None, 4)}),
    "mask": ({"mask": BOOLEANS.random((B, 1, T, S)) > 0.5}, {}),
    "mask by head": ({"mask": BOOLEANS.random((H, T, 1)) > 0.3}, {}),
    "padding": (
        {"value_mask": BOOLEANS.random((B, S)) > 0.5, "query_mask": BOOLEANS.random((B, T)) > 0.3},
        {"is_causal": True},
    ),
    "bias": ({"bias": normal((1, H, T, S), "bias")}, {}),
    "short bias": ({"bias": normal((H, 1, S), "bias")}, {"softcap": 2.0}),
    "dropout": ({}, {"dropout": 0.3, "seed": 11}),
    "all": (
        {"mask": BOOLEANS.random((B, 1, T, S)) > 0.2, "bias": normal((B, H, T, S), "all")},
        {"dropout": 0.3, "seed": 5, "is_causal": True, "softcap": 3.0, "scale": 0.7},
    ),
}


def _arrays(shared: int, d_v: int) -> Arrays:
    shapes = {"query": (B, T, H, 8), "key": (B, S, shared, 8), "value": (B, S, shared, d_v)}
    return {name: normal(shape, name) for name, shape in shapes.items()}


def _found(
    backend: Backend, arrays: Arrays, call: dict[str, Any], budget: int, scores: bool
) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[Path]]:
    """Results, gradients (where the framework has them) and paths of a call."""
    ops = backend.ops
    given = native(ops, arrays)
    moving = {name: x for name, x in given.items() if arrays[name].dtype.kind == "f"}
    fixed = {name: x for name, x in given.items() if name not in moving}

    def function(moving: dict[str, Any]) -> Any:
        return anymha.dot_product_attention(
            **moving, **fixed, **call, memory_budget=budget, return_scores=scores
        )

    shapes = [(B, T, H, arrays["value"].shape[3]), (B, H, T, S)][: 1 + scores]
    cotangents = tuple(ops.from_numpy(normal(s, f"cotangent {i}")) for i, s in enumerate(shapes))
    gradients = {}
    with told_paths() as paths:
        if hasattr(ops, "vjp"):
            if backend.name == "jax":  # op by op it would compile for longer
                function = importlib.import_module("jax").jit(function)
            results, gradients = ops.vjp(function, moving, cotangents if scores else cotangents[0])
        else:
            results = function(moving)
    return (
        [ops.to_numpy(x) for x in (results if scores else (results,))],
        {name: ops.to_numpy(x) for name, x in gradients.items()},
        paths,
    )


def _agree(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(other, one, rtol=0, atol=4e-6 * np.abs(one).max())


@pytest.mark.parametrize(
    ("name", "shared", "d_v"), [*((name, 2, 8) for name in CALLS), ("plain", 4, 6), ("all", 4, 6)]
)
def test_blocks_give_what_one_piece_gives(
    name: str, shared: int, d_v: int, backend: Backend
) -> None:
    extra, call = CALLS[name]
    arrays = _arrays(shared, d_v) | extra
    whole = _found(backend, arrays, call, LARGE, scores=True)
    blocks = _found(backend, arrays, call, SMALL, scores=True)
    assert sum(run.count for run in blocks[2][-1].runs) > 4
    for one, other in zip(whole[0], blocks[0], strict=True):
        _agree(one, other)
    assert whole[1].keys() == blocks[1].keys()
    for key, gradient in whole[1].items():
        _agree(gradient, blocks[1][key])
    alone = _found(backend, arrays, call, SMALL, scores=False)
    assert alone[0][0].tobytes() == blocks[0][0].tobytes()


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"training": True, "seed": 3}])
def test_a_layer_without_autodiff_has_the_gradients_of_one_piece(call: dict[str, Any]) -> None:
    options = {"num_heads": 4, "key_dim": 8, "num_key_value_heads": 2, "query_features": 12}
    x = normal((B, T, 12), "x")
    bias = normal((1, 4, T, T), "bias")
    found = []
    for budget in (SMALL, LARGE):
        layer = anymha.MultiHeadAttention(
            **options, backend="numpy", seed=1, dropout=0.3, memory_budget=budget
        )
        output, pullback = layer.vjp(x, attention_bias=bias, **call)
        found.append({"output": output, **pullback(normal(output.shape, "cotangent"))})
    assert len(found[0]) == 11
    for name, one in found[1].items():
        _agree(one, found[0][name])


@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {"dropout": 0.4}])
def test_blocks_of_all_heads_give_what_one_piece_gives(
    options: dict[str, Any], backend: Backend
) -> None:
    """Long enough to leave out keys, and short enough for one piece otherwise."""
    ops = backend.ops
    layer = anymha.MultiHeadAttention(
        2, 4, backend=backend.name, query_features=8, compute_dtype="float64", seed=1, **options
    )
    x = ops.from_numpy(normal((1, 300, 8), "x"))
    causal, mask = {"use_causal_mask": True}, np.tril(np.ones((300, 300), bool))
    call = {"training": True, "seed": 3, "return_attention_scores": True}
    with told_paths() as paths:
        one = layer(x, **call, **causal)
    assert paths[-1].together
    other = layer(x, **call, attention_mask=ops.from_numpy(mask))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(ops.to_numpy(a), ops.to_numpy(b), rtol=0, atol=1e-6)


def test_a_layer_of_each_backend_takes_a_budget(backend: Backend) -> None:
    ops = backend.ops
    x = ops.from_numpy(normal((B, T, 12), "x"))
    outputs = []
    for budget in (SMALL, LARGE):
        layer = anymha.MultiHeadAttention(
            4, 8, backend=backend.name, query_features=12, seed=1, memory_budget=budget
        )
        told = anymha.explain(layer, x, use_causal_mask=True, return_attention_scores=True)
        assert ("blocks" in told) == (budget == SMALL)
        outputs.append(ops.to_numpy(layer(x, use_causal_mask=True)))
        assert layer.config.to_dict()["memory_budget"] == budget
    _agree(outputs[1], outputs[0])


def test_a_gradient_through_blocks_can_be_differentiated_again() -> None:
    torch = pytest.importorskip("torch")
    found = []
    for budget in (SMALL, LARGE):
        for call in ({"dropout": 0.3, "seed": 2}, {"softcap": 2.0}):
            arrays = [torch.from_numpy(normal((1, 6, 2, 4), i)).requires_grad_() for i in range(3)]
            y = anymha.dot_product_attention(*arrays, **call, memory_budget=budget)
            (first,) = torch.autograd.grad((y**2).sum(), arrays[0], create_graph=True)
            found.append(torch.autograd.grad((first**2).sum(), arrays[1])[0].numpy())
    _agree(found[2], found[0])
    _agree(found[3], found[1])


@pytest.mark.parametrize("start", [(0, 0, 0, 0), (1, 2, 4, 3), (0, 1, 6, 0)])
def test_dropout_at_a_place_is_that_part_of_the_whole(
    start: tuple[int, int, int, int], backend: Backend
) -> None:
    ops = backend.ops
    dropout, beside = Dropout(20000, 7), ops.from_numpy(np.ones(1, np.float32))
    whole = ops.to_numpy(dropout.keep(ops, (2, 4, 12, 9), beside=beside))
    part = ops.to_numpy(dropout.keep(ops, (1, 2, 5, 6), Place(*start), beside=beside))
    b, h, t, s = start
    np.testing.assert_array_equal(part, whole[b : b + 1, h : h + 2, t : t + 5, s : s + 6])


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("visible", [
    Visibility(), Visibility(right=0), Visibility(right=0, offset=5),
    Visibility(right=0, offset=-9),
    Visibility(left=3, right=2), Visibility(left=0, right=0, offset=30), Visibility(left=2),
])  # fmt: skip
@pytest.mark.parametrize("elements", [1, 64, 300, 10**6])
def test_runs_hold_each_row_once_and_each_key_that_it_sees(
    visible: Visibility, unrolled: bool, elements: int
) -> None:
    queries, keys = 37, 20
    runs = plan_runs(visible, queries, keys, elements, unrolled=unrolled)
    assert [run.start for run in runs] == [0, *[run.stop for run in runs[:-1]]]
    assert runs[-1].stop == queries
    for run in runs:
        assert run.start % 2 == 0
        assert 0 <= run.low < run.high <= keys
        for row in range(run.start, run.stop):
            low, high = seen_keys(visible, row, row + 1, keys)
            nothing = row + visible.offset - (visible.left or 0) >= keys or (
                visible.right is not None and row + visible.offset + visible.right < 0
            )
            assert nothing or (run.low <= low and high <= run.high)
        if run.count > 1 or run.rows > 2:
            assert run.rows * (run.high - run.low) <= 2 * max(elements, 2 * keys)


def test_a_window_leaves_out_what_no_query_sees() -> None:
    runs = plan_runs(Visibility(left=63, right=0), 4096, 4096, 1 << 18, unrolled=True)
    assert sum(run.count * run.rows * (run.high - run.low) for run in runs) < 4096 * 1024


def test_explain_says_which_way_and_why_not_fused() -> None:
    layer = anymha.MultiHeadAttention(2, 4, backend="numpy", query_features=8, seed=0)
    x = normal((1, 3, 8), "x")
    assert anymha.explain(layer, x) == (
        "whole: it fits into one block. Not fused: numpy has no kernel here with the written "
        "meaning"
    )
    q = normal((1, 700, 2, 8), "q")
    told = anymha.explain(anymha.dot_product_attention, q, q, q, memory_budget=1 << 20)
    assert told.startswith("blocks: small blocks stay in the cache; 4 blocks of up to 188 queries")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({}, "fused: the framework's kernel has the written meaning"),
        ({"softcap": 2.0}, "Not fused: torch's kernel has no softcap"),
        ({"dropout": 0.5, "seed": 1}, "Not fused: the probabilities are few enough to be kept"),
        (
            {"dropout": 0.5, "seed": 1, "memory_budget": 64},
            "fused: the backend's own blocks with dropout",
        ),
        ({"return_scores": True}, "Not fused: the scores are asked for"),
    ],
)
def test_explain_tells_what_torch_does(call: dict[str, Any], told: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 4, 2, 8)
    assert told in anymha.explain(anymha.dot_product_attention, x, x, x, **call)


def test_a_layer_forgets_nothing_when_shapes_change(backend: Backend) -> None:
    """What is kept of one call is not taken for a call of another kind."""
    ops = backend.ops
    layer = anymha.MultiHeadAttention(2, 4, backend=backend.name, query_features=8, seed=0)
    for length in (3, 5, 3):
        x = ops.from_numpy(normal((2, length, 8), "x", length))
        y = ops.from_numpy(normal((2, 4, 8), "y"))
        for call in ({}, {"use_causal_mask": True}, {"query_offset": 1, "use_causal_mask": True}):
            assert ops.shape(layer(x, **call)) == (2, length, 8)
            assert ops.shape(layer(x, y, **call)) == (2, length, 8)
        with pytest.raises(anymha.AnymhaError, match="features"):
            layer(ops.from_numpy(normal((2, length, 7), "x")))
