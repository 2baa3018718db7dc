"""What was measured, and what follows from it: medians, ratios, marks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case
from benchmarks.entries import EXACT, OURS, named
from benchmarks.measure import FOREIGN

ENOUGH = 3
"""Undisturbed samples that are wanted; with fewer, all count, and the number is marked."""


@dataclass(frozen=True)
class Timing:
    """One layer in one case.

    Args:
        layer: Whose it is.
        form: How it runs; "" for eager.
        option: What sets it apart.
        seconds: Of one call, sample by sample.
        foreign: Cores that other processes took during each sample; None where that is not told.
        memory: Bytes that a call needs at its peak; None where that is not told.
        error: The greatest error, as a share of what rounding allows; None if it did not run.
        fault: Why it was not timed; "" if it was.
    """

    layer: str
    form: str = ""
    option: str = ""
    seconds: Sequence[float] = ()
    foreign: Sequence[float | None] = ()
    memory: int | None = None
    error: float | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """All that it is, in words."""
        return named(self.layer, self.form, self.option)

    @property
    def ours(self) -> bool:
        """Whether it is our layer."""
        return self.layer == OURS

    @property
    def clean(self) -> list[float]:
        """The samples during which other processes took next to nothing."""
        pairs = zip(self.seconds, self.foreign, strict=True)
        return [one for one, foreign in pairs if (foreign or 0.0) <= FOREIGN]

    @property
    def disturbed(self) -> bool:
        """Whether too few samples are clean, so that the disturbed ones count as well."""
        return len(self.clean) < min(ENOUGH, len(self.seconds))

    @property
    def median(self) -> float:
        """Seconds of a call; infinite if it was not timed."""
        counted = self.seconds if self.disturbed else self.clean
        return statistics.median(counted) if counted else math.inf

    def to_dict(self) -> dict[str, Any]:
        """All that there is, for JSON."""
        return {
            "name": self.name, "layer": self.layer, "form": self.form, "option": self.option,
            "ours": self.ours, "median": _finite(self.median), "seconds": list(self.seconds),
            "foreign": list(self.foreign), "disturbed": self.disturbed, "memory": self.memory,
            "error": _finite(self.error), "fault": self.fault,
        }  # fmt: skip


def from_dict(found: Mapping[str, Any]) -> Timing:
    """The timing that a worker told."""
    names = ("layer", "form", "option", "seconds", "foreign", "memory", "error", "fault")
    return Timing(**{name: found[name] for name in names})


Picked = Callable[[Timing], bool]


@dataclass(frozen=True)
class CaseResult:
    """All layers of one framework in one case.

    Args:
        framework: "numpy", "torch", "tensorflow" or "jax".
        case: The case.
        timings: The layers.
        note: Why layers are missing; "" if none is.
    """

    framework: str
    case: Case
    timings: Sequence[Timing]
    note: str = ""

    def best(self, picked: Picked, quantity: str = "time") -> Timing | None:
        """The layer that took the least time, or memory, of those that are picked."""
        found = [one for one in self.timings if picked(one) and amount(one, quantity) < math.inf]
        return min(found, key=lambda one: amount(one, quantity), default=None)

    @property
    def best_peer(self) -> Timing | None:
        """The fastest layer of others; where the mode's price is asked, ours without the mode."""
        if self.case.exact:
            return self.best(lambda one: one.ours and not one.option)
        return self.best(lambda one: not one.ours)

    @property
    def best_own(self) -> Timing | None:
        """The fastest of ours, with no option but that of the case."""
        option = EXACT if self.case.exact else ""
        return self.best(lambda one: one.ours and one.option == option)

    @property
    def sound(self) -> bool:
        """Whether our layer gave the right values in all its forms; a note says why none ran."""
        mine = [one for one in self.timings if one.ours]
        ran = bool(mine) or bool(self.note and not self.timings)
        return ran and not any(one.fault for one in mine)

    def to_dict(self) -> dict[str, Any]:
        """All that there is, for JSON."""
        peer = self.best_peer
        rows = [
            one.to_dict() | {"ratio": _finite(ratio(one, peer)), "memory_ratio":
                             _finite(ratio(one, peer, "memory"))}
            for one in self.timings
        ]  # fmt: skip
        return {
            "framework": self.framework, "case": self.case.to_dict(), "note": self.note,
            "best_peer": None if peer is None else peer.name, "layers": rows,
        }  # fmt: skip


def amount(timing: Timing, quantity: str) -> float:
    """Seconds or bytes; infinite where there are none."""
    if quantity == "time":
        return timing.median
    return math.inf if timing.memory is None or timing.fault else float(timing.memory)


def ratio(one: Timing | None, other: Timing | None, quantity: str = "time") -> float | None:
    """How much of the other's time, or memory, one takes; None where either has none.

    Memory that is less than a page counts as a page.
    """
    if one is None or other is None:
        return None
    a, b = amount(one, quantity), amount(other, quantity)
    if not math.isfinite(a) or not math.isfinite(b):
        return None
    return a / b if quantity == "time" else max(a, 4096.0) / max(b, 4096.0)


def spread(one: Timing, other: Timing) -> tuple[float, float]:
    """The quartiles of the ratio of times, round by round: both met the same disturbances."""
    rounds = [a / b for a, b in zip(one.seconds, other.seconds, strict=False)]
    return quartiles(rounds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, method="inclusive")
    return first, third


@dataclass(frozen=True)
class Report:
    """A whole run.

    Args:
        cases: What was measured, framework by framework.
        machines: By framework, what it says about where it runs.
        machine: What is known of the machine, by name.
        options: How the run was called, by name.
        missing: Backends that are not installed.
        failures: By framework, why its process ended early.
        seconds: How long the run took.
    """

    cases: Sequence[CaseResult]
    machines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether everything ran, and our layer gave the right values everywhere."""
        return bool(self.cases) and not self.failures and all(one.sound for one in self.cases)

    @property
    def disturbed(self) -> bool:
        """Whether any number is marked."""
        return any(timing.disturbed for one in self.cases for timing in one.timings)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
