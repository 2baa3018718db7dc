"""What a report of comparisons says: verdict, who agrees with whom, causes, stages, pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence

from anymha.parity.reports import document as doc
from anymha.parity.reports import pictures
from anymha.parity.reports.environment import Environment
from anymha.parity.reports.outcome import Outcome, pairs, passed, stage_words, to_dict, verdict
from anymha.parity.reports.result import (
    ComparisonResult,
    call_in_words,
    short,
    shown_stages,
    state_of,
)
from anymha.parity.stages.saved_case import case_bytes
from anymha.parity.stages.stagewise import Stage

LARGEST = 512 * 1024
"""Bytes of a case that a page still carries."""

BOTH = (doc.MARKDOWN, doc.TERMINAL)

COLUMNS = (
    doc.Column("", forms=BOTH),
    doc.Column("stage", code=True),
    doc.Column("error", number=True),
    doc.Column("own error", number=True),
    doc.Column("may", number=True),
    doc.Column("ratio", number=True, forms=(doc.PAGE,)),
    doc.Column("reference", number=True, dropped=1),
    doc.Column("candidate", number=True, dropped=1),
    doc.Column("at", number=True, forms=(doc.PAGE,)),
    doc.Column("", wraps=True),
)

LEGEND = (
    "Error: the greatest difference from the reference, with all that came before. Own error: from "
    "what the reference's step makes of the candidate's earlier stages. Both in units of the "
    "rounding of the stage's greatest number; “may”: what rounding explains. Ratio: the "
    "candidate's error against float64 over the reference's. Reference and candidate: the two "
    "numbers where they differ most."
)
BOXES = (
    "A box: the greatest error, of how great it may be, in units of rounding. Red fill: where the "
    "two part; red edge: wrong itself; yellow: follows from what came before. Dashed: not reported "
    "by the candidate."
)


def comparison_document(outcomes: Sequence[Outcome]) -> doc.Document:
    """The report of one comparison, or of several."""
    result = next((one.result for one in outcomes if one.result is not None), None)
    environment = Environment({}, {}) if result is None else result.environment
    alone = outcomes[0].result if len(outcomes) == 1 else None
    if alone is not None:
        title, data, blocks = outcomes[0].title, alone.to_dict(), details(alone, slug(outcomes[0]))
    else:
        title = outcomes[0].title if len(outcomes) == 1 else "Comparisons"
        data = to_dict(outcomes)
        blocks = [_who_with_whom(outcomes), *map(_fold, outcomes)]
    suites = [_suite(one) for one in outcomes]
    return doc.Document(title, verdict(outcomes), passed(outcomes), data, blocks, (), suites,
                    environment)  # fmt: skip


def details(result: ComparisonResult, file: str = "case", brief: bool = False) -> list[doc.Block]:
    """The details of a comparison.

    A page calls its saved case `file`, without the suffix. If `brief`, a terminal only counts the
    stages that agree.
    """
    right = sum(state_of(result, stage.name) == "good" for stage in result.stages)
    blocks: list[doc.Block] = [
        *_causes(result, (doc.PAGE, doc.MARKDOWN)),
        doc.Heading("Stages"),
        doc.Drawing(lambda: pictures.boxes(result)),
        doc.Text(BOXES, style="quiet", forms=(doc.PAGE,)),
        _stages(result, brief),
        doc.Text(LEGEND, style="quiet", forms=(doc.PAGE,)),
    ]
    if brief and right:
        words = f"   {right} other quantities agree"
        blocks.append(doc.Text(words, style="quiet", forms=(doc.TERMINAL,)))
    blocks += [
        *_causes(result, (doc.TERMINAL,)),
        doc.Drawing(lambda: pictures.pictures(result)),
        *(
            doc.Text(words, "Not exercised by these inputs", "warning")
            for words in result.not_exercised
        ),
        *(doc.Text(note, "Note", "quiet") for note in result.notes),
        *_repeat(result, file),
    ]
    return blocks


def slug(outcome: Outcome) -> str:
    """A name for a file, or a place on a page."""
    if not outcome.case:
        return "case"
    name = f"{outcome.candidate}-{outcome.reference}-{outcome.case}"
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def _who_with_whom(outcomes: Sequence[Outcome]) -> doc.Table:
    cases = list(dict.fromkeys(one.case for one in outcomes))
    rows = []
    for (reference, candidate), group in pairs(outcomes).items():
        by_case = {one.case: doc.Cell(one.state, one.state, slug(one)) for one in group}
        cells = [by_case.get(case, "") for case in cases]
        rows.append(doc.Row([f"{candidate} against {reference}", *cells]))
    columns = [doc.Column("candidate against reference", wraps=True), *map(doc.Column, cases)]
    return doc.Table(columns, rows, kind="matrix")


def _fold(outcome: Outcome) -> doc.Fold:
    result = outcome.result
    blocks = [] if result is None else details(result, slug(outcome), brief=True)
    return doc.Fold(outcome.title, outcome.state, outcome.summary, blocks, slug(outcome))


def _causes(result: ComparisonResult, forms: tuple[str, ...]) -> Iterator[doc.Block]:
    """Why they differ, and what to do: before the stages on a page, after them in a terminal."""
    diagnosis = result.diagnosis
    if diagnosis is not None:
        for cause in diagnosis.causes:
            yield doc.Cause(str(cause), cause.stage, cause.fix, forms=forms)
        if not diagnosis.causes:
            yield doc.Cause(str(diagnosis), "", "", forms=forms)
        elif diagnosis.explained:
            mistakes = "this mistake" if len(diagnosis.causes) == 1 else "these mistakes"
            yield doc.Text(
                f"With {mistakes} made in the reference too, the difference that is left is "
                f"{diagnosis.remaining:.2g} of what rounding explains.",
                style="quiet", forms=tuple(form for form in forms if form == doc.PAGE),
            )  # fmt: skip
        else:
            yield doc.Text("Something else differs too: fix this first, and compare again.",
                       forms=forms)  # fmt: skip
        if diagnosis.alternatives:
            others = "; ".join(diagnosis.alternatives)
            yield doc.Text(f"With these inputs it could also be: {others}.", forms=forms)
    if result.advice:
        yield doc.Text(result.advice, style="strong", forms=forms)


def _stages(result: ComparisonResult, brief: bool) -> doc.Table:
    rows = []
    for name, stage in shown_stages(result):
        first = name == result.first_divergence
        if stage is None and not first:
            continue
        words = stage_words(result, name) + (", not reported" if stage is None else "")
        faults = () if stage is None else stage.faults
        cells = [doc.Cell(state="first" if first else ""), name, *_numbers(stage),
                 "; ".join([*([words] if words else []), *faults])]  # fmt: skip
        state = state_of(result, name)
        hidden = brief and state == "good"
        rows.append(
            doc.Row(cells, state, (doc.PAGE, doc.MARKDOWN) if hidden else (doc.PAGE, *BOTH))
        )
    return doc.Table(COLUMNS, rows, kind="stages")


def _numbers(stage: Stage | None) -> list[str]:
    """The errors, both numbers at the place of the greatest, and the place."""
    if stage is None:
        return [""] * 7
    errors = [short(n) for n in (stage.units, stage.own_units, stage.budget, stage.ratio)]
    if stage.values is None:
        return [*errors, "", "", ""]
    place = ", ".join(map(str, stage.at))
    return [*errors, *(f"{value:.7g}" for value in stage.values), f"[{place}]"]


def _repeat(result: ComparisonResult, file: str) -> Iterator[doc.Block]:
    yield doc.Heading("The call, and how to repeat it")
    yield doc.Facts(call_in_words(result.request), forms=(doc.PAGE,))
    command = result.repeat_command(f"{file}.npz")
    yield doc.Code(command, forms=(doc.PAGE,))
    if not result.passed:
        lead = "Repeat it from its saved case:"
        yield doc.Code(f"$ {result.repeat_command()}", lead, forms=(doc.MARKDOWN,))
    yield doc.Drawing(lambda: pictures.download(f"{file}.npz", _case(result)))
    if "MODULE:OBJECT" in command:
        yield doc.Text("MODULE:OBJECT stands for the place from which your implementation can be "
                   "imported.", style="quiet", forms=(doc.PAGE,))  # fmt: skip


def _case(result: ComparisonResult) -> str:
    """The case's file in base64; empty where both agree, or where the file is large."""
    if result.passed:
        return ""
    data = case_bytes(result.request, result.traces)
    return base64.b64encode(data).decode("ascii") if len(data) <= LARGEST else ""


def _suite(outcome: Outcome) -> doc.Suite:
    """A suite, and in it a test case for each stage."""
    result = outcome.result
    if result is None:
        return doc.Suite(outcome.title, [doc.Check("call", outcome.state, outcome.summary)])
    values = {**result.environment.versions, **result.environment.flags}
    checks = [_check(result, name, stage) for name, stage in shown_stages(result)]
    return doc.Suite(outcome.title, checks, values)


def _check(result: ComparisonResult, name: str, stage: Stage | None) -> doc.Check:
    words = stage_words(result, name)
    if stage is None and name != result.first_divergence:
        return doc.Check(name, "not run", "the candidate does not report it")
    if not words:
        return doc.Check(name)
    parts = [words]
    if stage is not None:
        off, allowed, own = map(short, (stage.units, stage.budget, stage.own_units))
        words_of_units = f"{off} units of rounding off, of {allowed} allowed; {own} of its own"
        parts += [*stage.faults, words_of_units]
    return doc.Check(name, "differs", "; ".join(parts), words, result.to_text())
