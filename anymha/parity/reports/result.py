"""The result of a comparison: the data that every form of the report shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.parity.diagnose.diagnosis import Diagnosis
from anymha.parity.reports.environment import Environment, environment
from anymha.parity.stages.stagewise import Stage
from anymha.parity.stages.trace import INPUTS, STAGES, Request, Trace, name_of_dtype

SCHEMA = "anymha.compare/1"

NAMES = {
    "torch.nn.MultiheadAttention": "torch.MultiheadAttention",
    "keras.layers.MultiHeadAttention": "keras.MultiHeadAttention",
    "keras.layers.GroupedQueryAttention": "keras.GroupQueryAttention",
    "flax.nnx.MultiHeadAttention": "flax.nnx.MultiHeadAttention",
    "equinox.nn.MultiheadAttention": "equinox.MultiheadAttention",
}
"""The command's names of other libraries' layers."""


@dataclass(frozen=True)
class ComparisonResult:
    """Two implementations on the same inputs, as data; see `anymha.parity.Comparison`."""

    reference: str
    candidate: str
    stages: tuple[Stage, ...]
    first_divergence: str | None
    diagnosis: Diagnosis | None
    not_exercised: tuple[str, ...]
    notes: tuple[str, ...]
    request: Request = field(repr=False)
    traces: tuple[Trace, Trace] = field(repr=False)
    exact: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    reported: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    command_names: tuple[str, str] | None = None
    environment: Environment = field(default_factory=environment, repr=False)

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
            off = f"{worst.units:.2g} units of rounding off, of {worst.budget:.2g} allowed"
            count = "one quantity" if len(self.stages) == 1 else f"{len(self.stages)} quantities"
            return f"PARITY HOLDS: {both} agree in {count}; {worst.name} is {off}"
        return f"PARITY DOES NOT HOLD: {both} part at {self.first_divergence}: {self.diagnosis}"

    @property
    def advice(self) -> str:
        """Advice where the two have different weights; else empty."""
        names = [s.name.removeprefix("weight ") for s in self.stages if s.name[:7] == "weight "]
        causes = () if self.diagnosis is None else self.diagnosis.causes
        if not names or any(cause.stage.startswith("weight ") for cause in causes):
            return ""
        return f"Their weights differ: {', '.join(names)}. Give both the same, and compare again."

    def repeat_command(self, file: str = "case.npz") -> str:
        """The command that repeats the case.

        Args:
            file: What the case was saved as.
        """
        names = self.command_names or tuple(_name(trace) for trace in self.traces)
        return f"anymha compare {' '.join(names)} --inputs {file}"

    def arrays(self, stage: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The reference's and the candidate's numbers of a stage, where they have one shape."""
        first, second = self.traces
        exact = self.exact.get("probabilities" if stage == "scores" else stage)
        own = {**first.stages, "scores": first.scores}.get(stage)
        one = exact if own is None else own
        other = {**second.stages, "scores": second.scores, **self.reported}.get(stage)
        if stage == "output":
            one, other = first.output, second.output
        if one is None or other is None or one.shape != other.shape:
            return None
        return one.astype(np.float64), other.astype(np.float64)

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
            "untested": list(self.not_exercised),
            "notes": list(self.notes),
            "call": call_in_words(self.request),
            "command": self.repeat_command(),
            "versions": self.environment.versions,
            "flags": self.environment.flags,
        }

    def to_text(self) -> str:
        """The verdict, every stage, the cause and its fix, in plain text."""
        lines = [self.verdict, ""]
        lines.append(
            f"  {'stage':28} {'error':>10} {'own error':>10} {'may':>8}  units of rounding"
        )
        for stage in self.stages:
            mark = "->" if stage.name == self.first_divergence else "  "
            state = "" if stage.passed else "  differs"
            numbers = (stage.units, stage.own_units, stage.budget)
            columns = " ".join(
                f"{short(n):>{w}}" for n, w in zip(numbers, (10, 10, 8), strict=True)
            )
            faults = "".join(f"; {fault}" for fault in stage.faults)
            lines.append(f"{mark}{stage.name:28} {columns}{state}{faults}")
        if self.diagnosis is not None:
            lines += ["", f"Cause: {self.diagnosis}"]
            lines += [f"  {cause.fix}" for cause in self.diagnosis.causes]
        lines += [self.advice] if self.advice else []
        lines += [f"Not exercised by these inputs: {words}" for words in self.not_exercised]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)


def state_of(result: ComparisonResult, name: str) -> str:
    """How a stage stands.

    "first" where the implementations part; "own" where it is wrong itself, after that; "carried"
    where it differs by what came before; "good"; "unreported" where the candidate does not report
    it.
    """
    stage = next((stage for stage in result.stages if stage.name == name), None)
    if name == result.first_divergence:
        return "first"
    if stage is None:
        return "unreported"
    if stage.culprit and not name.startswith("gradient of "):  # theirs is never known alone
        return "own"
    return "good" if stage.passed else "carried"


def shown_stages(result: ComparisonResult) -> list[tuple[str, Stage | None]]:
    """All stages in order, also unreported ones; then the scores, the weights, the gradients."""
    by_name = {stage.name: stage for stage in result.stages}
    names = [*STAGES, *(name for name in by_name if name not in STAGES)]
    if result.first_divergence is not None and result.first_divergence not in names:
        names.append(result.first_divergence)
    return [(name, by_name.get(name)) for name in names]


def short(number: float | None) -> str:
    """A number in a few signs."""
    if number is None:
        return "-"
    return "0" if abs(number) < 1e-12 else f"{number:.3g}"


def call_in_words(request: Request) -> dict[str, str]:
    """The call's arguments in words: arrays by shape and dtype, the rest by value."""
    arrays = {**request.inputs, **request.masks}
    if request.bias is not None:
        arrays["attention_bias"] = request.bias
    words = {name: f"{name_of_dtype(array)} {array.shape}" for name, array in arrays.items()}
    ordered = sorted(words, key=lambda name: INPUTS.index(name) if name in INPUTS else len(INPUTS))
    call = request.call.items()
    rest = {n: str(v.tolist() if isinstance(v, np.ndarray) else v) for n, v in call}
    return {**{name: words[name] for name in ordered}, **rest}


def _name(trace: Trace) -> str:
    """The command's name of an implementation; a placeholder for one of the user's own."""
    if trace.name.startswith("anymha in "):
        return trace.name.removeprefix("anymha in ")
    return NAMES.get(trace.name, "MODULE:OBJECT")


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
            {"name": c.name, "detail": c.detail, "stage": c.stage, "cure": c.fix}
            for c in diagnosis.causes
        ],
        "remaining": _finite(diagnosis.remaining),
        "alternatives": list(diagnosis.alternatives),
    }
