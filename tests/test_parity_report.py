"""What the report says: its verdict, its table in a terminal, its JSON, its HTML, its files."""

from __future__ import annotations

import io
import json
import re
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from anymha.cli.progress import bar, progress_bar
from anymha.errors import FileError
from anymha.framework.registry import Backend
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.parity.matrix.judge import Cell, Row
from anymha.parity.matrix.matrix import AttentionMap, MatrixReport, versions
from anymha.parity.matrix.view import matrix_document
from anymha.parity.oracle.cases import MATRIX
from anymha.parity.reports.junit import to_junit
from anymha.parity.reports.markdown import to_markdown
from anymha.parity.reports.page import to_page
from anymha.parity.reports.terminal import print_document, print_verdict

FOUR = ("numpy", "torch", "tensorflow", "jax")
HOSTILE = "<script>alert(1)</script> [bold]$x_1$[/nothing] & \"'"
SENTENCE = ["[CLS]", "<b>", "$x$", "naïve", "注意", "[SEP]"]


def cell(units: float = 0.25, *faults: str, gradients: bool = True) -> Cell:
    return Cell(units, "scores", {"output": units / 2, "scores": units}, faults, gradients)


def row(name: str, cells: dict[str, Cell] | None = None, **changes: object) -> Row:
    values = {
        "dtype": "float32", "budget": 15.47, "elements": 1964, "differing": 1769, "ties": 0,
        "compared": 1964, "reproducible": False,
    }  # fmt: skip
    return Row(name=name, cells=cells or {n: cell() for n in FOUR}, **{**values, **changes})  # type: ignore[arg-type]


def exact(name: str, differing: int = 0, ties: int = 0, compared: int = 2_654_560) -> Row:
    return row(name, dtype="float32 in float64", budget=0.5, differing=differing, ties=ties,
               compared=compared, reproducible=True)  # fmt: skip


def report(*rows: Row, **changes: object) -> MatrixReport:
    values = {"backends": FOUR, "missing": (), "rows": rows, "versions": {"anymha": "1.0"}}
    return MatrixReport(**{**values, **changes})  # type: ignore[arg-type]


GOOD = [row(case.name) for case in MATRIX[:-3]] + [exact(case.name) for case in MATRIX[-3:]]
REAL = [row("layer 0, float32", budget=157.27), exact("layer 0, reproducible", 1, 1)]


def shown(found: MatrixReport, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width)
    print_document(console, matrix_document(found))
    print_verdict(console, matrix_document(found))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_verdict_counts_cases_and_elements() -> None:
    plain = "PARITY HOLDS: 2 cases on numpy, torch, tensorflow, jax"
    assert report(row("a"), row("b")).verdict == plain
    assert report(row("a"), exact("b")).verdict == (
        f"{plain}; in reproducible mode 0 of 2,654,560 elements differ"
    )
    assert report(row("a"), exact("b", 1, 1, 1000)).verdict == (
        f"{plain}; in reproducible mode 1 of 1,000 elements differ, a tie"
    )
    assert report(exact("a", 1, 1, 1000), exact("b", 1, 1, 1000)).verdict == (
        f"{plain}; in reproducible mode 2 of 2,000 elements differ, ties"
    )


def test_verdict_names_what_fails() -> None:
    bad = row("b", {"numpy": cell(), "torch": cell(99.0, "output is off")})
    found = report(row("a"), bad, row("c", faults=("3 of 9 elements differ",)))
    assert not found.passed
    assert found.verdict == (
        "PARITY DOES NOT HOLD: 2 of 3 cases on numpy, torch, tensorflow, jax fail: b; c"
    )
    many = report(*(row(f"case {i}", faults=("no",)) for i in range(9)))
    assert many.verdict.endswith("fail: case 0; case 1; case 2; case 3; case 4 and 4 more")


def test_verdict_counts_the_real_layers_too() -> None:
    found = report(row("a"), real=[row("layer 0", faults=("no",))])
    assert not found.passed
    assert "1 of 2 cases" in found.verdict


def test_report_without_cases_does_not_pass() -> None:
    assert not report().passed


@pytest.mark.parametrize("width", [80, 120])
def test_table_holds_every_name_and_column_whole(width: int) -> None:
    found = report(*GOOD, real=REAL)
    text = shown(found, width)
    lines = text.splitlines()
    verdict, table = lines[-1], lines[:-1]
    assert verdict == found.verdict
    assert "…" not in text
    assert all(len(line.rstrip()) <= width for line in table)
    head = lines[2].split()
    assert head == ["case", *(["dtype"] if width == 120 else []), *FOUR, "may", "bits"]
    for one in [*GOOD, *REAL]:
        (line,) = [line for line in lines if line.startswith(f"✓  {one.name}  ")]
        assert line.count("0.25") == 4, line


@pytest.mark.parametrize(("width", "gone"), [(74, {"may"}), (67, {"may", "bits"})])
def test_narrow_table_drops_columns_before_it_cuts_names(width: int, gone: set[str]) -> None:
    lines = shown(report(*GOOD), width).splitlines()
    assert lines[2].split() == ["case", *FOUR, *(n for n in ("may", "bits") if n not in gone)]
    assert any(line.startswith("✓  reproducible, 2^20 outputs ") for line in lines)


def test_cells_and_bits_say_what_they_found() -> None:
    cells = {
        "numpy": cell(0.25, gradients=False),
        "torch": Cell(np.inf, "", {}, ("raised ValueError: no",), False),
        "tensorflow": cell(np.inf, "scores is off by inf units"),
        "jax": cell(123456.0, "scores is off by 1.2e+05 units"),
    }
    text = shown(report(row("one", cells, differing=3, compared=1000), exact("two", 1, 1)))
    (one,) = [line.split() for line in text.splitlines() if line.startswith("✗  one ")]
    assert one[3:] == ["0.25*", "error", "inf", "1e+05", "15.47", "3"]
    (two,) = [line.split() for line in text.splitlines() if line.startswith("✓  two ")]
    assert two[-2:] == ["1", "tied"]
    assert "*: without gradients." in text
    assert "Tied: " in text
    assert "✗ one, torch: raised ValueError: no" in text
    assert "✗ one, jax: scores is off by 1.2e+05 units" in text


def test_legend_tells_only_what_is_there() -> None:
    text = shown(report(*GOOD))
    assert "*: without gradients." not in text
    assert "Tied: " not in text


def test_names_and_faults_are_no_markup() -> None:
    cells = {name: cell(0.1, f"raised [red]{HOSTILE}") for name in FOUR}
    text = shown(report(row(HOSTILE, cells)), 200)
    assert text.count(HOSTILE) >= 1 + 2 * 4
    assert f"raised [red]{HOSTILE}" in text


def test_long_and_many_faults_are_cut() -> None:
    cells = {"numpy": cell(9.0, *(f"{i}: {'far ' * 300}" for i in range(60)))}
    rows = [row(f"case {i}", cells) for i in range(45)]
    text = shown(report(*rows, backends=("numpy",)), 100)
    (line,) = [line for line in text.splitlines() if line.startswith("✗ case 7, numpy: ")]
    assert len(line) < 700
    assert line.endswith("far ...; and 58 more")
    assert "and 5 more; `--json` writes all" in text


def test_missing_backends_are_told_with_their_extras() -> None:
    cells = {"numpy": cell()}
    text = shown(report(row("one", cells), backends=("numpy",), missing=("torch", "jax")))
    assert "torch is not installed: pip install 'anymha[torch]' adds it." in text
    assert "jax is not installed: pip install 'anymha[jax]' adds it." in text
    assert "bits" not in text.splitlines()[2], "there is nothing to compare bits with"


def test_terminal_without_ticks_gets_words() -> None:
    bad = row("bad", {n: cell(99.0, "scores is off") for n in FOUR})
    text = shown(report(*GOOD, bad), encoding="ascii")
    assert re.search(r"^ok +\|self +\|", text, re.MULTILINE)
    assert re.search(r"^FAIL +\|bad +\|", text, re.MULTILINE)
    assert "FAIL bad, torch: scores is off" in text


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with progress_bar(4, Console(file=stream)) as told:
        for backend in FOUR:
            told(HOSTILE, backend)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_shows_case_and_backend_and_goes_away() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with progress_bar(2, console, delay=0) as told:
        told("[T, S]", "numpy")
        told("[T, S]", "torch")
    text = stream.getvalue()
    assert "torch: [T, S]" in text
    assert "1/2" in text
    assert text.rstrip().endswith("\x1b[2K"), "the line is erased at the end"


def test_progress_appears_only_where_the_work_takes_longer() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with bar(console, delay=60) as update:
        update(0, 1, "soon done")
    assert "soon done" not in stream.getvalue()
    with bar(console, delay=0.01) as update:
        update(0, None, "slow")
        time.sleep(0.5)
    assert "slow" in stream.getvalue()


def test_json_round_trips_and_has_no_infinity() -> None:
    bad = row("bad", {"numpy": cell(np.inf, "raised"), "torch": cell()}, faults=("differ",))
    found = report(*GOOD, bad, real=REAL, seconds=1.26, missing=("mlx",))
    text = json.dumps(found.to_dict(), allow_nan=False)
    plain = json.loads(text)
    assert plain == found.to_dict()
    assert list(plain) == [
        "schema", "passed", "verdict", "backends", "missing", "versions", "seconds", "cases",
        "checkpoint",
    ]  # fmt: skip
    assert plain["schema"] == "anymha.parity/1"
    assert (plain["passed"], plain["seconds"], plain["missing"]) == (False, 1.3, ["mlx"])
    assert [case["name"] for case in plain["cases"]] == [one.name for one in found.rows]
    assert [case["name"] for case in plain["checkpoint"]] == [one.name for one in REAL]
    last = plain["cases"][-1]
    assert last["cells"]["numpy"] == {
        "units": None, "worst": "scores", "errors": {"output": None, "scores": None},
        "faults": ["raised"], "gradients": True, "passed": False,
    }  # fmt: skip
    assert (last["passed"], last["faults"]) == (False, ["differ"])


def test_junit_has_a_suite_for_each_case_and_a_test_case_for_each_backend() -> None:
    cells = {"numpy": cell(), "torch": cell(99.0, f"scores is off {HOSTILE}")}
    bad = row("bad", cells, faults=("2 elements differ",), skipped={"jax": "it lacks float16"})
    root = ElementTree.fromstring(to_junit(matrix_document(report(row("good"), bad))))
    assert [suite.get("name") for suite in root] == ["good", "bad"]
    states = {case.get("name"): [child.tag for child in case] for case in root[1]}
    assert states == {"numpy": [], "torch": ["failure"], "jax": ["skipped"],
                      "between backends": ["failure"]}  # fmt: skip
    counts = ("tests", "failures", "errors", "skipped")
    assert [root.get(name) for name in counts] == ["8", "2", "0", "1"]


def test_markdown_has_the_verdict_the_table_and_what_is_wrong() -> None:
    bad = row("bad", {name: cell(99.0, f"scores is off {HOSTILE}") for name in FOUR})
    found = report(row("good"), bad, missing=("mlx",))
    text = to_markdown(matrix_document(found))
    assert found.verdict in text
    assert "| ✅ | good | float32 | 0.25 | 0.25 | 0.25 | 0.25 | 15.47 | 90% |" in text
    assert "| ❌ | bad | float32 | ❌ 99.00 |" in text
    assert "- bad on torch: scores is off &lt;script&gt;" in text
    assert "- mlx is not installed: pip install 'anymha\\[mlx\\]' adds it." in text
    assert "<script" not in text


def test_versions_name_the_frameworks(installed: list[Backend]) -> None:
    found = versions(installed)
    assert {"anymha", "python", "platform", "numpy"} <= set(found)
    assert all(backend.framework in found for backend in installed)


class _Page(HTMLParser):
    """What a page holds: its text, its tags, and all that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(v) for n, v in attrs if n in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def page(found: MatrixReport) -> tuple[str, _Page]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of matplotlib's imports
        pytest.importorskip("matplotlib", reason="the HTML report needs matplotlib")
        text = to_page(matrix_document(found))
    return text, _Page(text)


def attention(size: int, heads: int = 5) -> np.ndarray:
    scores = np.random.default_rng(0).random((heads, size, size))
    return scores / scores.sum(-1, keepdims=True)


def test_html_holds_verdict_cases_pictures_and_words() -> None:
    maps = [AttentionMap("encoder.layer.0.", SENTENCE, attention(6))]
    found = report(*GOOD, real=REAL, maps=maps, seconds=3.0)
    _, read = page(found)
    assert found.verdict in read.texts
    for one in (*GOOD, *REAL):
        assert read.texts.count(one.name) >= 2, "in the table and in a picture"
    assert read.tags.count("svg") == 3
    for token in SENTENCE:
        assert token in read.texts, token
    assert "encoder.layer.0" in read.texts
    assert all(name in read.texts for name in FOUR)


def test_html_loads_nothing() -> None:
    maps = [AttentionMap("a", SENTENCE, attention(6))]
    text, read = page(report(*GOOD, real=REAL, maps=maps))
    spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= spaces
    assert all(target.startswith(("#", "data:")) for target in read.loads)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "@import" not in text


def test_html_escapes_names_tokens_and_faults() -> None:
    cells = {name: cell(99.0, f"raised {HOSTILE}") for name in FOUR}
    maps = [AttentionMap(HOSTILE, [HOSTILE, "<b>", "b" * 99], attention(3))]
    text, read = page(report(row(HOSTILE, cells), maps=maps, versions={HOSTILE: HOSTILE}))
    assert "<script" not in text
    assert not {"b", "script"} & set(read.tags)
    assert read.texts.count(HOSTILE) >= 3, "in the table, in a picture, over the map"
    assert f"{HOSTILE} on torch: raised {HOSTILE}" in read.texts


def test_html_of_a_failure_says_so() -> None:
    cells = {
        "numpy": cell(), "torch": cell(99.0, "scores is off by 99 units"),
        "tensorflow": Cell(np.inf, "", {}, ("raised ValueError: no",), False),
        "jax": cell(np.inf, "scores is off by inf units"),
    }  # fmt: skip
    _, read = page(report(row("one", cells, faults=("2 of 9 elements differ",)), row("two")))
    assert "anymha parity: parity does not hold" in read.texts
    assert "one on tensorflow: raised ValueError: no" in read.texts
    assert "one: 2 of 9 elements differ" in read.texts
    assert read.texts.count("fails") == 3
    assert "error" in read.texts


def test_html_of_one_backend_has_no_bits() -> None:
    one = row("a", {"numpy": cell(0.0)}, compared=0, differing=0)
    _, read = page(report(one, backends=("numpy",), missing=("jax",)))
    assert read.tags.count("svg") == 1
    assert not any("bit between" in text for text in read.texts)
    assert any(text.startswith("jax is not installed: ") for text in read.texts)


def test_file_is_written_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.json"
    check_writable(path)
    assert not path.parent.exists(), "checking writes nothing"
    write_atomically(path, "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"
    write_atomically(path, "other")
    assert path.read_text(encoding="utf-8") == "other"
    assert [one.name for one in path.parent.iterdir()] == ["file.json"]


def test_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"]


def test_link_is_followed_and_device_is_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    check_writable(Path("/dev/null"))
    write_atomically(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_path_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path, told in (
        (tmp_path, f"{tmp_path} cannot be written: it is a folder."),
        (
            tmp_path / "file" / "new",
            f"{tmp_path}/file/new cannot be written: {tmp_path}/file is not a folder.",
        ),
    ):
        with pytest.raises(FileError) as error:
            check_writable(path)
        assert str(error.value) == told
    with pytest.raises(FileError, match=r"file/new cannot be written: "):
        write_atomically(tmp_path / "file" / "new", "text")


def test_folder_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FileError) as error:
        check_writable(tmp_path / "new")
    assert str(error.value) == (
        f"{tmp_path}/new cannot be written: no permission to write to {tmp_path}."
    )
