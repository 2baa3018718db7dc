"""The fuzzer: it repeats itself, it finds planted faults, and a short run finds nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("resource", reason="limits of memory are those of POSIX")

from anymha.errors import FileError
from tests.fuzz import worker
from tests.fuzz.command import cases, main, place
from tests.fuzz.samples import SAMPLES, arrays, installed

linux = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@linux
@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_short_run_of_the_fuzzer_finds_nothing(name: str, tmp_path: Path, capfd: Any) -> None:
    if not installed(name):
        pytest.skip("the library that reads it is not installed")
    status = main(["--format", name, "--count", "25", "--seed", "3", "--keep", str(tmp_path)])
    printed = capfd.readouterr()
    assert status == 0, printed.err
    assert "error" in printed.out


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_seed_repeats_the_damages(name: str, tmp_path: Path) -> None:
    if not installed(name):
        pytest.skip("the library that reads it is not installed")
    kinds = {kind: make(tmp_path) for kind, make in SAMPLES[name].items()}
    first, again = (list(cases(kinds, "1", range(20))) for _ in range(2))
    assert first == again
    assert first[7:9] == list(cases(kinds, "1", [7, 8]))
    assert [files for _, _, files, _ in first] != [
        files for _, _, files, _ in cases(kinds, "2", range(20))
    ]
    changed = [files != kinds[kind] for _, kind, files, _ in first]
    assert sum(changed) > 15


@pytest.fixture(scope="module")
def watch() -> worker.Watch:
    return worker.Watch()


def foreign(path: Path) -> Any:
    raise KeyError("foreign")


def writes(path: Path) -> Any:
    (path.parents[1] / "outside").write_bytes(b"1")
    raise FileError("refused")


def looks(path: Path) -> Any:
    (path.parents[1] / "outside").read_bytes()
    raise FileError("refused")


def prints(path: Path) -> Any:
    error = FileError("refused")
    error.__class__ = type("Raw", (FileError,), {"__str__": lambda self: "\x1b[2J"})
    raise error


def tells_much(path: Path) -> Any:
    raise FileError("x" * 5000)


def gives_others(path: Path) -> Any:
    return {name: array + 1 for name, array in arrays().items() if array.dtype != bool}


@pytest.mark.parametrize(
    ("fault", "told"),
    [(foreign, "KeyError: 'foreign'"), (writes, "touched: "), (looks, "touched: "),
     (prints, "cannot be printed"), (tells_much, "the error is long"),
     (gives_others, "has other values, and a checksum")],
)  # fmt: skip
def test_planted_faults_of_a_reader_are_found(
    tmp_path: Path, watch: worker.Watch, monkeypatch: Any, fault: Callable[[Path], Any], told: str
) -> None:
    (tmp_path / "outside").write_bytes(b"1")
    path = place(SAMPLES["npz"]["stored"](tmp_path), tmp_path / "case")
    right = arrays()
    assert worker.outcome(path, right, watch)["done"] == "arrays"
    with monkeypatch.context() as planted:
        planted.setattr(worker, "read", fault)
        result = worker.outcome(path, right, watch)
    assert result["done"] == "failed"
    assert told in result["words"]


@linux
@pytest.mark.parametrize(
    ("fault", "told"),
    [("import os; os.abort()", "ended the process"), ("import time; time.sleep(60)", "took more"),
     ("bytearray(3 * 10**9)", "MemoryError")],
)  # fmt: skip
def test_a_crash_a_long_time_and_much_memory_are_found(
    tmp_path: Path, monkeypatch: Any, capfd: Any, fault: str, told: str
) -> None:
    """A reader that does this on every fifth file."""
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import anymha.interchange.files.npz as npz\n"
        "old, count = npz.open_npz, 0\n"
        "def new(path):\n"
        "    global count\n"
        "    count += 1\n"
        f"    if count > 9:\n        {fault}\n"
        "    return old(path)\n"
        "npz.open_npz = new\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(path for path in sys.path if path)}")
    monkeypatch.setattr("tests.fuzz.command.SECONDS", 2)
    arguments = ["--format", "npz", "--count", "6", "--keep", str(tmp_path / "kept")]
    assert main(arguments) == 1
    assert told in capfd.readouterr().err
    (case, *_) = (tmp_path / "kept").iterdir()
    assert (case / "words.txt").is_file()


def test_samples_hold_what_they_say(tmp_path: Path) -> None:
    path = place(SAMPLES["npz"]["deflated"](tmp_path), tmp_path / "case")
    assert all(np.array_equal(worker.read(path)[name], array) for name, array in arrays().items())
