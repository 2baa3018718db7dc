"""Import libraries that only some formats need."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from anymha.errors import FileError
from anymha.text import shown


def require_library(name: str, path: Path, extra: str) -> Any:
    """Import the module `name` for the file at `path`.

    Raises:
        FileError: it is not installed; the message says which extra of anymha brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FileError(
            f"{shown(path)} needs {name}, which is not installed. Install it with: "
            f"pip install 'anymha[{extra}]'."
        ) from error
