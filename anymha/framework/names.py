"""Answers to wrong names: the right one, where a peer's name or a slip of the pen is recognised."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

SIMILARITY = 0.7
"""How alike two names must be, of 1, for one to be taken for the other misspelled."""


def answer(name: str, known: Iterable[str], peers: Mapping[str, str]) -> str:
    """A sentence that says what to pass in place of an unknown name, or all names that there are.

    `peers` has, by names that other libraries have, what to do here, a sentence.
    """
    if name in peers:
        return peers[name]
    right = list(known)
    alike = difflib.get_close_matches(name, [*right, *peers], 1, SIMILARITY)
    if not alike:
        return f"It takes: {', '.join(right)}."
    nearest = alike[0]
    if nearest in right:
        return f"Pass `{nearest}`, if that is meant."
    return f"If `{nearest}` is meant: {peers[nearest]}"


def listed(names: Iterable[str]) -> str:
    """Names in backticks, with commas."""
    return ", ".join(f"`{name}`" for name in names)
