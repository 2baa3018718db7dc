"""A command as a process: its streams, errors and exit status, as users of Unix tools expect."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

from anymha.errors import AnymhaError

WRONG_CALL = 2
INTERRUPTED = 130
"""What shells report for a process that SIGINT, Ctrl-C, ended."""
PIPE_CLOSED = 141
"""What shells report for a process that SIGPIPE ended: nobody reads its output any more."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def run_process(run: Callable[[], int]) -> int:
    """Run a command, and give the process's exit status.

    Args:
        run: The command; it gives its own exit status.

    Returns:
        The command's status; 2 with a line on stderr where it raised an `AnymhaError` or its
        results cannot be written; 130 with a line after Ctrl-C; 141 where the reader of its output
        has gone, as ``head`` does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a missing character must not lose the report
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:  # as it is where the caller closed it
                sys.stdout.flush()  # now, while an error can be reported
    except AnymhaError as error:
        say_error(str(error))
        return WRONG_CALL
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _discard_output()
        say_error(f"The results cannot be written to stdout: {error.strerror}.")
        return WRONG_CALL


def say_error(text: str) -> None:
    """Print a line about an error on stderr."""
    print(f"anymha: {text}", file=sys.stderr)


def _discard_output() -> None:
    """Send what stdout still holds nowhere, or the interpreter fails to write it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
