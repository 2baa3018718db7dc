"""The command `anymha parity`: every backend gives the same results, or not."""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anymha.cli.forms import FORMS, add_forms, check_files, write_forms
from anymha.cli.progress import progress_bar
from anymha.errors import UsageError
from anymha.framework.registry import BUILT_IN, Backend, backends, get_backend
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
from anymha.parity.matrix.view import matrix_document
from anymha.parity.oracle.cases import MATRIX, make_problem
from anymha.version import __version__


def add_command(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "parity", help="show that every backend gives the same results", description=parity.__doc__
    )
    command.add_argument("--backends", metavar="A,B", help="default: all that are installed")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="a file of weights")
    command.add_argument("--layout", metavar="NAME", help="its layout; see `anymha layouts`")
    command.add_argument("--num-heads", type=int, metavar="H", help="its number of query heads")
    command.add_argument("--prefix", metavar="P", help="only layers whose names begin with P")
    command.add_argument("--inputs", type=Path, metavar="FILE", help="its inputs, an .npz file")
    add_forms(command)
    command.set_defaults(run=parity)


def parity(options: argparse.Namespace) -> int:
    """Run the matrix of cases on every backend, and the layers of a checkpoint if one is given."""
    from anymha.parity.reports import terminal  # noqa: PLC0415  needs the extra "cli"

    began = time.perf_counter()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    chosen, missing = _chosen(options.backends)
    real = _real(options)
    _check_forms(options)
    problems = [make_problem(case) for case in MATRIX]
    absent = ", ".join(missing)
    print(
        f"anymha {__version__}: {counted_cases(len(problems) + len(real))} on "
        f"{', '.join(backend.name for backend in chosen)}"
        + (f" (not installed: {absent})" if missing else "")
    )
    with progress_bar((len(problems) + len(real)) * len(chosen)) as progress:
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
    document, console = matrix_document(report), terminal.Terminal()
    terminal.print_document(console, document)
    write_forms(document, options)
    terminal.print_verdict(console, document)
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


def _check_forms(options: argparse.Namespace) -> None:
    """Raise now where a form of the report cannot be written later."""
    sources = (options.checkpoint, options.inputs)
    check_files({name: getattr(options, name) for name in FORMS}, sources)
    if options.html is not None:
        # Says that the extra "report" is not installed.
        importlib.import_module("anymha.parity.matrix.pictures")


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
