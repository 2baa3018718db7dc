"""Two mistakes at once, those that promise most first; and any two usual ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from anymha.parity.diagnose.causes import Diagnosis
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.mistakes import LEFT_OUT
from anymha.parity.diagnose.trials import Trial, Trials, in_order, sample
from anymha.parity.stages.trace import STAGES

FIRST = 40
"""How many of the single mistakes are tried together with every other."""

TRANCHES = (0, 200), (200, 1200)
"""Which of the pairs that promise to leave least are tried first, and which then."""

NEAREST = 6
"""Beside how many of the nearest mistakes every other is tried between these."""

MEASURED = 8
"""Beside how many mistakes those of `NUMBERS` are measured again."""

NUMBERS = ("wrong scale", "wrong attention bias", "mask applied wrongly")
"""The mistakes with a number that come with another."""

BESIDE = 0.7
"""How much of what one mistake leaves two may leave: else the other explains no more than noise."""

EXACT = 1e-3
"""What two measured numbers may leave of the differences."""

USUAL = (
    "inverted mask", "ignored mask", "additive mask", "transposed mask", "mask applied wrongly",
    "causal mask ignored", "causal mask at the other corner", "causal mask off by one",
    "causal mask not asked for", "query offset ignored", "window ignored", "window off by one",
    "wrong attention bias", "wrong scale", "softmax over another axis", "no softmax",
    "grouped heads tiled", "inputs exchanged", "heads merged wrongly", "heads split wrongly",
    "transposed kernel", "packed weights in another order", "packed weights split wrongly",
    "heads interleaved", "missing bias", "output kernel interleaved",
    "weights of another projection", "rotary of another base", "rotary layout swapped",
    "rotary positions, by halves", "rotary positions, by pairs", "rotary of queries or keys alone",
)  # fmt: skip
"""Mistakes of which every two are tried together, those of options that are left out too."""

FORMS = 4
"""How many forms of each of these, the usual ones."""


def promising_pairs(
    trials: Trials, singles: list[Trial], seconds: float
) -> tuple[Diagnosis | None, bool]:
    """Two mistakes, those that promise most first; and whether the time ran out."""
    if trials.evidence.errors(trials.recipe).get("output", np.inf) <= 1:
        return None, False  # no two mistakes give a right output
    until = Deadline(seconds)
    singles = trials.whole(singles)
    # Of those that give the same numbers the usual one.
    nearest = sorted(singles, key=lambda one: (round(one.left, 6), one.rank))
    nearest = [*nearest[:FIRST], *(one for one in nearest[FIRST:] if one.rank < 2)]
    # Sums around the output and maps of heads are found by themselves beside each.
    none, rest = set[tuple[str, str]](), ((one, None) for one in nearest)
    first, more = _promising(trials, singles)
    sums = ((one, none) for one in nearest[NEAREST : 2 * FIRST])
    every = itertools.chain(first, itertools.islice(rest, NEAREST), sums, more, rest)
    measuring = {id(one) for one in nearest[:MEASURED]}
    alone = _left_alone(singles)
    for one, keys in every:
        measured = NUMBERS if not keys and id(one) in measuring else ()
        for other in trials.tried(one.recipe, one.causes[0].name, keys, measured=measured):
            # Two measured numbers may fit what is no attention at all.
            certain = other and (not one.rank == other.rank == 1 or other.left <= EXACT)
            if other and other.explains and certain and _both_are_needed(one, other, alone):
                usual = trials.tried(one.recipe, one.causes[0].name, measured=())
                other = next((u for u in usual if u and u.explains and not u.rank), other)
                both = in_order(*one.causes, *other.causes)
                return Diagnosis(both, other.worst, (), other.recipe), False
            if until.over:
                return None, True
    return None, False


def usual_pairs(
    trials: Trials, singles: list[Trial], seconds: float
) -> tuple[Diagnosis | None, bool]:
    """Any two usual mistakes, however little each alone does; and whether time ran out."""
    if trials.evidence.errors(trials.recipe).get("output", np.inf) <= 1:
        return None, False
    until = Deadline(seconds)
    counts: dict[str, int] = {}
    usual = list[Trial]()
    for one in singles:
        name = one.causes[0].name
        if one.rank == 0 and (name in USUAL or name.endswith(LEFT_OUT)):
            counts[name] = counts.get(name, 0) + 1
            usual += [one] * (counts[name] <= FORMS)
    # With those first that change an early stage, whatever is before the other is known.
    usual.sort(key=lambda one: STAGES.index(one.causes[0].stage))
    alone = _left_alone(singles)
    for at, one in enumerate(usual):
        keys = {other.causes[0].key for other in usual[at + 1 :]}
        for both in trials.tried(one.recipe, None, keys) if keys else ():
            if both is not None and both.explains and _both_are_needed(one, both, alone):
                return Diagnosis(in_order(*one.causes, *both.causes), both.worst, (),
                                 both.recipe), False  # fmt: skip
            if until.over:
                return None, True
    return None, False


def _left_alone(singles: list[Trial]) -> dict[tuple[str, str], float]:
    """What each mistake leaves alone, by its name and detail."""
    return {one.causes[0].key: one.left for one in singles if len(one.causes) == 1}


def _both_are_needed(one: Trial, both: Trial, alone: dict[tuple[str, str], float]) -> bool:
    """Whether two mistakes leave less than each alone; `both` has the causes of the second."""
    lefts = [one.left, *(alone.get(cause.key, np.inf) for cause in both.causes)]
    return both.left <= BESIDE * min(lefts)


def _promising(
    trials: Trials, singles: list[Trial]
) -> Iterator[Iterator[tuple[Trial, set[tuple[str, str]]]]]:
    """Mistakes with those to be tried beside each: pairs along whose effects most lies."""
    seconds = [at for at, one in enumerate(singles) if one.rank == 0]
    if not seconds:
        return (iter(()) for _ in TRANCHES)
    right = sample(trials.evidence.differences(trials.recipe))
    effects = np.stack([one.apart for one in singles]) - right
    one = np.sum(effects * effects, axis=1)
    other = one[seconds]
    both, along = effects @ effects[seconds].T, effects @ right
    one, also = one[:, None], along[seconds]
    part = along[:, None] ** 2 * other - 2 * np.outer(along, also) * both + also**2 * one
    part = part / np.maximum(one * other - both**2, 1e-6 * one * other + 1e-30)
    part = np.round(part / (float(right @ right) or 1.0), 6).reshape(-1)
    part = np.where(np.isnan(part), -np.inf, part)
    most = min(TRANCHES[-1][1], part.size)
    best = np.flatnonzero(part >= np.partition(part, -most)[-most])
    best = best[np.argsort(-part[best], kind="stable")]  # the usual ones stand first

    def tranche(begin: int, end: int) -> Iterator[tuple[Trial, set[tuple[str, str]]]]:
        together: dict[int, set[tuple[str, str]]] = {}
        for at in best[begin:end]:
            first, second = divmod(int(at), len(seconds))
            together.setdefault(first, set()).add(singles[seconds[second]].causes[0].key)
        return ((singles[first], keys) for first, keys in together.items())

    return (tranche(*counts) for counts in TRANCHES)
