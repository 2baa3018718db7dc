"""The comparisons of a run of tests, as plain data and in one file.

A record is a comparison's own dict with "test", the test's id; "text", all in plain text; "page",
the comparison's own HTML page, or None; and "saved", the file that repeats it, or None.
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from anymha.errors import UsageError
from anymha.interchange.files.atomic_write import write_atomically
from anymha.version import __version__

if TYPE_CHECKING:
    from anymha.parity.reports.report import Comparison

SCHEMA = "anymha.compared/1"
CONTROL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Records = Sequence[dict[str, Any]]


def record(
    comparison: Comparison, test: str, number: int, *, saved: Path | None, pages: bool
) -> dict[str, Any]:
    """A comparison as plain data, which can be sent to another process.

    Args:
        comparison: The comparison.
        test: The id of its test.
        number: Its number among the comparisons of the test.
        saved: The folder in which it is saved where it differs; None: it is not.
        pages: Whether its own HTML page is made where it differs.
    """
    page, path = None, None
    if not comparison.passed and saved is not None:
        words = re.sub(r"[^\w.]+", "-", test)[-80:].strip("-")
        path = str(saved / f"{words}-{zlib.crc32(test.encode()):08x}-{number}.npz")
        comparison.save(path)
    if not comparison.passed and pages:
        page = _page(comparison)
    data = {"test": test, **comparison.to_dict()}
    data |= {"text": comparison.to_text(), "page": page, "saved": path}
    if path is not None:
        data["command"] = comparison.repeat_command(path)
    return json.loads(json.dumps(data))


def _page(comparison: Comparison) -> str | None:
    """The comparison's own page with pictures; None where the extra "report" is missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        try:
            comparison.to_html(path)
        except UsageError:
            return None
        return path.read_text(encoding="utf-8")


def write(records: Records, path: Path) -> None:
    """Write all of them into one file; the suffix of its name says in which form."""
    forms = {".html": to_html, ".json": to_json, ".md": to_markdown, ".xml": to_junit}
    write_atomically(path, forms[path.suffix](records))


def verdict(records: Records) -> str:
    """The verdict in one line."""
    differ = sum(not record["passed"] for record in records)
    return f"{len(records)} compared: {len(records) - differ} agree, {differ} differ"


def to_json(records: Records) -> str:
    """Every number."""
    left_out = ("page", "schema", "text")
    comparisons = [{k: v for k, v in record.items() if k not in left_out} for record in records]
    passed = all(record["passed"] for record in records)
    whole = {"schema": SCHEMA, "anymha": __version__, "passed": passed, "comparisons": comparisons}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def to_markdown(records: Records) -> str:
    """A table, and the text of each comparison that differs, for the summary of a CI service."""
    lines = ["## Parity", "", verdict(records), ""]
    if records:
        lines += ["| | test | first divergence | cause |", "|---|---|---|---|"]
    for one in records:
        quote = "``" if "`" in one["test"] else "`"
        cells = [f"{quote}{one['test']}{quote}", _stage(one), _cause(one)]
        row = " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| {'✓' if one['passed'] else '✗'} | {row} |")
    for one in records:
        if not one["passed"]:
            lines += ["", f"<details><summary>{escape(one['test'])}</summary>", ""]
            lines += ["````text", one["text"], "````", "", "</details>"]
    return "\n".join(lines) + "\n"


def to_junit(records: Records) -> str:
    """One test case for each comparison."""
    differ = str(sum(not record["passed"] for record in records))
    sizes = {"tests": str(len(records)), "failures": differ, "errors": "0", "skipped": "0"}
    suite = ElementTree.Element("testsuite", {"name": "parity", **sizes})
    for one in records:
        names = {"classname": one["test"], "name": f"{one['candidate']} as {one['reference']}"}
        case = ElementTree.SubElement(suite, "testcase", {k: _xml(v) for k, v in names.items()})
        if not one["passed"]:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(one["verdict"])})
            failure.text = _xml(one["text"])
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    declared = '<?xml version="1.0" encoding="utf-8"?>\n'
    return declared + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return CONTROL.sub("?", text)


def _stage(one: dict[str, Any]) -> str:
    return one["first_divergence"] or ""


def _cause(one: dict[str, Any]) -> str:
    return "" if one["diagnosis"] is None else one["diagnosis"]["told"]


def to_html(records: Records) -> str:
    """A page that loads nothing: every comparison, those that differ first, opened."""
    ordered = sorted(records, key=lambda record: record["passed"])
    state = "good" if all(record["passed"] for record in records) else "bad"
    body = "\n".join(_section(one) for one in ordered) or "<p>No test compared anything.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Parity: {verdict(records)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>Parity</h1><p class="verdict {state}">{verdict(records)}</p>\n{body}\n'
        f"<footer>anymha {__version__}. Errors in units of rounding.</footer>"
        "</main></body></html>\n"
    )


def _section(one: dict[str, Any]) -> str:
    state = "good" if one["passed"] else "bad"
    word = "agrees" if one["passed"] else "differs"
    parts = [f"<p>{escape(one['verdict'])}</p>", _table(one)]
    if one["diagnosis"] is not None:
        parts.append(f"<h3>Cause</h3><p>{escape(one['diagnosis']['told'])}</p>")
        parts += [f"<p>{escape(cause['cure'])}</p>" for cause in one["diagnosis"]["causes"]]
    parts += [
        f'<p class="note">Not exercised by these inputs: {escape(w)}</p>' for w in one["untested"]
    ]
    parts += [f'<p class="note">{escape(words)}</p>' for words in one["notes"]]
    if one["saved"]:
        parts.append(f"<h3>Once more</h3><p><code>{escape(one['command'])}</code></p>")
    if one["page"]:
        parts.append(
            "<details><summary>With pictures</summary>"
            f'<iframe srcdoc="{escape(one["page"])}" title="{escape(one["test"])}"></iframe>'
            "</details>"
        )
    return (
        f'<details class="one"{"" if one["passed"] else " open"}><summary>'
        f'<span class="badge {state}">{word}</span> <code>{escape(one["test"])}</code> '
        f"<span>{escape(_stage(one))}</span></summary>{''.join(parts)}</details>"
    )


def _table(one: dict[str, Any]) -> str:
    rows = ["<tr><th>stage</th><td>error</td><td>own error</td><td>may</td><td></td></tr>"]
    for stage in one["stages"]:
        first = stage["name"] == one["first_divergence"]
        good = stage["passed"] and not first
        state = "first to differ" if first else "agrees" if good else "differs"
        numbers = "".join(f"<td>{_short(stage[k])}</td>" for k in ("units", "own_units", "budget"))
        row = f"<tr{' class=first' if first else ''}>"
        rows.append(
            f"{row}<th>{escape(stage['name'])}</th>{numbers}"
            f'<td class="{"good" if good else "bad"}">{state}</td></tr>'
        )
        rows += [f'{row}<td colspan="5">{escape(fault)}</td></tr>' for fault in stage["faults"]]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _short(number: float | None) -> str:
    return "inf" if number is None else f"{number:.3g}"


STYLE = """
:root{--page:#fff;--ink:#1f2328;--quiet:#59636e;--line:#d1d9e0;--good:#1a7f37;--bad:#cf222e;
--mark:#ffebe9}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#f0f6fc;--quiet:#9198a1;--line:#3d444d;
--good:#3fb950;--bad:#ff7b72;--mark:#3c1618}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h3{font-size:1rem;margin:1rem 0 0}
code{overflow-wrap:anywhere}.verdict{font-size:1.15rem;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.note,footer{color:var(--quiet)}
.badge{border:1px solid;border-radius:1em;padding:0 .6em;font-size:.85em}
.one{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem;margin:.7rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem .2rem .3rem;border-bottom:1px solid var(--line);text-align:right}
th,td:last-child{text-align:left}th{font-weight:400}.first{background:var(--mark)}
.first th{font-weight:600}@media(max-width:40rem){th,td{padding:.2rem;font-size:.85rem}}
iframe{width:100%;height:80vh;border:1px solid var(--line)}
"""
