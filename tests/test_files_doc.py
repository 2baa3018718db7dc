"""What docs/files.md shows is what the commands print."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from anymha.cli.main import main
from anymha.framework.registry import BUILT_IN
from anymha.interchange.files.formats import FOLDER, FORMATS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/files.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```console\n\$ anymha (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
NUMBERS = re.compile(r"\d\.\de-\d\d, \d+\.\d\d units")


@pytest.mark.parametrize(("arguments", "shown"), SHOWN, ids=[call.split()[0] for call, _ in SHOWN])
def test_commands_print_what_is_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    shown: str,
) -> None:
    whole = find_spec("transformers") and all(backend.installed for backend in BUILT_IN)
    if "--verify" in arguments and not whole:
        pytest.skip("needs all four frameworks and transformers")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(shlex.split(arguments)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert NUMBERS.sub("#", printed.out) == NUMBERS.sub("#", shown)


def test_both_commands_are_shown() -> None:
    assert [call.split()[0] for call, _ in SHOWN] == ["inspect", "convert"]


def test_every_format_is_in_the_table() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    folders = [line for line in rows if "a folder" in line]
    assert len(folders) == sum(FOLDER in one.suffixes for one in FORMATS)
    for one in FORMATS:
        for suffix in one.suffixes:
            if suffix == FOLDER:
                continue
            (row,) = [line for line in rows if f"`{suffix}`" in line]
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert bool(cells[3]) == bool(one.writer), suffix


def test_every_extra_of_a_format_is_in_the_table() -> None:
    for extra in ("hdf5", "orbax", "gguf"):
        assert f"`anymha[{extra}]`" in PAGE
