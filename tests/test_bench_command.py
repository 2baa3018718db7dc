"""The command `anymha bench`: what it takes, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

import benchmarks.command
from anymha.cli.main import main
from anymha.errors import UsageError
from anymha.framework.registry import BUILT_IN, Backend
from benchmarks import processes
from benchmarks.cases import CASES, Case, choose, series
from benchmarks.command import SCHEMA
from benchmarks.entries import EXACT
from benchmarks.goals import GOALS
from benchmarks.processes import WorkerError, run_framework
from benchmarks.results import CaseResult, Report, Timing
from benchmarks.terminal import print_report, print_verdict
from tests.test_import import loaded_by

NUMPY = ("bench", "--backends=numpy", "--repeats=1")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; gives its exit status, what it printed and what it printed as errors."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as stop:  # of argparse
            status = int(str(stop.code))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Planted results instead of processes; the names of the frameworks that were asked for."""
    asked: list[str] = []

    def run(framework: str, cases: Sequence[Case], *, results: list[Any], **rest: Any) -> None:
        asked.append(framework)
        rest["facts"].update(threads=2, absent=["flax"])
        for case in cases:
            times = (2.0, 1.0, 3.0)
            ours = Timing("anymha", "", "", times, [0.0] * 3, 1 << 20, 0.1)
            peer = Timing("torch.nn.MultiheadAttention", "", "", (4.0,) * 3, [0.5] * 3, None, 0.2)
            results.append(CaseResult(framework, case, [ours, peer]))

    monkeypatch.setattr(benchmarks.command, "run_framework", run)
    return asked


def test_numpy_is_timed_and_everything_is_written(command: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = (tmp_path / "new" / "bench.json", tmp_path / "new" / "bench.svg")
    status, out, err = command(
        *NUMPY, "--cases=tiny", "--lengths=16,8", f"--json={files[0]}", f"--image={files[1]}"
    )
    assert (status, err) == (0, "")
    assert "3 cases on numpy, 1 round\n" in out
    for told in ("tiny", "length-8", "length-16", "numpy.matmul", f"JSON: {files[0]}"):
        assert told in out
    assert out.splitlines()[-1].startswith("BENCHMARK DONE in ")

    found = json.loads(files[0].read_text())
    assert (found["schema"], found["sound"], found["failures"]) == (SCHEMA, True, {})
    assert found["frameworks"]["numpy"]["numpy"] == found["machine"]["versions"]["numpy"]
    assert [case["case"]["name"] for case in found["cases"]] == ["tiny", "length-8", "length-16"]
    for case in found["cases"]:
        ours, peer = case["layers"]
        assert (ours["name"], ours["ours"], peer["name"]) == ("anymha", True, "numpy.matmul")
        assert case["best_peer"] == "numpy.matmul"
        assert ours["ratio"] == pytest.approx(ours["median"] / peer["median"])
        assert 0 <= ours["error"] <= 1
        assert len(ours["seconds"]) == len(ours["foreign"]) >= 1
    assert [goal["compared"] for goal in found["goals"]] == ["eager microseconds"]

    text = files[1].read_text()
    assert ElementTree.fromstring(text.encode()).tag.endswith("svg")
    for told in ("NumPy", "anymha", "numpy.matmul", "time of a call", "length"):
        assert f">{told}</text>" in text


def test_wrong_values_of_ours_end_with_status_1(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(framework: str, cases: Sequence[Case], *, results: list[Any], **rest: Any) -> None:
        bad = Timing("anymha", error=9.0, fault="other values: [so] many")
        results.append(CaseResult(framework, cases[0], [bad]))

    monkeypatch.setattr(benchmarks.command, "run_framework", run)
    status, out, _ = command(*NUMPY, "--cases=m1k")
    assert status == 1
    assert "✗ numpy, m1k, anymha: not timed: other values: [so] many" in out
    assert "BENCHMARK NOT SOUND" in out.splitlines()[-1]


def test_process_that_dies_is_told_with_what_it_said(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "anymha"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('no [more] memory')")
    monkeypatch.setattr(
        processes, "environment", lambda framework, device: {"PYTHONPATH": str(tmp_path)}
    )
    with pytest.raises(WorkerError, match=r"ended with status 1: no \[more\] memory"):
        run_framework("numpy", list(CASES[:1]), repeats=1, budget=1.0)
    status, out, _ = command(*NUMPY, "--cases=tiny")
    assert status == 1
    assert "✗ numpy: its process ended with status 1: no [more] memory" in out


def test_all_prints_every_layer_and_every_goal(command: Run, planted: list[str]) -> None:
    names = [backend.name for backend in BUILT_IN if backend.installed]
    status, out, err = command("bench", "--all")
    assert (status, err, planted) == (0, "", names)
    for case in CASES:
        assert (f"\n{case.name} " in out) == (case.device is None), case.name
    assert "numpy: goals" in out
    assert out.count("torch.nn.MultiheadAttention") >= 2 * len(names)
    assert "~4.00 s" in out  # a disturbed sample
    assert " 2.00 s" in out
    assert "0.50" in out
    assert "Peers that are not installed: flax." in out


def test_usual_run_is_a_few_cases_and_a_summary(command: Run, planted: list[str]) -> None:
    status, out, _ = command("bench", "--backends=numpy, numpy")
    assert (status, planted) == (0, ["numpy"])
    assert "4 cases on numpy, 5 rounds" in out
    assert "goals" in out
    assert "numpy: goals" not in out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--modes=train"], ["m1k-train"]),
        (["--cases=l4k*", "--modes=forward"], ["l4k", "l4k-causal"]),
        (["--cases=s128,tiny"], ["tiny", "s128"]),
        (["--lengths=64,32,64"], ["length-32", "length-64"]),
        (["--lengths=32", "--cases=32k"], ["32k", "length-32"]),
    ],
)
def test_cases_that_are_asked_for(
    arguments: list[str], names: list[str], command: Run, planted: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    assert command(*NUMPY, *arguments, f"--json={path}")[0] == 0
    cases = json.loads(path.read_text())["cases"]
    assert [case["case"]["name"] for case in cases] == names


def test_image_draws_the_usual_lengths(command: Run, planted: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "bench.svg"
    assert command(*NUMPY, f"--image={path}")[0] == 0
    assert all(f">{length}</text>" in path.read_text() for length in (128, 512, 2048, 8192))


REFUSED = {
    "--backends=keras": "`--backends` must be of numpy, torch, tensorflow, jax on cpu. "
    "Received: 'keras'.",
    "--backends=,": "Received: ','.",
    "--device=cuda --backends=numpy": "must be of torch, tensorflow, jax on cuda. "
    "Received: 'numpy'.",
    "--cases=m1": "`--cases` must be of tiny, s128, ",
    "--cases=m1k,zebra*": "Received: 'zebra*'.",
    "--cases=m1k-float16": "Received: 'm1k-float16'.",
    "--modes=backward": "`--modes` must be of forward, train. Received: 'backward'.",
    "--cases=tiny --modes=train": "None of these cases has a mode of train.",
    "--lengths=12,x": "`--lengths` must be positive integers, by commas. Received: '12,x'.",
    "--lengths=0": "Received: '0'.",
    "--repeats=0": "`--repeats` must be 1 or more. Received: 0.",
    "--image=bench.png": "`--image` must be an .svg file. Received: bench.png.",
    "--json=/dev/null/x": "cannot be written",
    "--json=x.svg --image=x.svg": "`--json` and `--image` must be two files. Received: x.svg.",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_call_that_is_wrong_ends_with_status_2_before_anything_runs(
    arguments: str, command: Run, planted: list[str]
) -> None:
    status, out, err = command("bench", *arguments.split())
    assert (status, out, planted) == (2, "", [])
    assert REFUSED[arguments] in err


def test_backend_that_is_not_installed_is_refused_where_it_is_named(
    command: Run, planted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "installed", property(lambda self: self.name != "jax"))
    status, _, err = command("bench", "--backends=numpy,jax")
    assert (status, planted) == (2, [])
    assert "pip install 'anymha[jax]'" in err
    status, out, _ = command("bench")
    assert status == 0
    assert "jax is not installed: pip install 'anymha[jax]' adds it." in out


def test_narrow_terminal_without_signs_keeps_numbers_whole() -> None:
    cases = [CaseResult("jax", case, [
        Timing("anymha", "jit", "", (0.1234,) * 3, (0.0,) * 3, 1 << 20, 0.1),
        Timing("jax.nn.dot_product_attention", "jit", "", (0.2345,) * 3, (0.5,) * 3, 1 << 30, 0.1),
        Timing("anymha", "jit", EXACT, (0.3,) * 3, (0.0,) * 3, 1 << 20, 0.1),
    ]) for case in CASES]  # fmt: skip
    with open("/dev/null", "w", encoding="ascii", errors="replace") as file:
        console = Console(file=file, width=80, record=True)
        report = Report(cases, seconds=61.4)
        print_report(console, report, whole=True)
        print_verdict(console, report)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    lines = [line for line in text.splitlines() if line.startswith("m1k-train-dropout ")]
    assert lines
    assert all("123 ms" in line for line in lines)
    assert "~234 ms" in text or "~235 ms" in text
    assert "FAIL" in text
    assert "\u2713" not in text
    assert "BENCHMARK DONE in 61 s: " in text


def test_cases_and_goals_have_one_name_each() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {goal.case for goal in GOALS} <= set(names)
    told = [(g.framework, g.case, g.told) for g in GOALS]
    assert len(set(told)) == len(told)
    assert [case.name for case in series([32, 8])] == ["length-8", "length-32"]
    with pytest.raises(UsageError, match="mode"):
        choose(["tiny"], ["train"], every=False, device="cpu")
    assert "m1k-float16" in [c.name for c in choose(None, ["forward"], every=True, device="cuda")]


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "jax", "jax_libraries", "keras"])
def test_module_of_a_frameworks_layers_imports_no_framework(name: str) -> None:
    assert loaded_by(f"import benchmarks.command, benchmarks.frameworks.{name}") == set()
