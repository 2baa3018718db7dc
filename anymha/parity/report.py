"""What a comparison found, and the forms in which it is told."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anymha.interchange.files.whole import write_whole
from anymha.parity.diagnosis import Diagnosis
from anymha.parity.stagewise import Stage
from anymha.parity.trace import Request, Trace

SCHEMA = "anymha.compare/1"


@dataclass(frozen=True)
class Comparison:
    """Two implementations on the same inputs.

    Args:
        reference: The name of what is right.
        candidate: The name of what is judged.
        stages: What was compared, in order: stages, scores, weights, gradients.
        first_divergence: The first stage that is wrong itself; None where all agree.
        diagnosis: Why they differ; None where they do not.
        untested: Features of the call that change nothing with these inputs.
        notes: What a reader should know.
        request: The call.
        traces: What both gave.
        honest: The reference's stages in float64.
        told: The candidate's, as far as it told them.
    """

    reference: str
    candidate: str
    stages: tuple[Stage, ...]
    first_divergence: str | None
    diagnosis: Diagnosis | None
    untested: tuple[str, ...]
    notes: tuple[str, ...]
    request: Request = field(repr=False)
    traces: tuple[Trace, Trace] = field(repr=False)
    honest: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    told: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        """Whether all that was compared agrees."""
        return self.first_divergence is None

    @property
    def verdict(self) -> str:
        """One line that says how it went."""
        both = f"{self.candidate} and {self.reference}"
        if self.passed:
            worst = max(self.stages, key=lambda s: s.units / s.budget if s.budget else 0.0)
            return (f"PARITY HOLDS: {both} agree in {len(self.stages)} quantities; {worst.name} is "
                    f"{worst.units:.2g} units of rounding off, {worst.budget:.2g} may")  # fmt: skip
        return f"PARITY DOES NOT HOLD: {both} part at {self.first_divergence}: {self.diagnosis}"

    def to_text(self) -> str:
        """The verdict, every stage, the cause and its cure, in plain text."""
        lines = [self.verdict, ""]
        lines.append(
            f"  {'stage':28} {'error':>10} {'own error':>10} {'may':>8}  units of rounding"
        )
        for stage in self.stages:
            mark = "->" if stage.name == self.first_divergence else "  "
            state = "" if stage.passed else "  differs"
            numbers = (stage.units, stage.own_units, stage.budget)
            told = " ".join(f"{_short(n):>{w}}" for n, w in zip(numbers, (10, 10, 8), strict=True))
            faults = "".join(f"; {fault}" for fault in stage.faults)
            lines.append(f"{mark}{stage.name:28} {told}{state}{faults}")
        if self.diagnosis is not None:
            lines += ["", f"Cause: {self.diagnosis}"]
            lines += [f"  {cause.cure}" for cause in self.diagnosis.causes]
        lines += [f"Not tested by these inputs: {words}" for words in self.untested]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, for JSON."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "verdict": self.verdict,
            "reference": self.reference,
            "candidate": self.candidate,
            "first_divergence": self.first_divergence,
            "diagnosis": None if self.diagnosis is None else _diagnosis(self.diagnosis),
            "stages": [_stage(stage) for stage in self.stages],
            "untested": list(self.untested),
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path) -> None:
        """Write everything but the arrays as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_whole(Path(path), text + "\n")

    def noting(self, *notes: str) -> Comparison:
        """The same with further notes."""
        return replace(self, notes=(*self.notes, *notes))


def _short(number: float) -> str:
    return "inf" if math.isinf(number) else f"{number:.3g}"


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _stage(stage: Stage) -> dict[str, Any]:
    numbers = ("error", "own_error", "units", "own_units", "unit", "budget", "ratio")
    return {
        "name": stage.name,
        "passed": stage.passed,
        "culprit": stage.culprit,
        **{name: _finite(getattr(stage, name)) for name in numbers},
        "faults": list(stage.faults),
        "at": list(stage.at),
        "values": None if stage.values is None else [_finite(v) for v in stage.values],
    }


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "explained": diagnosis.explained,
        "told": str(diagnosis),
        "causes": [
            {"name": c.name, "detail": c.detail, "stage": c.stage, "cure": c.cure}
            for c in diagnosis.causes
        ],
        "remaining": _finite(diagnosis.remaining),
        "alternatives": list(diagnosis.alternatives),
    }
