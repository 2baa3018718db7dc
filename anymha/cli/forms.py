"""The options of a command that write its report into files, one for each form."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from anymha.errors import UsageError
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.parity.reports.document import Document, to_json
from anymha.parity.reports.junit import to_junit
from anymha.parity.reports.markdown import to_markdown
from anymha.parity.reports.page import to_page

FORMS: dict[str, tuple[Callable[[Document], str], str]] = {
    "html": (to_page, "write a page with pictures"),
    "json": (to_json, "write every number"),
    "junit": (to_junit, "write JUnit's XML, a test case for each stage or backend"),
    "markdown": (to_markdown, "write a summary for a CI job"),
}


def add_forms(command: argparse.ArgumentParser) -> None:
    """Add the options to a command's parser."""
    for name, (_, words) in FORMS.items():
        command.add_argument(f"--{name}", type=Path, metavar="FILE", help=words)


def check_files(paths: dict[str, Path | None]) -> None:
    """See that files, by the names of their options, can be written later, each its own."""
    known = {name: path for name, path in paths.items() if path is not None}
    for name, path in known.items():
        check_writable(path)
        twice = [other for other, where in known.items() if other != name and where == path]
        if twice:
            first, second = sorted((name, twice[0]), reverse=True)
            raise UsageError(f"`--{first}` and `--{second}` must be two files. Received: {path}.")


def write_forms(document: Document, options: argparse.Namespace) -> None:
    """Write the forms that are asked for, and say where."""
    for name, (write, _) in FORMS.items():
        path = getattr(options, name)
        if path is not None:
            write_atomically(path, write(document))
            print(f"{name}: {path}")
