"""The model of a report: what it says, whoever made it and in whichever form it is written.

`anymha parity`, `anymha compare` and the pytest plugin make a `Document`; the writers of pages
(HTML), Markdown, JUnit's XML, JSON and the terminal know nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anymha.parity.reports.environment import Environment

PAGE, MARKDOWN, TERMINAL = "page", "markdown", "terminal"
EVERY = (PAGE, MARKDOWN, TERMINAL)


@dataclass(frozen=True)
class Block:
    """A part of a report; its subclasses are all that there are.

    Args:
        forms: The forms that show it.
    """

    forms: tuple[str, ...] = field(default=EVERY, kw_only=True)


@dataclass(frozen=True)
class Heading(Block):
    """A heading on a page."""

    words: str


@dataclass(frozen=True)
class Text(Block):
    """A sentence or a few.

    Args:
        words: The words.
        label: What stands before them, as "Note".
        style: "", "quiet", "strong" or "warning".
    """

    words: str
    label: str = ""
    style: str = ""


@dataclass(frozen=True)
class Cause(Block):
    """Why two implementations differ.

    Args:
        words: The mistake.
        stage: Where it lies; empty where no known mistake explains the difference.
        fix: What to do.
    """

    words: str
    stage: str
    fix: str


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: Its heading.
        number: Whether its cells stand at the right.
        code: Whether its cells are names in code.
        quiet: Whether its cells matter less.
        wraps: Whether its cells may take several lines.
        dropped: When a narrow terminal drops it: 1 first; 0 never.
        forms: The forms that show it.
    """

    name: str
    number: bool = False
    code: bool = False
    quiet: bool = False
    wraps: bool = False
    dropped: int = 0
    forms: tuple[str, ...] = EVERY


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        words: Its text.
        state: "agrees", "differs", "error", "not run" colour it; "first" marks with an arrow; a
            cell without words shows the state's sign.
        link: The anchor of a `Fold` that it leads to.
        note: What a page shows where the pointer rests.
        strong: Whether it stands out.
    """

    words: str = ""
    state: str = ""
    link: str = ""
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        cells: A cell for each column.
        state: "first", "own", "carried", "unreported" or "good", as `state_of` has them; or "".
        forms: The forms that show it.
    """

    cells: Sequence[Cell | str]
    state: str = ""
    forms: tuple[str, ...] = EVERY


@dataclass(frozen=True)
class Table(Block):
    """A table.

    Args:
        columns: Its columns.
        rows: Its rows.
        title: What stands over it.
        kind: "stages", "matrix" or "": how a narrow page folds it.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Faults(Block):
    """What is wrong, by place.

    Args:
        places: The case, the backend or "", and what is wrong there.
    """

    places: Sequence[tuple[str, str, Sequence[str]]]


@dataclass(frozen=True)
class Facts(Block):
    """Names and values.

    Args:
        values: The values by name.
    """

    values: dict[str, str]


@dataclass(frozen=True)
class Code(Block):
    """A command or a text as it is, with a sentence before it."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Drawing(Block):
    """A piece of HTML with a picture, which is made when a page is written."""

    make: Callable[[], str]


@dataclass(frozen=True)
class Fold(Block):
    """One comparison of several.

    Args:
        title: Its name.
        state: "agrees", "differs", "error" or "not run".
        summary: How it went, in a line.
        blocks: Its details.
        anchor: Its place on a page.
        folded: Whether Markdown folds it even where it differs.
    """

    title: str
    state: str
    summary: str
    blocks: Sequence[Block]
    anchor: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Check:
    """One test case of JUnit.

    Args:
        name: What was judged.
        state: "agrees", "differs", "error" or "not run".
        message: How it stands, in a line.
        kind: The kind of a difference, in a few words.
        text: Everything, in plain text.
        group: Its class; default the name of the suite.
    """

    name: str
    state: str = "agrees"
    message: str = ""
    kind: str = ""
    text: str = ""
    group: str = ""


@dataclass(frozen=True)
class Suite:
    """One test suite of JUnit.

    Args:
        name: Its name.
        checks: Its test cases.
        properties: Versions and switches.
    """

    name: str
    checks: Sequence[Check]
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A report.

    Args:
        title: Its title.
        verdict: The result in one line.
        passed: Whether parity holds.
        data: Everything but the pictures, for JSON.
        blocks: What it says.
        findings: What is wrong and what is missing: first on a page, last in a terminal.
        suites: What it judged, for JUnit.
        environment: Versions and switches.
    """

    title: str
    verdict: str
    passed: bool
    data: dict[str, Any]
    blocks: Sequence[Block] = ()
    findings: Sequence[Block] = ()
    suites: Sequence[Suite] = ()
    environment: Environment = field(default_factory=lambda: Environment({}, {}))

    @property
    def state(self) -> str:
        """The worst state of any comparison; "agrees" or "differs" where there is one alone."""
        states = [block.state for block in self.blocks if isinstance(block, Fold)]
        alone = "agrees" if self.passed else "differs"
        worst = (state for state in ("error", "differs", "agrees", "not run") if state in states)
        return next(worst, alone)

    @property
    def outcome(self) -> str:
        """The verdict in two or three words."""
        return "parity holds" if self.passed else "parity does not hold"


def to_json(document: Document) -> str:
    """The document's data as JSON."""
    return json.dumps(document.data, indent=1, allow_nan=False) + "\n"
