"""The benchmark of decoding: both layers agree, and the command prints a row."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from anymha.framework.registry import Backend
from benchmarks.decoding import STEPS, Sizes, grown, measured
from tests.frameworks import required


def test_both_layers_have_the_same_values_and_are_timed(backend: Backend) -> None:
    found = measured(backend.name, Sizes(2, 2, 4, 5, 5 + STEPS), times=1)
    assert list(found) == ["anymha", "by hand"]
    assert all(spent > 0 for spent in found.values())


def test_functions_of_torch_have_the_same_values() -> None:
    required("torch")
    found = measured("torch", Sizes(2, 2, 4, 5, 5 + STEPS), times=1, functions=True)
    assert list(found) == ["anymha", "by hand"]


def test_compiled_layers_have_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = required("torch")
    quick = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *given, **o: quick(*given, **o))
    torch._dynamo.reset()
    found = measured("torch", Sizes(2, 2, 4, 5, 5 + STEPS), times=1, compiled=True)
    assert list(found) == ["anymha", "by hand"]


def test_growth_has_a_row_for_each_part_of_the_steps() -> None:
    rows = grown("numpy", Sizes(1, 2, 4, 5, 5 + 10 * STEPS), 9 * STEPS)
    assert [held for held, _, _ in rows] == [5 + STEPS * n for n in range(2, 10)]


def test_command() -> None:
    sizes = ("--held", "5", "--room", "40", "--heads", "2", "--width", "4", "--times", "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decoding", "--frameworks", "numpy", *sizes],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "by hand" in done.stdout
