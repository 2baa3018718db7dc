"""What the report of the matrix says: tables of errors, pictures, what is wrong or skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from anymha.parity.matrix.judge import Cell, Row
from anymha.parity.matrix.matrix import MatrixReport, counted_cases
from anymha.parity.reports import document as doc
from anymha.parity.reports.environment import Environment

LEGEND = (
    "A number: the greatest error of outputs, scores and gradients against the float64 oracle "
    '(and recorded results), in units of the dtype\'s rounding; "may": the greatest allowed.'
)
TIED = (
    "Tied: elements whose exact value lies half way between two numbers of the dtype, as closely "
    "as float64 resolves."
)
ERRORS = (
    "The greatest error of outputs, scores and gradients against an independent float64 oracle, as "
    "a share of what the arithmetic's own rounding explains. Above 100 % a case fails. Where all "
    "is computed in a wider dtype and rounded once, that one rounding is all that is allowed, and "
    "it takes most of it."
)
BITS = (
    "In float32 every framework sums in another order, and most elements differ in their last "
    "bits. In reproducible mode (green) everything is computed in float64 and rounded once."
)


def matrix_document(report: MatrixReport) -> doc.Document:
    """The report of the matrix."""
    every = [*report.rows, *report.real]
    blocks = [*_pictures(report), *_tables(report), *_legend(report, every)]
    seconds = {"seconds": f"{report.seconds:.0f}"} if report.seconds else {}
    return doc.Document(
        "anymha parity",
        report.verdict,
        report.passed,
        report.to_dict(),
        blocks,
        list(_findings(report, every)),
        [_suite(row) for row in every],
        Environment({**report.versions, **seconds}, {}),
    )


def _findings(report: MatrixReport, every: Sequence[Row]) -> Iterator[doc.Block]:
    """What is wrong, what is skipped, what is not installed."""
    places = [(row.name, "", row.faults) for row in every if row.faults]
    places += [
        (row.name, name, cell.faults)
        for row in every
        for name, cell in row.cells.items()
        if cell.faults
    ]
    if places:
        yield doc.Heading("What is wrong")
        yield doc.Faults(places)
    for (backend, reason), names in report.skipped.items():
        words = f"{backend} skips {counted_cases(len(names))}, as {reason}: {'; '.join(names)}"
        yield doc.Text(words, style="warning")
    for name in report.missing:
        yield doc.Text(f"{name} is not installed: pip install 'anymha[{name}]' adds it.")


def _pictures(report: MatrixReport) -> Iterator[doc.Block]:
    """The pictures of a page; matplotlib is imported when they are drawn."""
    if report.maps:
        yield doc.Heading("A real sentence through real weights")
        tokens = " ".join(report.maps[0].tokens)
        words = (f"Who looks at whom in “{tokens}”: a row is a word's attention over all words, "
                 "for heads from the most focused to the least.")  # fmt: skip
        yield doc.Text(words, forms=(doc.PAGE,))
    for item in report.maps:
        yield doc.Heading(item.layer.rstrip(".") or "The layer")
        yield doc.Drawing(lambda item=item: _drawn("map_picture", item))
    yield doc.Heading("Error of each case on each backend")
    yield doc.Text(ERRORS, style="quiet", forms=(doc.PAGE,))
    yield doc.Drawing(lambda: _drawn("errors_picture", report))
    if any(row.compared for row in (*report.rows, *report.real)):
        yield doc.Heading("Bits that differ between frameworks")
        yield doc.Text(BITS, style="quiet", forms=(doc.PAGE,))
        yield doc.Drawing(lambda: _drawn("bits_picture", report))


def _drawn(name: str, subject: object) -> str:
    from anymha.parity.matrix import pictures  # noqa: PLC0415  needs the extra "report"

    return f'<figure class="picture">{pictures.draw(getattr(pictures, name), subject)}</figure>'


def _tables(report: MatrixReport) -> Iterator[doc.Block]:
    several = len(report.backends) > 1
    columns = [
        doc.Column(""),
        doc.Column("case"),
        doc.Column("dtype", quiet=True, dropped=1),
        *(doc.Column(name, number=True) for name in report.backends),
        doc.Column("may", number=True, quiet=True, dropped=2),
        *((doc.Column("bits", number=True, dropped=3),) if several else ()),
    ]
    named = {"Parity of the layer": report.rows, "Real weights": report.real}
    for title, rows in named.items():
        if rows:
            yield doc.Table(columns, [_row(report, row, several) for row in rows], title)


def _row(report: MatrixReport, row: Row, several: bool) -> doc.Row:
    state = "not run" if not row.cells else "agrees" if row.passed else "differs"
    cells = [_cell(row, name) for name in report.backends]
    bits = [_bits(row)] if several else []
    return doc.Row([doc.Cell(state=state), row.name, row.dtype, *cells, f"{row.budget:.2f}", *bits])


def _cell(row: Row, backend: str) -> doc.Cell:
    cell = row.cells.get(backend)
    if cell is None:
        return doc.Cell("skipped", "not run", note=row.skipped.get(backend, ""))
    return doc.Cell(
        _error(cell), "agrees" if cell.passed else "differs", note=cell.worst or "error"
    )


def _error(cell: Cell) -> str:
    if not cell.errors:
        return "error"
    if math.isfinite(cell.units) and cell.units >= 1e4:
        return f"{cell.units:.0e}"
    return f"{cell.units:.2f}" + ("" if cell.gradients else "*")


def _bits(row: Row) -> doc.Cell:
    if not row.compared:
        return doc.Cell("-")
    note = f"{row.differing:,} of {row.compared:,}" + f", {row.ties} tied" * bool(row.ties)
    if not row.differing:
        return doc.Cell("0", note=note, strong=True)
    if row.differing == row.ties:
        return doc.Cell(f"{row.ties} tied", note=note)
    share = row.differing / row.compared
    return doc.Cell(f"{share:.0%}" if share >= 0.01 else str(row.differing), note=note)


def _legend(report: MatrixReport, every: Sequence[Row]) -> Iterator[doc.Block]:
    parts = [LEGEND]
    if not all(cell.gradients for row in every for cell in row.cells.values() if cell.errors):
        parts.append("*: without gradients.")
    if len(report.backends) > 1:
        parts.append("Bits: elements that differ in any bit between two backends.")
    if any(row.ties for row in every):
        parts.append(TIED)
    yield doc.Text("", forms=(doc.TERMINAL,))
    yield doc.Text("\n".join(parts), style="quiet", forms=(doc.PAGE, doc.MARKDOWN, doc.TERMINAL))


def _suite(row: Row) -> doc.Suite:
    """A suite for a case, and in it a test case for each backend."""
    checks = [
        doc.Check(name, "agrees")
        if cell.passed
        else doc.Check(name, "differs", "; ".join(cell.faults))
        for name, cell in row.cells.items()
    ]
    checks += [doc.Check(name, "not run", reason) for name, reason in row.skipped.items()]
    if row.faults:
        checks.append(doc.Check("between backends", "differs", "; ".join(row.faults)))
    return doc.Suite(row.name, checks)
