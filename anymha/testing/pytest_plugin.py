"""The pytest plugin: fixture `parity`, marker `parity`, options, and a section at the end.

Where anymha is installed, every run of pytest imports this module; it imports pytest alone, and
what compares, with NumPy, when a test first compares. docs/ci.md shows how to use it.

Under pytest-xdist each worker sends what its tests compared with their reports, as plain data; the
process that the user started writes the files and the section.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from anymha.parity.reports.report import Comparison

SUFFIXES = (".html", ".json", ".md", ".xml", "")
ATTRIBUTE = "anymha_parity"
"""Of a test's report: what the test compared, as plain data, which xdist sends."""

Records = list[dict[str, Any]]
RECORDS = pytest.StashKey[Records]()


class Parity:
    """What the fixture `parity` gives: comparisons that are told at the end of the run.

    Args:
        item: The test that compares.
    """

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self._records = item.stash.setdefault(RECORDS, [])
        self._count = 0

    def compare(self, reference: Any, candidate: Any, inputs: Any, **call: Any) -> Comparison:
        """Compare, and go on whatever the result; see `anymha.parity.comparison.compare`.

        Args:
            reference: What is right: a layer of any framework, ours or theirs, or a function.
            candidate: What is judged; likewise.
            inputs: The query, a sequence of query, value and key, or a mapping of them by name.
            **call: The call's other arguments by the names of anymha's layer.

        Returns:
            The comparison.
        """
        __tracebackhide__ = True
        from anymha.parity.comparison.compare import compare  # noqa: PLC0415
        from anymha.parity.reports.collection import raised, record  # noqa: PLC0415

        try:
            comparison = compare(reference, candidate, inputs, **call)
        except Exception as error:
            self._records.append(raised(error, self._item.nodeid))
            raise error.with_traceback(_outside(error.__traceback__)) from error.__cause__
        config = self._item.config
        saved = config.option.parity_save and _absolute(config, config.option.parity_save)
        pages = any(path.endswith(".html") for path in config.option.parity_report)
        self._count += 1
        made = record(comparison, self._item.nodeid, self._count, saved=saved, pages=pages)
        self._records.append(made)
        return comparison

    def check(self, reference: Any, candidate: Any, inputs: Any, **call: Any) -> Comparison:
        """Compare, and fail the test unless both agree: the message says where they part, and why.

        Args:
            reference: As for `compare`.
            candidate: As for `compare`.
            inputs: As for `compare`.
            **call: As for `compare`.

        Returns:
            The comparison, which passed.

        Raises:
            ParityError: they do not agree; it is an AssertionError too.
        """
        __tracebackhide__ = True
        comparison = self.compare(reference, candidate, inputs, **call)
        if not comparison.passed:
            from anymha.parity.comparison.compare import ParityError  # noqa: PLC0415

            raise ParityError(comparison.to_text())
        return comparison


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Compare two implementations of attention: `parity.check(reference, candidate, inputs)`."""
    return Parity(request.node)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("parity", "comparison of implementations of attention (anymha)")
    group.addoption(
        "--parity-report", action="append", default=[], metavar="PATH",
        help="write all comparisons into this file: .html, .json, .md, or .xml (JUnit); "
        "without an ending Markdown, and $GITHUB_STEP_SUMMARY is appended to; may be given more "
        "than once",
    )  # fmt: skip
    group.addoption(
        "--parity-save", metavar="DIR",
        help="save each comparison that differs in this folder, as an .npz that repeats it",
    )  # fmt: skip
    group.addoption(
        "--parity-expect", default="", metavar="NAMES",
        help="packages, with commas between, that must be installed: tests marked "
        "parity(needs=...) fail where one of them is missing, instead of being skipped",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and see before any test runs that what is asked for can be written."""
    config.addinivalue_line(
        "markers",
        "parity(needs=()): a test that compares implementations; skipped where a package that "
        "`needs` names is not installed.",
    )
    if hasattr(config, "workerinput"):
        return
    paths = [_absolute(config, path) for path in config.option.parity_report]
    for path in paths:
        if path.suffix not in SUFFIXES or path.is_dir():
            raise pytest.UsageError(
                f"--parity-report must be a file that ends in {', '.join(SUFFIXES[:-1])}, or a "
                f"file without an ending, for Markdown. Received: {path}."
            )
        _writable("--parity-report", path.parent)
    if config.option.parity_save is not None:
        _writable("--parity-save", _absolute(config, config.option.parity_save))
    config.pluginmanager.register(Collector(paths), "anymha-parity-collector")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test where what it needs is not installed; fail it where that is expected."""
    expected = re.split(r"[,\s]+", item.config.option.parity_expect)
    for mark in item.iter_markers("parity"):
        if mark.args or set(mark.kwargs) - {"needs"}:
            pytest.fail(
                "The marker parity takes `needs`, a name or names of packages, and nothing else. "
                f"Received: {mark.args} {mark.kwargs}.",
                pytrace=False,
            )
        missing = _missing(**mark.kwargs)
        if set(missing) & set(expected):
            pytest.fail(f"{missing[0]} is not installed, but --parity-expect names it", False)
        if missing:
            reason = f"{' and '.join(missing)} not installed"
            raise pytest.skip.Exception(reason, _use_item_location=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give the report of each phase of a test what was compared in it."""
    report = yield
    records = item.stash.get(RECORDS, [])
    if report.passed:  # the test expected the error
        records[:] = [record for record in records if "error" not in record]
    setattr(report, ATTRIBUTE, records[:])
    records.clear()
    return report


class Collector:
    """Gathers the comparisons of all processes, writes them to paths, and tells them at the end."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.records: Records = []
        self.failure = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test compared, of workers too."""
        self.records += getattr(report, ATTRIBUTE, [])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the files; the order of workers changes nothing."""
        self.records.sort(key=lambda record: record["test"])
        if not self.paths or session.config.option.collectonly:
            return
        from anymha.parity.reports.collection import write  # noqa: PLC0415

        try:
            for path in self.paths:
                write(self.records, path)
        except OSError as error:
            self.failure = str(error)
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The section: how many agree, and what is wrong with the others."""
        if not self.records and not self.paths:
            return
        write = terminalreporter.write_line
        terminalreporter.section("parity")
        wrong = [record for record in self.records if not record["passed"]]
        count, errors = len(self.records), sum("error" in record for record in wrong)
        more = f", {errors} raised an error" if errors else ""
        agree, differ = count - len(wrong), len(wrong) - errors
        write(f"{count} compared: {agree} agree, {differ} differ{more}")
        for record in wrong:
            write(f"{record['test']}: {record['verdict']}", red=True)
            if record["saved"]:
                write(f"  saved: {record['saved']}")
        for record in self.records:
            if record["untested"]:
                words = "; ".join(record["untested"])
                write(f"{record['test']}: not exercised by its inputs: {words}", yellow=True)
        if self.failure:
            write(f"no report: {self.failure}", red=True)
        elif self.paths:
            write(f"report: {', '.join(map(str, self.paths))}")


def _outside(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from its first frame outside of anymha: what the user's own code did."""
    home = str(Path(__file__).parents[1])
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(home):
        frames = frames.tb_next
    return frames


def _missing(needs: str | Sequence[str] = ()) -> list[str]:
    names = [needs] if isinstance(needs, str) else list(needs)
    return [name for name in names if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a package that is missing, or made to seem so
        return False


def _absolute(config: pytest.Config, path: str) -> Path:
    return config.invocation_params.dir / Path(path).expanduser()


def _writable(option: str, folder: Path) -> None:
    """Make the folder where it is not there; say so where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(
            f"{option}: nothing can be written in {folder} ({error.strerror or error}). "
            "Name another folder."
        ) from error
