"""Answers to wrong names: the right one, where a peer's name or a slip of the pen is recognised."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

from anymha.errors import ArgumentError, UnknownOptionError
from anymha.framework.shapes import received

Function = TypeVar("Function", bound=Callable[..., Any])

SIMILARITY = 0.8
"""How alike two names must be, of 1, for one to be taken for the other misspelled."""
SIMILARITY_OF_WORDS = 0.6
"""How alike each of their words must be: `query_dim` is not `query_size`."""


def answer(name: str, known: Iterable[str], peers: Mapping[str, str]) -> str:
    """A sentence that says what to pass in place of an unknown name, or all names that there are.

    `peers` has, by names that other libraries have, what to do here, a sentence.
    """
    if name in peers:
        return peers[name]
    right = list(known)
    alike = difflib.get_close_matches(name, [*right, *peers], 5, SIMILARITY)
    alike = [other for other in alike if _same_words(name, other)]
    if not alike:
        return f"It takes: {', '.join(right) or 'nothing'}."
    nearest = alike[0]
    if nearest in right:
        return f"Pass `{nearest}`, if that is meant."
    return f"If `{nearest}` is meant: {peers[nearest]}"


def _same_words(name: str, other: str) -> bool:
    """Whether two names have the same words, misspelled; or only `_` or capitals set them apart."""
    words, others = name.split("_"), other.split("_")
    if name.replace("_", "").lower() == other.replace("_", "").lower():
        return True
    return len(words) == len(others) and all(
        difflib.SequenceMatcher(None, word, right).ratio() >= SIMILARITY_OF_WORDS
        for word, right in zip(words, others, strict=True)
    )


def backticked(names: Iterable[str]) -> str:
    """Names in backticks, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def by_name(told: Mapping[str, str]) -> dict[str, str]:
    """Sentences by each name that they answer; `told` has the names, in one text, by the sentence.

    In a sentence {0} stands for the name.
    """
    return {
        name: sentence.replace("{0}", name)
        for sentence, names in told.items()
        for name in names.split()
    }


def answers(
    told: Mapping[str, str] = MappingProxyType({}), **right: str
) -> Callable[[Function], Function]:
    """Make a function or the constructor of a class answer wrong keywords with the right one.

    A class of options raises an `UnknownOptionError`, a function an `ArgumentError`.

    Args:
        told: As for `by_name`, what to do in place of names that other libraries have.
        **right: By the name of a parameter other names for it, in one text.
    """
    peers = by_name({**told, **{f"Pass `{name}`.": others for name, others in right.items()}})

    def decorate(function: Function) -> Function:
        made: Any = function
        if inspect.isclass(function):
            made.__init__ = _answering(made.__init__, made.__name__, peers, UnknownOptionError)
            return cast(Function, made)
        return cast(Function, _answering(made, made.__name__, peers, ArgumentError))

    return decorate


def _answering(
    function: Any, title: str, peers: Mapping[str, str], kind: type[ArgumentError]
) -> Callable[..., Any]:
    """The function, which raises `kind` for a keyword that it does not take, or that it lacks."""
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    takes_more = len(names) < len(parameters)
    known = [name for name in names if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        for name, value in named.items():
            if name in peers or not (takes_more or name in names):
                raise kind(
                    f"`{title}` takes no `{name}`. Received: {name}={received(value)}. "
                    f"{answer(name, known, peers)}"
                )
        try:
            return function(*args, **named)
        except TypeError:
            try:
                inspect.signature(function).bind(*args, **named)
            except TypeError as error:
                wrong = error
            else:
                raise
        others = [f"`{name}`: {answer(name, known, {})}" for name in named if name not in known]
        cure = " ".join(others) or f"It takes: {', '.join(known)}."
        raise kind(f"`{title}` cannot be called so: {wrong}. {cure}")

    return checked
