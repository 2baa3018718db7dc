"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from anymha.errors import UsageError


def check_writable(path: Path) -> None:
    """See to it that a file could be written there, without writing anything.

    Raises:
        UsageError: it could not.
    """
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder.")
    if _is_special(path):
        return
    folder = next(above for above in path.resolve().parents if above.exists())
    if not folder.is_dir():
        raise UsageError(f"{path} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: no permission to write to {folder}.")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, and its folder where there is none.

    A file that is there is replaced at once, when the new one is complete.

    Raises:
        UsageError: it cannot be written; what was there is left.
    """
    whole = path.resolve()
    part = path if _is_special(path) else whole.with_name(f".{whole.name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        if part != path:
            part.replace(whole)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        if part != path:
            with suppress(OSError):  # it is not there, or its folder is not
                part.unlink()


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, as /dev/stdout, which nothing may replace."""
    return path.exists() and not path.is_file()
