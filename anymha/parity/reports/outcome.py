"""The outcome of each comparison: it ran to its end, an implementation raised, or it cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anymha.parity.reports.result import ComparisonResult, state_of

SCHEMA = "anymha.comparisons/1"


@dataclass(frozen=True)
class Outcome:
    """One comparison of several."""

    case: str  # The name of its inputs; empty where there is one alone
    reference: str  # The name of what is right
    candidate: str  # The name of what is judged
    # The result; None where there is none
    result: ComparisonResult | None = field(default=None, repr=False)
    error: str | None = None  # The error that an implementation raised
    reason: str | None = None  # Why it could not be run
    # Whether it was not run because the implementations are not made for such a call: parity can
    # hold without it
    left_out: bool = False

    @property
    def state(self) -> str:
        """One of "agrees", "differs", "error" and "not run"."""
        if self.result is not None:
            return "agrees" if self.result.passed else "differs"
        return "error" if self.error is not None else "not run"

    @property
    def title(self) -> str:
        """Candidate, reference and case."""
        on = f", {self.case}" if self.case else ""
        return f"{self.candidate} against {self.reference}{on}"

    @property
    def summary(self) -> str:
        """The outcome in a line, without the names."""
        result = self.result
        if result is None:
            return f"raised {self.error}" if self.error is not None else f"not run: {self.reason}"
        if result.passed:
            return f"agrees in {len(result.stages)} quantities"
        return f"parts at {result.first_divergence}: {result.diagnosis}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        head = {"case": self.case, "state": self.state}
        if self.result is None:
            return {**head, "reference": self.reference, "candidate": self.candidate,
                    "error": self.error, "reason": self.reason}  # fmt: skip
        return {**head, **self.result.to_dict()}


def verdict(outcomes: Sequence[Outcome]) -> str:
    """One line for all of them."""
    if len(outcomes) == 1 and outcomes[0].result is not None:
        return outcomes[0].result.verdict
    ran = [one for one in outcomes if one.state != "not run"]
    failed = [one for one in ran if one.state != "agrees"]
    missing = not_run(outcomes)
    left = len(outcomes) - len(ran) - len(missing)
    more = f"; {left} do{'es' * (left == 1)} not apply" if left else ""
    if not ran:
        return f"PARITY IS NOT SHOWN: none of {len(outcomes)} comparisons could be run"
    if failed:
        places = dict.fromkeys(one.case for one in failed if one.case)
        where = f", on {', '.join(places)}" if places else ""
        more = f"; {len(missing)} could not be run{more}" if missing else more
        return f"PARITY DOES NOT HOLD: {len(failed)} of {_counted(len(ran))} differ{where}{more}"
    agree = f"{_counted(len(ran))} agree{'s' if len(ran) == 1 else ''}"
    if missing:
        cases = ", ".join(dict.fromkeys(one.case or "the case" for one in missing))
        return (f"PARITY IS NOT SHOWN: {agree}, but {cases} could not be run: "
                f"{missing[0].reason}{more}")  # fmt: skip
    return f"PARITY HOLDS: {agree}{more}"


def not_run(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The comparisons that could not be run, and without which parity is not shown."""
    return [one for one in outcomes if one.state == "not run" and not one.left_out]


def passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether at least one comparison ran, all that ran agree, and none was missed."""
    ran = [one for one in outcomes if one.state != "not run"]
    return bool(ran) and all(one.state == "agrees" for one in ran) and not not_run(outcomes)


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 where parity holds; 1 where it does not, or nothing ran; 3 where some could not be run."""
    if passed(outcomes):
        return 0
    states = {one.state for one in outcomes}
    return 3 if "agrees" in states and not states & {"differs", "error"} else 1


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Several comparisons, for JSON."""
    return {
        "schema": SCHEMA,
        "passed": passed(outcomes),
        "verdict": verdict(outcomes),
        "comparisons": [one.to_dict() for one in outcomes],
    }


def pairs(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes by reference and candidate, in order."""
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        grouped.setdefault((one.reference, one.candidate), []).append(one)
    return grouped


def stage_words(result: ComparisonResult, name: str) -> str:
    """How a stage stands, in words; empty where it is right."""
    state = state_of(result, name)
    reported = [stage.name for stage in result.stages]
    wrong = next((stage.name for stage in result.stages if stage.culprit), None)
    if state == "own" and result.first_divergence not in reported and name == wrong:
        return "shows it first"
    words = {
        "first": "first divergence", "own": "wrong itself", "carried": "follows",
        "good": "", "unreported": "not reported",
    }  # fmt: skip
    return words[state]


def _counted(number: int) -> str:
    return f"{number} comparison{'s' * (number != 1)}"
