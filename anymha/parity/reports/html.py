"""Comparisons as one HTML file with its pictures inside. Needs the extra "report"."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from anymha.errors import UsageError
from anymha.parity.reports.environment import Environment
from anymha.parity.reports.outcome import Outcome, pairs, passed, stage_words, verdict
from anymha.parity.reports.pictures import heat_maps, histogram
from anymha.parity.reports.result import (
    ComparisonResult,
    call_in_words,
    short,
    shown_stages,
    state_of,
)
from anymha.parity.stages.saved_case import case_bytes
from anymha.parity.stages.stagewise import Stage
from anymha.parity.stages.trace import STAGES

try:
    import jinja2
except ImportError as error:
    raise UsageError(
        f"The HTML report needs {error.name}, which is not installed. "
        "Install it with: pip install 'anymha[report]'."
    ) from error

TEMPLATE = "comparison.html.j2"
LARGEST = 512 * 1024
"""Bytes of a case that the page still carries."""


def to_html(outcomes: Sequence[Outcome]) -> str:
    """All of them as one HTML document that loads nothing.

    Args:
        outcomes: One or several; of several, those that differ are unfolded.
    """
    template = files("anymha.parity.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    surroundings = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    result = next((one.result for one in outcomes if one.result is not None), None)
    return surroundings.from_string(template).render(
        outcomes=[_shown(one) for one in outcomes],
        several=len(outcomes) > 1,
        title=outcomes[0].title if len(outcomes) == 1 else "Comparisons",
        passed=passed(outcomes),
        verdict=verdict(outcomes),
        pairs=pairs(outcomes),
        cases=list(dict.fromkeys(one.case for one in outcomes)),
        slug=_slug,
        environment=Environment({}, {}) if result is None else result.environment,
    )


def _shown(outcome: Outcome) -> dict[str, Any]:
    """The values that the template takes for an outcome."""
    shown: dict[str, Any] = {"outcome": outcome, "anchor": _slug(outcome), "result": outcome.result}
    result = outcome.result
    if result is None:
        return shown
    rows = list(_rows(result))
    by_name = {row["name"]: row for row in rows}
    file = f"{_slug(outcome)}.npz"
    return {
        **shown,
        "rows": [row for row in rows if row["stage"] is not None],
        "boxes": [by_name[name] for name in STAGES],
        "others": [row for row in rows if row["name"] not in STAGES and row["state"] != "good"],
        "maps": heat_maps(result),
        "bars": _from_first(histogram(result)),
        "call": call_in_words(result.request),
        "file": file,
        "command": result.repeat_command(file),
        "data": _data(result),
    }


def _rows(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    for name, stage in shown_stages(result):
        idle = name == "dropped_probabilities" and not result.request.training
        yield {
            "name": name,
            "words": name.replace("_", " "),
            "state": state_of(result, name),
            "words_of_state": stage_words(result, name) or "agrees",
            "stage": stage,
            "lacking": "no dropout" if idle else "not reported",
            "values": [] if stage is None else _values(stage),
            "error": "" if stage is None else short(stage.units),
            "own": "" if stage is None else short(stage.own_units),
            "may": "" if stage is None else short(stage.budget),
            "ratio": "" if stage is None else short(stage.ratio),
        }


def _values(stage: Stage) -> list[str]:
    """Both numbers at the place of the greatest error, and the place."""
    if stage.values is None:
        return []
    place = ", ".join(map(str, stage.at))
    return [f"{stage.values[0]:.7g}", f"{stage.values[1]:.7g}", f"[{place}]"]


def _from_first(bars: list[Any]) -> list[Any]:
    """Without the empty bars before the first."""
    first = next((i for i, bar in enumerate(bars) if bar.count), 0)
    return bars[first:]


def _data(result: ComparisonResult) -> str:
    """The case's file in base64; empty where both agree, or where the file is large."""
    if result.passed:
        return ""
    data = case_bytes(result.request, result.traces)
    return base64.b64encode(data).decode("ascii") if len(data) <= LARGEST else ""


def _slug(outcome: Outcome) -> str:
    """A name for a file or a place in the page."""
    if not outcome.case:
        return "case"
    return re.sub(r"[^\w.]+", "-", f"{outcome.candidate}-{outcome.reference}-{outcome.case}").strip(
        "-"
    )
