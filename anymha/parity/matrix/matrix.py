"""Every case on every backend, judged, as one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.framework.registry import Backend
from anymha.parity.matrix.checkpoint import CheckpointProblem
from anymha.parity.matrix.judge import Row, judge
from anymha.parity.matrix.run import Result, Skipped, lacking_dtype, run
from anymha.parity.oracle.cases import OracleProblem
from anymha.parity.oracle.truth import expected
from anymha.parity.reports.environment import installed_versions, own_versions

Progress = Callable[[str, str], None]
"""Takes the names of the case and the backend that come next."""


@dataclass(frozen=True)
class AttentionMap:
    """The attention map of a real sentence."""

    layer: str
    tokens: Sequence[str]  # The T tokens
    scores: np.ndarray  # (H, T, T) probabilities


@dataclass(frozen=True)
class MatrixReport:
    """The result of the matrix of cases, and of a checkpoint's layers."""

    backends: Sequence[str]  # The backends that ran
    missing: Sequence[str]  # Backends that are not installed
    rows: Sequence[Row]  # The cases of the matrix
    real: Sequence[Row] = ()  # The layers of the checkpoint
    maps: Sequence[AttentionMap] = ()  # Attention maps of the real sentence
    seconds: float = 0.0  # How long it took
    versions: dict[str, str] = field(default_factory=dict)  # By package

    @property
    def passed(self) -> bool:
        """Whether there are cases that ran, and every one passes on every backend that ran it."""
        every = [*self.rows, *self.real]
        return any(row.cells for row in every) and all(row.passed for row in every)

    @property
    def skipped(self) -> dict[tuple[str, str], list[str]]:
        """The names of the cases that were skipped, by backend and reason."""
        names: dict[tuple[str, str], list[str]] = {}
        for row in (*self.rows, *self.real):
            for backend, reason in row.skipped.items():
                names.setdefault((backend, reason), []).append(row.name)
        return names

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        every = [*self.rows, *self.real]
        failed = [row.name for row in every if not row.passed]
        where = f"{counted_cases(len(every))} on {', '.join(self.backends)}"
        if failed:
            named = "; ".join(failed[:5]) + (f" and {len(failed) - 5} more" if failed[5:] else "")
            return f"PARITY DOES NOT HOLD: {len(failed)} of {where} fail: {named}"
        exact = [row for row in every if row.reproducible]
        differing, compared = sum(r.differing for r in exact), sum(r.compared for r in exact)
        tied = f", {'a tie' if differing == 1 else 'ties'}" if differing else ""
        same = f"; in reproducible mode {differing:,} of {compared:,} elements differ{tied}"
        counts: dict[str, int] = {}
        for (backend, _), names in self.skipped.items():
            counts[backend] = counts.get(backend, 0) + len(names)
        skipped = "".join(f"; {n} of them skipped on {backend}" for backend, n in counts.items())
        if not self.passed:
            return f"PARITY DOES NOT HOLD: no case ran{skipped}"
        return f"PARITY HOLDS: {where}{skipped}" + (same if compared else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps, for JSON."""
        return {
            "schema": "anymha.parity/1",
            "passed": self.passed,
            "verdict": self.verdict,
            "backends": list(self.backends),
            "missing": list(self.missing),
            "versions": self.versions,
            "seconds": round(self.seconds, 1),
            "cases": [row.to_dict() for row in self.rows],
            "checkpoint": [row.to_dict() for row in self.real],
        }


def counted_cases(number: int) -> str:
    """How many cases, in words: "1 case", "2 cases"."""
    return f"{number} case" if number == 1 else f"{number} cases"


def run_case(
    backends: Sequence[Backend], problem: OracleProblem, progress: Progress
) -> dict[str, Any]:
    """The results of each backend, why it skips the problem, or what it raised."""
    results: dict[str, Result | Skipped | Exception] = {}
    for backend in backends:
        progress(problem.case.name, backend.name)
        try:
            reason = lacking_dtype(backend.ops, problem)
            results[backend.name] = Skipped(reason) if reason else run(backend, problem)
        except Exception as error:  # a broken backend fails its cell, not the run
            results[backend.name] = error
    return results


def run_matrix(
    backends: Sequence[Backend],
    problems: Iterable[OracleProblem | CheckpointProblem],
    progress: Progress,
) -> list[Row]:
    """Each problem on each backend, judged."""
    rows = []
    for item in problems:
        problem = item.problem if isinstance(item, CheckpointProblem) else item
        recorded = item.recorded if isinstance(item, CheckpointProblem) else None
        results = run_case(backends, problem, progress)
        rows.append(judge(problem, expected(problem), results, recorded))
    return rows


def attention_map(real: CheckpointProblem, tokens: Sequence[str], sentence: int) -> AttentionMap:
    """The oracle's attention map of one sentence."""
    scores = expected(real.problem).scores[sentence, :, : len(tokens), : len(tokens)]
    return AttentionMap(real.layer, tokens, scores)


def versions(backends: Sequence[Backend]) -> dict[str, str]:
    """The versions of anymha, Python and the frameworks."""
    return own_versions() | installed_versions(backend.framework for backend in backends)
