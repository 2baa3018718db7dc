"""Why a candidate differs: known mistakes, and how well they explain it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from anymha.parity.oracle.recipe import Recipe


@dataclass(frozen=True)
class Cause:
    """A mistake that a candidate has."""

    name: str  # Its name in the catalogue
    detail: str  # Which variant
    stage: str  # The first stage that it changes
    fix: str  # How to fix it

    @property
    def key(self) -> tuple[str, str]:
        """Its name and detail, by which the catalogue knows it."""
        return self.name, self.detail

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True)
class Diagnosis:
    """Why a candidate differs."""

    # The mistakes, the first one first; none where no known mistake explains it
    causes: tuple[Cause, ...] = ()
    # The greatest error that is left once the reference has these mistakes too, as a share of what
    # rounding explains; infinite without causes
    remaining: float = np.inf
    alternatives: tuple[str, ...] = ()  # Other mistakes that give the same numbers for these inputs
    # The recipe with these mistakes, which gives the reported results; None if none does
    recipe: Recipe | None = field(default=None, repr=False)
    small: bool = False  # Whether an unexplained difference is small everywhere

    hurried: bool = False  # Whether the time ran out before every two mistakes were tried

    untried: str = ""  # Why known mistakes could not be tried, or not all; empty where they were

    @classmethod
    def certain(cls, name: str, stage: str, fix: str) -> Diagnosis:
        """One cause, which leaves nothing to explain."""
        return cls((Cause(name, "", stage, fix),), 0.0)

    @property
    def explained(self) -> bool:
        """Whether the causes close the gap."""
        return bool(self.causes) and self.remaining <= 1

    def __str__(self) -> str:
        if not self.causes and self.untried:
            return f"no known mistake is found, as few or none could be tried: {self.untried}"
        if not self.causes:
            two = "any two of those that there was time for" if self.hurried else "any two of them"
            unknown = f"no known mistake, nor {two}, explains the difference"
            return f"{unknown}, which is small everywhere" if self.small else unknown
        named = " and ".join(map(str, self.causes))
        if not self.explained:
            return f"{named}; something else differs too"
        also = f" (or: {'; '.join(self.alternatives)})" if self.alternatives else ""
        return named + also
