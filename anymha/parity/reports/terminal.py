"""Comparisons in a terminal: verdict first, then the stages, the cause, the fix."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anymha.parity.reports.outcome import Outcome, pairs, passed, stage_words, verdict
from anymha.parity.reports.result import ComparisonResult, short, shown_stages, state_of

STYLES = {"agrees": "green", "differs": "bold red", "error": "bold red", "not run": "dim"}
ROWS = {"first": "bold red", "own": "red", "carried": "yellow", "unreported": "dim", "good": ""}
NARROW = 100
"""Columns of a terminal below which the two numbers at the worst place are left out."""


def print_comparison(console: Console, comparison: ComparisonResult) -> None:
    """One comparison.

    Args:
        console: Where.
        comparison: The result.
    """
    _verdict(console, comparison.verdict, comparison.passed)
    print_details(console, comparison)
    print_environment(console, comparison)


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Several: the verdict, who agrees with whom on what, and the details of what does not."""
    if len(outcomes) == 1 and outcomes[0].result is not None:
        print_comparison(console, outcomes[0].result)
        return
    _verdict(console, verdict(outcomes), passed(outcomes))
    console.print()
    console.print(_matrix(console, outcomes))
    for one in outcomes:
        if one.state == "agrees":
            continue
        console.print()
        style = STYLES[one.state]
        line = f"[{style}]{_sign(console, one.state)}[/] [bold]{escape(one.title)}[/]: "
        console.print(line + escape(one.summary), highlight=False, soft_wrap=True)
        if one.result is not None:
            print_details(console, one.result, brief=True)
    result = next((one.result for one in outcomes if one.result is not None), None)
    if result is not None:
        print_environment(console, result)


def print_details(console: Console, result: ComparisonResult, brief: bool = False) -> None:
    """The stages, why they differ and what to do, what the inputs do not exercise, and notes.

    Args:
        console: Where.
        result: The result.
        brief: Whether stages that agree are only counted.
    """
    console.print(_stages(console, result, brief))
    right = sum(state_of(result, stage.name) == "good" for stage in result.stages)
    if brief and right:
        console.print(f"   {right} other quantities agree", style="dim")
    diagnosis = result.diagnosis
    if diagnosis is not None:
        for cause in diagnosis.causes:
            _line(console, f"[bold]Cause:[/] {escape(str(cause))}")
            _line(console, f"[bold]Fix:[/]   {escape(cause.fix)}")
        if not diagnosis.causes:
            _line(console, f"[bold]Cause:[/] {escape(str(diagnosis))}")
        elif not diagnosis.explained:
            _line(console, "Something else differs too: fix this first, and compare again.")
        if diagnosis.alternatives:
            others = "; ".join(diagnosis.alternatives)
            _line(console, f"With these inputs it could also be: {escape(others)}.")
    if result.advice:
        _line(console, f"[bold]{escape(result.advice)}[/]")
    for words in result.not_exercised:
        _line(console, f"[yellow]Not exercised by these inputs:[/] {escape(words)}")
    for note in result.notes:
        _line(console, f"[dim]Note: {escape(note)}[/]")


def print_environment(console: Console, result: ComparisonResult) -> None:
    """Versions and switches."""
    shown = {**result.environment.versions, **result.environment.flags}
    line = ", ".join(f"{name} {value}" for name, value in shown.items())
    console.print(line, style="dim", markup=False, highlight=False)


def _stages(console: Console, result: ComparisonResult, brief: bool) -> Table:
    wide = console.width >= NARROW
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    for name in ("error", "own error", "may", *(("reference", "candidate") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for name, stage in shown_stages(result):
        first = name == result.first_divergence
        if (stage is None and not first) or (brief and state_of(result, name) == "good"):
            continue
        arrow = "->" if console.options.ascii_only else "→"
        cells = [arrow if first else "", escape(name)]
        cells += ["", "", ""] if stage is None else [
            short(stage.units), short(stage.own_units), short(stage.budget)
        ]  # fmt: skip
        if wide:
            values = None if stage is None else stage.values
            cells += ["", ""] if values is None else [f"{v:.6g}" for v in values]
        faults = () if stage is None else stage.faults
        words = stage_words(result, name) + (", not reported" if stage is None else "")
        cells.append(escape("; ".join([*([words] if words else []), *faults])))
        table.add_row(*cells, style=ROWS[state_of(result, name)])
    return table


def _matrix(console: Console, outcomes: Sequence[Outcome]) -> Table:
    cases = list(dict.fromkeys(one.case for one in outcomes))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("candidate against reference")
    for case in cases:
        table.add_column(escape(case), no_wrap=True)
    for (reference, candidate), group in pairs(outcomes).items():
        by_case = {one.case: one for one in group}
        cells = [_state(console, by_case[case]) if case in by_case else "" for case in cases]
        table.add_row(escape(f"{candidate} against {reference}"), *cells)
    return table


def _state(console: Console, outcome: Outcome) -> str:
    return f"[{STYLES[outcome.state]}]{_sign(console, outcome.state)} {outcome.state}[/]"


def _sign(console: Console, state: str) -> str:
    plain = {"agrees": "ok", "differs": "X", "error": "X", "not run": "-"}
    pretty = {"agrees": "✓", "differs": "✗", "error": "✗", "not run": "-"}
    return (plain if console.options.ascii_only else pretty)[state]


def _verdict(console: Console, text: str, good: bool) -> None:
    style = "bold green" if good else "bold red"
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
