"""One framework, in a process of its own: ``python -m benchmarks.worker`` with a job on stdin.

A line of standard output is one JSON object; what frameworks print goes to standard error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.cases import Arrays, Case, Problem, make_problem
from benchmarks.check import change, drops_as, error_beside, error_of
from benchmarks.entries import Entry, Machine, Ready
from benchmarks.measure import available_memory, interleaved, peak_memory
from benchmarks.reference import Reference, make_reference
from benchmarks.results import Timing

SHARE = 0.6
"""The share of the free memory that a peer may need."""

Tell = Callable[[str], None]


def framework_module(name: str) -> Any:
    """The module of a framework's layers."""
    return importlib.import_module(f"benchmarks.frameworks.{name}")


class Judge:
    """Holds each layer of a case against the reference, and against our layer."""

    def __init__(self, problem: Problem) -> None:
        self.case = problem.case
        self.reference: Reference = make_reference(problem)
        self.ours: Arrays = {}
        self.changed: float | None = None

    def error(self, entry: Entry, ready: Ready) -> float:
        """The layer's greatest error, as a share of what is allowed.

        Raises:
            ValueError: its dropout does something else than it should.
        """
        values = ready.values(ready.plain())
        worst = error_of(self.case, values, self.reference)
        if self.ours:
            worst = max(worst, error_beside(self.case, values, self.ours, self.reference))
        elif entry.ours and worst <= 1:
            self.ours = values
        if self.case.dropout:
            changed = change(ready.values(ready.call()), values)
            if self.changed is None and entry.ours:
                self.changed = changed
            if not drops_as(changed, self.changed or changed):
                raise ValueError(f"its dropout changes the output by {changed:.2g}")
        return worst


def run_case(
    module: Any,
    machine: Machine,
    case: Case,
    repeats: int,
    budget: float,
    device: str = "cpu",
    tell: Tell = lambda name: None,
) -> dict[str, Any]:
    """Check and time all layers of a case; gives what `results.CaseResult` is made of."""
    problem = make_problem(case)
    entries, note = _affordable(module.entries(problem, device), case)
    if not entries:
        return {"timings": [], "note": note or f"{case.dtype} is not computed there"}
    judge = Judge(problem)
    found = [_checked(entry, judge, tell) for entry in entries]
    del judge
    ready = [one for _, one, _, fault in found if not fault and one is not None]
    tell("memory")
    memory = [(machine.peak_memory or peak_memory)(one.call) for one in ready]
    tell("times")
    samples = interleaved([one.call for one in ready], repeats, budget)
    measured = iter(zip(memory, samples, strict=True))
    timings = []
    for entry, _, error, fault in found:
        bytes_needed, times = (None, []) if fault else next(measured)
        timings.append(
            Timing(
                entry.layer, entry.form, entry.option, [one.seconds for one in times],
                [one.foreign for one in times], bytes_needed, error, fault,
            ).to_dict()
        )  # fmt: skip
    return {"timings": timings, "note": note}


def _affordable(entries: list[Entry], case: Case) -> tuple[list[Entry], str]:
    """The layers without those that might need more memory than there is."""
    free = available_memory()
    if free is None or case.dense_bytes <= SHARE * free:
        return entries, ""
    kept = [entry for entry in entries if entry.ours]
    if len(kept) == len(entries):
        return entries, ""
    needed = case.dense_bytes / 1e9
    return kept, f"peers left out: they may need {needed:.0f} GB, of {free / 1e9:.0f} free"


def _checked(
    entry: Entry, judge: Judge, tell: Tell
) -> tuple[Entry, Ready | None, float | None, str]:
    """The layer, made and run, its error and what is wrong with it."""
    tell(entry.name)
    try:
        ready = entry.make()
        error = judge.error(entry, ready)
    except Exception as reason:  # one peer that fails leaves the others to be timed
        return entry, None, None, f"{type(reason).__name__}: {_first_line(reason)}"
    if error > 1:
        return entry, None, error, f"other values: an error of {error:.3g} times what is allowed"
    return entry, ready, error, ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def main() -> None:
    """Do the job that standard input describes."""
    job = json.loads(sys.stdin.readline())
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        lines.write(json.dumps(event) + "\n")
        lines.flush()

    module = framework_module(job["framework"])
    machine = module.machine(job["device"])
    tell(event="machine", facts=machine.facts, absent=machine.absent)
    for held in job["cases"]:
        case = Case(**held)
        tell(event="case", case=case.name)
        result = run_case(
            module, machine, case, job["repeats"], job["budget"], job["device"],
            lambda name: tell(event="layer", layer=name),
        )  # fmt: skip
        tell(event="result", **result)
        gc.collect()


if __name__ == "__main__":
    main()
