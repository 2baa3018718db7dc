"""Files that belong together: those that one index names."""

from __future__ import annotations

from pathlib import Path

from anymha.interchange.files.json_text import parse_json

MAX_INDEX = 100_000_000


def siblings(path: Path) -> list[Path]:
    """The files that an index next to a file names together with it, and the index."""
    found: list[Path] = []
    for index in path.parent.glob("*.index.json"):
        try:
            if index.stat().st_size > MAX_INDEX:
                continue
            files = set(parse_json(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            continue  # it is none of ours
        if path.name in files:
            found += [index, *(path.parent / str(file) for file in files)]
    return found
