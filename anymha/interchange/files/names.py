"""Names of tensors: those that a file may have, and those that a format can hold."""

from __future__ import annotations

from collections.abc import Collection

from anymha.text import quoted

MAX_NAME = 4096
"""The most characters of a tensor's name."""
MAX_GROUPS = 32
"""The most groups of HDF5 in one another."""
METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""
OUTPUT = ":0"
"""What older names of TensorFlow's variables end with, an operation's output; it is not read."""


def name_fault(name: str) -> str | None:
    """Why no file may have a tensor of this name; None where it may."""
    if len(name) > MAX_NAME:
        return "is too long"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        return "is no text"
    return None


def npz_fault(name: str, names: Collection[str]) -> str | None:
    """Why an ``.npz`` cannot hold one of these names as it is, in words; None where it can."""
    return "holds a character NUL, at which a zip archive's names end" if "\0" in name else None


def safetensors_fault(name: str, names: Collection[str]) -> str | None:
    """As `npz_fault`, for safetensors."""
    return "is that of the file's metadata" if name == METADATA else None


def hdf5_fault(name: str, names: Collection[str]) -> str | None:
    """As `npz_fault`, for HDF5."""
    *groups, _ = parts = name.split("/")
    above = ("/".join(groups[:depth]) for depth in range(1, len(parts)))
    if "\0" in name or not all(part.strip(".") for part in parts):
        return "has a part that is empty, or dots alone, or holds a character NUL"
    if len(groups) > MAX_GROUPS:
        return f"has more than {MAX_GROUPS} groups"
    group = next((one for one in above if one in names), None)
    if group is not None:
        return f"needs a group {quoted(group)}, which is the name of another tensor"
    plain = name.removesuffix(OUTPUT)
    return f"is read as {quoted(plain)}" if name != plain and plain not in names else None
