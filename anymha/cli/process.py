"""A command as a process: its streams, errors and exit status, as users of Unix tools expect."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from anymha.errors import AnymhaError

WRONG_CALL = 2
SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""The signals that end a command after it has cleaned up, and the word for each."""
PIPE_CLOSED = 141
"""What shells report for a process that SIGPIPE ended: nobody reads its output any more."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def run_process(run: Callable[[], int]) -> int:
    """Run a command, and give the process's exit status.

    Args:
        run: The command; it gives its own exit status.

    Returns:
        The command's status; 2 with a line on stderr where it raised an `AnymhaError` or its
        results cannot be written; 130 with a line after Ctrl-C, 143 after SIGTERM, 129 after
        SIGHUP; 141 where the reader of its output has gone, as ``head`` does.
    """
    with _signals_raised() as received:
        try:
            return _run_with_output(run)
        except BaseException as error:
            if isinstance(error, AnymhaError) and not received:
                say_error(str(error))
                return WRONG_CALL
            if not received and not isinstance(error, KeyboardInterrupt):
                raise
        number = received[0] if received else signal.SIGINT
        with suppress(OSError):  # of a terminal that is gone, after SIGHUP
            say_error(SIGNALS[number.name])
        return 128 + number


@contextmanager
def _signals_raised() -> Iterator[list[signal.Signals]]:
    """Raise KeyboardInterrupt on each of `SIGNALS`, and list those that were received.

    A signal that is ignored stays so, as SIGHUP under ``nohup``.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    old = {}
    try:
        for number in numbers:
            if signal.getsignal(number) in usual:
                old[number] = signal.signal(number, receive)
    except ValueError:  # only the main thread can
        pass
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _run_with_output(run: Callable[[], int]) -> int:
    """The command's status, or that of an output that cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a missing character must not lose the report
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:  # as it is where the caller closed it
                sys.stdout.flush()  # now, while an error can be reported
    except AnymhaError:
        raise
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
