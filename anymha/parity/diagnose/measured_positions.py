"""Rotary positions of queries, solved for: each query is turned by every position.

A query's output depends on no other query, so the position that gives it is found for each alone.
"""

from __future__ import annotations

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.oracle.features.rotary import RotarySection
from anymha.parity.oracle.recipe import Recipe

MOST = 128
"""Up to this position all are tried."""

FIX = "Turn each query by its own position: the first of a piece or a call is not 0."
TOLD = 3
"""How many queries are told."""


def measured_positions(recipe: Recipe, evidence: Evidence) -> tuple[Cause, Recipe] | None:
    """The positions of queries that give the reported output, where others are right.

    Args:
        recipe: The right one.
        evidence: What is reported.
    """
    sections = [one for one in recipe.sections if type(one) is RotarySection]
    right = recipe.places("query")
    most = max(int(right.max(initial=0)), *recipe.lengths[1:])
    if not sections or most > MOST or evidence.columns(recipe) is None:
        return None
    section, shape = sections[0], recipe.lengths[:2]

    def turned(places: np.ndarray) -> Recipe:
        return recipe.with_section(
            RotarySection(section.value, places={"query": places}, factor=section.factor)
        )

    right = np.broadcast_to(right, shape)
    apart = [evidence.columns(turned(np.full(shape, at))) for at in range(most + 1)]
    every = np.stack([np.full(shape, np.inf) if one is None else one for one in apart])
    own = np.take_along_axis(every, np.clip(right, 0, most)[None], 0)[0]
    found = np.where(own <= 2 * every.min(0), right, every.argmin(0))
    moved = np.argwhere(found != right)
    if not len(moved):
        return None
    alike = np.all(found - right == (found - right)[:1])
    told = [at for at in moved if not alike or at[0] == 0]
    words = [
        f"query {t}{'' if alike else f' of sequence {b}'} at {found[b, t]}, not {right[b, t]}"
        for b, t in told[:TOLD]
    ]
    more = f" and {len(told) - TOLD} more" if len(told) > TOLD else ""
    detail = f"measured: {', '.join(words)}{more}"
    return Cause("rotary of other positions", detail, "query", FIX), turned(found)
