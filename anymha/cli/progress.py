"""A bar in a terminal while layers are converted; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def layer_bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Give a function of the number of layers done, their total, and the next layer's prefix."""
    if not console.is_terminal:
        yield lambda done, count, prefix: None
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, count, prefix: bar.update(
            task, description=prefix, completed=done, total=count
        )
