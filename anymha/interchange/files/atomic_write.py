"""Write files atomically: as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from anymha.errors import FileError
from anymha.interchange.files.paths import kind_of, stat_of
from anymha.text import shown

try:
    import fcntl
except ImportError:  # of Windows, where parts of killed processes stay
    fcntl: Any = None

MAX_NAME = 255
"""The most bytes of a file's name on the usual file systems."""
PART = ".anymha.part"
_TOKEN = 8


def check_writable(path: Path) -> None:
    """Check that a file can be written there, without writing anything.

    Raises:
        FileError: it cannot.
    """
    kind = kind_of(path)
    if kind == "folder":
        raise FileError(f"{shown(path)} cannot be written: it is a folder.")
    if kind == "special":
        return
    folder = next(above for above in path.resolve().parents if stat_of(above))
    if not folder.is_dir():
        raise FileError(f"{shown(path)} cannot be written: {shown(folder)} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(
            f"{shown(path)} cannot be written: no permission to write to {shown(folder)}."
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a new file, and its folder where there is none; it appears once it is complete.

    It is written as ``.NAME.TOKEN.anymha.part`` in the same folder, flushed to the disk, and
    renamed. Where the block raises an error, no part of it is left, and an old file stays. A new
    file has the old one's mode and owner, and links are written through. What a process left
    that was killed while it wrote this file is removed.

    Raises:
        FileError: it cannot be written.
    """
    check_writable(path)
    part: Path | None = None
    try:
        if kind_of(path) == "special":  # it must not be replaced
            with path.open("wb") as stream:
                yield stream
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(target)
        old = stat_of(target)
        mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
        part = target.with_name(f"{_beginning(target)}{secrets.token_hex(_TOKEN // 2)}{PART}")
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            _lock(stream.fileno())
            if old is not None:
                _keep_owner_and_mode(part, old)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
        _flush_folder(target.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{shown(path)} cannot be written: {error.strerror or error}.") from error
    finally:
        if part is not None:
            with suppress(OSError):  # it is not there
                part.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, as `atomic_file` does.

    Raises:
        FileError: it cannot be written; an old file stays.
    """
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def _beginning(target: Path) -> str:
    """What the names of the file's parts begin with; its own name may be as long as is allowed."""
    name = os.fsencode(target.name)[: MAX_NAME - 2 - _TOKEN - len(PART)]
    return f".{name.decode('utf-8', 'ignore')}."


def _remove_stale_parts(target: Path) -> None:
    """Remove the file's parts whose writers are gone: a writer holds a lock until its end."""
    beginning = _beginning(target)
    length = len(beginning) + _TOKEN + len(PART)
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if (
                len(entry.name) == length
                and entry.name.startswith(beginning)
                and entry.name.endswith(PART)
            ):
                _remove_if_stale(entry.path)


def _remove_if_stale(part: str) -> None:
    with suppress(OSError):  # it is gone by now, or another user's
        handle = os.open(part, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _lock(handle):
                os.unlink(part)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Take the lock of an open part, until it is closed; False where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also of file systems without locks
        return False
    return True


def _keep_owner_and_mode(part: Path, old: os.stat_result) -> None:
    with suppress(OSError, AttributeError):  # another user's file; no owners on Windows
        os.chown(part, old.st_uid, old.st_gid)
    with suppress(OSError):  # some file systems have no modes
        part.chmod(stat.S_IMODE(old.st_mode))


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot do it for a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
