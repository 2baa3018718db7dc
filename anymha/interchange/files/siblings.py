"""Files that belong together: those that one index names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from anymha.errors import FileError
from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.paths import stat_of

MAX_INDEX = 25_000_000


def siblings(files: Collection[Path], target: Path | None = None) -> list[Path]:
    """The files that an index names together with some of `files`, and the index.

    Names are not compared, as a link or a second name may lead to the same file. The indices are
    those next to the files, to what they are links to, and to a new file that may be a sibling.

    Args:
        files: The files of a source.
        target: The new file.
    """
    paths = [*files] if target is None else [*files, target]
    known = set(map(_identity, files)) - {None}
    found: list[Path] = []
    for folder in dict.fromkeys(path.parent for one in paths for path in (one, one.resolve())):
        for index in folder.glob("*.index.json"):
            try:
                if index.stat().st_size > MAX_INDEX:
                    continue
                names = set(parse_json(index.read_bytes())["weight_map"].values())
                together = [folder / str(name) for name in names]
                if not known.isdisjoint(map(_identity, together)):
                    found += [index, *together]
            except (OSError, ValueError, TypeError, LookupError, AttributeError):
                continue  # it is none of ours
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    """What a file's names and links have in common; None where there is no file."""
    try:
        status = stat_of(path)
    except FileError:
        return None
    return (status.st_dev, status.st_ino) if status else None
