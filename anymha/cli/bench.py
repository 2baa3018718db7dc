"""The command `anymha bench`: the benchmarks of a checkout; an installed package lacks them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from anymha.errors import UsageError

CHECKOUT = Path(__file__).parents[2]


def add_command(commands: Any) -> None:
    """Add the command to the parser's commands; `run_bench` takes its arguments unparsed."""
    commands.add_parser("bench", help="time this layer and others, in a checkout", add_help=False)


def run_bench(arguments: list[str]) -> int:
    """Run the benchmarks with these arguments, and give the exit status; only in a checkout."""
    if not (CHECKOUT / "benchmarks" / "command.py").is_file():
        raise UsageError(
            "`anymha bench` runs the benchmarks of a checkout, and the installed package has none. "
            "Clone the project, and run `nox -s bench` there."
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    command: Any = importlib.import_module("benchmarks.command")
    return command.main(arguments)
