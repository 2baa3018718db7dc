"""Comparisons as JUnit's XML: a suite for each, and in it a test case for each stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from anymha.parity.reports.outcome import Outcome, stage_words
from anymha.parity.reports.result import ComparisonResult, short, shown_stages

ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold, not even escaped."""


def to_junit(outcomes: Sequence[Outcome]) -> str:
    """All of them as one XML document."""
    root = ElementTree.Element("testsuites", {"name": "anymha compare"})
    totals: dict[str, int] = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for one in outcomes:
        suite = ElementTree.SubElement(root, "testsuite", {"name": _legal(one.title)})
        if one.result is None:
            _call(suite, one)
        else:
            _properties(suite, one.result)
            _stages(suite, one.title, one.result)
        counts = {
            "tests": len(suite.findall("testcase")),
            "failures": len(suite.findall("testcase/failure")),
            "errors": len(suite.findall("testcase/error")),
            "skipped": len(suite.findall("testcase/skipped")),
        }
        for name, count in counts.items():
            suite.set(name, str(count))
            totals[name] += count
    for name, count in totals.items():
        root.set(name, str(count))
    ElementTree.indent(root, " ")
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _properties(suite: ElementTree.Element, result: ComparisonResult) -> None:
    values = {**result.environment.versions, **result.environment.flags}
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _legal(value)})


def _stages(suite: ElementTree.Element, title: str, result: ComparisonResult) -> None:
    for name, stage in shown_stages(result):
        case = _case(suite, title, name)
        words = stage_words(result, name)
        if stage is None and name != result.first_divergence:
            ElementTree.SubElement(case, "skipped", {"message": "the candidate does not report it"})
        elif words:
            parts = [words, *(() if stage is None else stage.faults)]
            if stage is not None:
                parts.append(f"{short(stage.units)} units of rounding off, {short(stage.budget)} "
                            f"may; {short(stage.own_units)} of its own")  # fmt: skip
            message = "; ".join(parts)
            failure = ElementTree.SubElement(
                case, "failure", {"type": words, "message": _legal(message)}
            )
            failure.text = _legal(result.to_text())


def _call(suite: ElementTree.Element, outcome: Outcome) -> None:
    """The one test case of a comparison without a result."""
    case = _case(suite, outcome.title, "call")
    kind = "skipped" if outcome.state == "not run" else "error"
    ElementTree.SubElement(case, kind, {"message": _legal(outcome.summary)})


def _case(suite: ElementTree.Element, title: str, name: str) -> ElementTree.Element:
    attributes = {"classname": _legal(title), "name": name, "time": "0"}
    return ElementTree.SubElement(suite, "testcase", attributes)


def _legal(text: str) -> str:
    return ILLEGAL.sub("\ufffd", text)
