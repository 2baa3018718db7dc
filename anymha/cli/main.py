"""The command line. Exit status: 0 parity holds, 1 it does not, 2 the call is wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from anymha.cli.bench import run_bench
from anymha.cli.compare import add_command as add_compare
from anymha.cli.convert import add_command as add_convert
from anymha.cli.inspect import add_command as add_inspect
from anymha.cli.selftest import add_command as add_selftest
from anymha.errors import AnymhaError, UsageError
from anymha.framework.registry import BUILT_IN, Backend, backends, get_backend
from anymha.interchange.files.atomic_write import check_writable, write_atomically
from anymha.interchange.layouts import layouts
from anymha.parity.matrix.checkpoint import (
    CheckpointProblem,
    checkpoint_problems,
    read_inputs,
    tokens_of,
)
from anymha.parity.matrix.matrix import (
    AttentionMap,
    MatrixReport,
    attention_map,
    counted_cases,
    run_matrix,
    versions,
)
from anymha.parity.matrix.terminal import print_report, print_verdict, progress_bar
from anymha.parity.oracle.cases import MATRIX, make_problem
from anymha.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and give its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a character that it lacks must not lose the report
            stream.reconfigure(errors="replace")
    options, rest = _parser().parse_known_args(arguments)
    if rest and getattr(options, "command", "") != "bench":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return options.run(options, Console())
    except AnymhaError as error:
        Console(stderr=True).print(
            f"anymha: {error}", markup=False, highlight=False, soft_wrap=True
        )
        return 2


def parity(options: argparse.Namespace, console: Console) -> int:
    """Run the matrix of cases on every backend, and the layers of a checkpoint if one is given."""
    began = time.perf_counter()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    chosen, missing = _chosen(options.backends)
    real = _real(options)
    to_html = _renderer(options)
    problems = [make_problem(case) for case in MATRIX]
    absent = ", ".join(missing)
    console.print(
        f"anymha {__version__}: {counted_cases(len(problems) + len(real))} on "
        f"{', '.join(backend.name for backend in chosen)}"
        + (f" (not installed: {absent})" if missing else ""),
        highlight=False,
    )
    with progress_bar(console, (len(problems) + len(real)) * len(chosen)) as progress:
        rows = run_matrix(chosen, problems, progress)
        real_rows = run_matrix(chosen, real, progress)
    report = MatrixReport(
        [backend.name for backend in chosen],
        missing,
        rows,
        real_rows,
        _maps(real, options),
        time.perf_counter() - began,
        versions(chosen),
    )
    print_report(console, report)
    if options.json is not None:
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        write_atomically(options.json, text + "\n")
        console.print(f"JSON: {options.json}", markup=False, highlight=False, soft_wrap=True)
    if to_html is not None:
        write_atomically(options.html, to_html(report))
        console.print(f"HTML: {options.html}", markup=False, highlight=False, soft_wrap=True)
    print_verdict(console, report)
    return 0 if report.passed else 1


def _chosen(names: str | None) -> tuple[list[Backend], list[str]]:
    """The backends to run, and those that are not installed; a named one must be."""
    if names is not None:
        chosen = [get_backend(name) for name in dict.fromkeys(names.replace(" ", "").split(","))]
        for backend in chosen:
            if not backend.installed:
                _ = backend.ops  # says which extra installs it
        return chosen, []
    every = list(backends().values())
    missing = [backend.name for backend in BUILT_IN if not backend.installed]
    return [backend for backend in every if backend.installed], missing


def _real(options: argparse.Namespace) -> list[CheckpointProblem]:
    if options.checkpoint is None:
        for name in ("layout", "num_heads", "prefix", "inputs"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise UsageError(
                    f"`--{option}` says how to read a checkpoint: give `--checkpoint`."
                )
        return []
    if options.layout is None or options.num_heads is None:
        raise UsageError(
            "`--checkpoint` needs `--layout` and `--num-heads` too: neither is in the file. "
            f"Known layouts: {', '.join(layouts())}."
        )
    path, inputs = options.checkpoint, options.inputs
    return list(
        checkpoint_problems(path, options.layout, options.num_heads, options.prefix, inputs)
    )


def _renderer(options: argparse.Namespace) -> Callable[[MatrixReport], str] | None:
    """The function that makes the HTML, if asked for; raise where a file cannot be written."""
    if options.json is not None and options.json == options.html:
        raise UsageError(f"`--json` and `--html` must be two files. Received: {options.json}.")
    for path in (options.json, options.html):
        if path is not None:
            check_writable(path)
    if options.html is None:
        return None
    from anymha.parity.matrix.html import to_html  # noqa: PLC0415  needs the extra "report"

    return to_html


def _maps(real: Sequence[CheckpointProblem], options: argparse.Namespace) -> list[AttentionMap]:
    """The attention maps of the first sentence, of each layer once."""
    if not options.html or not options.inputs:
        return []
    tokens = tokens_of(read_inputs(options.inputs))
    if not tokens:
        return []
    return [
        attention_map(item, tokens[0], 0)
        for item in real
        if item.problem.case.config.dtype == "float64"
    ]


def show_layouts(options: argparse.Namespace, console: Console) -> int:
    """The names of all layouts."""
    for name in layouts():
        console.print(name, highlight=False)
    return 0


def info(options: argparse.Namespace, console: Console) -> int:
    """Versions, and the backends that are installed."""
    every = list(backends().values())
    for name, version in versions([b for b in every if b.installed]).items():
        console.print(f"{name:12} {version}", highlight=False)
    for backend in every:
        if not backend.installed:
            console.print(
                f"{backend.name:12} not installed: pip install 'anymha\\[{backend.name}]'",
                highlight=False,
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymha", description="One attention layer, everywhere.")
    parser.add_argument("--version", action="version", version=f"anymha {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    command = commands.add_parser(
        "parity", help="show that every backend gives the same results", description=parity.__doc__
    )
    command.add_argument("--backends", metavar="A,B", help="default: all that are installed")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="a file of weights")
    command.add_argument("--layout", metavar="NAME", help="its layout; see `anymha layouts`")
    command.add_argument("--num-heads", type=int, metavar="H", help="its number of query heads")
    command.add_argument("--prefix", metavar="P", help="only layers whose names begin with P")
    command.add_argument("--inputs", type=Path, metavar="FILE", help="its inputs, an .npz file")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a report with pictures")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    command.set_defaults(run=parity)

    command = commands.add_parser("bench", help="time this layer and others", add_help=False)
    command.set_defaults(run=lambda options, console: run_bench(options.rest))
    add_compare(commands)
    add_convert(commands)
    add_inspect(commands)
    add_selftest(commands)
    command = commands.add_parser("layouts", help="list the layouts of weights")
    command.set_defaults(run=show_layouts)
    command = commands.add_parser("info", help="show versions and backends")
    command.set_defaults(run=info)
    return parser


if __name__ == "__main__":
    sys.exit(main())
