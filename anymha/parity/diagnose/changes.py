"""Shapes that many mistakes have: other fields of the recipe, or other steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anymha.parity.oracle.recipe import Recipe, Step, Variants

Maker = Callable[[Recipe], Variants]
"""Makes the recipes that have a mistake from a right one, with words for each."""

Row = tuple[Any, ...]
"""The fields of a `Mistake` in order, as the lists of mistakes have them."""


def no_families(recipe: Recipe) -> Iterator[Any]:
    """None: nothing is measured."""
    return iter(())


def listed(words: Sequence[str]) -> str:
    """Words with commas between them, and "and" before the last."""
    *front, last = words
    return f"{', '.join(front)} and {last}" if front else last


def fields(
    where: Callable[[Recipe], Any],
    variants: Callable[[Recipe], Mapping[str, Mapping[str, Any]]] | None = None,
    **changes: Any,
) -> Maker:
    """Other fields, `where` the mistake can be made: those of each variant, or these alone."""

    def make(recipe: Recipe) -> Variants:
        if where(recipe):
            every = {"": changes} if variants is None else variants(recipe)
            for words, changed in every.items():
                yield words, recipe.but(**changed)

    return make


def steps(stage: str, wrong: Mapping[str, Step]) -> Maker:
    """Another step for a stage, by the words of each variant."""

    def make(recipe: Recipe) -> Variants:
        for words, step in wrong.items():
            yield words, recipe.stepping(stage, step)

    return make
