"""Text from elsewhere, as files' names of tensors, made fit to be printed.

A name in a file may hold control characters, which move a terminal's cursor or forge lines, and
may be as long as the file.
"""

from __future__ import annotations

import reprlib
import shlex
from collections.abc import Collection

SHOWN_CHARACTERS = 200
SHOWN_ITEMS = 12
SHOWN_LEVELS = 3


def escaped(text: str, kept: str = "") -> str:
    """The text with backslash escapes for characters that cannot be printed, except `kept`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def shown(text: object, most: int = SHOWN_CHARACTERS) -> str:
    """A text without quotes: escaped, and its middle left out where it has more characters."""
    words = str(text)
    if len(words) > most:
        half = most // 2
        words = f"{words[:half]}...{words[-half:]} ({len(words)} characters)"
    return escaped(words)


def quoted(value: object) -> str:
    """``repr(value)`` of a text, number, list or dict, shortened at every level and as a whole."""
    return shown(_SHORT.repr(value), 5 * SHOWN_CHARACTERS)


def listed(names: Collection[object]) -> str:
    """Names joined by commas, the first ones where there are many; "none" where there is none."""
    first = [shown(name) for name, _ in zip(names, range(SHOWN_ITEMS), strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "") if first else "none"


def shell_word(text: object) -> str:
    """A text as one word of a shell's command line, with the shell's escapes where needed."""
    words = str(text)
    if words.isprintable():
        return shlex.quote(words)
    escapes = {"\\": "\\\\", "'": "\\'"}
    return (
        "$'"
        + "".join(
            escapes.get(c, c) if c.isprintable() else "".join(f"\\x{b:02x}" for b in _bytes(c))
            for c in words
        )
        + "'"
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class _Short(reprlib.Repr):
    """Python's shortened `repr`, with limits that leave the usual names and shapes whole."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN_CHARACTERS
        self.maxlist = self.maxtuple = 32
        self.maxlevel = SHOWN_LEVELS  # lists may hold one another many times
        self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write integers of thousands of digits."""
        huge = f"an integer of {x.bit_length()} bits"
        return huge if x.bit_length() > 1000 else super().repr_int(x, level)


_SHORT = _Short()
