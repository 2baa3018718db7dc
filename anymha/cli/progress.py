"""A bar on stderr while a command works; nothing where that is no terminal or rich is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anymha.text import shown


@contextmanager
def progress_bar(
    steps: int, console: Any = None, delay: float = 1.0
) -> Iterator[Callable[[str, str], None]]:
    """Give a function of the names of the case and the backend that come next.

    Args:
        steps: How many there are.
        console: Rich's console to draw on; default stderr.
        delay: Seconds before it appears.
    """
    with bar(console, delay=delay) as update:
        done = -1

        def advance(case: str, backend: str) -> None:
            nonlocal done
            done += 1
            update(done, steps, f"{backend}: {case}")

        yield advance


@contextmanager
def bar(
    console: Any = None, refreshes: float = 10, delay: float = 1.0
) -> Iterator[Callable[[int, int | None, str], None]]:
    """Give a function of the steps done, their total, and what comes next.

    Args:
        console: Rich's console to draw on; default stderr.
        refreshes: How often a second it is drawn.
        delay: Seconds before it appears: what is done sooner needs none.
    """
    try:
        from rich.console import Console  # noqa: PLC0415  of the extra "cli"
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        yield lambda done, total, words: None
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, words: None
        return
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    drawn = Progress(*columns, console=console, transient=True, refresh_per_second=refreshes)
    task = drawn.add_task("", total=None)
    timer = threading.Timer(delay, drawn.start)
    timer.daemon = True
    (timer.start if delay else drawn.start)()
    try:
        yield lambda done, total, words: drawn.update(
            task, description=shown(words), completed=done, total=total
        )
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()  # it may be about to draw
        drawn.stop()


@contextmanager
def busy(words: str) -> Iterator[None]:
    """Draw a bar without an end while the block runs."""
    with bar() as update:
        update(0, None, words)
        yield
