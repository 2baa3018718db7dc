"""A report in a terminal. Needs the extra "cli"."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from anymha.errors import UsageError
from anymha.parity.reports import document as doc

try:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table as RichTable
except ImportError as error:
    raise UsageError(
        "This command prints tables with rich, which is not installed. "
        "Install it with: pip install 'anymha[cli]'."
    ) from error

STYLES = {"agrees": "green", "differs": "bold red", "error": "bold red", "not run": "yellow"}
ROWS = {"first": "bold red", "own": "red", "carried": "yellow", "unreported": "dim"}
TEXTS = {"quiet": "dim", "strong": "bold", "warning": "yellow"}
SIGNS = {"agrees": "✓", "differs": "✗", "error": "✗", "not run": "-", "first": "→"}
ASCII_SIGNS = {"agrees": "ok", "differs": "FAIL", "error": "FAIL", "not run": "-", "first": "->"}

WRAPPED = 16
"""Columns that a terminal must leave for cells that may take several lines."""
SHOWN_FAULTS = 2
"""How many faults of a place are printed."""
SHOWN_PLACES = 40
"""How many places with faults are printed."""


class Terminal(Console):
    """A console that leaves a closed pipe to the command; rich itself ends with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise the error that is being handled again."""
        raise


def print_document(console: Console, document: doc.Document) -> None:
    """Print all of a document but its verdict."""
    _print_blocks(console, (*document.blocks, *document.findings))
    # What agrees is one line; what is to know about it stands here, once.
    agree = [fold for fold in document.blocks
             if isinstance(fold, doc.Fold) and fold.state == "agrees"]  # fmt: skip
    notes = [block for fold in agree for block in fold.blocks
             if isinstance(block, doc.Text) and block.label]  # fmt: skip
    _print_blocks(console, list(dict.fromkeys(notes)))


def print_verdict(console: Console, document: doc.Document) -> None:
    """Print the verdict."""
    style = "bold green" if document.passed else "bold red"
    console.print(document.verdict, style=style, markup=False, highlight=False, soft_wrap=True)


def print_environment(console: Console, document: doc.Document) -> None:
    """Print versions and switches."""
    values = {**document.environment.versions, **document.environment.flags}
    line = ", ".join(f"{name} {value}" for name, value in values.items())
    console.print(line, style="dim", markup=False, highlight=False)


def _print_blocks(console: Console, blocks: Sequence[doc.Block]) -> None:
    shown = [block for block in blocks if doc.TERMINAL in block.forms]
    tables = [block for block in shown if isinstance(block, doc.Table)]
    drop = _drop(console, tables)
    for block in shown:
        match block:
            case doc.Table():
                console.print()
                console.print(_table(console, block, drop))
            case doc.Text(words, label, style):
                if style == "quiet" and not label:  # a legend, in the terminal's own lines
                    console.print(words, style="dim", markup=False, highlight=False)
                    continue
                style = TEXTS.get(style, "")
                text = f"{label}: {words}" if label else words
                console.print(escape(text), style=style, highlight=False, soft_wrap=True)
            case doc.Cause(words, _, fix):
                _line(console, f"[bold]Cause:[/] {escape(words)}")
                if fix:
                    _line(console, f"[bold]Fix:[/]   {escape(fix)}")
            case doc.Faults(places):
                _faults(console, places)
            case doc.Fold(title, state, summary) if state != "agrees":
                console.print()
                sign = f"[{STYLES[state]}]{_sign(console, state)}[/]"
                _line(console, f"{sign} [bold]{escape(title)}[/]: {escape(summary)}")
                _print_blocks(console, block.blocks)


def _faults(console: Console, places: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    for case, backend, faults in places[:SHOWN_PLACES]:
        place = f"{case}, {backend}" if backend else case
        shown = "; ".join(
            textwrap.shorten(one, 300, placeholder=" ...") for one in faults[:SHOWN_FAULTS]
        )
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        sign = f"[bold red]{_sign(console, 'differs')}[/]"
        _line(console, f"{sign} {escape(f'{place}: {shown}{more}')}")
    if len(places) > SHOWN_PLACES:
        left = len(places) - SHOWN_PLACES
        console.print(f"and {left} more; `--json` writes all", style="dim")


def _drop(console: Console, tables: Sequence[doc.Table]) -> int:
    """How many kinds of columns must go, so that every table fits and no name is cut."""
    most = max((column.dropped for table in tables for column in table.columns), default=0)
    unbounded = console.options.update(width=10_000)
    for drop in range(most):
        widths = []
        for table in tables:
            wraps = any(column.wraps for column in table.columns)
            made = _table(console, table, drop, measured=True)
            widths.append(Measurement.get(console, unbounded, made).maximum + WRAPPED * wraps)
        if max(widths) <= console.width:
            return drop
    return most


def _table(console: Console, table: doc.Table, drop: int, measured: bool = False) -> RichTable:
    kept = [
        (i, column)
        for i, column in enumerate(table.columns)
        if doc.TERMINAL in column.forms
        and not 0 < column.dropped <= drop
        and not (measured and column.wraps)
    ]
    made = RichTable(title=escape(table.title) or None, title_justify="left", title_style="bold",
                     header_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
                     padding=(0, 1, 0, 0))  # fmt: skip
    for _, column in kept:
        justify: Any = "right" if column.number else "left"
        made.add_column(escape(column.name), justify=justify, no_wrap=not column.wraps,
                        style="dim" if column.quiet else "")  # fmt: skip
    for row in table.rows:
        if doc.TERMINAL in row.forms:
            cells = [_cell(console, column, row.cells[i]) for i, column in kept]
            made.add_row(*cells, style=ROWS.get(row.state, ""))
    return made


def _cell(console: Console, column: doc.Column, cell: doc.Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    # The words of a number's state are its sign.
    sign = "" if column.number or not cell.state else _sign(console, cell.state)
    text = escape(" ".join(part for part in (sign, cell.words) if part))
    style = "bold" if cell.strong else STYLES.get(cell.state, "")
    plain = not style or not text or (column.number and cell.state == "agrees" and not cell.strong)
    return text if plain else f"[{style}]{text}[/]"


def _sign(console: Console, state: str) -> str:
    """A sign, in words where the terminal has no such signs."""
    return (ASCII_SIGNS if console.options.ascii_only else SIGNS)[state]


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
