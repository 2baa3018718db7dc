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
from anymha.parity.reports.result import Found, call_in_words, short, shown_stages, state_of
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
        outcomes: One, or several, of which those that do not agree are unfolded.
    """
    template = files("anymha.parity.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    surroundings = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found = next((one.found for one in outcomes if one.found is not None), None)
    return surroundings.from_string(template).render(
        outcomes=[_shown(one) for one in outcomes],
        several=len(outcomes) > 1,
        title=outcomes[0].title if len(outcomes) == 1 else "Comparisons",
        passed=passed(outcomes),
        verdict=verdict(outcomes),
        pairs=pairs(outcomes),
        cases=list(dict.fromkeys(one.case for one in outcomes)),
        slug=_slug,
        environment=Environment({}, {}) if found is None else found.environment,
    )


def _shown(outcome: Outcome) -> dict[str, Any]:
    """What the template shows of an outcome."""
    shown: dict[str, Any] = {"outcome": outcome, "anchor": _slug(outcome), "found": outcome.found}
    found = outcome.found
    if found is None:
        return shown
    rows = list(_rows(found))
    held = {row["name"]: row for row in rows}
    file = f"{_slug(outcome)}.npz"
    return {
        **shown,
        "rows": [row for row in rows if row["stage"] is not None],
        "boxes": [held[name] for name in STAGES],
        "beside": [row for row in rows if row["name"] not in STAGES and row["state"] != "good"],
        "maps": heat_maps(found),
        "bars": _from_first(histogram(found)),
        "call": call_in_words(found.request),
        "file": file,
        "command": found.repeated(file),
        "data": _data(found),
    }


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    for name, stage in shown_stages(found):
        idle = name == "dropped_probabilities" and not found.request.training
        yield {
            "name": name,
            "words": name.replace("_", " "),
            "state": state_of(found, name),
            "told": stage_words(found, name) or "agrees",
            "stage": stage,
            "lacking": "no dropout" if idle else "not told",
            "values": [] if stage is None else _values(stage),
            "error": "" if stage is None else short(stage.units),
            "own": "" if stage is None else short(stage.own_units),
            "may": "" if stage is None else short(stage.budget),
            "ratio": "" if stage is None else short(stage.ratio),
        }


def _values(stage: Stage) -> list[str]:
    """Both numbers at the worst place, and the place."""
    if stage.values is None:
        return []
    place = ", ".join(map(str, stage.at))
    return [f"{stage.values[0]:.7g}", f"{stage.values[1]:.7g}", f"[{place}]"]


def _from_first(bars: list[Any]) -> list[Any]:
    """Without the empty bars before the first."""
    first = next((i for i, bar in enumerate(bars) if bar.count), 0)
    return bars[first:]


def _data(found: Found) -> str:
    """The case's file in base64; empty where nothing is to be repeated, or where it is great."""
    if found.passed:
        return ""
    held = case_bytes(found.request, found.traces)
    return base64.b64encode(held).decode("ascii") if len(held) <= LARGEST else ""


def _slug(outcome: Outcome) -> str:
    """A name for a file or a place in the page."""
    if not outcome.case:
        return "case"
    return re.sub(r"[^\w.]+", "-", f"{outcome.candidate}-{outcome.reference}-{outcome.case}").strip(
        "-"
    )
