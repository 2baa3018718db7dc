"""The pictures of the matrix's report, as SVG. Needs the extra "report"."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from anymha.errors import UsageError
from anymha.parity.matrix.matrix import AttentionMap, MatrixReport

try:
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise UsageError(
        f"The HTML report needs {error.name}, which is not installed. "
        "Install it with: pip install 'anymha[report]'."
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADS = 4
"""How many heads of each layer are drawn."""

STYLE: dict[Any, Any] = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "anymha"}
"""Names and tokens as they are, "$" included; text as text, so that it can be read and found."""

SHARES = LinearSegmentedColormap.from_list(
    "shares", ["#f6f8fa", "#54aeff", "#0a3069"]
).with_extremes(bad="#cf222e")


def draw(picture: Callable[[Any], str], subject: Any) -> str:
    """Make one of the pictures below, in the style of all."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A script that matplotlib's font lacks is drawn by the reader's own.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        return picture(subject)


def errors_picture(report: MatrixReport) -> str:
    """The greatest error of each case on each backend, as a share of what rounding explains."""
    rows = [*report.rows, *report.real]
    cells = [[row.cells.get(name) for name in report.backends] for row in rows]
    shares = np.array([
        [np.nan if cell is None else cell.units / row.budget for cell in several]
        for row, several in zip(rows, cells, strict=True)
    ])  # fmt: skip
    ran = np.array([[cell is not None for cell in several] for several in cells])
    good = np.array([[cell is None or cell.passed for cell in several] for several in cells])
    figure = Figure(figsize=(9.5, 0.24 * len(rows) + 0.8), layout="constrained")
    axes: Axes = figure.subplots()
    sure = np.nan_to_num(np.where(good, shares, 1), nan=1e-3)
    shown = np.ma.array(np.clip(sure, 1e-3, 1), mask=~good)
    image = axes.imshow(shown, aspect="auto", cmap=SHARES, norm=LogNorm(1e-3, 1))
    axes.set_xticks(range(len(report.backends)), report.backends)
    axes.set_yticks(range(len(rows)), [_short(row.name, 60) for row in rows], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(report.backends) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    for (i, j), share in np.ndenumerate(shares):
        color = "white" if share > 0.1 or not good[i, j] else "#1f2328"
        text = f"{100 * share:.2g} %" if good[i, j] else "fails"
        text = text if ran[i, j] else "skipped"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.4, aspect=30)
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1], labels=["0.1 %", "1 %", "10 %", "100 %"])
    bar.set_label("greatest error / what rounding allows")
    bar.outline.set_visible(False)
    return _svg(figure)


def bits_picture(report: MatrixReport) -> str:
    """The share of elements that differ between backends, with the reproducible mode below."""
    rows = [row for row in (*report.rows, *report.real) if row.compared]
    rows = [row for row in rows if row.dtype in ("float32", "float32 in float64")]
    rows.sort(key=lambda row: row.reproducible)
    if not rows:
        return ""
    figure = Figure(figsize=(9.5, 0.22 * len(rows) + 0.8), layout="constrained")
    axes: Axes = figure.subplots()
    shares = [100 * row.differing / row.compared for row in rows]
    colors = ["#1a7f37" if row.reproducible else "#8b949e" for row in rows]
    axes.barh(range(len(rows)), shares, color=colors)
    axes.set_yticks(range(len(rows)), [_short(row.name, 60) for row in rows], fontsize=9)
    axes.invert_yaxis()
    for i, (row, share, color) in enumerate(zip(rows, shares, colors, strict=True)):
        tied = f", {row.ties} of them tied" if row.ties else ""
        label = f"{row.differing:,} of {row.compared:,}{tied}"
        shade = color if row.reproducible else "#1f2328"
        axes.text(share + 0.7, i, label, va="center", fontsize=8, color=shade)
        axes.get_yticklabels()[i].set_color(shade)
    axes.set_xlim(0, 120)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("elements that differ in any bit between two backends, %")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def map_picture(item: AttentionMap) -> str:
    """The attention maps of a few heads, from the most focused to the least, as SVG."""
    size, words = len(item.tokens), [_short(token, 14) for token in item.tokens]
    spread = -np.sum(item.scores * np.log(item.scores + 1e-12), axis=-1).mean(-1)  # entropy
    order = np.argsort(spread)
    heads = order[np.unique(np.linspace(0, len(order) - 1, HEADS).round().astype(int))]
    figure = Figure(figsize=(9.5, 3.0), layout="constrained")
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    image: Any = None
    for panel, head in zip(panels, heads, strict=True):
        image = panel.imshow(item.scores[head], cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"head {head}", fontsize=10)
        panel.set_xticks(range(size), words, rotation=90, fontsize=8)
        first = words if head == heads[0] else [""] * size
        panel.set_yticks(range(size), first, fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_color("#d0d7de")
    panels[0].set_ylabel("this word")
    panels[0].set_xlabel("looks at")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=25)
    bar.set_label("probability")
    bar.outline.set_visible(False)
    return _svg(figure)


def _short(text: str, length: int) -> str:
    """The text, cut where a picture has no room for it; the page has all of it elsewhere."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
