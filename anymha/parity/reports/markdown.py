"""A report as Markdown, for the summary of a CI job."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from anymha.interchange.files.atomic_write import write_atomically
from anymha.parity.reports import document as doc

SIGNS = {"agrees": "✅", "differs": "❌", "error": "❌", "not run": "⚪", "first": "➡️", "": ""}


def to_markdown(document: doc.Document) -> str:
    """The document; comparisons that agree are folded."""
    several = any(isinstance(block, doc.Fold) for block in document.blocks)
    line = document.verdict if several else document.title
    lines = [f"### {SIGNS[document.state]} {_plain(line)}", ""]
    lines += [] if several else [f"**{_plain(document.verdict)}**", ""]
    lines += _blocks((*document.blocks, *document.findings))
    values = {**document.environment.versions, **document.environment.flags}
    if values:
        words = ", ".join(f"{name} {value}" for name, value in values.items())
        lines.append(f"<sub>{_plain(words)}</sub>")
    return "\n".join(lines).rstrip("\n") + "\n"


def write_markdown(path: Path, text: str) -> None:
    """Write a report; append it where the file is the summary of a step of GitHub's CI.

    Raises:
        FileError: it cannot be written.
    """
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and os.path.realpath(summary) == os.path.realpath(path) and path.is_file():
        before = path.read_text(encoding="utf-8")
        text = before + "\n" * (bool(before) + (not before.endswith("\n"))) + text
    write_atomically(path, text)


def _blocks(blocks: Sequence[doc.Block]) -> Iterator[str]:
    """The lines of blocks; items of a list stand together."""
    items = False
    for block in blocks:
        if doc.MARKDOWN not in block.forms:
            continue
        lines = list(_block(block))
        starts_item = bool(lines) and lines[0].startswith("- ")
        if items and not starts_item:
            yield ""
        yield from lines
        items = starts_item
    if items:
        yield ""


def _block(block: doc.Block) -> Iterator[str]:
    match block:
        case doc.Text(words, label, style):
            text = _plain(f"{label}: {words}" if label else words)
            yield from (f"**{text}**", "") if style == "strong" else (f"- {text}",)
        case doc.Cause(words, stage, fix):
            at = f", at `{stage}`" if stage else ""
            yield f"- **{_plain(words)}**{at}. {_plain(fix)}"
        case doc.Table():
            yield from _table(block)
        case doc.Faults(places):
            for case, backend, faults in places:
                place = f"{case} on {backend}" if backend else case
                yield f"- {_plain(place)}: {_plain('; '.join(faults))}"
        case doc.Facts(values):
            yield from (f"- {_plain(name)}: {_plain(value)}" for name, value in values.items())
        case doc.Code(text, lead):
            yield from (*((lead, "") if lead else ()), "````text", text, "````", "")
        case doc.Fold():
            yield from _fold(block)


def _fold(fold: doc.Fold) -> Iterator[str]:
    title = f"{SIGNS[fold.state]} {fold.title}"
    if fold.state == "agrees" or fold.folded:
        summary = escape(f"{title}: {fold.summary}")  # no Markdown in there
        yield from ("<details>", f"<summary>{summary}</summary>", "")
        yield from _blocks(fold.blocks)
        yield from ("</details>", "")
    else:
        yield from (f"#### {_plain(title)}", "", f"**{_plain(fold.summary)}**", "")
        yield from _blocks(fold.blocks)


def _table(table: doc.Table) -> Iterator[str]:
    shown = [doc.MARKDOWN in column.forms for column in table.columns]
    columns = [column for column, yes in zip(table.columns, shown, strict=True) if yes]
    if table.title:
        yield from (f"**{_plain(table.title)}**", "")
    yield _row(_plain(column.name) for column in columns)
    yield "|" + "|".join("--:" if column.number else "---" for column in columns) + "|"
    for row in table.rows:
        if doc.MARKDOWN in row.forms:
            cells = [cell for cell, yes in zip(row.cells, shown, strict=True) if yes]
            yield _row(_cell(*pair) for pair in zip(columns, cells, strict=True))
    yield ""


def _row(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _cell(column: doc.Column, cell: doc.Cell | str) -> str:
    if isinstance(cell, doc.Cell):
        right = column.number and cell.state == "agrees"  # a number alone says so
        words, sign = cell.words, "" if right else SIGNS[cell.state]
    else:
        words, sign = cell, ""
    if column.code and words:
        quote = "``" if "`" in words else "`"
        text = f"{quote}{' '.join(words.split())}{quote}".replace("|", r"\|")
    else:
        text = _plain(words)
    return " ".join(part for part in (sign, text) if part)


def _plain(text: str) -> str:
    """Text in one line, escaped for Markdown and HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))  # what is code stays code
    code = [part.replace("|", r"\|") for part in parts[1::2]]
    words = [re.sub(r"([\\*_\[\]|`])", r"\\\1", escape(part, quote=False)) for part in parts[::2]]
    return "".join(a + b for a, b in zip(words, [*code, ""], strict=True))
