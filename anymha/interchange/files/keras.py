"""Keras's ``.keras``: a zip archive with the model's weights in HDF5, and its configuration.

Only the weights are read. Nothing of the configuration is built, so no code of a file runs.

References:
    Keras 3.15, ``keras/src/saving/saving_lib.py``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from anymha.interchange.files.archive import Archive
from anymha.interchange.files.hdf5 import Hdf5Reader
from anymha.interchange.files.reader import CHUNK, broken

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
        copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  the reader closes it
        try:
            with archive.open(WEIGHTS) as stream:
                shutil.copyfileobj(stream, copy, CHUNK)
            return Hdf5Reader(path, copy, KIND)
        except BaseException:
            copy.close()
            raise
    finally:
        archive.close()
