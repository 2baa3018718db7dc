"""The flow of a call: few files, each entered few times; plans that are shared; no call twice."""

from __future__ import annotations

import threading
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.layer import forward
from tests.frameworks import required
from tests.support import normal

ROOT = Path(anymha.__file__).parents[1]


def entered_files(function: Any, *args: Any) -> list[str]:
    """The files of the project that a call runs through, one entry for each time it enters one.

    Lines and returns count, so that a file is entered again where a call comes back to it.
    """
    import sys  # noqa: PLC0415

    files: list[str] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if ROOT / "anymha" in path.parents or ROOT / "backends" in path.parents:
            files.append(path.relative_to(ROOT).as_posix())
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return [file for file, _ in groupby(files)]


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}], ids=["plain", "causal"])
def test_a_first_call_of_torch_runs_through_few_files(call: dict[str, Any]) -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch")
    files = entered_files(lambda: layer(torch.ones(1, 3, 8), **call))
    assert len(set(files)) <= 8, set(files)
    counts = {file: files.count(file) for file in files}
    assert all(count <= 3 for count in counts.values()), counts  # left and entered again twice


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_lengths_that_grow_share_a_plan_and_do_not_fill_the_memory(backend: str) -> None:
    from anymha.framework.registry import get_backend  # noqa: PLC0415

    if backend != "numpy":
        required(backend)
    ops: Any = get_backend(backend).ops
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend=backend, seed=0)
    query = ops.from_numpy(normal((1, 1, 8), "query"))
    for length in range(1, 200):
        layer(query, ops.from_numpy(normal((1, length, 8), "keys")))
    assert len(layer.plans.plans) == 1
    assert not layer.plans.calls  # each length came once
    for _ in range(3):
        layer(query, query)
    assert len(layer.plans.calls) == 1


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"return_attention_scores": True}])
def test_no_call_is_computed_twice(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    counts, attend = [], forward.attend
    monkeypatch.setattr(forward, "attend", lambda *a, **o: counts.append(1) or attend(*a, **o))
    x = normal((1, 300, 8), "x")
    for number in range(1, 5):
        layer(x, **call)
        assert len(counts) == number


def test_errors_of_others_pass_through_untouched() -> None:
    torch = required("torch")

    class Stop(Exception):
        pass

    def hook(*_: Any) -> None:
        raise Stop

    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch", seed=0)
    layer.value.register_forward_hook(hook)
    for _ in range(4):
        with pytest.raises(Stop):
            layer(torch.ones(1, 3, 8))


def test_explain_reports_its_own_call_alone() -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    x, stop = normal((1, 3, 8), "x"), threading.Event()

    def work() -> None:
        while not stop.is_set():
            layer(x, use_causal_mask=True)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        reports = {anymha.explain(layer, x) for _ in range(100)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(reports) == 1
    assert "\n" not in reports.pop()


def test_plans_follow_the_weights_and_the_options() -> None:
    """What is kept with a layer is not taken for weights or options that came later."""
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
    x = normal((1, 3, 8), "x")
    first = [layer(x) for _ in range(3)][-1]
    layer.weights["query.kernel"][...] *= 2
    second = layer(x)
    assert not np.array_equal(first, second)
    layer.weights["query.kernel"] = layer.weights["query.kernel"] / 2
    np.testing.assert_array_equal(layer(x), first)
