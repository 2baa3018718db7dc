"""docs/backends.md as a project of its own: its files run, and show what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from anymha.framework.capabilities import TOGETHER, Capabilities
from tests.backends.faults import FUNCTIONS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLES = re.findall(
    r"```py\n(import array_api_strict.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL
)
SHOWN = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PLUGIN = "anymha_strict"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The page's files, installed: with the metadata that `pip install` would write."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    metadata = tmp_path / "anymha_strict-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(points))
    return tmp_path


def python(project: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    search = [path, str(project), str(ROOT), str(ROOT / "backends")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "COLUMNS": "88",
        # With these, which CI services set, pytest prints otherwise than the page shows.
        "CI": "", "BUILD_NUMBER": "", "PY_COLORS": "0", "PYTEST_ADDOPTS": "",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_page_shows_the_tested_backend() -> None:
    shown = FILES["anymha_strict/ops.py"]
    assert shown == (ROOT / "tests" / "backends" / "anymha_strict" / "ops.py").read_text()


def test_page_names_every_function_and_capability_once() -> None:
    required, optional = PAGE.split("### Optional: `Capabilities`")
    table = re.findall(r"^\| `(\w+)` \|", required, re.MULTILINE)
    assert sorted([*table, "vjp"]) == sorted(FUNCTIONS)
    table = re.findall(r"^\| `(\w+)`", optional, re.MULTILINE)
    assert sorted(table) == sorted(field.name for field in fields(Capabilities))


def test_page_names_what_a_capability_needs() -> None:
    _, optional = PAGE.split("### Optional: `Capabilities`")
    for line in re.findall(r"^\| `\w+`.*$", optional, re.MULTILINE):
        name, needs = re.findall(r"\w+", line)[0], re.findall(r"needs ([^|]*)", line)
        named = re.findall(r"`(\w+)`", needs[0]) if needs else []
        assert named == [other for one, other in TOGETHER if one == name]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_prints_what_the_page_shows(project: Path, number: int) -> None:
    code, shown = EXAMPLES[number]
    done = python(project, "-c", code)
    assert (done.stdout, done.stderr) == (shown, "")


def test_page_has_its_examples_and_files() -> None:
    assert len(EXAMPLES) == 2
    assert set(FILES) == {
        "anymha_strict/ops.py",
        "pyproject.toml",
        "test_conformance.py",
        "test_devices.py",
    }


def test_kit_passes_and_prints_its_skips(project: Path) -> None:
    done = python(project, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    for line in SHOWN[2].splitlines():
        assert line.removeprefix("SKIPPED ") in done.stdout


def test_kit_fails_as_the_page_shows_without_keepdims(project: Path) -> None:
    ops = project / "anymha_strict" / "ops.py"
    wrong = re.findall(r"```py\n(def max.*?)```", PAGE, re.DOTALL)[0]
    ops.write_text(ops.read_text().replace("    max,\n", "") + f"\n\n{wrong}")
    done = python(project, "-m", "pytest", "test_conformance.py", "-x", "-p", "no:cacheprovider")
    assert done.returncode == 1
    printed = done.stdout.splitlines()
    assert [line for line in SHOWN[3].splitlines() if line not in printed] == []


def test_kit_fails_as_the_page_shows_in_half_precision(project: Path) -> None:
    ops = project / "anymha_strict" / "ops.py"
    wrong = (
        "\n\ndef matmul(x, y, /):\n"
        "    x, y = (np.asarray(z).astype(np.float16) for z in (x, y))\n"
        "    return xp.asarray((x @ y).astype(np.float32))\n"
    )
    ops.write_text(ops.read_text().replace("    matmul,\n", "") + wrong)
    done = python(
        project, "-m", "pytest", "test_conformance.py", "-q", "-p", "no:cacheprovider", "--tb=no"
    )
    assert done.returncode == 1
    printed = done.stdout
    assert [line for line in SHOWN[4].splitlines() if line not in printed] == []


FIND = """
import sys, anymha
from anymha.framework.registry import backends, get_backend
import numpy as np
anymha.dot_product_attention(*[np.ones((1, 2, 1, 2))] * 3)
print("strict" in backends.__wrapped__() if {ask} else "anymha_strict" in sys.modules)
"""


def test_plug_in_is_not_imported_for_arrays_of_a_built_in_backend(project: Path) -> None:
    assert python(project, "-c", FIND.format(ask=False)).stdout == "False\n"
    assert python(project, "-c", FIND.format(ask=True)).stdout == "True\n"


def test_plug_in_that_cannot_be_imported_is_named(project: Path) -> None:
    (project / "anymha_strict" / "ops.py").write_text("import a_framework_that_is_not_there\n")
    code = (
        "from anymha.framework.registry import get_backend as g\n"
        "print(g('numpy').name); g('strict')"
    )
    done = python(project, "-c", code)
    assert done.stdout == "numpy\n"
    assert done.stderr.splitlines()[-1] == (
        "anymha.errors.BackendNotInstalledError: The backend 'strict' of the package "
        "anymha_strict does not work: No module named 'a_framework_that_is_not_there'. "
        "Install what it needs, or uninstall the package."
    )


def test_unknown_name_is_refused_with_the_names_that_there_are(project: Path) -> None:
    done = python(project, "-c", "import anymha.framework.registry as r; r.get_backend('theano')")
    assert done.stderr.splitlines()[-1] == (
        "anymha.errors.UnknownBackendError: A backend is one of 'numpy', 'torch', "
        "'tensorflow', 'jax', 'strict'. Received: 'theano'."
    )
