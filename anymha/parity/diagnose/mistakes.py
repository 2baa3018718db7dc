"""The catalogue of mistakes that ports of the layer make, as changes of the recipe.

A mistake gives the recipes that have it, with the words for each variant; none where it cannot be
made, as a grouped-heads mistake where heads are not grouped. `anymha.parity.diagnose.diagnosis`
skips variants that change no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from anymha.parity.diagnose import (
    attention_mistakes,
    axes_mistakes,
    decoding_mistakes,
    mask_mistakes,
    segment_mistakes,
    weight_mistakes,
)
from anymha.parity.diagnose.changes import no_families
from anymha.parity.diagnose.measured import Families
from anymha.parity.oracle.features import SECTIONS
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants

LEFT_OUT = "left out"
"""How the names of mistakes end where an option is not there."""


@dataclass(frozen=True)
class Mistake:
    """One known mistake."""

    name: str  # A short name, as "inverted mask"
    fix: str  # How to fix it
    # Make the recipes that have it from a right one: those that are known, and those with a number
    # that is to be measured
    variants: Callable[[Recipe], Variants] = lambda recipe: iter(())
    families: Families = no_families
    # Whether it has so many variants that it is tried alone, not together with another
    alone: bool = False


def catalogue(recipe: Recipe | None = None) -> Iterator[Mistake]:
    """All mistakes; those that ports make most often first.

    With a recipe also those of its sections that no option of anymha has.
    """
    several = (
        decoding_mistakes, segment_mistakes, mask_mistakes, attention_mistakes, axes_mistakes
    )  # fmt: skip
    yield from (Mistake(*one) for module in several for one in module.MISTAKES)
    own = () if recipe is None else map(type, recipe.sections)
    for section in dict.fromkeys((*SECTIONS.values(), *own)):
        yield from option_mistakes(section)
    yield from (Mistake(*one) for one in weight_mistakes.MISTAKES)


def option_mistakes(section: type[Section]) -> Iterator[Mistake]:
    """The mistakes with an option: those that every option has, and its own."""
    option = section.option
    yield Mistake(f"{option} {LEFT_OUT}", f"Pass `{option}` on: the candidate ignores it.",
                  partial(_left_out, section))  # fmt: skip
    for name, fix, make, *alone in section.mistakes:
        families = _FAMILIES.get(name, no_families)
        yield Mistake(name, fix, partial(_own, section, make), families, *alone)
    if section.usual:
        name = f"another {option}"
        yield Mistake(name, f"Give both the same `{option}`.", partial(_another, section),
                      _FAMILIES.get(name, no_families))  # fmt: skip


_FAMILIES: Mapping[str, Families] = {
    "another softcap": attention_mistakes.any_cap,
    "rotary of another base": attention_mistakes.any_base,
    "rotary angles multiplied": attention_mistakes.any_turn,
}
"""The mistakes with options of which any other number is measured."""


def other_options(
    recipe: Recipe, config: Any, weights: Arrays | None = None
) -> Iterator[tuple[Mistake, str, Recipe]]:
    """The options that differ between a candidate's config and the recipe.

    An option that the recipe lacks comes with the candidate's weights of it.
    """
    for option, section in SECTIONS.items() if config is not None else ():
        own, expected = section.from_config(config), recipe.options.get(option)
        value = None if own is None else own.value
        if own is None or value == expected:
            continue  # one that is off is "left out" in the catalogue
        if expected is None:
            fix = f"Leave `{option}` out of the candidate, or give it to the reference too."
            mistake = Mistake(f"{option} not asked for", fix, lambda recipe: iter(()))
            yield mistake, f"{option}={value!r}", _with_weights(recipe, config, own, weights or {})
        else:
            mistake = next(m for m in option_mistakes(section) if m.name == f"another {option}")
            yield mistake, _in_place(value, expected), recipe.with_section(own)


def _with_weights(recipe: Recipe, config: Any, section: Section, weights: Arrays) -> Recipe:
    """The recipe with a section, and the weights of its option."""
    features = (f for f in config.features if f.option == section.option)
    names = [name for feature in features for name in feature.weights(config, 1)]
    added = {n: np.asarray(weights[n], np.float64) for n in names if n in weights}
    recipe = recipe.with_section(section)
    return recipe.but(weights={**recipe.weights, **added}) if added else recipe


def _left_out(kind: type[Section], recipe: Recipe) -> Variants:
    for section in recipe.sections:
        if type(section) is kind:
            yield getattr(section, "left_out", ""), recipe.without_section(kind.option)


def _another(kind: type[Section], recipe: Recipe) -> Variants:
    for section in recipe.sections:
        if type(section) is kind:
            for value in section.usual:
                if value != section.value:
                    other = type(section)(value)
                    words = _in_place(other.value, section.value)
                    yield words, recipe.with_section(other)


def _in_place(value: Any, expected: Any) -> str:
    """An option's value and the expected one; of several fields those that differ."""
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        named = [n for n in {**expected, **value} if value.get(n) != expected.get(n)]
        return ", ".join(f"{n} {value.get(n)!r} in place of {expected.get(n)!r}" for n in named)
    return f"{value!r} in place of {expected!r}"


def _own(kind: type[Section], make: Callable[[Any, Recipe], Variants], recipe: Recipe) -> Variants:
    for section in recipe.sections:
        if type(section) is kind:
            yield from make(section, recipe)
