"""The report in a terminal: tables, faults, and the verdict in one line."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from anymha.parity.matrix.judge import Cell, Row
from anymha.parity.matrix.matrix import MatrixReport, counted_cases

DROPPED = ("", "dtype", "may", "bits")
"""The columns that are dropped, in this order, where the terminal is too narrow for all."""

SHOWN_FAULTS = 2
"""How many faults of a case on a backend are printed."""

SHOWN_CELLS = 40
"""How many cases and backends with faults are printed."""


def print_report(console: Console, report: MatrixReport) -> None:
    """Print the tables, their legend, faults, and skipped and missing backends."""
    every = [*report.rows, *report.real]
    for table in _tables(console, report):
        console.print()
        console.print(table)
    console.print()
    parts = [
        "A number: the greatest error of outputs, scores and gradients against the float64 oracle "
        '(and recorded results), in units of the dtype\'s rounding; "may": the greatest allowed.'
    ]
    if not all(cell.gradients for row in every for cell in row.cells.values() if cell.errors):
        parts.append("*: without gradients.")
    if len(report.backends) > 1:
        parts.append("Bits: elements that differ in any bit between two backends.")
    if any(row.ties for row in every):
        parts.append(
            "Tied: elements whose exact value lies half way between two numbers of the dtype, as "
            "closely as float64 resolves."
        )
    console.print("\n".join(parts), style="dim", highlight=False)
    _print_faults(console, every)
    for (backend, reason), names in report.skipped.items():
        console.print(f"{backend} skips {counted_cases(len(names))}, as {reason}: "
                      f"{'; '.join(names)}", style="yellow", markup=False, highlight=False,
                      soft_wrap=True)  # fmt: skip
    for name in report.missing:
        console.print(f"{name} is not installed: pip install 'anymha\\[{name}]' adds it.",
                      highlight=False, soft_wrap=True)  # fmt: skip


def print_verdict(console: Console, report: MatrixReport) -> None:
    """Print the verdict."""
    style = "bold green" if report.passed else "bold red"
    console.print(report.verdict, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_faults(console: Console, rows: Sequence[Row]) -> None:
    faulty = [(row.name, row.faults) for row in rows if row.faults]
    faulty += [
        (f"{row.name}, {name}", cell.faults)
        for row in rows
        for name, cell in row.cells.items()
        if cell.faults
    ]
    for place, faults in faulty[:SHOWN_CELLS]:
        shown = "; ".join(
            textwrap.shorten(one, 300, placeholder=" ...") for one in faults[:SHOWN_FAULTS]
        )
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        line = f"{_sign(console, False)} {escape(f'{place}: {shown}{more}')}"
        console.print(line, highlight=False, soft_wrap=True)
    if len(faulty) > SHOWN_CELLS:
        console.print(f"and {len(faulty) - SHOWN_CELLS} more; `--json` writes all", style="dim")


def _tables(console: Console, report: MatrixReport) -> list[Table]:
    """The tables with as many columns as fit; the case's name is never cut."""
    named = {"Parity of the layer": report.rows, "Real weights": report.real}
    tables: list[Table] = []
    for count in range(1, len(DROPPED) + 1):
        tables = [
            _table(title, rows, report.backends, DROPPED[:count], console)
            for title, rows in named.items()
            if rows
        ]
        unbounded = console.options.update(width=10_000)
        sizes = [Measurement.get(console, unbounded, table).maximum for table in tables]
        if max(sizes) <= console.width:
            break
    return tables


def _table(
    title: str,
    rows: Sequence[Row],
    backends: Sequence[str],
    dropped: Collection[str],
    console: Console,
) -> Table:
    right = {"justify": "right", "no_wrap": True}
    columns = {
        "case": ({"no_wrap": True}, lambda row: escape(row.name)),
        "dtype": ({"no_wrap": True, "style": "dim"}, lambda row: row.dtype),
        **{name: (right, lambda row, name=name: _cell(row.cells.get(name))) for name in backends},
        "may": ({**right, "style": "dim"}, lambda row: f"{row.budget:.2f}"),
        "bits": (right, _bits),
    }
    if len(backends) < 2:
        del columns["bits"]
    kept = {name: column for name, column in columns.items() if name not in dropped}
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold",
                  box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("", no_wrap=True)
    for name, (style, _) in kept.items():
        table.add_column(escape(name), **style)
    for row in rows:
        cells = [show(row) for _, show in kept.values()]
        sign = _sign(console, row.passed) if row.cells else "[yellow]-[/]"
        table.add_row(sign, *cells)
    return table


def _sign(console: Console, passed: bool) -> str:
    """A tick or a cross, in words where the terminal has no such signs."""
    good, bad = ("ok", "FAIL") if console.options.ascii_only else ("\u2713", "\u2717")
    return f"[green]{good}[/]" if passed else f"[bold red]{bad}[/]"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "[yellow]skip[/]"
    if not cell.errors:
        text = "error"
    elif math.isfinite(cell.units) and cell.units >= 1e4:
        text = f"{cell.units:.0e}"
    else:
        text = f"{cell.units:.2f}" + ("" if cell.gradients else "*")
    return text if cell.passed else f"[bold red]{text}[/]"


def _bits(row: Row) -> str:
    if not row.compared:
        return "-"
    if not row.differing:
        return "[bold]0[/]"
    if row.differing == row.ties:
        return f"{row.ties} tied"
    share = row.differing / row.compared
    return f"{share:.0%}" if share >= 0.01 else str(row.differing)
