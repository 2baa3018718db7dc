"""The pictures of a comparison on a page, as HTML and SVG that a style sheet colours."""

from __future__ import annotations

from html import escape

from anymha.parity.reports.outcome import stage_words
from anymha.parity.reports.pictures import Bar, HeatMap, Panel, heat_maps, histogram
from anymha.parity.reports.result import ComparisonResult, short, shown_stages, state_of
from anymha.parity.stages.stagewise import Stage
from anymha.parity.stages.trace import STAGES

LEVELS = {"within": "explained by rounding", "broken": "only one is a number"}
SINGULAR = ("output", "context", "query", "key", "value")


def boxes(result: ComparisonResult) -> str:
    """The stages as boxes in their order, and whatever else differs below."""
    shown = dict(shown_stages(result))
    flow = "\n".join(_box(result, name, shown[name]) for name in STAGES)
    flow = f'<div class="flow">\n{flow}\n<div class="wire" aria-hidden="true"></div>\n</div>'
    others = [
        _box(result, name, stage)
        for name, stage in shown.items()
        if name not in STAGES and state_of(result, name) != "good"
    ]
    if others:
        flow += f'\n<div class="others">Other quantities that differ: {" ".join(others)}</div>'
    return flow


def _box(result: ComparisonResult, name: str, stage: Stage | None) -> str:
    state = state_of(result, name)
    if stage is not None:
        words = f"{short(stage.units)} of {short(stage.budget)}"
    elif state == "first":
        words = "where the cause lies"
    else:
        idle = name == "dropped_probabilities" and not result.request.training
        words = "no dropout" if idle else "not reported"
    arrow = " arrow" if name in STAGES and name not in ("query", "key", "value") else ""
    title = escape(stage_words(result, name) or "agrees")
    return (
        f'<div class="box {escape(name)} is-{state}{arrow}" title="{title}">'
        f"<b>{escape(name.replace('_', ' '))}</b> <span>{words}</span></div>"
    )


def pictures(result: ComparisonResult) -> str:
    """The heat maps of the errors, and the histogram of the output's differences."""
    return "\n".join([*map(_map, heat_maps(result)), _bars(histogram(result))])


def _map(drawn: HeatMap) -> str:
    kind = "over" if drawn.greatest > drawn.may else "under"
    note = f" Drawn: {drawn.note}." if drawn.note else ""
    several = len(drawn.panels) > 1
    verb = "differs" if drawn.stage in SINGULAR else "differ"
    levels = [("lnone", "equal"), *((f"l{level}", _level(drawn, level)) for level in drawn.levels)]
    return "\n".join([
        f"<h3>Where the {escape(drawn.stage.replace('_', ' '))} {verb}</h3>",
        f'<figure class="{kind}">',
        f"<figcaption>Down: {drawn.axes[0]}; across: {drawn.axes[1]}.{escape(note)}</figcaption>",
        '<div class="panels">', *(_panel(panel, several) for panel in drawn.panels), "</div>",
        '<div class="legend">',
        *(f'<span><i class="{name}"></i>{words}</span>' for name, words in levels),
        "</div>", "</figure>",
    ])  # fmt: skip


def _level(drawn: HeatMap, level: str) -> str:
    return LEVELS.get(level) or f"up to {drawn.greatest * int(level) / 5:.2g}"


def _panel(panel: Panel, several: bool) -> str:
    width = (230 if several else 640) / panel.columns
    cell = min(22, max(5, width), max(5, 380 / panel.rows))
    title = escape(panel.title)
    label = f"errors of {title}" if title else "errors"
    paths = "".join(f'<path class="l{name}" d="{path}"/>' for name, path in panel.paths.items())
    return (
        f'<div class="panel"><svg viewBox="0 0 {panel.columns} {panel.rows}" '
        f'width="{round(cell * panel.columns)}" role="img" aria-label="{label}" '
        f'shape-rendering="crispEdges">{paths}</svg><div>{title}</div></div>'
    )


def _bars(bars: list[Bar]) -> str:
    first = next((i for i, bar in enumerate(bars) if bar.count), 0)
    items = "".join(
        f'<dt>{bar.label}</dt><dd><i style="width: {100 * bar.share:.1f}%"></i>{bar.count:,}</dd>'
        for bar in bars[first:]
    )
    title = "<h3>Differences of the output, in units in the last place</h3>\n"
    return f'{title}<dl class="bars">{items}</dl>' if items else ""


def download(file: str, data: str) -> str:
    """A link to the case's file, which the page carries in base64; or how to write it."""
    if data:
        target = f"data:application/octet-stream;base64,{data}"
        link = f'<a download="{escape(file)}" href="{target}">save {escape(file)}</a>'
        return f"<p>The case is in this page: {link}.</p>"
    return (
        f'<p class="quiet"><code>comparison.save("{escape(file)}")</code> or '
        f"<code>--save {escape(file)}</code> writes its file.</p>"
    )
