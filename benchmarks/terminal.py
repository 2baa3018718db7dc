"""The report in a terminal: what is compared, tables with ratios, goals, what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anymha.cli.progress import bar
from benchmarks.goals import Verdict, judge
from benchmarks.results import CaseResult, Report, Timing, ratio

RIGHT = "right"


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[str, str], None]]:
    """A bar over that many cases, on a terminal; gives what tells it of each step."""
    # Drawing takes time from what is measured: seldom, then.
    with bar(console, refreshes=1) as update:
        seen: dict[tuple[str, str], None] = {}

        def told(framework: str, step: str) -> None:
            seen.setdefault((framework, step.partition(":")[0]))
            update(len(seen) - 1, steps, f"{framework}: {step}")

        yield told


def print_report(console: Console, report: Report, *, whole: bool) -> None:
    """The tables, what they mean, and what is wrong.

    Args:
        console: Where.
        report: What was measured.
        whole: Whether every layer is shown, beside the summary.
    """
    frameworks = list(dict.fromkeys(one.framework for one in report.cases))
    for framework in frameworks:
        found = [one for one in report.cases if one.framework == framework]
        if whole:
            console.print()
            console.print(_layers(console, framework, found))
        verdicts = [verdict for one in found for verdict in judge(one)]
        if whole and verdicts:
            console.print()
            console.print(_goals(console, framework, verdicts))
    console.print()
    console.print(_summary(report.cases))
    console.print()
    for line in _legend(report):
        console.print(line, style="dim", highlight=False)
    for line in _faults(console, report):
        console.print(line, highlight=False, soft_wrap=True)


def print_verdict(console: Console, report: Report) -> None:
    """One line: how many goals are met, or what is wrong."""
    verdicts = [verdict for one in report.cases for verdict in judge(one)]
    met = sum(verdict.met for verdict in verdicts)
    goals = f"{met} of {len(verdicts)} goals met" if verdicts else "no goals in these cases"
    if report.sound:
        text, style = f"BENCHMARK DONE in {report.seconds:.0f} s: {goals}", "bold green"
    else:
        text, style = f"BENCHMARK NOT SOUND: see above; {goals}", "bold red"
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _summary(results: Sequence[CaseResult]) -> Table:
    """Our best form beside the best peer, a line for each case."""
    table = new_table("This layer beside the best peer")
    table.add_column("case", no_wrap=True)
    for title in ("anymha", "peer", "ratio", "goals", "MB", "peer's"):
        table.add_column(title, justify=RIGHT, no_wrap=True)
    table.add_column("best peer")
    before = ""
    for one in results:
        if one.framework != before:
            table.add_section()
            table.add_row(f"[bold]{escape(one.framework)}[/]")
            before = one.framework
        mine, peer, verdicts = one.best_own, one.best_peer, judge(one)
        met = sum(verdict.met for verdict in verdicts)
        color = "green" if met == len(verdicts) else "bold red"
        table.add_row(
            escape(one.case.name), _time(mine), _time(peer), _share(ratio(mine, peer)),
            f"[{color}]{met}/{len(verdicts)}[/]" if verdicts else "",
            _memory(mine), _memory(peer), escape(peer.name if peer else one.note),
        )  # fmt: skip
    return table


def _layers(console: Console, framework: str, results: Sequence[CaseResult]) -> Table:
    """Every layer of every case."""
    table = new_table(framework)
    table.add_column("case", no_wrap=True)
    table.add_column("layer")
    for title in ("time", "ratio", "MB", "error"):
        table.add_column(title, justify=RIGHT, no_wrap=True)
    for one in results:
        peer = one.best_peer
        ordered = sorted(one.timings, key=lambda t: (not t.ours, t.median))
        for i, timing in enumerate(ordered):
            style = "bold" if timing.ours else ""
            table.add_row(
                escape(one.case.name) if i == 0 else "", f"[{style}]{escape(timing.name)}[/]"
                if style else escape(timing.name),
                _time(timing) if not timing.fault else _sign(console, False),
                _share(ratio(timing, peer)), _memory(timing),
                "-" if timing.error is None else f"{timing.error:.2f}",
            )  # fmt: skip
        if not ordered:
            table.add_row(escape(one.case.name), f"[dim]{escape(one.note)}[/]", "", "", "", "")
        table.add_section()
    return table


def _goals(console: Console, framework: str, verdicts: Sequence[Verdict]) -> Table:
    """Every goal, and how it stands."""
    table = new_table(f"{framework}: goals")
    for title in ("", "case", "compared"):
        table.add_column(title, no_wrap=True)
    for title in ("here", "goal"):
        table.add_column(title, justify=RIGHT, no_wrap=True)
    for verdict in verdicts:
        goal = verdict.goal
        digits = 2 if goal.against else 0
        mark = "~" if verdict.close else ""
        table.add_row(
            _sign(console, verdict.met), escape(goal.case), escape(goal.told),
            f"{mark}{verdict.value:.{digits}f}", f"{goal.limit:.{digits}f}",
        )  # fmt: skip
    return table


def _legend(report: Report) -> list[str]:
    lines = [
        "Medians of interleaved calls. ratio: our time over the best peer's; MB: memory that a "
        "call needs at its peak, results included; error: as a share of what rounding allows; "
        "goals: how many are met."
    ]
    if report.disturbed or any(verdict.close for one in report.cases for verdict in judge(one)):
        lines.append(
            "~: other processes took the processor in all but two or fewer of the samples, or a "
            "goal lies within the middle half of what the rounds gave."
        )
    return lines


def _faults(console: Console, report: Report) -> Iterator[str]:
    for framework, reason in report.failures.items():
        yield f"{_sign(console, False)} {escape(f'{framework}: {reason}')}"
    for one in report.cases:
        for timing in one.timings:
            if timing.fault:
                place = f"{one.framework}, {one.case.name}, {timing.name}"
                yield f"{_sign(console, False)} {escape(f'{place}: not timed: {timing.fault}')}"
        if one.note and one.timings:
            yield escape(f"{one.framework}, {one.case.name}: {one.note}")
    for name in report.missing:
        yield f"{escape(name)} is not installed: pip install 'anymha\\[{name}]' adds it."
    absent = dict.fromkeys(n for facts in report.machines.values() for n in facts.get("absent", ()))
    if absent:
        yield f"Peers that are not installed: {escape(', '.join(absent))}."


def new_table(title: str) -> Table:
    """A table as all reports have it."""
    return Table(
        title=title, title_justify="left", title_style="bold", header_style="bold",
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip


def _sign(console: Console, good: bool) -> str:
    """A tick or a cross, in words where the terminal has no such signs."""
    yes, no = ("ok", "FAIL") if console.options.ascii_only else ("\u2713", "\u2717")
    return f"[green]{yes}[/]" if good else f"[bold red]{no}[/]"


def _time(timing: Timing | None) -> str:
    if timing is None or not math.isfinite(timing.median):
        return "-"
    return ("~" if timing.disturbed else "") + duration(timing.median)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits, with three digits."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    places = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{places}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _memory(timing: Timing | None) -> str:
    if timing is None or timing.memory is None:
        return "-"
    megabytes = timing.memory / 1e6
    return f"{megabytes:.0f}" if megabytes >= 9.5 else f"{megabytes:.1f}"
