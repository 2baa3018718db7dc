"""Blocks of queries and fused kernels: the results are those of one piece, forward and backward."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.dropout import Dropout
from anymha.attention.masks import PositionMask, TileOrigin
from anymha.execution import path as paths
from anymha.execution import tiling
from anymha.execution.tiling import plan_tiles, seen_keys
from anymha.framework.registry import Backend, get_backend
from anymha.parity.stages.tolerance import tolerance
from tests.block_cases import CASES, LARGE, B, Case, T, agree, found, kept
from tests.conftest import BACKENDS, usable
from tests.support import Arrays, close, normal

SMALL = 1
"""Bytes for not even one query: blocks have the two queries that they have at least."""

FEW = ("many heads", "window")
"""The cases for which a framework that takes long to compile has several sizes of blocks."""


pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(autouse=True)
def _two_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pieces of code for compiled loops, so that few queries make loops of several rounds."""
    monkeypatch.setattr(tiling, "SEGMENTS", 2)


@pytest.fixture
def unfused(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend, with no fused kernel."""
    own = backend.ops.capabilities
    if own.fused_attention is not None:
        refusing = dataclasses.replace(own, why_not_fused=lambda *_: "the test's")
        monkeypatch.setattr(backend.ops, "capabilities", refusing)
    return backend


def _budgets(case: Case, dtype: str = "float32") -> list[int]:
    """For blocks of 2 and (3 are rounded up) 4 queries, half and all of the queries of a head."""
    queries = case.shape[1]
    return [SMALL, *(case.budget(rows, dtype) for rows in (3, queries // 2 + 1, queries))]


def _count(path: paths.Path) -> int:
    return sum(tiles.count for tiles in path.tiles)


def _is_slow(backend: Backend) -> bool:
    return backend.name in ("tensorflow", "jax")


ALIKE = (
    *("open window", "window after", "mask (S,)", "mask (T, S)", "mask (H, T, 1)"),
    *("mask (B, 1, T, S)", "bias (S,)", "bias (H, 1, S)", "bias (1, H, T, S)", "bias (B, H, T, S)"),
)
"""Windows, masks and biases of which frameworks that take long to compile have every second."""


def _has(backend: str, name: str) -> bool:
    odd = {"tensorflow": 0, "jax": 1}.get(backend)
    return odd is None or name not in ALIKE or ALIKE.index(name) % 2 == odd


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in BACKENDS for name in CASES if _has(backend, name)],
    indirect=["backend"],
)
def test_blocks_of_each_size_give_what_one_piece_gives(name: str, unfused: Backend) -> None:
    budgets = _budgets(CASES[name])
    if _is_slow(unfused):
        budgets = budgets[:3:2] if name in FEW else [SMALL]
    _check_sizes(unfused, name, "float32", budgets)


@pytest.mark.parametrize("name", CASES)
def test_blocks_in_float64_give_what_one_piece_gives(name: str) -> None:
    for backend in map(usable, ("numpy", "torch")):
        _check_sizes(backend, name, "float64", _budgets(CASES[name], "float64"))


@pytest.mark.parametrize("slow", ["tensorflow", "jax"])
def test_blocks_in_float64_give_what_one_piece_gives_where_compiled(slow: str) -> None:
    _check_sizes(usable(slow), "window", "float64", [SMALL])


@functools.cache
def _one_piece(name: str, dtype: str, backend: str = "numpy") -> Arrays:
    """What a backend gives for a case by the written formula in one piece."""
    one, path = found(usable(backend), CASES[name], dtype, observed=True)
    assert path.kernel == "whole"
    return one


def _piece_of(backend: Backend, name: str, dtype: str = "float32") -> Arrays:
    """The case in one piece; NumPy's where this takes long to compile: it differs by rounding."""
    return _one_piece(name, dtype, "numpy" if _is_slow(backend) else backend.name)


def _check_sizes(backend: Backend, name: str, dtype: str, budgets: list[int]) -> None:
    case, one = CASES[name], _piece_of(backend, name, dtype)
    some, counts = {}, []
    for budget in budgets:
        some, path = found(backend, case, dtype, budget=budget)
        assert path.kernel == "tiles"
        assert not path.together
        counts.append(_count(path))
        agree(case, one, some, dtype)
    assert counts[0] == (case.shape[1] + 1) // 2  # two queries in each, and one in the last
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 1 or counts[-1] < counts[0]
    if not _is_slow(backend):
        alone, _ = found(backend, case, dtype, budget=budgets[-1], scores=False)
        assert alone["context"].tobytes() == some["context"].tobytes()


@pytest.mark.parametrize("name", ["window", "padding", "all"])
def test_blocks_of_all_heads_give_what_one_piece_gives(
    name: str, unfused: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, one = CASES[name], _piece_of(unfused, name)
    some, path = found(unfused, case, budget=LARGE)
    assert path.kernel == "whole"
    agree(case, one, some)
    monkeypatch.setattr(paths, "WORTHWHILE", 1)
    some, path = found(unfused, case, budget=LARGE)
    assert path.together
    assert _count(path) > 1
    agree(case, one, some)


IN_ONE = ("plain", "causal", "mask (S,)", "bias (S,)")
"""The cases without dropout for which torch's kernel is never called run by run."""


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(
    "name",
    [n for n, c in CASES.items() if not c.softcap and (c.dropout or c.shape[5] == c.shape[6])],
)
def test_kernels_of_torch_give_what_the_formula_gives(name: str, scores: bool) -> None:
    """Torch's own kernel, in one piece and run by run, and the blocks with dropout beside it."""
    backend, case = usable("torch"), CASES[name]
    how: dict[str, Any] = {"fixed": ("bias",) if case.bias else (), "scores": scores}
    why = "the framework's kernel has the written meaning"
    if case.dropout is not None:
        why = "the backend's own kernel with dropout"
    one, path = found(backend, case, observed=True, **how)
    assert path.kernel == "whole"
    for budget in _budgets(case) + [LARGE] * (case.dropout is None):
        some, path = found(backend, case, budget=budget, **how)
        assert (path.kernel, path.why) == ("fused", why)
        if budget == SMALL and case.dropout is None:
            assert (_count(path) > 1) == (name not in IN_ONE)
        agree(case, one, some)


WIDE = (B, T, 7, 4, 2, 4, 2 * T)
TELLING = {
    "everywhere": Case(dropout=Dropout(20000, 11), shape=WIDE, telling=True),
    "window": Case(
        visible=PositionMask(3, 1, 1), dropout=Dropout(30000, -5), shape=WIDE, telling=True
    ),
}


def _expected(case: Case) -> np.ndarray:
    """What the generator keeps of the probabilities, all made at once."""
    ops: Any = get_backend("numpy").ops
    scores = case.stages["probabilities"]
    assert case.dropout is not None
    keep = case.dropout.keep(ops, scores.shape, like=scores)
    np.testing.assert_array_equal(case.stages["dropped_probabilities"] != 0, keep & (scores != 0))
    assert np.any(~keep & (scores != 0))
    return keep & (scores != 0)


@pytest.mark.parametrize("name", TELLING)
def test_dropout_drops_the_same_elements_in_one_piece_and_in_blocks(
    name: str, unfused: Backend
) -> None:
    case = TELLING[name]
    budgets = [SMALL, LARGE] if _is_slow(unfused) else [*_budgets(case), LARGE]
    for budget in budgets:
        some, path = found(unfused, case, budget=budget, scores=False)
        assert path.kernel == ("whole" if budget == LARGE else "tiles")
        for bits in kept(case, some):
            np.testing.assert_array_equal(bits, _expected(case))


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize("name", TELLING)
def test_dropout_drops_the_same_elements_in_torchs_blocks(
    name: str, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, case = usable("torch"), TELLING[name]
    if not remembered:
        monkeypatch.setattr(importlib.import_module("anymha_torch.tiled_dropout"), "REMEMBERED", 0)
    for budget in _budgets(case):
        some, path = found(backend, case, budget=budget, scores=False)
        assert path.kernel == "fused"
        for bits in kept(case, some):
            np.testing.assert_array_equal(bits, _expected(case))


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"training": True, "seed": 3}])
def test_a_layer_without_autodiff_has_the_gradients_of_one_piece(call: dict[str, Any]) -> None:
    options = {"num_heads": 4, "key_dim": 8, "num_key_value_heads": 2, "query_features": 12}
    x = normal((B, T, 12), "x")
    bias = normal((1, 4, T, T), "bias")
    results = []
    for budget in (SMALL, LARGE):
        layer = anymha.MultiHeadAttention(
            **options, backend="numpy", seed=1, dropout=0.3, memory_budget=budget
        )
        output, pullback = layer.vjp(x, attention_bias=bias, **call)
        results.append({"output": output, **pullback(normal(output.shape, "cotangent"))})
    assert len(results[0]) == 11
    for name, one in results[1].items():
        _agree(one, results[0][name])


def _agree(one: np.ndarray, other: np.ndarray) -> None:
    """Fail unless results of a layer with no sum longer than 36 differ by rounding alone."""
    margin = 2 * tolerance("float32", 36, float(np.max(np.abs(one))))
    close(other, one, margin)


def test_a_layer_of_each_backend_takes_a_budget(backend: Backend) -> None:
    ops = backend.ops
    x = ops.from_numpy(normal((B, T, 12), "x"))
    outputs = []
    for budget in (SMALL, LARGE):
        layer = anymha.MultiHeadAttention(
            4, 8, backend=backend.name, query_features=12, seed=1, memory_budget=budget
        )
        told = anymha.explain(layer, x, use_causal_mask=True, return_attention_scores=True)
        assert ("tiles" in told) == (budget == SMALL)
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
def test_dropout_at_a_place_is_that_part_of_the_whole(start: tuple[int, int, int, int]) -> None:
    ops = usable("torch").ops
    dropout, like = Dropout(20000, 7), ops.from_numpy(np.ones(1, np.float32))
    whole = ops.to_numpy(dropout.keep(ops, (2, 4, 12, 9), like=like))
    part = ops.to_numpy(dropout.keep(ops, (1, 2, 5, 6), TileOrigin(*start), like=like))
    b, h, t, s = start
    np.testing.assert_array_equal(part, whole[b : b + 1, h : h + 2, t : t + 5, s : s + 6])


@pytest.mark.parametrize("eager_loop", [True, False])
@pytest.mark.parametrize("visible", [
    PositionMask(), PositionMask(right=0), PositionMask(right=0, offset=5),
    PositionMask(right=0, offset=-9),
    PositionMask(left=3, right=2), PositionMask(left=0, right=0, offset=30), PositionMask(left=2),
])  # fmt: skip
@pytest.mark.parametrize("elements", [1, 64, 300, 10**6])
def test_runs_hold_each_row_once_and_each_key_that_it_sees(
    visible: PositionMask, eager_loop: bool, elements: int
) -> None:
    queries, keys = 37, 20
    runs = plan_tiles(visible, queries, keys, elements, eager_loop=eager_loop)
    assert [run.start for run in runs] == [0, *[run.stop for run in runs[:-1]]]
    assert runs[-1].stop == queries
    for run in runs:
        assert run.start % 2 == 0
        assert 0 <= run.key_start < run.key_stop <= keys
        for row in range(run.start, run.stop):
            low, high = seen_keys(visible, row, row + 1, keys)
            nothing = row + visible.offset - (visible.left or 0) >= keys or (
                visible.right is not None and row + visible.offset + visible.right < 0
            )
            assert nothing or (run.key_start <= low and high <= run.key_stop)
        if run.count > 1 or run.height > 2:
            assert run.height * (run.key_stop - run.key_start) <= 2 * max(elements, 2 * keys)


def test_a_window_leaves_out_what_no_query_sees() -> None:
    runs = plan_tiles(PositionMask(left=63, right=0), 4096, 4096, 1 << 18, eager_loop=True)
    assert (
        sum(run.count * run.height * (run.key_stop - run.key_start) for run in runs) < 4096 * 1024
    )


def test_explain_says_which_way_and_why_not_fused() -> None:
    layer = anymha.MultiHeadAttention(2, 4, backend="numpy", query_features=8, seed=0)
    x = normal((1, 3, 8), "x")
    assert anymha.explain(layer, x) == (
        "whole: it fits into one tile. Not fused: numpy has no kernel here with the written meaning"
    )
    q = normal((1, 700, 2, 8), "q")
    told = anymha.explain(anymha.dot_product_attention, q, q, q, memory_budget=1 << 20)
    assert told.startswith("tiles: small tiles stay in the cache; 4 tiles of up to 188 queries")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({}, "fused: the framework's kernel has the written meaning"),
        ({"softcap": 2.0}, "Not fused: the kernel has no softcap"),
        ({"dropout": 0.5, "seed": 1}, "Not fused: the probabilities are few enough to be kept"),
        (
            {"dropout": 0.5, "seed": 1, "memory_budget": 64},
            "fused: the backend's own kernel with dropout",
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
