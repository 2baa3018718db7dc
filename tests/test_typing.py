"""pyright and mypy refuse each use of `type_checks/wrong_uses.py`, and none of `right_uses.py`.

`nox -s lint` runs this file with both checkers and all frameworks, and fails where one is missing.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from anymha.framework.registry import BUILT_IN, LAYERS, get_layer
from anymha.layer.arguments import CALL_ARGUMENTS, KEYWORDS, Kind
from anymha.layer.native import CallOptions, PlainCall
from anymha.options.config import AttentionConfig
from tests.frameworks import skip_or_fail
from tests.type_checks import right_uses

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "type_checks"
FRAMEWORKS = ("torch", "jax", "flax", "equinox", "tensorflow", "keras")
FILES = ("wrong_uses.py", "right_uses.py")
LEAST = 60
"""Uses in each file, at least."""

Places = set[tuple[str, int]]
"""Files by name, and lines."""


def marked(mark: str) -> Places:
    """The lines that end with a mark, in the file named after it."""
    name = f"{mark}_uses.py"
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return {(name, n) for n, line in enumerate(lines, 1) if line.endswith(f"# {mark}")}


def needs(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            skip_or_fail(name, f"{name} is not installed")


def pyright(tmp_path: Path) -> Places:
    """The lines in which pyright sees an error."""
    for name in FILES:  # pyright looks at files below its settings
        shutil.copy(FOLDER / name, tmp_path)
    settings = {"include": ["."], "extraPaths": [str(ROOT), str(ROOT / "backends")]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--outputjson"]
    done = run([*command, "--pythonpath", sys.executable])
    report = json.loads(done[done.index("{") :])
    assert report["summary"]["filesAnalyzed"] == 2, done
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    }


def mypy(tmp_path: Path) -> Places:
    """The lines in which mypy sees an error."""
    cache = os.environ.get("ANYMHA_MYPY_CACHE", str(tmp_path / "cache"))
    options = ["--config-file", "pyproject.toml", "--cache-dir", cache, "--no-error-summary"]
    done = run([sys.executable, "-m", "mypy", *options, str(FOLDER)])
    errors = re.findall(r"^(.+?):(\d+): error: ", done, re.MULTILINE)
    assert errors or not done.strip(), done
    return {(Path(name).name, int(line)) for name, line in errors}


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=900
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("checker", [pyright, mypy], ids=["pyright", "mypy"])
def test_every_wrong_use_is_refused_and_no_right_one(
    checker: Callable[[Path], Places], tmp_path: Path
) -> None:
    needs(checker.__name__, *FRAMEWORKS)
    found, wrong = checker(tmp_path), marked("wrong")
    assert sorted(wrong - found) == [], "wrong uses that pass"
    assert sorted(found - wrong) == [], "right uses that are refused, or lines without a use"


def test_there_are_enough_uses_of_each_kind() -> None:
    assert len(marked("wrong")) >= LEAST
    assert len(marked("right")) >= LEAST
    for file in FILES:
        text = (FOLDER / file).read_text(encoding="utf-8")
        assert [b.name for b in (*BUILT_IN, *LAYERS) if f"anymha_{b.name}." not in text] == []


@pytest.mark.parametrize("name", [*(b.name for b in (*BUILT_IN, *LAYERS)), "functions"])
def test_the_right_uses_run(name: str) -> None:
    if name in FRAMEWORKS:
        needs(name)
    getattr(right_uses, f"use_{name}")()


def test_the_right_conversions_run() -> None:
    needs("torch", "jax")
    right_uses.use_conversion()


def test_the_types_of_the_call_agree_with_its_arguments() -> None:
    every = PlainCall.__annotations__ | CallOptions.__annotations__
    typed = {name: str(kind) for name, kind in every.items()}
    assert typed.keys() == set(KEYWORDS)
    for argument in CALL_ARGUMENTS:
        if argument.kind in (Kind.MASK, Kind.BIAS, Kind.FLAG):
            wanted = argument.annotation.replace("Array", "A")
            assert f"'{wanted}'" in typed[argument.name], argument.name


def test_every_option_has_a_type() -> None:
    for field in fields(AttentionConfig):
        assert field.type != "Any", field.name


def test_help_shows_what_an_option_takes() -> None:
    shown = inspect.signature(AttentionConfig).parameters
    assert shown["dtype"].annotation == "DtypeLike"
    assert shown["kernel_regularizer"].annotation == "ObjectLike | None"
    layer = inspect.signature(get_layer("numpy")).parameters
    assert layer["compute_dtype"].annotation == "DtypeLike | None"


@pytest.mark.parametrize("name", [b.name for b in (*BUILT_IN, *LAYERS)])
def test_the_options_of_each_constructor_are_those_of_its_class_of_options(name: str) -> None:
    """What `help` shows and type checkers read is what the constructor takes."""
    if name in FRAMEWORKS:
        needs(name)
    layer: Any = get_layer(name)
    shown = list(inspect.signature(layer.__init__).parameters)[1:]
    options = [field.name for field in fields(AttentionConfig)]
    assert shown[: len(options)] == options
    written = inspect.signature(layer.__init__.__wrapped__).parameters.values()
    own = [p.name for p in written if p.kind is p.KEYWORD_ONLY]
    if name == "keras":
        own = ["trainable", "autocast", "use_gate", "flash_attention"]
    assert sorted(shown[len(options) :]) == sorted(own)
