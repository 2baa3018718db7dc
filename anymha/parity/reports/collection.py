"""The comparisons of a run of tests, as plain data and in one file.

A record is a comparison's own dict with "test", the test's id; "text", all in plain text; "page",
the comparison's part of an HTML page, or None; and "saved", the file that repeats it, or None.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymha.interchange.files.atomic_write import write_atomically
from anymha.parity.reports import document as doc
from anymha.parity.reports.comparison_view import details
from anymha.parity.reports.environment import Environment
from anymha.parity.reports.junit import to_junit
from anymha.parity.reports.markdown import to_markdown, write_markdown
from anymha.parity.reports.page import to_fragment, to_page
from anymha.version import __version__

if TYPE_CHECKING:
    from anymha.parity.reports.report import Comparison

SCHEMA = "anymha.compared/1"
Records = Sequence[dict[str, Any]]


def record(
    comparison: Comparison, test: str, number: int, *, saved: Path | None, pages: bool
) -> dict[str, Any]:
    """A comparison as plain data, which can be sent to another process.

    It is the `number`-th of its test. Where it differs it is saved in the folder `saved`, if any;
    `pages` says whether its part of an HTML page is made.
    """
    page, path = None, None
    if not comparison.passed and saved is not None:
        words = re.sub(r"[^\w.]+", "-", test)[-80:].strip("-")
        path = str(saved / f"{words}-{zlib.crc32(test.encode()):08x}-{number}.npz")
        comparison.save(path)
    if pages:
        shown = details(comparison)
        if comparison.passed:  # their pictures would make the page of many tests heavy
            shown = [block for block in shown if not isinstance(block, doc.Drawing)]
        page = to_fragment(shown)
    data = {"test": test, **comparison.to_dict()}
    data |= {"text": comparison.to_text(), "page": page, "saved": path}
    if path is not None:
        data["command"] = comparison.repeat_command(path)
    return json.loads(json.dumps(data))


def raised(error: Exception, test: str) -> dict[str, Any]:
    """The record of a comparison whose call raised an error."""
    words = f"NOT COMPARED: {type(error).__name__}: {error}"
    return {
        "test": test, "passed": False, "verdict": words, "reference": "", "candidate": "",
        "first_divergence": None, "diagnosis": None, "stages": [], "untested": [],
        "notes": list(getattr(error, "__notes__", [])), "error": words, "text": words,
        "page": None, "saved": None,
    }  # fmt: skip


def write(records: Records, path: Path) -> None:
    """Write all of them into one file, in the form of its suffix; without one, as Markdown."""
    document = collection_document(records)
    if path.suffix in ("", ".md"):
        write_markdown(path, to_markdown(document))
        return
    forms = {".html": to_page, ".json": doc.to_json, ".xml": to_junit}
    write_atomically(path, forms[path.suffix](document))


def verdict(records: Records) -> str:
    """The verdict in one line."""
    states = [_state(record) for record in records]
    agree, differ, errors = (states.count(one) for one in ("agrees", "differs", "error"))
    more = f", {errors} raised an error" if errors else ""
    return f"{len(records)} compared: {agree} agree, {differ} differ{more}"


def collection_document(records: Records) -> doc.Document:
    """The report of a run of tests: every comparison, those that differ first."""
    left_out = ("page", "schema", "text")
    comparisons = [{k: v for k, v in record.items() if k not in left_out} for record in records]
    passed = all(record["passed"] for record in records)
    data = {"schema": SCHEMA, "anymha": __version__, "passed": passed, "comparisons": comparisons}
    suites = [doc.Suite("parity", [_check(one) for one in records])]
    blocks: list[doc.Block] = (
        [_table(records)] if records else [doc.Text("No test compared anything.")]
    )
    blocks += map(_fold, sorted(records, key=lambda record: record["passed"]))
    return doc.Document("Parity", verdict(records), passed, data, blocks, (), suites,
                    Environment({"anymha": __version__}, {}))  # fmt: skip


def _table(records: Records) -> doc.Table:
    columns = [
        doc.Column(""),
        doc.Column("test", code=True),
        doc.Column("first divergence", code=True),
        doc.Column("cause"),
    ]
    rows = [
        doc.Row(
            [doc.Cell(state=_state(one)), one["test"], one["first_divergence"] or "", _cause(one)]
        )
        for one in records
    ]
    return doc.Table(columns, rows, forms=(doc.MARKDOWN,))


def _fold(one: dict[str, Any]) -> doc.Fold:
    blocks: list[doc.Block] = [doc.Text(one["verdict"], forms=(doc.PAGE,))]
    if one["page"]:
        blocks.append(doc.Drawing(lambda: one["page"]))
    blocks.append(doc.Code(one["text"], forms=(doc.MARKDOWN,)))
    if one["saved"]:
        blocks.append(doc.Code(one["command"], "Once more:", forms=(doc.PAGE,)))
    return doc.Fold(
        one["test"], _state(one), one["first_divergence"] or _state(one), blocks, folded=True
    )


def _check(one: dict[str, Any]) -> doc.Check:
    name = "call" if "error" in one else f"{one['candidate']} as {one['reference']}"
    text = "" if one["passed"] else one["text"]
    return doc.Check(name, _state(one), one["verdict"], text=text, group=one["test"])


def _state(one: dict[str, Any]) -> str:
    return "agrees" if one["passed"] else "error" if "error" in one else "differs"


def _cause(one: dict[str, Any]) -> str:
    return one.get("error", "") if one["diagnosis"] is None else one["diagnosis"]["told"]
