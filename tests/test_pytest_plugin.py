"""The pytest plugin, in runs of their own: a project that has pytest, NumPy and this library."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from anymha.parity.stages.saved_case import load_case

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
OUTSIDE = ("CI", "BUILD_NUMBER", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS",
           "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER")  # fmt: skip
"""Variables that change what pytest writes."""

HEAVY = ("numpy", "ml_dtypes", "torch", "tensorflow", "jax", "keras", "flax", "rich", "jinja2")

SAMPLE = """
import numpy as np
import pytest
import anymha

OPTIONS = {"query_features": 8, "bias_initializer": "random_normal", "seed": 0}
layer = anymha.MultiHeadAttention(2, 4, backend="numpy", **OPTIONS)
x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")

def forgetful(query, use_causal_mask):
    return layer(query)
"""
AGREES = "def test_agrees(parity):\n    assert parity.check(layer, layer, x).passed\n"
DIFFERS = """
def test_differs(parity):
    parity.check(layer, forgetful, x, use_causal_mask=True)
"""
ODD = """
@pytest.mark.parametrize("odd", ["<b>|`"])
def test_odd(parity, odd):
    assert not parity.compare(layer, forgetful, x, use_causal_mask=True).passed
"""
VERDICT = "PARITY DOES NOT HOLD: forgetful and anymha in numpy part at masked_logits: "

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest, with our plugin alone, in a process of its own on what a test file holds."""
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("COLUMNS", "200")

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makeini("[pytest]")  # so that its own folder is the root
        pytester.makepyfile(source)
        plain = [
            "-p", "anymha.testing.pytest_plugin", "-p", "no:cacheprovider", "--color=no", "-ra",
            "--strict-markers",
        ]  # fmt: skip
        return pytester.runpytest_subprocess(*plain, *options, timeout=120)

    return run


def test_the_plugin_imports_pytest_alone() -> None:
    source = (
        "import pytest, sys; before = set(sys.modules); import anymha.testing.pytest_plugin\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] != 'anymha'))\n"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] == 'anymha'))"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": PATHS}, text=True
    )
    others, own = output.splitlines()
    assert others == ""
    packages = ["anymha", "anymha.testing", "anymha.testing.pytest_plugin", "anymha.version"]
    assert own.split() == packages


def test_a_run_that_compares_nothing_imports_nothing_and_tells_nothing(run: Run) -> None:
    source = f"import sys\ndef test_light():\n    assert not set({HEAVY}) & set(sys.modules)\n"
    result = run(source)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*= parity =*")


def test_a_difference_fails_the_test_with_stage_and_cause_and_no_lines_of_ours(run: Run) -> None:
    result = run(SAMPLE + AGREES + DIFFERS)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       parity.check(layer, forgetful, x, use_causal_mask=True)",
            f"E       anymha.parity.*ParityError: {VERDICT}causal mask ignored",
            "E*stage *error *own error *may *",
            "E*output * differs*",
            "E*Cause: causal mask ignored",
            "test_*.py:*: ParityError",
            "*= parity =*",
            "2 compared: 1 agree, 1 differ",
            f"test_*::test_differs: {VERDICT}causal mask ignored",
        ]
    )
    assert "pytest_plugin.py" not in result.stdout.str()


RAISES = """
def broken(query):
    return query @ np.ones((3, 3))

def test_raises(parity):
    parity.check(layer, broken, x)

def test_expects(parity):
    with pytest.raises(ValueError):
        parity.check(layer, broken, x)
"""


def test_a_call_that_raises_is_in_the_section_without_lines_of_ours(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = pytester.path / "summary"
    summary.write_text("# Before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    forms = [f"--parity-report={name}" for name in ("a.json", "a.xml", "a.html", "summary")]
    result = run(SAMPLE + AGREES + RAISES, *forms)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       parity.check(layer, broken, x)",
            ">       return query @ np.ones((3, 3))",
            "*= parity =*",
            "2 compared: 1 agree, 0 differ, 1 raised an error",
            "test_*::test_raises: NOT COMPARED: ValueError: *",
        ]
    )
    text = result.stdout.str()
    assert "compare.py" not in text
    assert "pytest_plugin.py" not in text
    told = json.loads((pytester.path / "a.json").read_text("utf-8"))
    assert [one["passed"] for one in told["comparisons"]] == [True, False]
    assert "<error" in (pytester.path / "a.xml").read_text("utf-8")
    written = summary.read_text("utf-8")
    assert written.startswith("# Before\n\n### ")
    assert "NOT COMPARED: ValueError" in written


def test_an_exit_of_an_implementation_is_a_call_that_raises(run: Run) -> None:
    leaves = "def test_leaves(parity):\n    parity.check(layer, lambda query: exit(0), x)\n"
    result = run(SAMPLE + leaves)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*NOT COMPARED: RuntimeError: The code raised SystemExit(0)*"])


def test_report_without_an_ending_is_markdown(run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "report").write_text("old")
    run(SAMPLE + AGREES, "--parity-report=report").assert_outcomes(passed=1)
    assert (pytester.path / "report").read_text("utf-8").startswith("### ")


def test_compare_tells_a_difference_without_failing_the_test(run: Run) -> None:
    result = run(SAMPLE + ODD)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["1 compared: 0 agree, 1 differ", f"*test_odd*: {VERDICT}*"])


def test_the_tests_of_the_page_run(run: Run, pytester: pytest.Pytester) -> None:
    page = (ROOT / "docs/ci.md").read_text("utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    pytester.mkpydir("my_project").joinpath("reference.py").write_text(
        "import numpy as np\n"
        "def layer(query):\n"
        "    logits = np.einsum('btd,bsd->bts', query, query) / 4\n"
        "    weights = np.exp(logits - logits.max(-1, keepdims=True))\n"
        "    return np.einsum('bts,bsd->btd', weights / weights.sum(-1, keepdims=True), query)\n"
    )
    run("\n".join(blocks), "-k", "test_attention").assert_outcomes(passed=1, deselected=1)
    missing = int(any(importlib.util.find_spec(name) is None for name in ("torch", "jax")))
    marked = run("\n".join(blocks), "-m", "parity")
    marked.assert_outcomes(passed=1 - missing, skipped=missing, deselected=1)


def test_features_that_the_inputs_do_not_test_are_told(run: Run) -> None:
    result = run(SAMPLE + "def test_one(parity):\n    parity.check(layer, layer, x[:1])\n")
    result.stdout.fnmatch_lines(
        ["*::test_one: not exercised by its inputs: *there is one element*"]
    )


def test_a_comparison_of_a_fixture_is_told_too(run: Run) -> None:
    fixture = """
@pytest.fixture
def checked(parity):
    parity.check(layer, layer, x)
    yield
    parity.check(layer, layer, x)

def test_uses_it(checked): pass
"""
    run(SAMPLE + fixture).stdout.fnmatch_lines(["2 compared: 2 agree, 0 differ"])


class Page(html.parser.HTMLParser):
    """What a page holds: its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.loads, self.tags = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_all_comparisons_go_into_a_file_of_each_form(run: Run, pytester: pytest.Pytester) -> None:
    forms = ("html", "json", "md", "xml")
    result = run(SAMPLE + AGREES + DIFFERS + ODD, *(f"--parity-report=out/p.{f}" for f in forms))
    result.assert_outcomes(passed=2, failed=1)
    found = {form: (pytester.path / f"out/p.{form}").read_text("utf-8") for form in forms}
    assert result.stdout.str().count("report: ") == 1

    told = json.loads(found["json"])
    assert (told["schema"], told["passed"]) == ("anymha.compared/1", False)
    names = [one["test"].split("::")[1] for one in told["comparisons"]]
    assert names == ["test_agrees", "test_differs", "test_odd[<b>|`]"]
    assert [one["passed"] for one in told["comparisons"]] == [True, False, False]
    assert told["comparisons"][1]["first_divergence"] == "masked_logits"
    assert told["comparisons"][1]["diagnosis"]["causes"][0]["name"] == "causal mask ignored"

    page = Page(found["html"])
    assert all(target.startswith("data:") for target in page.loads), "it loads nothing"
    assert all(name in page.words for name in names)
    assert page.words.index("test_differs") < page.words.index("test_agrees")
    assert "3 compared: 1 agree, 2 differ" in page.words
    assert "Switch the causal mask on." in page.words

    assert "| ✅ | `test_" in found["md"]
    assert "test_odd[<b>\\|`]`` | `masked_logits` | causal mask ignored |" in found["md"]
    assert VERDICT in found["md"]

    (suite,) = ElementTree.fromstring(found["xml"])
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    failures = [case.get("classname").split("::")[1] for case in suite if len(case)]
    assert failures == ["test_differs", "test_odd[<b>|`]"]


def test_the_page_shows_the_pictures_of_what_differs(run: Run, pytester: pytest.Pytester) -> None:
    run(SAMPLE + AGREES + DIFFERS, "--parity-report=p.html").assert_outcomes(passed=1, failed=1)
    text = (pytester.path / "p.html").read_text("utf-8")
    differs, _, agrees = text.partition("test_agrees")
    assert "<svg" in differs
    assert "<svg" not in agrees


def test_the_page_needs_nothing_that_draws(run: Run, pytester: pytest.Pytester) -> None:
    without = "import sys\nsys.modules['matplotlib'] = sys.modules['rich'] = None\n"
    run(without + SAMPLE + DIFFERS, "--parity-report=p.html").assert_outcomes(failed=1)
    page = Page((pytester.path / "p.html").read_text("utf-8"))
    assert "masked_logits" in page.words


def test_workers_of_xdist_write_one_report_and_one_section(
    run: Run, pytester: pytest.Pytester
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    many = SAMPLE + DIFFERS + AGREES + ODD + AGREES.replace("test_agrees", "test_again")
    options = ("--parity-report=p.json", "--parity-report=p.html", "--parity-save=cases")
    alone = run(many, *options)
    first = [(pytester.path / name).read_text("utf-8") for name in ("p.json", "p.html")]
    shared = run(many, *options, "-p", "xdist.plugin", "-n2")
    for result in (alone, shared):
        result.assert_outcomes(passed=3, failed=1)
        assert result.stdout.str().count("= parity =") == 1
        assert "4 compared: 2 agree, 2 differ" in result.stdout.str()
    second = [(pytester.path / name).read_text("utf-8") for name in ("p.json", "p.html")]
    assert json.loads(second[0]) == json.loads(first[0])
    assert Page(second[1]).words == Page(first[1]).words


def test_each_case_that_differs_is_saved(run: Run, pytester: pytest.Pytester) -> None:
    options = ("--parity-save=out/cases", "--parity-report=out/p.html")
    result = run(SAMPLE + AGREES + DIFFERS + ODD, *options)
    files = sorted((pytester.path / "out/cases").iterdir())
    assert [re.sub("-[0-9a-f]{8}-1.npz$", "", path.name.split("py-")[1]) for path in files] == [
        "test_differs",
        "test_odd-b",
    ]
    result.stdout.fnmatch_lines([f"*saved: {path}" for path in files])
    page = Page((pytester.path / "out/p.html").read_text("utf-8"))
    assert f"anymha compare numpy MODULE:OBJECT --inputs {files[0]}" in page.words
    case = load_case(files[0])
    assert case.call == {"use_causal_mask": True}
    assert case.inputs["query"].shape == (2, 5, 8)
    assert "reference" in case.layers


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--parity-report=p.txt", "--parity-report must be a file that ends in .html, .json, "),
        ("--parity-report=folder.html", "--parity-report must be a file that ends in .html, "),
        ("--parity-report=file/p.html", "--parity-report: nothing can be written in */file ("),
        ("--parity-save=file", "--parity-save: nothing can be written in */file ("),
        ("--parity-save=file/under", "--parity-save: nothing can be written in */file/under ("),
    ],
)
def test_what_cannot_be_written_is_said_before_any_test_runs(
    run: Run, pytester: pytest.Pytester, option: str, message: str
) -> None:
    (pytester.path / "file").touch()
    (pytester.path / "folder.html").mkdir()
    result = run("def test_ran():\n    open('ran', 'w').close()\n", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}*"])
    assert not (pytester.path / "ran").exists()


def test_a_report_that_cannot_be_written_at_the_end_is_an_error(
    run: Run, pytester: pytest.Pytester
) -> None:
    spoil = """
import pathlib
def test_spoils():
    pathlib.Path("out").rmdir()
    pathlib.Path("out").touch()
"""
    result = run(spoil, "--parity-report=out/p.json")
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["*= parity =*", "no report: *p.json cannot be written: *"])


NEEDS = """
import pytest
@pytest.mark.parity(needs=("pytest", "no_such_package"))
def test_needs_two(): pass
@pytest.mark.parity(needs="pytest")
def test_needs_one(): pass
@pytest.mark.parity
def test_needs_none(): pass
"""


def test_a_test_is_skipped_where_what_it_needs_is_missing(run: Run) -> None:
    result = run(NEEDS)
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_*.py:*: no_such_package not installed"])


def test_a_test_fails_where_what_it_needs_is_expected_and_missing(run: Run) -> None:
    result = run(NEEDS, "--parity-expect=pytest,no_such_package")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["no_such_package is not installed, but --parity-expect names it"])
    run(NEEDS, "--parity-expect=other").assert_outcomes(passed=2, skipped=1)


@pytest.mark.parametrize("wrong", ["'torch'", "need='torch'"])
def test_a_marker_that_is_used_wrongly_says_what_it_takes(run: Run, wrong: str) -> None:
    result = run(f"import pytest\n@pytest.mark.parity({wrong})\ndef test_one(): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["The marker parity takes `needs`, a name or names of packages*"])


def test_the_plugin_is_found_where_the_library_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["pytest11"].items()
    assert entry == ("anymha.testing.pytest_plugin", "anymha.testing.pytest_plugin")
