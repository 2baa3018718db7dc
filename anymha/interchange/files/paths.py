"""Paths that users give: what is there, and errors of ours where the system refuses the path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from anymha.errors import ArgumentError, FileError, UsageError
from anymha.text import quoted, shown

Kind = Literal["file", "folder", "special", "nothing"]


def as_path(name: str, value: Any) -> Path:
    """The path that an argument stands for.

    Raises:
        ArgumentError: it is neither a text nor an object with a path, as `pathlib.Path`.
    """
    try:
        return Path(value)
    except TypeError as error:
        raise ArgumentError(f"`{name}` must be a path. Received: {quoted(value)}.") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of the system, while a file or folder is read, into errors of ours.

    Raises:
        FileError: it cannot be read: no permission, a broken disk, or it has vanished.
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{shown(path)} cannot be read: {reason}.") from error


def stat_of(path: Path) -> os.stat_result | None:
    """What the system knows of a file; None where there is nothing.

    Raises:
        FileError: the name is too long, its links lead in a circle, or its folder is closed.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{shown(path)} cannot be used as a path: {reason}.") from error


def kind_of(path: Path) -> Kind:
    """What lies at a path; "special" is a device or a pipe, as /dev/stdout.

    Raises:
        FileError: as in `stat_of`.
    """
    status = stat_of(path)
    if status is None:
        return "nothing"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(status.st_mode) else "special"


def check_not_source(target: Path, source: Path, files: Iterable[Path]) -> None:
    """Check that a new file takes the place of none that the source consists of.

    Names are not compared: a link, a second name or other capitals may lead to the same file.

    Args:
        target: The new file.
        source: The source, for the message.
        files: The files that it consists of.

    Raises:
        UsageError: it is one of them.
        FileError: a path cannot be used.
    """
    status = stat_of(target)
    for file in files:
        other = stat_of(file)
        if status and other and os.path.samestat(status, other):
            twice = file == source
            needed = (
                f"{shown(source)} twice"
                if twice
                else (f"{shown(target)}, which {shown(source)} needs as {shown(file.name)}")
            )
            raise UsageError(f"The two files must be different ones. Received: {needed}.")
