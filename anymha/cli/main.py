"""The command line. Exit status: 0 parity holds, 1 it does not, 2 the call is wrong.

Results go to stdout, errors and the progress of work to stderr; see `anymha.cli.process`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from anymha.cli.process import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and give its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_process(lambda: _run(words))


def _run(words: list[str]) -> int:
    # Imported here, so that Ctrl-C while NumPy is imported is handled too.
    from anymha.cli.bench import run_bench  # noqa: PLC0415
    from anymha.cli.parser import make_parser  # noqa: PLC0415
    from anymha.parity.adapters.arguments import exits_as_errors  # noqa: PLC0415

    if words[:1] == ["bench"]:  # a checkout's benchmarks have a parser of their own
        return run_bench(words[1:])
    options = make_parser().parse_args(words)
    return exits_as_errors(options.run)(options)  # not of the parser, which exits by itself


if __name__ == "__main__":
    sys.exit(main())
