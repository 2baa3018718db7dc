"""Names by their last parts: all layouts are looked for in one pass over the names of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = 5
"""No array of a layout has a name of more parts."""
_LONGEST, _DEEPEST = 2000, 64
"""No honest name is longer or has more parts; of hostile ones, slices would fill the memory."""


class NameIndex:
    """The names of a file or a model, by what they end with.

    Args:
        names: The names; dots and slashes separate their parts.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._by_prefix: dict[str, list[str]] = {}
        self._prefixes: dict[str, list[str]] = {}
        self._split = [
            name for name in self._names
            if len(name) <= _LONGEST and len(re.findall(r"[./]", name)) <= _DEEPEST
        ]  # fmt: skip
        for name in self._split:
            starts = [0, *(match.end() for match in re.finditer(r"[./]", name))]
            for start in starts[-_PARTS:]:
                self._prefixes.setdefault(name[start:], []).append(name[:start])

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def beginning(self, prefix: str) -> Iterable[str]:
        """The names that begin so, each without it."""
        if not prefix:
            return self._names
        if not self._by_prefix:
            for name in self._split:
                for match in re.finditer(r"[./]", name):
                    self._by_prefix.setdefault(name[: match.end()], []).append(name[match.end() :])
        return self._by_prefix.get(prefix, [])

    def prefixes(self, ending: str) -> list[str]:
        """What stands before an ending, for each name that has it from a part's beginning on."""
        return self._prefixes.get(ending, [])
