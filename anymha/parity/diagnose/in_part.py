"""One mistake in a part of a call: in some calls, in some sequences, or from some query on."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np

from anymha.parity.diagnose.causes import Diagnosis
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
        singles = [*singles, *filter(None, rounded)]
    # Those whose own results are those of the group come first: all that change no keys are
    # found so, and others change these. Of them what is left out is usual, many variants are not.
    order = [
        (_apart_in(one, group.columns), number, at, one)
        for number, group in enumerate(parts) for at, one in enumerate(singles)
        if len(one.causes) == 1 and not OF_CALLS.search(one.causes[0].detail)
    ]  # fmt: skip
    # Of a group whose own results are right what is written for later ones may be wrong.
    right = [bool(np.all(fitting | ~group.columns)) for group in parts]
    order = [
        each for each in order
        if (each[0] <= SAME_PART and not right[each[1]])
        or each[3].causes[0].stage in ("query", *OF_KEYS)
    ]  # fmt: skip
    order.sort(key=lambda each: (
        each[0] > SAME_PART, not each[3].causes[0].name.endswith(LEFT_OUT),
        each[0] > SAME_PART and each[3].rank, each[0] if each[0] <= SAME_PART else each[1], each[0],
    ))  # fmt: skip
    found: list[tuple[int, Trial]] = []
    until = time.thread_time() + seconds
    for apart, number, at, one in order:
        if time.thread_time() > until or (found and apart > SAME_PART):
            break
        (cause,), group = one.causes, parts[number]
        detail = ", ".join(filter(None, (cause.detail, group.words)))
        wrong = mixed(trials.recipe, one.recipe, group)
        tried = trials.weighed(
            trials.recipe, (replace(cause, detail=detail),), wrong, one.rank
        )  # fmt: skip
        if tried is not None and tried.explains:
            found.append((at, tried))
    # Of those that fit the usual ones in the catalogue's order.
    found.sort(key=lambda one: (one[1].rank, one[0]))
    return best(one for _, one in found)


def _apart_in(one: Trial, columns: np.ndarray) -> float:
    """How far a mistake's own output is from the reported one in a group of columns."""
    if one.columns is None:
        return np.inf
    where = np.broadcast_to(columns, one.columns.shape)
    return float(np.max(one.columns, where=where, initial=0.0))
