"""Comparisons as Markdown, for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from anymha.parity.reports.outcome import Outcome, pairs, stage_words, verdict
from anymha.parity.reports.result import ComparisonResult, short, shown_stages

SIGNS = {"agrees": "✅", "differs": "❌", "error": "❌", "not run": "⚪"}


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """All of them: the verdict, a table of pairs and cases where there are several, the details.

    Args:
        outcomes: One or several; of several, those that agree are folded.
    """
    lines = []
    if len(outcomes) > 1:
        lines += [f"### {_sign(outcomes)} {_plain(verdict(outcomes))}", "", *_matrix(outcomes)]
    for one in outcomes:
        several = len(outcomes) > 1
        title = f"{SIGNS[one.state]} {_plain(one.title)}"
        if several and one.state == "agrees":
            summary = escape(
                f"{SIGNS[one.state]} {one.title}: {one.summary}"
            )  # no Markdown in there
            lines += ["<details>", f"<summary>{summary}</summary>", ""]
            lines += [*_details(one.result), "</details>", ""]
            continue
        lines += [f"{'####' if several else '###'} {title}", ""]
        line = one.result.verdict if one.result is not None else one.summary
        lines += [f"**{_plain(line)}**", ""]
        lines += _details(one.result)
    lines += _environment(outcomes)
    return "\n".join(lines).rstrip("\n") + "\n"


def _matrix(outcomes: Sequence[Outcome]) -> Iterator[str]:
    cases = list(dict.fromkeys(one.case for one in outcomes))
    yield "| candidate against reference | " + " | ".join(map(_plain, cases)) + " |"
    yield "|---" * (len(cases) + 1) + "|"
    for (reference, candidate), group in pairs(outcomes).items():
        by_case = {one.case: f"{SIGNS[one.state]} {one.state}" for one in group}
        cells = " | ".join(by_case.get(case, "") for case in cases)
        yield f"| {_plain(candidate)} against {_plain(reference)} | {cells} |"
    yield ""


def _details(result: ComparisonResult | None) -> Iterator[str]:
    if result is None:
        return
    if result.diagnosis is not None:
        for cause in result.diagnosis.causes:
            yield f"- **{_plain(str(cause))}**, at `{cause.stage}`. {_plain(cause.fix)}"
        if result.diagnosis.alternatives:
            yield f"- Or: {_plain('; '.join(result.diagnosis.alternatives))}."
        if result.diagnosis.causes:
            yield ""
    if result.advice:
        yield from (f"**{_plain(result.advice)}**", "")
    yield "| | stage | error | own error | may | reference | candidate | |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    for name, stage in shown_stages(result):
        words = stage_words(result, name)
        mark = "➡️" if name == result.first_divergence else ""
        if stage is None:
            if mark:
                yield f"| {mark} | `{name}` | | | | | | {words}, not reported |"
            continue
        state = "; ".join([*([words] if words else []), *map(_plain, stage.faults)])
        values = ("", "") if stage.values is None else [f"{v:.7g}" for v in stage.values]
        yield (
            f"| {mark} | `{name}` | {short(stage.units)} | {short(stage.own_units)} "
            f"| {short(stage.budget)} | {values[0]} | {values[1]} | {state} |"
        )
    yield ""
    yield from (
        f"- Not exercised by these inputs: {_plain(words)}" for words in result.not_exercised
    )
    yield from (f"- {_plain(note)}" for note in result.notes)
    if result.not_exercised or result.notes:
        yield ""
    if not result.passed:
        yield from ("Repeat it from its saved case:", "", "```console", 
                    f"$ {result.repeat_command()}", "```", "")  # fmt: skip


def _environment(outcomes: Sequence[Outcome]) -> Iterator[str]:
    result = next((one.result for one in outcomes if one.result is not None), None)
    if result is not None:
        values = {**result.environment.versions, **result.environment.flags}
        yield f"<sub>{_plain(', '.join(f'{n} {v}' for n, v in values.items()))}</sub>"


def _sign(outcomes: Sequence[Outcome]) -> str:
    states = [one.state for one in outcomes]
    worst = next((s for s in ("error", "differs", "agrees") if s in states), "not run")
    return SIGNS[worst]


def _plain(text: str) -> str:
    """Text in one line, escaped for Markdown and HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))  # what is code stays code
    code = [part.replace("|", r"\|") for part in parts[1::2]]
    words = [re.sub(r"([\\*_\[\]|`])", r"\\\1", escape(part, quote=False)) for part in parts[::2]]
    return "".join(a + b for a, b in zip(words, [*code, ""], strict=True))
