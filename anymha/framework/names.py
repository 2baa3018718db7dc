"""Answers to wrong names: the right one, where a peer's name or a slip of the pen is recognised."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from anymha.errors import ArgumentError
from anymha.text import quoted

Function = TypeVar("Function", bound=Callable[..., Any])

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


def backticked(names: Iterable[str]) -> str:
    """Names in backticks, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def answers(**peers: str) -> Callable[[Function], Function]:
    """Make a function answer keywords that it does not take with the right one.

    Args:
        **peers: By names that other libraries have, what to do here, a sentence.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        names = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        takes_more = len(names) < len(parameters)

        @functools.wraps(function)
        def checked(*args: Any, **named: Any) -> Any:
            for name, value in named.items():
                if name in peers or not (takes_more or name in names):
                    raise ArgumentError(
                        f"`{function.__name__}` takes no `{name}`. Received: {name}="
                        f"{quoted(value)}. {answer(name, names, peers)}"
                    )
            return function(*args, **named)

        return cast(Function, checked)

    return decorate
