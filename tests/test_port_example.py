"""The sample of a port, from red to green as docs/port.md says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/port.md").read_text("utf-8")
FIXES = re.findall(r"^```diff\n-(.*)\n\+(.*)\n```$", PAGE, re.MULTILINE)
SPLIT = "packed weights split wrongly"

Sample = Callable[..., tuple[pytest.RunResult, dict[str, Any]]]


@pytest.fixture
def sample(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Runs the sample's tests in a copy of it; gives the result and its comparisons by test."""
    shutil.copytree(
        ROOT / "docs/examples/port", pytester.path, dirs_exist_ok=True,
        ignore=lambda *_: {"__pycache__"},
    )  # fmt: skip
    for name in ("CI", "BUILD_NUMBER", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "backends")]))
    monkeypatch.setenv("COLUMNS", "80")
    # A file that is mended within a second, to the same size, would be taken from its bytecode.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def run(*options: str) -> tuple[pytest.RunResult, dict[str, Any]]:
        ours = ("-p", "anymha.testing.pytest_plugin", "-p", "no:cacheprovider", "--color=no")
        report = "--parity-report=report.json"
        result = pytester.runpytest_subprocess(*ours, report, *options, timeout=120)
        told = json.loads((pytester.path / "report.json").read_text("utf-8"))
        return result, {one["test"].split("::")[1]: one for one in told["comparisons"]}

    return run


def mend(folder: Path, number: int) -> None:
    """Put the page's line in the place of the wrong one."""
    old, new = FIXES[number]
    path = folder / "port.py"
    source = path.read_text("utf-8")
    assert source.count(f"{old}\n") == 1
    path.write_text(source.replace(old, new), "utf-8")


def causes(one: dict[str, Any]) -> list[str]:
    return [cause["name"] for cause in one["diagnosis"]["causes"]]


def shown(heading: str) -> list[str]:
    """The lines of output that the page shows under a heading, without their numbers."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return plain(block)


def plain(text: str) -> list[str]:
    """Lines without their numbers, which differ in their last digits from machine to machine."""
    numbers = re.sub(r"\b\d[\d.]*(e[+-]\d+)?", "N", text)
    return [re.sub(r"\s+", " ", line).strip() for line in numbers.splitlines()]


def test_the_page_leads_from_red_to_green(sample: Sample, pytester: pytest.Pytester) -> None:
    assert len(FIXES) == 2
    quiet = ("-q", "--tb=short")
    red, found = sample(*quiet, "-k", "anymha")
    red.assert_outcomes(failed=3, deselected=3)
    assert {one["first_divergence"] for one in found.values()} == {"query"}
    assert {causes(one)[0] for one in found.values()} == {SPLIT}
    assert causes(found["test_padded_cross_attention[anymha]"]) == [SPLIT, "inverted mask"]
    assert set(shown("Red")) <= set(plain(red.stdout.str()))

    mend(pytester.path, 0)
    less, found = sample(*quiet, "-k", "anymha")
    less.assert_outcomes(passed=2, failed=1, deselected=3)
    (padded,) = [one for one in found.values() if not one["passed"]]
    assert (padded["first_divergence"], causes(padded)) == ("masked_logits", ["inverted mask"])
    assert set(shown("Less red")) <= set(plain(less.stdout.str()))

    mend(pytester.path, 1)
    green, found = sample(*quiet)
    torch = importlib.util.find_spec("torch") is not None
    green.assert_outcomes(passed=6 if torch else 3, skipped=0 if torch else 3)
    assert all(one["passed"] and not one["untested"] for one in found.values())
    assert set(shown("Green")) <= set(plain(green.stdout.str()))


def test_a_saved_case_is_repeated_by_the_command(sample: Sample, pytester: Any) -> None:
    sample("-k", "self and anymha", "--parity-save=cases")
    (case,) = pytester.path.glob("cases/*.npz")
    command = (
        "-m",
        "anymha.cli.main",
        "compare",
        "numpy",
        "test_port:ported",
        "--inputs",
        str(case),
    )
    again = pytester.run(sys.executable, *command, timeout=120)
    assert again.ret == 1
    again.stdout.fnmatch_lines([f"PARITY DOES NOT HOLD: ported and * part at query: {SPLIT} *"])


def test_the_reference_may_be_the_layer_of_torch_itself(sample: Sample) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    red, found = sample("-k", "torch")
    red.assert_outcomes(failed=3, deselected=3)
    assert {one["first_divergence"] for one in found.values()} == {"query"}
    assert {causes(one)[0] for one in found.values()} == {SPLIT}


def test_code_that_the_page_shows_is_that_of_the_sample() -> None:
    source = (ROOT / "docs/examples/port/test_port.py").read_text("utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert all(block in source for block in blocks)
