"""The command `anymha bench`: the benchmarks of a checkout, which an installed package has not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from anymha.errors import UsageError

CHECKOUT = Path(__file__).parents[2]


def run_bench(arguments: list[str]) -> int:
    """Run the benchmarks with these arguments, and give the exit status.

    Raises:
        UsageError: this is no checkout.
    """
    if not (CHECKOUT / "benchmarks" / "command.py").is_file():
        raise UsageError(
            "The benchmarks are no part of the installed package. Clone the project and run "
            "`nox -s bench` there, or `python -m benchmarks`."
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    command: Any = importlib.import_module("benchmarks.command")
    return command.main(arguments)
