"""The self-test's command: it shows that `compare` finds mistakes, and no others."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from anymha.cli.process import run_process
from anymha.cli.progress import progress_bar
from anymha.errors import UsageError
from anymha.framework.registry import Backend, backends, get_backend
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.version import __version__
from tests.selftest.injected_faults import FAULTS
from tests.selftest.injection import (
    DTYPES,
    Alarm,
    FaultResult,
    find_false_alarms,
    inject_all,
    inject_pairs,
)

SCHEMA = "anymha.selftest/1"
NAMED = 0.95
"""The least share of the faults that must be named."""


def selftest(options: argparse.Namespace, console: Console) -> int:
    """Inject every known mistake in every framework, and compare correct layers.

    Exit status: 0 every fault is caught and its stage named, at least 95 % of the faults are named,
    and no correct layer is blamed; 1 not so; 2 the call is wrong.
    """
    began = time.perf_counter()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    chosen = _chosen(options.backends)
    dtypes = _dtypes(options.dtypes)
    if options.honest < 0:
        raise UsageError(f"`--honest` must be 0 or more. Received: {options.honest}.")
    if options.json is not None:
        check_writable(options.json)
    console.print(
        f"anymha {__version__}: {len(FAULTS)} mistakes in {', '.join(b.name for b in chosen)}",
        highlight=False,
    )
    steps = len(FAULTS) * len(chosen) + options.honest * len(dtypes)
    honest = (chosen, range(options.honest), dtypes)
    with progress_bar(steps) as progress:
        singles = list(inject_all(chosen, progress))
        pairs = list(inject_pairs(chosen[:1], progress)) if options.pairs else []
        alarms = [a for several in find_false_alarms(*honest, progress) for a in several]
    console.print(_table(chosen, singles))
    lines, passed = _verdict(chosen, singles, pairs, alarms, (options.honest, dtypes))
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if options.json is not None:
        report = {
            "schema": SCHEMA, "passed": passed, "backends": [b.name for b in chosen],
            "faults": [asdict(one) for one in singles], "pairs": [asdict(one) for one in pairs],
            "honest": options.honest, "dtypes": dtypes,
            "alarms": [asdict(alarm) for alarm in alarms],
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        write_atomically(options.json, json.dumps(report, indent=1) + "\n")
        console.print(f"JSON: {options.json}", markup=False, highlight=False, soft_wrap=True)
    verdict = "SELF-TEST PASSES" if passed else "SELF-TEST FAILS"
    console.print(f"[bold {'green' if passed else 'red'}]{verdict}[/]", highlight=False)
    return 0 if passed else 1


def _chosen(names: str | None) -> list[Backend]:
    if names is None:
        return [backend for backend in backends().values() if backend.installed]
    chosen = [get_backend(name) for name in dict.fromkeys(names.replace(" ", "").split(","))]
    for backend in chosen:
        _ = backend.ops  # says which extra installs it
    return chosen


def _dtypes(names: str | None) -> list[str]:
    if names is None:
        return list(DTYPES)
    chosen = list(dict.fromkeys(names.replace(" ", "").split(",")))
    if unknown := [name for name in chosen if name not in DTYPES]:
        raise UsageError(f"`--dtypes` are of {', '.join(DTYPES)}. Received: {', '.join(unknown)}.")
    return chosen


def _table(chosen: Sequence[Backend], singles: Sequence[FaultResult]) -> Table:
    """A row for each fault, and a column for each framework with the results."""
    table = Table(title="Injected faults: caught, stage right, cause right",
                  title_justify="left", box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("fault")
    table.add_column("shows at")
    for backend in chosen:
        table.add_column(backend.name, justify="center", no_wrap=True)
    for fault in FAULTS:
        cells = []
        for backend in chosen:
            own = [f for f in singles if f.faults == (fault.wrong,) and f.backend == backend.name]
            cells.append("  ".join("".join(_sign(v) for v in _three(f)) for f in own))
        table.add_row(fault.wrong, fault.stage, *cells)
    table.caption = "Each twice: the port reports its stages, or its output and scores alone."
    return table


def _three(result: FaultResult) -> tuple[bool, bool, bool]:
    return result.caught, result.stage, result.cause


def _sign(right: bool) -> str:
    return "[green]\u2713[/]" if right else "[bold red]\u2717[/]"


def _verdict(
    chosen: Sequence[Backend],
    singles: Sequence[FaultResult],
    pairs: Sequence[FaultResult],
    alarms: Sequence[Alarm],
    correct: tuple[int, Sequence[str]],
) -> tuple[list[str], bool]:
    """The results in words, and whether they suffice."""
    total = len(singles)
    caught, stages, causes = (sum(three) for three in zip(*map(_three, singles), strict=True))
    lines = [f"{caught} of {total} caught, the first stage right in {stages}, the cause in "
             f"{causes}."]  # fmt: skip
    passed = caught == stages == total and causes >= NAMED * total
    if pairs:
        both = sum(one.both for one in pairs)
        named = sum(one.caught and one.cause for one in pairs)
        lines.append(f"Two together: {named} of {len(pairs)} with the first named, {both} with "
                     "both.")  # fmt: skip
        passed = passed and named == len(pairs)
    count, dtypes = correct
    if count:
        ways = max(len(chosen) * (len(chosen) - 1), 1)
        lines.append(f"Correct layers: {len(alarms)} false alarms in {count} configurations, "
                     f"{', '.join(dtypes)}, {ways} pairs of frameworks.")  # fmt: skip
        passed = passed and not alarms
    for one in singles:
        if not all(_three(one)):
            lines.append(f"  {one.faults[0]} in {one.backend}: {one.verdict}")
    lines += [f"  {alarm.dtype}, {' and '.join(alarm.pair)}, configuration {alarm.number}:\n"
              f"{alarm.text}" for alarm in alarms[:3]]  # fmt: skip
    return lines, passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the self-test, and give the exit status."""
    return run_process(lambda: selftest(_parser().parse_args(arguments), Console()))


def _parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m tests.selftest", description=selftest.__doc__)
    command.add_argument("--backends", metavar="A,B", help="default: all that are installed")
    command.add_argument(
        "--honest",
        type=int,
        default=10,
        metavar="N",
        help="random configurations of correct layers; default: 10",
    )
    command.add_argument(
        "--dtypes",
        metavar="A,B",
        help="of these configurations; default: " + ", ".join(DTYPES),
    )
    command.add_argument("--pairs", action="store_true", help="two mistakes together, too")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every result")
    return command
