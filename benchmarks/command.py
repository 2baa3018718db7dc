"""The benchmarks' command: ``python -m benchmarks``, or `anymha bench` in a checkout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from anymha.cli.process import run_process
from anymha.errors import UsageError
from anymha.framework.registry import BUILT_IN, Backend, get_backend
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.parity.matrix.matrix import counted_cases, versions
from anymha.version import __version__
from benchmarks.cases import MODES, SERIES, Case, choose, series
from benchmarks.goals import judge
from benchmarks.processes import WorkerError, machine, run_framework
from benchmarks.results import CaseResult, Report
from benchmarks.terminal import print_report, print_verdict, progress

SCHEMA = "anymha.bench/1"
DEVICES = ("cpu", "cuda")


def bench(options: argparse.Namespace, console: Console) -> int:
    """Time this layer beside the framework's own, with the same weights and inputs.

    Values are checked before anything is timed. Exit status: 0 done, 1 our layer gave a wrong
    value or a framework's process died, 2 the call is wrong. A missed goal is no error.
    """
    began = time.perf_counter()
    cases = _cases(options)
    found, missing = _backends(options)
    to_svg = _picture(options)
    names = [backend.name for backend in found]
    console.print(
        f"anymha {__version__}: {counted_cases(len(cases))} on "
        f"{', '.join(names)}, {options.repeats} "
        f"{'round' if options.repeats == 1 else 'rounds'}",
        highlight=False,
    )  # fmt: skip
    report = Report(
        [], {name: {} for name in names}, machine() | {"versions": versions(found)},
        {"repeats": options.repeats, "seconds": options.seconds, "device": options.device},
        missing,
    )  # fmt: skip
    with progress(console, len(cases) * len(names)) as told:
        results, failures = _measured(names, cases, options, report, told)
    report = dataclasses.replace(
        report, cases=results, failures=failures, seconds=time.perf_counter() - began
    )
    print_report(console, report, whole=options.all or options.cases is not None)
    if options.json is not None:
        text = json.dumps(to_dict(report), indent=1, allow_nan=False)
        write_atomically(options.json, text + "\n")
        console.print(f"JSON: {options.json}", markup=False, highlight=False, soft_wrap=True)
    if to_svg is not None and any(one.case.series for one in results):
        write_atomically(options.image, to_svg(results))
        console.print(f"Picture: {options.image}", markup=False, highlight=False, soft_wrap=True)
    print_verdict(console, report)
    return 0 if report.sound else 1


def _measured(
    names: Sequence[str],
    cases: Sequence[Case],
    options: argparse.Namespace,
    report: Report,
    told: Callable[[str, str], None],
) -> tuple[list[CaseResult], dict[str, str]]:
    """The results of all frameworks, and why one ended early."""
    results: list[CaseResult] = []
    failures: dict[str, str] = {}
    for name in names:
        held: list[CaseResult] = []
        facts: Any = report.machines[name]
        try:
            run_framework(
                name, cases, repeats=options.repeats, budget=options.seconds,
                device=options.device, told=told, facts=facts, results=held,
            )  # fmt: skip
        except WorkerError as error:
            failures[name] = str(error)
        results += held
    return results, failures


def to_dict(report: Report) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "schema": SCHEMA,
        "sound": report.sound,
        "machine": dict(report.machine),
        "frameworks": {name: dict(facts) for name, facts in report.machines.items()},
        "options": dict(report.options),
        "missing": list(report.missing),
        "failures": dict(report.failures),
        "seconds": round(report.seconds, 1),
        "cases": [one.to_dict() for one in report.cases],
        "goals": [verdict.to_dict() for one in report.cases for verdict in judge(one)],
    }


def _cases(options: argparse.Namespace) -> list[Case]:
    """The cases that are asked for, the lengths of the picture last."""
    patterns = None if options.cases is None else listed(options.cases)
    modes = listed(options.modes)
    drawn: list[Case] = []
    if options.lengths is not None:
        drawn = series(_lengths(options.lengths))
    elif options.image is not None:
        drawn = series(SERIES)
    if drawn and patterns is None and not options.all:
        return drawn
    return choose(patterns, modes, every=options.all, device=options.device) + drawn


def _lengths(text: str) -> list[int]:
    found = listed(text)
    if not found or not all(one.isascii() and one.isdigit() and int(one) > 0 for one in found):
        raise UsageError(f"`--lengths` must be positive integers, by commas. Received: {text!r}.")
    return [int(one) for one in found]


def listed(text: str) -> list[str]:
    """The parts of a list by commas."""
    return [part for part in text.replace(" ", "").split(",") if part]


def _backends(options: argparse.Namespace) -> tuple[list[Backend], list[str]]:
    """The backends to run, and those that are not installed; a named one must be."""
    fitting = [b for b in BUILT_IN if options.device == "cpu" or b.name != "numpy"]
    if options.backends is None:
        missing = [backend.name for backend in fitting if not backend.installed]
        return [backend for backend in fitting if backend.installed], missing
    names = list(dict.fromkeys(listed(options.backends)))
    known = [backend.name for backend in fitting]
    for name in names or [options.backends]:
        if name not in known:
            raise UsageError(
                f"`--backends` must be of {', '.join(known)} on {options.device}. "
                f"Received: {name!r}."
            )
    found = [get_backend(name) for name in names]
    for backend in found:
        if not backend.installed:
            _ = backend.ops  # says which extra installs it
    return found, []


def _picture(options: argparse.Namespace) -> Callable[[Sequence[CaseResult]], str] | None:
    """What draws the picture, if it is asked for. All that may hinder writing is told now."""
    if options.repeats < 1:
        raise UsageError(f"`--repeats` must be 1 or more. Received: {options.repeats}.")
    if options.json is not None and options.json == options.image:
        raise UsageError(f"`--json` and `--image` must be two files. Received: {options.json}.")
    for path in (options.json, options.image):
        if path is not None:
            check_writable(path)
    if options.image is None:
        return None
    if options.image.suffix != ".svg":
        raise UsageError(f"`--image` must be an .svg file. Received: {options.image}.")
    from benchmarks.picture import to_svg

    return to_svg


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks, and give the exit status."""
    return run_process(lambda: bench(_parser().parse_args(arguments), Console()))


def _parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="anymha bench", description=bench.__doc__)
    command.add_argument("--backends", metavar="A,B", help="default: all that are installed")
    command.add_argument("--cases", metavar="A,B", help="names or patterns; default: a few")
    command.add_argument(
        "--modes", metavar="A,B", default=",".join(MODES), help="forward, train; default: both"
    )
    command.add_argument("--all", action="store_true", help="every case, every layer, every goal")
    command.add_argument("--lengths", metavar="N,M", help="lengths of the picture")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds; default: 5")
    command.add_argument(
        "--seconds", type=float, default=10.0, metavar="S",
        help="of a case, after which no further round begins; default: 10",
    )  # fmt: skip
    command.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    command.add_argument("--image", type=Path, metavar="FILE.svg", help="draw time and memory")
    return command
