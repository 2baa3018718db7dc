"""A backend that lacks a dtype skips the cases that need it, and every report says so."""

from __future__ import annotations

import html
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anymha.cli.parity
import anymha_numpy.ops
from anymha.cli.main import main
from anymha.framework.registry import Backend
from anymha.parity.oracle.cases import MATRIX

FEW = ("self", "float16", "bfloat16", "float32 in bfloat16")
RAISED = "it lacks float16: ops.dtype('float16') raised TypeError: no such dtype as 'float16'"
NONE = "it lacks bfloat16: ops.dtype('bfloat16') gave None"


def lacking(name: str) -> Any:
    """`ops.dtype` of a backend that raises for one half precision, and gives None for the other."""
    if name == "float16":
        raise TypeError("no such dtype as 'float16'")
    return None if name == "bfloat16" else anymha_numpy.ops.dtype(name)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend without half precision, the only one that is installed."""
    package, ops = types.ModuleType("toy_backend"), types.ModuleType("toy_backend.ops")
    ops.__dict__.update({n: v for n, v in vars(anymha_numpy.ops).items() if n[:2] != "__"})
    ops.__dict__.update(name="toy", dtype=lacking)
    monkeypatch.setitem(sys.modules, "toy_backend", package)
    monkeypatch.setitem(sys.modules, "toy_backend.ops", ops)
    backend = Backend("toy", "toy_backend", "numpy", ("numpy",))
    monkeypatch.setattr(anymha.cli.parity, "backends", lambda: {"toy": backend})
    return backend


@pytest.fixture
def run(
    toy: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Run `anymha parity` on cases by name; gives the status and the lines."""

    def run(names: tuple[str, ...], *arguments: str) -> tuple[int, list[str]]:
        cases = tuple(case for case in MATRIX if case.name in names)
        monkeypatch.setattr(anymha.cli.parity, "MATRIX", cases)
        status = main(["parity", *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_terminal_says_what_is_skipped_and_why(run: Any) -> None:
    status, lines = run(FEW)
    assert status == 0
    assert f"toy skips 1 case, as {RAISED}: float16" in lines
    assert f"toy skips 2 cases, as {NONE}: bfloat16; float32 in bfloat16" in lines
    assert lines[-1] == "PARITY HOLDS: 4 cases on toy; 3 of them skipped on toy"
    [line] = [line for line in lines if line.startswith("-  float16")]
    assert line.split()[2:3] == ["skip"] or "skip" in line
    assert any(line.startswith("✓  self") for line in lines)


def test_json_has_the_reason(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run(FEW, "--json", str(path))
    report = json.loads(path.read_text())
    assert report["passed"]
    cases = {case["name"]: case for case in report["cases"]}
    assert cases["float16"]["skipped"] == {"toy": RAISED}
    assert cases["float16"]["cells"] == {}
    assert cases["bfloat16"]["skipped"] == cases["float32 in bfloat16"]["skipped"] == {"toy": NONE}
    assert cases["self"]["skipped"] == {}
    assert cases["self"]["cells"]["toy"]["passed"]


def test_html_has_the_reason(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the HTML report needs matplotlib")
    path = tmp_path / "report.html"
    assert run(FEW, "--html", str(path))[0] == 0
    text = html.unescape(path.read_text(encoding="utf-8"))
    assert f"toy skips 1 case, as {RAISED}: float16<" in text
    assert f"toy skips 2 cases, as {NONE}: bfloat16; float32 in bfloat16<" in text
    assert text.count(">skipped<") == 6, "in the table and in the picture"


def test_a_run_in_which_every_case_is_skipped_does_not_pass(run: Any) -> None:
    status, lines = run(("float16",))
    assert status == 1
    assert lines[-1] == "PARITY DOES NOT HOLD: no case ran; 1 of them skipped on toy"


def test_a_backend_that_fails_another_case_still_fails(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(x: Any) -> Any:
        raise RuntimeError("no arrays today")

    monkeypatch.setattr(sys.modules["toy_backend.ops"], "from_numpy", refuse)
    status, lines = run(FEW)
    assert status == 1
    assert lines[-1] == "PARITY DOES NOT HOLD: 1 of 4 cases on toy fail: self"
