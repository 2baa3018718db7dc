"""Comparisons in a terminal: verdict first, then the stages, the cause, the cure."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anymha.parity.reports.outcome import Outcome, pairs, passed, stage_words, verdict
from anymha.parity.reports.result import Found, short, shown_stages, state_of

STYLES = {"agrees": "green", "differs": "bold red", "error": "bold red", "not run": "dim"}
ROWS = {"first": "bold red", "own": "red", "carried": "yellow", "untold": "dim", "good": ""}
NARROW = 100
"""Columns of a terminal below which the two numbers at the worst place are left out."""


def print_comparison(console: Console, comparison: Found) -> None:
    """One comparison.

    Args:
        console: Where.
        comparison: What was found.
    """
    _verdict(console, comparison.verdict, comparison.passed)
    print_details(console, comparison)
    print_environment(console, comparison)


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Several: the verdict, who agrees with whom on what, and the details of what does not."""
    if len(outcomes) == 1 and outcomes[0].found is not None:
        print_comparison(console, outcomes[0].found)
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
        console.print(line + escape(one.told), highlight=False, soft_wrap=True)
        if one.found is not None:
            print_details(console, one.found, brief=True)
    found = next((one.found for one in outcomes if one.found is not None), None)
    if found is not None:
        print_environment(console, found)


def print_details(console: Console, found: Found, brief: bool = False) -> None:
    """The stages, why they differ and what to do, what is not tested, and notes.

    Args:
        console: Where.
        found: What was found.
        brief: Whether stages that agree are only counted.
    """
    console.print(_stages(console, found, brief))
    right = sum(state_of(found, stage.name) == "good" for stage in found.stages)
    if brief and right:
        console.print(f"   {right} other quantities agree", style="dim")
    diagnosis = found.diagnosis
    if diagnosis is not None:
        for cause in diagnosis.causes:
            _line(console, f"[bold]Cause:[/] {escape(str(cause))}")
            _line(console, f"[bold]Cure:[/]  {escape(cause.cure)}")
        if not diagnosis.causes:
            _line(console, f"[bold]Cause:[/] {escape(str(diagnosis))}")
        elif not diagnosis.explained:
            _line(console, "Something else differs beside: mend this first, and compare again.")
        if diagnosis.alternatives:
            told = "; ".join(diagnosis.alternatives)
            _line(console, f"With these inputs it could as well be: {escape(told)}.")
    if found.advice:
        _line(console, f"[bold]{escape(found.advice)}[/]")
    for words in found.untested:
        _line(console, f"[yellow]Not tested by these inputs:[/] {escape(words)}")
    for note in found.notes:
        _line(console, f"[dim]Note: {escape(note)}[/]")


def print_environment(console: Console, found: Found) -> None:
    """Versions and switches."""
    told = {**found.environment.versions, **found.environment.flags}
    line = ", ".join(f"{name} {value}" for name, value in told.items())
    console.print(line, style="dim", markup=False, highlight=False)


def _stages(console: Console, found: Found, brief: bool) -> Table:
    wide = console.width >= NARROW
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    for name in ("error", "own error", "may", *(("reference", "candidate") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for name, stage in shown_stages(found):
        first = name == found.first_divergence
        if (stage is None and not first) or (brief and state_of(found, name) == "good"):
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
        words = stage_words(found, name) + (", not told" if stage is None else "")
        cells.append(escape("; ".join([*([words] if words else []), *faults])))
        table.add_row(*cells, style=ROWS[state_of(found, name)])
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
