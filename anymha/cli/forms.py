"""The options of a command that write its report into files, one for each form."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from anymha.errors import UsageError
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.interchange.files.formats import files_of
from anymha.interchange.files.paths import check_not_source
from anymha.parity.reports.document import Document, to_json
from anymha.parity.reports.junit import to_junit
from anymha.parity.reports.markdown import to_markdown, write_markdown
from anymha.parity.reports.page import to_page
from anymha.text import shown

FORMS: dict[str, tuple[Callable[[Document], str], str]] = {
    "html": (to_page, "write a page with pictures"),
    "json": (to_json, "write every number"),
    "junit": (to_junit, "write JUnit's XML, a test case for each stage or backend"),
    "markdown": (to_markdown, "write a summary for a CI job; $GITHUB_STEP_SUMMARY is appended to"),
}


def add_forms(command: argparse.ArgumentParser) -> None:
    """Add the options to a command's parser."""
    for name, (_, words) in FORMS.items():
        command.add_argument(f"--{name}", type=Path, metavar="FILE", help=words)


def check_files(paths: dict[str, Path | None], sources: Iterable[Path | None] = ()) -> None:
    """See that files can be written later.

    Args:
        paths: By the names of the options.
        sources: Files that are read, which must stay.

    Raises:
        UsageError: two options name one file, or one names a source.
        FileError: one cannot be written.
    """
    known = {name: path for name, path in paths.items() if path is not None}
    for name, path in known.items():
        check_writable(path)
        for source in filter(None, sources):
            check_not_source(path, source, files_of(source))
        real = os.path.realpath(path)
        twice = [n for n, other in known.items() if n != name and os.path.realpath(other) == real]
        if twice:
            first, second = sorted((name, twice[0]), reverse=True)
            raise UsageError(
                f"`--{first}` and `--{second}` must be two files. Received: {shown(path)}."
            )


def write_forms(document: Document, options: argparse.Namespace) -> None:
    """Write the forms that are asked for, and say where."""
    for name, (write, _) in FORMS.items():
        path = getattr(options, name)
        if path is not None:
            put = write_markdown if name == "markdown" else write_atomically
            put(path, write(document))
            print(f"{name}: {shown(path)}")
