"""The report in a terminal: progress while it runs, one table, one verdict line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from anymha.parity.judge import Cell, Row
from anymha.parity.matrix import Progress as Told
from anymha.parity.matrix import Report


@contextmanager
def progress_bar(console: Console, steps: int) -> Iterator[Told]:
    """A bar over that many steps; gives what tells it of each."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        started = False

        def told(case: str, backend: str) -> None:
            nonlocal started
            bar.update(task, description=f"{case} · {backend}", advance=int(started))
            started = True

        yield told


def print_report(console: Console, report: Report) -> None:
    """The tables, what is wrong, what is missing, and the verdict."""
    console.print(_table("Parity of the layer", report.rows, report.backends))
    if report.real:
        console.print(_table("Real weights on real text", report.real, report.backends))
    console.print(
        "Numbers: the greatest error of outputs, scores and gradients against the float64 oracle "
        "(and recorded results), in units of the dtype's rounding; † without gradients.\n"
        "Bits: how many elements differ in any bit between backends; tied: exactly half way, to "
        "float64's precision, between two numbers of the dtype.",
        style="dim",
    )
    for row in (*report.rows, *report.real):
        for name, cell in row.cells.items():
            for fault in cell.faults:
                console.print(f"[red]✗[/] {row.name} · {name}: {fault}", highlight=False)
        for fault in row.faults:
            console.print(f"[red]✗[/] {row.name}: {fault}", highlight=False)
    for name in report.missing:
        console.print(
            f"{name} is not installed: pip install 'anymha\\[{name}]' adds it.", highlight=False
        )
    style = "bold green" if report.passed else "bold red"
    console.print(report.verdict, style=style, highlight=False, soft_wrap=True)


def _table(title: str, rows: Sequence[Row], backends: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("case")
    table.add_column("dtype", style="dim")
    for name in backends:
        table.add_column(name, justify="right")
    table.add_column("may", justify="right", style="dim")
    table.add_column("bits", justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.name,
            row.dtype,
            *(_cell(row.cells[name]) for name in backends),
            f"{row.budget:.2f}",
            _bits(row),
            "[green]✓[/]" if row.passed else "[bold red]✗[/]",
        )
    return table


def _cell(cell: Cell) -> str:
    text = f"{cell.units:.2f}" + ("" if cell.gradients else "†")
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
