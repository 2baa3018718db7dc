"""Keras's ``.keras``: a zip archive with the model's weights in HDF5, and its configuration.

Only the weights are read. Nothing of the configuration is built, so no code of a file runs.

References:
    Keras 3.15, ``keras/src/saving/saving_lib.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from anymha.errors import FileError
from anymha.interchange.files.archive import Archive
from anymha.interchange.files.hdf5 import Hdf5Reader
from anymha.interchange.files.reader import CHUNK, broken
from anymha.text import shown

KIND = "a .keras"
WEIGHTS = "model.weights.h5"


def open_keras(path: Path) -> Hdf5Reader:
    """The weights of a model that Keras saved.

    Raises:
        FileError: it cannot be read, is broken, or has its weights in another form.
    """
    archive = Archive(path, KIND)
    try:
        if WEIGHTS not in archive.sizes:
            raise broken(path, KIND, f"it has no member {WEIGHTS!r}")
        # A file of its own: HDF5 jumps about, and the checksum counts for the whole.
        with _room_for(path, archive.sizes[WEIGHTS]):
            copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  the reader closes it
        try:
            with archive.open(WEIGHTS) as stream:
                while chunk := stream.read(CHUNK):
                    with _room_for(path, archive.sizes[WEIGHTS]):
                        copy.write(chunk)
                        copy.flush()
            return Hdf5Reader(path, copy, KIND)
        except BaseException:
            with suppress(OSError):  # of what is still to be written
                copy.close()
            raise
    finally:
        archive.close()


@contextmanager
def _room_for(path: Path, size: int) -> Iterator[None]:
    """Say what is full where the copy of the weights cannot be written."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{shown(path)} cannot be read: its weights, {size:,} bytes, are copied to a temporary "
            f"file, and {tempfile.gettempdir()} cannot hold it: {error.strerror or error}. Set "
            "TMPDIR to a folder with room."
        ) from error
