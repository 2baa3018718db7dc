"""The catalogue of mistakes that ports of the layer make, each planted into the recipe.

A mistake gives the recipes that have it, with the words for each variant; none where it cannot be
made, as a grouped-heads mistake where heads are not grouped. What gives the same numbers as the
unchanged recipe is not told apart from it: see `anymha.parity.diagnose.diagnosis`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from anymha.parity.diagnose import attention_mistakes as mistaken_attention
from anymha.parity.diagnose import mask_mistakes as mistaken_masks
from anymha.parity.diagnose import weight_mistakes as mistaken_weights
from anymha.parity.oracle.recipe import Recipe

Variants = Iterator[tuple[str, Recipe]]
"""Words for a variant, and the recipe that has it."""


@dataclass(frozen=True)
class Mistake:
    """One known mistake.

    Args:
        name: A short name, as "inverted mask".
        cure: What to do about it.
        plant: The recipes that have it, made from a right one.
    """

    name: str
    cure: str
    plant: Callable[[Recipe], Variants]


def _catalogue() -> Iterator[Mistake]:
    for module in (mistaken_masks, mistaken_attention, mistaken_weights):
        for name, cure, plant in module.MISTAKES:
            yield Mistake(name, cure, plant)


CATALOGUE: tuple[Mistake, ...] = tuple(_catalogue())
"""All of them; those that ports make most often first."""
