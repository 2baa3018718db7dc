"""A report as JUnit's XML."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from anymha.parity.reports.document import Check, Document, Suite

ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold, not even escaped."""

KINDS = {"differs": "failure", "error": "error", "not run": "skipped"}
COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def to_junit(document: Document) -> str:
    """The document's suites as one XML document."""
    root = ElementTree.Element("testsuites", {"name": document.title})
    for suite in document.suites:
        _suite(root, suite)
    _count(root)
    ElementTree.indent(root, " ")
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(root: ElementTree.Element, suite: Suite) -> None:
    element = ElementTree.SubElement(root, "testsuite", {"name": _legal(suite.name)})
    if suite.properties:
        properties = ElementTree.SubElement(element, "properties")
        for name, value in suite.properties.items():
            pair = {"name": _legal(name), "value": _legal(value)}
            ElementTree.SubElement(properties, "property", pair)
    for check in suite.checks:
        _check(element, check, suite.name)
    _count(element)


def _check(suite: ElementTree.Element, check: Check, group: str) -> None:
    names = {"classname": _legal(check.group or group), "name": _legal(check.name), "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", names)
    if check.state == "agrees":
        return
    attributes = {"message": _legal(check.message)}
    if check.kind:
        attributes["type"] = _legal(check.kind)
    result = ElementTree.SubElement(case, KINDS[check.state], attributes)
    result.text = _legal(check.text) or None


def _count(element: ElementTree.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    for name, tag in COUNTS.items():
        element.set(name, str(len(list(element.iter(tag)))))


def _legal(text: str) -> str:
    return ILLEGAL.sub("\ufffd", text)
