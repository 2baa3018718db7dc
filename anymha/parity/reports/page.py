"""A report as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from anymha.parity.reports import document as doc

SIGNS = {"agrees": "✓", "differs": "✗", "error": "✗", "not run": "-", "first": "→"}
CLASSES = {"agrees": "good", "differs": "bad", "error": "bad", "not run": "quiet", "first": "bad"}


def to_page(document: doc.Document) -> str:
    """The document as a page; of several comparisons, those that differ are unfolded."""
    style = files("anymha.parity.reports").joinpath("page.css").read_text(encoding="utf-8")
    state = "holds" if document.passed else "fails"
    body = [
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="verdict {state}">{escape(document.verdict)}</p>',
        *_blocks((*document.findings, *document.blocks)),
        *_environment(document),
    ]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(document.title)}: {document.outcome}</title>",
        f"<style>\n{style}</style></head>",
        "<body><main>", *body, "</main></body></html>\n",
    ])  # fmt: skip


def to_fragment(blocks: Sequence[doc.Block]) -> str:
    """Blocks as the part of a page."""
    return "\n".join(_blocks(blocks))


def _environment(document: doc.Document) -> Iterator[str]:
    versions, flags = document.environment.versions, document.environment.flags
    if versions:
        words = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f'<h2>Made with</h2>\n<p class="quiet">{escape(words)}</p>'
    if flags:
        yield _facts(flags)


def _blocks(blocks: Sequence[doc.Block]) -> Iterator[str]:
    """The parts of a page; the causes of a difference stand together."""
    causes = False
    for block in blocks:
        if doc.PAGE not in block.forms:
            continue
        if isinstance(block, doc.Cause) != causes:
            causes = not causes
            yield '<div class="causes">' if causes else "</div>"
        yield _block(block)
    if causes:
        yield "</div>"


def _block(block: doc.Block) -> str:
    match block:
        case doc.Heading(words):
            return f"<h3>{escape(words)}</h3>"
        case doc.Text(words, label, style):
            head = f"<strong>{escape(label)}:</strong> " if label else ""
            return (
                f'<p class="{style}">{head}{escape(words)}</p>'
                if style
                else (f"<p>{head}{escape(words)}</p>")
            )
        case doc.Cause(words, stage, fix):
            at = f' <span class="quiet">at {escape(stage.replace("_", " "))}</span>' * bool(stage)
            return f"<p><strong>{escape(words)}</strong>{at}<br>{escape(fix)}</p>"
        case doc.Table():
            return _table(block)
        case doc.Faults(places):
            items = "".join(
                f"<li>{escape(f'{case} on {backend}' if backend else case)}: {escape(fault)}</li>"
                for case, backend, faults in places
                for fault in faults
            )
            return f'<ul class="bad">{items}</ul>'
        case doc.Facts(values):
            return _facts(values)
        case doc.Code(text, lead):
            return (f"<p>{escape(lead)}</p>" if lead else "") + f"<pre>{escape(text)}</pre>"
        case doc.Drawing(make):
            return make()
        case doc.Fold():
            return _fold(block)
    raise TypeError(f"Expected a block of a report. Received: {type(block).__name__}.")


def _facts(values: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in values.items())
    return f'<dl class="call">{items}</dl>'


def _fold(fold: doc.Fold) -> str:
    anchor = f' id="{escape(fold.anchor)}"' if fold.anchor else ""
    opened = " open" if fold.state in ("differs", "error") else ""
    sign = f'<span class="{CLASSES[fold.state]}">{SIGNS[fold.state]}</span>'
    return "\n".join([
        f'<details class="one"{anchor}{opened}>',
        f"<summary>{sign} {escape(fold.title)}: <span>{escape(fold.summary)}</span></summary>",
        *_blocks(fold.blocks), "</details>",
    ])  # fmt: skip


def _table(table: doc.Table) -> str:
    kept = [(i, column) for i, column in enumerate(table.columns) if doc.PAGE in column.forms]
    head = "".join(f"<th{_class(column)}>{escape(column.name)}</th>" for _, column in kept)
    rows = "\n".join(_row(kept, row) for row in table.rows if doc.PAGE in row.forms)
    title = f"<h2>{escape(table.title)}</h2>\n" if table.title else ""
    return (
        f'{title}<div class="wide"><table class="{table.kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(kept: Sequence[tuple[int, doc.Column]], row: doc.Row) -> str:
    cells = []
    for place, (i, column) in enumerate(kept):
        cell = row.cells[i]
        cell = doc.Cell(cell) if isinstance(cell, str) else cell
        tag = "th" if place == 0 else "td"
        label = f' data-label="{escape(column.name)}"' if column.number and cell.words else ""
        note = f' title="{escape(cell.note)}"' if cell.note else ""
        cells.append(f"<{tag}{_class(column)}{label}{note}>{_cell(column, cell)}</{tag}>")
    state = f' class="row-{row.state}"' if row.state else ""
    return f"<tr{state}>{''.join(cells)}</tr>"


def _cell(column: doc.Column, cell: doc.Cell) -> str:
    words = escape(cell.words.replace("_", " ") if column.code else cell.words)
    if cell.state:
        kind = CLASSES[cell.state]
        if column.number and cell.state == "agrees":
            return words
        sign = "" if column.number else f'<span class="{kind}">{SIGNS[cell.state]}</span>'
        words = f'<span class="{kind}">{words}</span>' if column.number else f"{sign} {words}"
    return f'<a href="#{escape(cell.link)}">{words}</a>' if cell.link else words.strip()


def _class(column: doc.Column) -> str:
    names = [name for name in ("number", "quiet") if getattr(column, name)]
    return f' class="{" ".join(names)}"' if names else ""
