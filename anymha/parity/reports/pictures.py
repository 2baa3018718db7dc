"""The pictures of a comparison on a page: stages as boxes, heat maps of errors, a histogram.

They are HTML, and plain SVG paths, one for each level of error, so that a style sheet can colour
them for light and dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np

from anymha.parity.reports.outcome import stage_words
from anymha.parity.reports.result import ComparisonResult, short, shown_stages, state_of
from anymha.parity.stages.stagewise import Stage
from anymha.parity.stages.structure import distance
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import STAGES, name_of_dtype

ATTENTION = ("logits", "masked_logits", "probabilities", "dropped_probabilities", "scores")
"""Stages of shape (B, H, T, S): two before the softmax, then what it gives."""
HEADS_LAST = ("query", "key", "value", "context")
"""Stages of shape (B, T, H, d)."""

PANELS = 8
"""How many heads are drawn."""
CELLS = 48
"""How many cells a side of a panel has; where there are more numbers, the worst of a cell is drawn.
"""
STEPS = 5
"""Levels of error, each a fifth of the greatest."""
BEYOND = 12
"""The power of four of units in the last place from which differences are counted together."""

LEVELS = {"within": "explained by rounding", "broken": "only one is a number"}
"""The levels of error that are no number, in words."""
SINGULAR = ("output", "context", "query", "key", "value")
"""Stages whose heading has a verb in the singular."""


@dataclass(frozen=True)
class Panel:
    """The errors of one head."""

    title: str  # What it is
    columns: int  # Its width in cells
    rows: int  # Its height in cells
    # The SVG path of the cells of each level: "within" rounding, "1" to "5", and "broken" where one
    # alone is a number
    paths: dict[str, str]


@dataclass(frozen=True)
class HeatMap:
    """The errors of one stage."""

    stage: str
    axes: tuple[str, str]  # What rows and columns are
    note: str  # Which of all the numbers are drawn
    greatest: float  # The greatest error drawn
    may: float  # The greatest that rounding explains
    panels: tuple[Panel, ...]  # One for each head that is drawn

    @property
    def levels(self) -> list[str]:
        """The levels that occur, in order."""
        order = ("within", *map(str, range(1, STEPS + 1)), "broken")
        return [level for level in order if any(level in panel.paths for panel in self.panels)]


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram: how many numbers differ by so many units in the last place."""

    label: str
    count: int
    share: float


def heat_maps(result: ComparisonResult) -> list[HeatMap]:
    """The errors of the stage where the implementations part, and of the attention map.

    Where the candidate does not report the stage at which they part, the first wrong stage that it
    reports is drawn.
    """
    wrong = [result.first_divergence, *(s.name for s in result.stages if not s.passed or s.culprit)]
    drawn = [heat_map(result, name) for name in dict.fromkeys(wrong) if name is not None]
    chosen = [one for one in drawn if one is not None][:1]
    if not any(one.stage in ATTENTION[2:] for one in chosen):
        order = ("probabilities", "scores") if chosen else ("probabilities", "scores", *ATTENTION)
        chosen += [one for one in (heat_map(result, n) for n in order) if one is not None][:1]
    if not any(one.stage in (*ATTENTION, "output") for one in chosen):
        output = heat_map(result, "output")
        chosen += [] if output is None else [output]
    return chosen


def heat_map(result: ComparisonResult, name: str) -> HeatMap | None:
    """The errors of a stage; None where the candidate did not tell it, or has another shape."""
    stage = next((stage for stage in result.stages if stage.name == name), None)
    arrays = result.arrays(name)
    if stage is None or arrays is None or not arrays[0].size or arrays[0].ndim < 2:
        return None
    errors, axes = _planes(name, distance(arrays[1], arrays[0]))  # (B, panels, rows, columns)
    worst = errors.max(axis=(1, 2, 3))
    batch = int(np.argmax(worst))
    chosen = errors[batch]
    heads = np.argsort(-chosen.max(axis=(1, 2)), kind="stable")[:PANELS]
    notes = []
    if len(errors) > 1:
        notes.append(f"batch element {batch} of {len(errors)}, which has the greatest error")
    if len(chosen) > PANELS:
        notes.append(f"the {PANELS} heads of {len(chosen)} with the greatest errors")
    factors = [math.ceil(n / CELLS) for n in chosen.shape[1:]]
    if max(factors) > 1:
        notes.append(f"a cell is the greatest of {factors[0]} by {factors[1]} numbers")
    finite = chosen[np.isfinite(chosen)]
    greatest = float(np.max(finite, initial=0.0))
    may = stage.budget * stage.unit
    several = len(chosen) > 1
    panels = tuple(
        _panel(f"head {head}" if several else "", _pooled(chosen[head], factors), greatest, may)
        for head in sorted(heads)
    )
    return HeatMap(name, axes, "; ".join(notes), greatest, may, panels)


def _planes(name: str, errors: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    if name in ATTENTION and errors.ndim == 4:
        return errors, ("query", "key")
    if name in HEADS_LAST and errors.ndim == 4:
        return errors.swapaxes(1, 2), ("position", "feature")
    if errors.ndim == 2:
        return errors[None, None], ("row", "column")
    rows = errors.reshape(errors.shape[0], 1, errors.shape[1], -1)
    return rows, ("query" if name == "output" else "axis 1", "feature")


def _pooled(plane: np.ndarray, factors: list[int]) -> np.ndarray:
    """The greatest number of each cell."""
    for axis, factor in enumerate(factors):
        plane = np.maximum.reduceat(plane, np.arange(0, plane.shape[axis], factor), axis=axis)
    return plane


def _panel(title: str, plane: np.ndarray, greatest: float, may: float) -> Panel:
    top = greatest or 1.0
    steps = np.clip(np.ceil(STEPS * np.where(np.isfinite(plane), plane, 0) / top), 1, STEPS)
    levels = np.where(plane <= may, 0, steps).astype(int)
    if greatest <= may:  # all is well: then the small errors are what there is to see
        levels = steps.astype(int)
    levels = np.where(plane == 0, -1, np.where(np.isfinite(plane), levels, STEPS + 1))
    names = {0: "within", STEPS + 1: "broken", **{n: str(n) for n in range(1, STEPS + 1)}}
    paths = {name: _path(levels == level) for level, name in names.items()}
    rows, columns = plane.shape
    return Panel(title, columns, rows, {name: path for name, path in paths.items() if path})


def _path(cells: np.ndarray) -> str:
    """The SVG path around cells, one rectangle for each run of them in a row."""
    parts = []
    for row, line in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        parts += [f"M{a} {row}h{b - a}v1h{a - b}z" for a, b in edges.reshape(-1, 2)]
    return "".join(parts)


def histogram(result: ComparisonResult) -> list[Bar]:
    """The output's differences in units in the last place; empty where shapes differ."""
    arrays = result.arrays("output")
    if arrays is None or not arrays[0].size:
        return []
    dtype = max((name_of_dtype(trace.output) for trace in result.traces), key=eps)
    one, other = arrays
    apart = distance(other, one)
    size = np.maximum(np.abs(one), np.abs(other))
    finite = np.where(np.isfinite(size), size, 1.0)
    place = eps(dtype) * np.exp2(np.floor(np.log2(np.maximum(finite, np.finfo(np.float64).tiny))))
    with np.errstate(over="ignore"):
        units = np.where(np.isfinite(apart), np.round(apart / place), 0)
    powers = np.where(units < 1, 0, np.ceil(np.log2(np.maximum(units, 1)) / 2) + 1)
    powers = np.minimum(powers, BEYOND).astype(int)
    counts = np.bincount(powers[np.isfinite(apart)], minlength=1)
    bars = [(_range(power), int(count)) for power, count in enumerate(counts)]
    broken = int(np.sum(~np.isfinite(apart)))
    if broken:
        bars.append(("one is no number", broken))
    most = max(count for _, count in bars)
    return [Bar(label, count, count / most) for label, count in bars]


def _range(power: int) -> str:
    if power < 2:
        return str(power)
    low, high = 4 ** (power - 2) + 1, 4 ** (power - 1)
    return f"over {low - 1:,}" if power == BEYOND else f"{low:,} to {high:,}"


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
        '<div class="panels">', *(_drawn(panel, several) for panel in drawn.panels), "</div>",
        '<div class="legend">',
        *(f'<span><i class="{name}"></i>{words}</span>' for name, words in levels),
        "</div>", "</figure>",
    ])  # fmt: skip


def _level(drawn: HeatMap, level: str) -> str:
    return LEVELS.get(level) or f"up to {drawn.greatest * int(level) / 5:.2g}"


def _drawn(panel: Panel, several: bool) -> str:
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
