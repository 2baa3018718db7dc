"""A bar on stderr while a command works; nothing where that is no terminal or rich is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anymha.text import shown


@contextmanager
def progress_bar(steps: int, console: Any = None) -> Iterator[Callable[[str, str], None]]:
    """Give a function of the names of the case and the backend that come next.

    Args:
        steps: How many there are.
        console: Rich's console to draw on; default stderr.
    """
    with bar(console) as update:
        done = -1

        def advance(case: str, backend: str) -> None:
            nonlocal done
            done += 1
            update(done, steps, f"{backend}: {case}")

        yield advance


@contextmanager
def layer_bar(console: Any = None) -> Iterator[Callable[[int, int, str], None]]:
    """Give a function of the number of layers done, their total, and the next layer's prefix."""
    with bar(console) as update:
        yield update


@contextmanager
def bar(console: Any = None, refreshes: float = 10) -> Iterator[Callable[[int, int, str], None]]:
    """Give a function of the steps done, their total, and what comes next.

    Args:
        console: Rich's console to draw on; default stderr.
        refreshes: How often a second it is drawn.
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
    with Progress(*columns, console=console, transient=True, refresh_per_second=refreshes) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda done, total, words: drawn.update(
            task, description=shown(words), completed=done, total=total
        )
