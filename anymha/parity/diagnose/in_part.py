"""One mistake in a part of a call: in some calls, in some sequences, or from some query on."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from anymha.parity.diagnose.causes import Diagnosis
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.mistakes import LEFT_OUT
from anymha.parity.diagnose.mixed import OF_KEYS, groups, mixed
from anymha.parity.diagnose.precision import rounded_alone
from anymha.parity.diagnose.trials import Trial, Trials, best

SAME_PART = 1e-3
"""Outputs that differ by no more than this part of the greatest number are alike in a group of
columns. Once a mistake is found, only those whose outputs are alike are tried too."""

SMALL = 0.02
"""Relative differences up to this are small."""

OF_CALLS = re.compile("calls|(first|last|second|each) call")
"""What mistakes say that are in some calls themselves."""


class _Try(NamedTuple):
    """A mistake to be tried in a group of columns."""

    apart: float  # how far its own output is from the reported one in the group
    group: int  # the number of the group
    at: int  # its place among the mistakes
    trial: Trial

    @property
    def is_alike(self) -> bool:
        """Whether its own output is the reported one in the group."""
        return self.apart <= SAME_PART

    def order(self) -> tuple[Any, ...]:
        """What is tried first: what is alike, which finds all that change no keys.

        Of the others first what is left out, and what has no many variants.
        """
        left_out = self.trial.causes[0].name.endswith(LEFT_OUT)
        if self.is_alike:
            return False, not left_out, 0, self.apart
        return True, not left_out, self.trial.rank, self.group, self.apart


def in_a_part(trials: Trials, singles: list[Trial], seconds: float) -> Diagnosis | None:
    """One mistake in some calls alone, in some sequences, or from some query on."""
    fitting = trials.evidence.fitting(trials.recipe)
    # A group that is all that is wrong comes first.
    parts = sorted(groups(trials.recipe, fitting), key=lambda one: np.any(one.columns == fitting))
    if parts and trials.before < SMALL:
        rounded = (
            trials.weighed(trials.recipe, (cause,), wrong, 1)
            for cause, wrong in rounded_alone(trials.recipe, trials.evidence)
        )
        singles = [*singles, *trials.completed(filter(None, rounded))]
    # Of a group whose own results are right, what it writes for later ones may be wrong.
    right = [bool(np.all(fitting | ~group.columns)) for group in parts]
    tries = [
        _Try(_apart_in(one, group.columns), number, at, one)
        for number, group in enumerate(parts) for at, one in enumerate(singles)
        if len(one.causes) == 1 and not OF_CALLS.search(one.causes[0].detail)
    ]  # fmt: skip
    tries = [
        one for one in tries
        if (one.is_alike and not right[one.group])
        or one.trial.causes[0].stage in ("query", *OF_KEYS)
    ]  # fmt: skip
    found: list[_Try] = []
    until = Deadline(seconds)
    for one in sorted(tries, key=_Try.order):
        if until.over or (found and not one.is_alike):
            break
        (cause,), group = one.trial.causes, parts[one.group]
        cause = replace(cause, detail=", ".join(filter(None, (cause.detail, group.words))))
        wrong = mixed(trials.recipe, one.trial.recipe, group)
        tried = trials.weighed(trials.recipe, (cause,), wrong, one.trial.rank)
        if tried is not None and tried.explains:
            found.append(one._replace(trial=tried))
    # Of those that fit the usual ones in the catalogue's order.
    found.sort(key=lambda one: (one.trial.rank, one.at))
    return best(one.trial for one in found)


def _apart_in(one: Trial, columns: np.ndarray) -> float:
    """How far a mistake's own output is from the reported one in a group of columns."""
    if one.columns is None:
        return np.inf
    where = np.broadcast_to(columns, one.columns.shape)
    return float(np.max(one.columns, where=where, initial=0.0))
