"""Write files atomically: as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from anymha.errors import FileError


def check_writable(path: Path) -> None:
    """Check that a file can be written there, without writing anything.

    Raises:
        FileError: it cannot.
    """
    if path.is_dir():
        raise FileError(f"{path} cannot be written: it is a folder.")
    if _is_special(path):
        return
    folder = next(above for above in path.resolve().parents if above.exists())
    if not folder.is_dir():
        raise FileError(f"{path} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"{path} cannot be written: no permission to write to {folder}.")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a new file, and its folder where there is none; it appears once it is complete.

    It is written under another name in the same folder, flushed to the disk, and renamed. Where
    the block raises an error, no part of it is left, and an old file stays.

    Raises:
        FileError: it cannot be written.
    """
    target = path.resolve()
    special = _is_special(path)
    part = path if special else target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if not special:
            part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb" if special else "xb") as stream:
            yield stream
            stream.flush()
            if not special:
                os.fsync(stream.fileno())
        if not special:
            part.replace(target)
            _flush_folder(target.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if not special:
            with suppress(OSError):  # it is not there, or its folder is not
                part.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, as `atomic_file` does.

    Raises:
        FileError: it cannot be written; an old file stays.
    """
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot do it for a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, as /dev/stdout; those must not be replaced."""
    return path.exists() and not path.is_file()
