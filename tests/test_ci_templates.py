"""The templates for nox and for GitHub Actions: they load, and name the same sessions."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anymha.testing import pytest_plugin

FOLDER = Path(__file__).parents[1] / "docs/examples/ci"
NOXFILE, WORKFLOW = FOLDER / "noxfile.py", FOLDER / "parity.yml"


def matrix() -> list[str]:
    """The sessions of the workflow."""
    (items,) = re.findall(
        r"^ {8}session:\n((?: {10}- \S+\n)+)", WORKFLOW.read_text("utf-8"), re.MULTILINE
    )
    return [line.strip().removeprefix("- ") for line in items.splitlines()]


def test_nox_lists_the_sessions_that_the_workflow_runs() -> None:
    if importlib.util.find_spec("nox") is None:
        pytest.skip("nox is not installed")
    command = [sys.executable, "-B", "-m", "nox", "--list", "--no-color", "-f", str(NOXFILE)]
    plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    listed = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=plain
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert re.findall(r"^\* parity\((\S+)\) ->", listed.stdout, re.MULTILINE) == matrix()


def test_sessions_are_those_of_the_workflow_and_begin_with_their_package() -> None:
    sessions = dict(re.findall(r'^    "(\S+)": \["(\S+)"\],$', NOXFILE.read_text("utf-8"), re.M))
    assert list(sessions) == matrix()
    for name, requirement in sessions.items():
        assert re.split("[=<>]", requirement)[0] == name.partition("-")[0]


def test_the_workflow_is_yaml_with_the_jobs_that_github_wants() -> None:
    yaml = pytest.importorskip("yaml", reason="yaml is not installed")
    job = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]["parity"]
    assert job["strategy"]["matrix"]["session"] == matrix()
    assert 'nox -s "parity(${{ matrix.session }})"' in [step.get("run") for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_the_workflow_is_indented_by_spaces_in_steps_of_two() -> None:
    for line in WORKFLOW.read_text("utf-8").splitlines():
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0, line
        assert "\t" not in line


def test_the_templates_use_options_of_the_plugin() -> None:
    used = set(re.findall(r"--parity-[a-z]+", NOXFILE.read_text("utf-8")))
    page = (FOLDER.parents[1] / "ci.md").read_text("utf-8")
    known = set(re.findall(r'"(--parity-[a-z]+)"', Path(pytest_plugin.__file__).read_text("utf-8")))
    assert used <= known
    assert set(re.findall(r"--parity-[a-z]+", page)) == known
