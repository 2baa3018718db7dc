"""docs/add-an-option.md: who follows it to the letter has a new option of the layer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from anymha.layer.arguments import ARRAYS, OPTIONS
from anymha.layer.native import CallOptions, PlainCall

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/add-an-option.md").read_text(encoding="utf-8")
FILE = re.compile(
    r"^`([\w./]+)`(?:, (after|in place of) (`+) ?([^\n]+?) ?\3)?\n\n```\w+\n(.*?)^```$",
    re.M | re.S,
)
FOLDERS = ("anymha", "backends", "docs", "tests")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with what the page adds."""
    root = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "images")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, how, _, line, text in FILE.findall(PAGE):
        path = root / name
        if not how:
            assert not path.exists(), f"{name} is there already"
            path.write_text(text, encoding="utf-8")
            continue
        before = path.read_text(encoding="utf-8")
        assert before.count(f"{line}\n") == 1, f"{name} has not one line {line!r}"
        kept = f"{line}\n" if how == "after" else ""
        path.write_text(before.replace(f"{line}\n", kept + text), encoding="utf-8")
    return root


def python(project: Path, arguments: Sequence[str]) -> str:
    path = os.pathsep.join([str(project), str(project / "backends")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_page_has_every_file_of_the_recipe() -> None:
    names = [name for name, *_ in FILE.findall(PAGE)]
    assert len(names) == 8
    for folder in ("anymha/attention/features", "anymha/parity/oracle/features"):
        assert f"{folder}/temperature.py" in names


@pytest.mark.parametrize(
    ("file", "selected"),
    [
        ("tests/test_temperature.py", "test"),
        ("tests/test_parity_cases.py", "temperature"),
        ("tests/test_selftest.py", "page or (numpy and temperature)"),
    ],
)
def test_the_tests_of_the_toy_pass(project: Path, file: str, selected: str) -> None:
    shown = python(project, ["-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", selected])
    assert " passed" in shown


def test_the_matrix_judges_the_toy(project: Path) -> None:
    shown = python(project, ["-m", "anymha", "parity", "--backends", "numpy"])
    assert re.search(r"^✓  temperature, everything", shown, re.MULTILINE)
    assert "PARITY HOLDS" in shown


def test_the_toy_is_saved_and_loaded(project: Path) -> None:
    code = (
        "import anymha\n"
        "layer = anymha.MultiHeadAttention(\n"
        "    2, 4, query_features=8, temperature=2, backend='numpy'\n"
        ")\n"
        "anymha.save('layer.safetensors', layer)\n"
        "print(anymha.load('layer.safetensors', backend='numpy').config.temperature)\n"
    )
    assert python(project, ["-c", code]) == "2.0\n"


def test_the_toy_has_its_type_its_help_and_its_answer(project: Path) -> None:
    """By the one field and its line in the docstring."""
    code = (
        "import inspect, anymha, anymha_numpy\n"
        "init = anymha_numpy.MultiHeadAttention.__init__\n"
        "print(inspect.signature(init).parameters['temperature'])\n"
        "print([line for line in init.__doc__.splitlines() if 'temperature:' in line])\n"
        "print('temperature: ' in anymha.MultiHeadAttention.__doc__)\n"
        "try:\n"
        "    anymha_numpy.MultiHeadAttention(2, 4, temprature=2.0)\n"
        "except anymha.errors.UnknownOptionError as error:\n"
        "    print(error)\n"
    )
    typed, helped, by_name, answer = python(project, ["-c", code]).splitlines()
    assert typed == "temperature: 'float | None' = None"
    assert "logits become ``logits / t``" in helped
    assert by_name == "True"
    assert answer.endswith("`temprature`. Pass `temperature`, if that is meant.")


def test_the_arguments_of_the_call_have_types() -> None:
    typed = {*PlainCall.__annotations__, *CallOptions.__annotations__}
    assert typed == {a.name for a in (*ARRAYS, *OPTIONS)}


def test_the_stated_places_exist() -> None:
    pages = [
        PAGE,
        *((ROOT / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "docs/flow.md")),
    ]
    for name in re.findall(r"`((?:anymha|backends|tests)/[\w/]+\.py)`", "".join(pages)):
        assert "temperature" in name or (ROOT / name).exists(), name
