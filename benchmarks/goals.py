"""What the layer is meant to reach, and whether it does.

A goal of 1.0 means: as fast as. Absolute times hold for the machine on which they were set, two
cores of an AMD EPYC (Zen 4) at 3.7 GHz without AVX-512.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.entries import NATIVE
from benchmarks.results import CaseResult, Timing, amount, ratio, spread

ANY = "best peer"
UNITS = {"us": 1e6, "MB": 1 / 1e6}


@dataclass(frozen=True)
class Goal:
    """One goal.

    Args:
        framework: Of which framework; "" for each.
        case: In which case.
        limit: What our layer may take at the most: a share of the peer's, or an amount.
        against: The peer, by the beginning of its name; "best peer"; or our own layer with an
            option, as "native dropout". "" for an amount.
        quantity: "time", "memory", "us" (microseconds) or "MB".
        form: How our layer runs: "eager", "compiled" or, for its best, "".
        theirs: How the peer runs, likewise.
    """

    framework: str
    case: str
    limit: float
    against: str = ANY
    quantity: str = "time"
    form: str = ""
    theirs: str = ""

    @property
    def told(self) -> str:
        """What is compared with what, in words."""
        how = f"{self.form} " if self.form else ""
        if not self.against:
            return {"us": f"{how}microseconds", "MB": f"{how}peak MB"}[self.quantity]
        what = "memory, " if self.quantity == "memory" else ""
        other = f" {self.theirs}" if self.theirs else ""
        return f"{what}{how}against{other} {self.against}"


@dataclass(frozen=True)
class Verdict:
    """How a goal stands.

    Args:
        goal: The goal.
        framework: Where.
        value: What was measured.
        met: Whether it is no more than the goal.
        close: Whether the goal lies within the middle half of what the rounds gave.
    """

    goal: Goal
    framework: str
    value: float
    met: bool
    close: bool

    def to_dict(self) -> dict[str, Any]:
        """All that there is, for JSON."""
        return {
            "framework": self.framework, "case": self.goal.case, "compared": self.goal.told,
            "limit": self.goal.limit, "value": self.value, "met": self.met, "close": self.close,
        }  # fmt: skip


def _goals() -> Iterator[Goal]:
    sdpa, module = "Linear + SDPA", "torch.nn.MultiheadAttention"
    shares: dict[str, dict[str, dict[str, float]]] = {
        "numpy": {
            "s128": {ANY: 0.95}, "m1k": {ANY: 0.75}, "m1k-causal": {ANY: 0.55},
            "m1k-bool": {ANY: 0.60}, "m1k-padding": {ANY: 0.66}, "m1k-scores": {ANY: 0.95},
            "l4k": {ANY: 0.50}, "l4k-causal": {ANY: 0.28}, "m1k-modern": {ANY: 1.1},
        },
        "torch": {
            "s128": {sdpa: 1.0, module: 0.90},
            "m1k": {sdpa: 1.0, module: 0.65},
            "m1k-causal": {sdpa: 1.0, module: 0.35, "keras": 0.75},
            "m1k-bool": {sdpa: 1.0, module: 0.33},
            "m1k-padding": {sdpa: 1.0, module: 0.42},
            "m1k-scores": {ANY: 1.0},
            "m1k-bfloat16": {sdpa: 1.0}, "m1k-modern": {ANY: 1.1},
            "l4k": {sdpa: 1.0, module: 0.57},
            "l4k-causal": {sdpa: 1.0, module: 0.20},
            "m1k-train": {sdpa: 1.0, module: 0.97},
            "m1k-train-dropout": {ANY: 0.70},
        },
        "tensorflow": {
            "s128": {"keras, XLA": 0.95, "keras, tf.function": 0.65},
            "m1k": {"keras": 0.75, "tf.matmul": 0.96},
            "m1k-causal": {"keras": 0.62}, "m1k-bool": {"keras": 0.90},
            "m1k-padding": {"keras": 0.90}, "m1k-scores": {ANY: 1.0},
            "m1k-bfloat16": {ANY: 0.95}, "m1k-modern": {ANY: 1.1},
            "l4k": {"keras": 0.75}, "l4k-causal": {"keras": 0.55},
            "m1k-train": {ANY: 1.0}, "m1k-train-dropout": {ANY: 0.85},
        },
        "jax": {
            "s128": {ANY: 0.85}, "m1k": {ANY: 0.65}, "m1k-causal": {ANY: 0.65},
            "m1k-bool": {ANY: 0.65}, "m1k-padding": {ANY: 0.67}, "m1k-scores": {ANY: 0.95},
            "m1k-bfloat16": {ANY: 0.60}, "m1k-modern": {ANY: 1.1},
            "l4k": {ANY: 0.50}, "l4k-causal": {ANY: 0.37},
            "m1k-train": {ANY: 0.75}, "l4k-train": {ANY: 0.64}, "m1k-train-dropout": {ANY: 0.70},
        },
    }  # fmt: skip
    for framework, cases in shares.items():
        for case, peers in cases.items():
            for against, limit in peers.items():
                yield Goal(framework, case, limit, against)
    memory = {
        ("numpy", "l4k"): {ANY: 0.08},
        ("torch", "l4k"): {module: 0.08, sdpa: 1.0},
        ("torch", "m1k-train-dropout"): {ANY: 0.3},
        ("tensorflow", "l4k"): {ANY: 0.4},
        ("jax", "l4k"): {"flax": 0.05},
        ("jax", "m1k-train"): {ANY: 0.2},
        ("jax", "m1k-train-dropout"): {ANY: 0.25},
    }
    for (framework, case), peers in memory.items():
        for against, limit in peers.items():
            yield Goal(framework, case, limit, against, "memory")
    yield Goal("", "x8k", 100.0, "", "MB")
    for case in ("s128-train-dropout", "m1k-train-dropout"):
        yield Goal("", case, 1.05, NATIVE)
    for framework, limit in (("numpy", 50), ("torch", 65), ("tensorflow", 650), ("jax", 130)):
        yield Goal(framework, "tiny", limit, "", "us", "eager")
    for framework, limit in (("tensorflow", 480), ("jax", 75)):
        yield Goal(framework, "tiny", limit, "", "us", "compiled")
        yield Goal(framework, "tiny", 1.33, ANY, "time", "eager", "compiled")


GOALS = tuple(_goals())


def judge(result: CaseResult, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """The goals of a case that can be told from what was measured."""
    fitting = [g for g in goals if g.case == result.case.name]
    fitting = [g for g in fitting if g.framework in ("", result.framework)]
    found = [_judged(result, goal) for goal in fitting]
    return [verdict for verdict in found if verdict is not None]


def _judged(result: CaseResult, goal: Goal) -> Verdict | None:
    quantity = "memory" if goal.quantity in ("memory", "MB") else "time"
    mine = result.best(lambda one: one.ours and not one.option and _runs(one, goal.form), quantity)
    if mine is None:
        return None
    if not goal.against:
        value = amount(mine, quantity) * UNITS[goal.quantity]
        return Verdict(goal, result.framework, value, value <= goal.limit, False)
    other = result.best(lambda one: _is(one, goal), quantity)
    value = ratio(mine, other, quantity)
    if other is None or value is None:
        return None
    low, high = spread(mine, other) if quantity == "time" else (math.inf, -math.inf)
    return Verdict(goal, result.framework, value, value <= goal.limit, low <= goal.limit <= high)


def _runs(timing: Timing, form: str) -> bool:
    return not form or (form == "compiled") == bool(timing.form)


def _is(timing: Timing, goal: Goal) -> bool:
    """Whether it is what the goal compares with."""
    if timing.ours:
        return timing.option == goal.against
    return _runs(timing, goal.theirs) and (
        goal.against == ANY or timing.name.startswith(goal.against)
    )
