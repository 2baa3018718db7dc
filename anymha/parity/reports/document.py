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
    """A part of a report; its subclasses are all that there are."""

    forms: tuple[str, ...] = field(default=EVERY, kw_only=True)  # The forms that show it


@dataclass(frozen=True)
class Heading(Block):
    """A heading on a page."""

    words: str


@dataclass(frozen=True)
class Text(Block):
    """A sentence or a few."""

    words: str
    label: str = ""  # What stands before them, as "Note"
    style: str = ""  # "", "quiet", "strong" or "warning"


@dataclass(frozen=True)
class Cause(Block):
    """Why two implementations differ."""

    words: str  # The mistake
    stage: str  # Where it lies; empty where no known mistake explains the difference
    fix: str  # What to do


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    number: bool = False  # Whether its cells stand at the right
    code: bool = False  # Whether its cells are names in code
    quiet: bool = False  # Whether its cells matter less
    wraps: bool = False  # Whether its cells may take several lines
    dropped: int = 0  # When a narrow terminal drops it: 1 first; 0 never
    forms: tuple[str, ...] = EVERY  # The forms that show it


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    words: str = ""
    # "agrees", "differs", "error", "not run" colour it; "first" marks with an arrow; a cell without
    # words shows the state's sign
    state: str = ""
    link: str = ""  # The anchor of a `Fold` that it leads to
    note: str = ""  # What a page shows where the pointer rests
    strong: bool = False  # Whether it stands out


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    cells: Sequence[Cell | str]  # A cell for each column
    # "first", "own", "carried", "unreported" or "good", as `state_of` has them; or ""
    state: str = ""
    forms: tuple[str, ...] = EVERY  # The forms that show it


@dataclass(frozen=True)
class Table(Block):
    """A table."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""  # What stands over it
    kind: str = ""  # "stages", "matrix" or "": how a narrow page folds it


@dataclass(frozen=True)
class Faults(Block):
    """What is wrong, by place."""

    # The case, the backend or "", and what is wrong there
    places: Sequence[tuple[str, str, Sequence[str]]]


@dataclass(frozen=True)
class Facts(Block):
    """Names and values."""

    values: dict[str, str]  # The values by name


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
    """One comparison of several."""

    title: str
    state: str  # "agrees", "differs", "error" or "not run"
    summary: str  # How it went, in a line
    blocks: Sequence[Block]
    anchor: str = ""  # Its place on a page
    folded: bool = False  # Whether Markdown folds it even where it differs


@dataclass(frozen=True)
class Check:
    """One test case of JUnit."""

    name: str  # What was judged
    state: str = "agrees"  # "agrees", "differs", "error" or "not run"
    message: str = ""  # How it stands, in a line
    kind: str = ""  # The kind of a difference, in a few words
    text: str = ""  # Everything, in plain text
    group: str = ""  # Its class; default the name of the suite


@dataclass(frozen=True)
class Suite:
    """One test suite of JUnit."""

    name: str
    checks: Sequence[Check]  # Its test cases
    properties: dict[str, str] = field(default_factory=dict)  # Versions and switches


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    verdict: str  # The result in one line
    passed: bool  # Whether parity holds
    data: dict[str, Any]  # Everything but the pictures, for JSON
    blocks: Sequence[Block] = ()  # What it says
    # What is wrong and what is missing: first on a page, last in a terminal
    findings: Sequence[Block] = ()
    suites: Sequence[Suite] = ()  # What it judged, for JUnit
    # Versions and switches
    environment: Environment = field(default_factory=lambda: Environment({}, {}))

    @property
    def state(self) -> str:
        """The worst state of any comparison; "agrees" or "differs" where there is one alone."""
        states = [block.state for block in self.blocks if isinstance(block, Fold)]
        alone = "agrees" if self.passed else "differs"
        worst = (state for state in ("error", "differs", "agrees", "not run") if state in states)
        state = next(worst, alone)
        return "not run" if state == "agrees" and not self.passed else state

    @property
    def outcome(self) -> str:
        """The verdict in two or three words."""
        if not self.passed and self.state == "not run":
            return "parity is not shown"
        return "parity holds" if self.passed else "parity does not hold"


def to_json(document: Document) -> str:
    """The document's data as JSON."""
    return json.dumps(document.data, indent=1, allow_nan=False) + "\n"
