"""Mistakes of decoding in a candidate that gives a whole sequence, and may read it in calls.

A function that generates gives the outputs of all positions in the end, as a causal layer does. How
many positions each of its calls reads is not told: usual numbers are assumed; and in short
sequences each call's, with which its own queries fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.decoding_mistakes import MISTAKES
from anymha.parity.diagnose.mistakes import Mistake
from anymha.parity.diagnose.trials import Trial, Trials, best, first_change
from anymha.parity.diagnose.wrong_caches import OF_SLOTS
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Recipe

SAME_QUERY = 1e-4
"""Outputs of a query that differ by no more than this part of the greatest number are alike."""

EACH = 8
"""In sequences up to this length every call is assumed, in longer ones the usual."""

FIRST = 3
"""In so many of the usual ways mistakes with many variants are tried before any other way."""

Sizes = tuple[int, ...]
"""How many positions each call reads."""

Key = tuple[str, str]
"""A mistake's name and detail."""


def as_decoded(trials: Trials, seconds: float) -> Diagnosis | None:
    """The mistake of decoding that gives the reported results, where one does.

    Args:
        trials: Those of a recipe whose sequences are read in one call.
        seconds: How long it may take.
    """
    recipe = trials.recipe
    _, queries, keys = recipe.lengths
    plain = recipe.decoded is recipe.segments is None and not np.any(recipe.offset)
    if not plain or queries != keys or queries < 2 or "output" not in trials.reported:
        return None
    if np.any(recipe.seen & ~np.tri(queries, dtype=bool)):
        return None  # what sees later positions is not decoded
    every = [Mistake(*row) for row in MISTAKES]
    few, many = ([one for one in every if one.alone == alone] for alone in (False, True))
    fits = trials.evidence.fitting(recipe).all(0)
    usual = [*dict.fromkeys(_usual(queries, 0 if fits.all() else int(np.argmin(fits))))]
    search = _Search(trials, Deadline(seconds))
    for mistakes, ways in (few, usual), (many, usual[:FIRST]):
        for sizes in ways:
            found = search.best(sizes, mistakes)
            if found is not None or search.late:
                return found
    if queries <= EACH:
        for sizes, known in search.one_by_one(queries):
            found = search.best(sizes, few, known)
            if found is not None or search.late:
                return found
    return next(filter(None, (search.best(sizes, many) for sizes in usual[FIRST:])), None)


def _usual(length: int, prompt: int) -> Iterator[Sizes]:
    """The usual ways to read so many positions, first those with a prompt whose length is known."""
    yield (1,) * length
    lengths = [n for n in range(2, length) if n <= 8 or n & (n - 1) == 0]
    prompts = [*dict.fromkeys(n for n in (prompt, *lengths) if 1 < n < length)]
    yield from ((n, *(1,) * (length - n)) for n in prompts[:1])
    if 0 < prompt < length:
        yield prompt, length - prompt
    for n in lengths if length > 3 else ():
        yield (*(n,) * (length // n), *(length % n,) * (length % n > 0))
    yield from ((n, *(1,) * (length - n)) for n in prompts[1:])


class _Search:
    """Tries mistakes of decoding with assumed calls, and keeps where the queries of a call fit."""

    def __init__(self, trials: Trials, until: Deadline) -> None:
        self._trials, self._until = trials, until
        # The calls, from a position to another, whose queries fit
        self._fitting: dict[Key, set[tuple[int, int]]] = {}
        self._whole: set[Sizes] = set()  # The sizes of which all mistakes are tried

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self._until.over

    def best(
        self, sizes: Sizes, mistakes: Sequence[Mistake], only: Collection[Key] | None = None
    ) -> Diagnosis | None:
        """The diagnosis of the mistakes that explain the results if calls have these sizes.

        With `only` those of these names and details alone.
        """
        recipe = self._trials.recipe
        calls = np.repeat(np.arange(len(sizes)), sizes)
        facts = Decoded(np.ones(recipe.lengths[:2], bool), calls)
        # Padding is written, and hidden as it is read.
        masks = {OF_SLOTS if n == "value_mask" else n: m for n, m in recipe.masks.items()}
        base = recipe.but(decoded=facts, masks=masks)
        found: list[Trial] = []
        if only is None:
            self._whole.add(sizes)
        names = None if only is None else {name for name, _ in only}
        for mistake in mistakes:
            wanted = names is None or mistake.name in names
            for detail, wrong in mistake.variants(base) if wanted and not self.late else ():
                key = mistake.name, detail
                if (only is None or key in only) and self._is_near(sizes, key, wrong):
                    found += self._weighed(base, mistake, detail, wrong, sizes)
        return best(found)

    def _is_near(self, sizes: Sizes, key: Key, wrong: Recipe) -> bool:
        """Whether all queries fit nearly; those of which calls do is kept."""
        with np.errstate(all="ignore"):
            try:
                columns = self._trials.evidence.columns(wrong)
            except (ValueError, IndexError):
                return False
        if columns is None:
            return False
        fits = np.all(columns <= SAME_QUERY, axis=0)
        if fits.any() and not fits.all():
            ends = np.cumsum(sizes)
            within = {(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)
                      if fits[end - size : end].all()}  # fmt: skip
            self._fitting.setdefault(key, set()).update(within)
        return bool(fits.all())

    def _weighed(
        self, base: Recipe, mistake: Mistake, detail: str, wrong: Recipe, sizes: Sizes
    ) -> list[Trial]:
        stage = first_change(base, wrong)
        if stage is None:
            return []
        words = ", ".join(filter(None, (detail, _words(sizes))))
        cause = Cause(mistake.name, words, stage, mistake.fix)
        one = self._trials.weighed(base, (cause,), wrong, 0, whole=True)
        return [] if one is None else [one]

    def one_by_one(self, length: int) -> Iterator[tuple[Sizes, set[Key]]]:
        """Calls of which each is assumed, with the mistakes that fit before it; and those joined.

        Whether the queries of a call fit depends on no later call.
        """
        for begin in range(1, length):
            for end in range(begin + 2, length + 1):
                reaching: dict[Sizes, set[Key]] = {}
                for key in self._fitting:
                    before = self._fewest(key, begin)
                    if before:
                        reaching.setdefault(before, set()).add(key)
                for before, keys in reaching.items():
                    sizes = (*before, end - begin, *(1,) * (length - end))
                    if sizes not in self._whole:
                        yield sizes, keys
        for key in [*self._fitting]:
            sizes = self._fewest(key, length)
            if sizes is not None and len(sizes) > 1:
                yield sizes, {key}

    def _fewest(self, key: Key, until: int) -> Sizes | None:
        """The fewest calls up to a position whose queries all fit; None where none do."""
        fewest: dict[int, Sizes] = {0: ()}
        for at in range(1, until + 1):
            ways = [(*fewest[b], e - b) for b, e in self._fitting[key] if e == at and b in fewest]
            if ways:
                fewest[at] = min(ways, key=lambda sizes: (len(sizes), sizes))
        return fewest.get(until)


def _words(sizes: Sizes) -> str:
    """How sequences are read, in words."""
    first, *rest = sizes
    if {*sizes} == {1}:
        return "as of decoding one position at a time"
    if {*rest} == {1}:
        return f"as of decoding {first} positions first, then one at a time"
    if len(sizes) > 2 and {*sizes[:-1]} == {first} and sizes[-1] <= first:
        return f"as of decoding {first} positions at a time"
    return f"as of decoding in calls of {listed([*map(str, sizes)])} positions"
