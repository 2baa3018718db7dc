"""The report as one HTML file with its pictures inside. Needs the extra "report"."""

from __future__ import annotations

import io
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from anymha.errors import UsageError
from anymha.parity.matrix import AttentionMap, Report

try:
    import jinja2
    import matplotlib
    from matplotlib.colors import LogNorm
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


def to_html(report: Report) -> str:
    """The whole report as one HTML document that loads nothing."""
    template = files("anymha.parity").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pictures = {"errors": errors_picture(report), "bits": bits_picture(report)}
    maps = [(item, map_picture(item)) for item in report.maps]
    return environment.from_string(template).render(
        report=report, pictures=pictures, maps=maps, rows=[*report.rows, *report.real]
    )


def errors_picture(report: Report) -> str:
    """The greatest error of each case on each backend over what rounding allows, as SVG."""
    rows = [*report.rows, *report.real]
    shares = np.array([[r.cells[b].units / r.budget for b in report.backends] for r in rows])
    figure = Figure(figsize=(7.5, 0.24 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    shown = np.clip(np.nan_to_num(shares, nan=1e3, posinf=1e3), 1e-4, 1e3)
    image = axes.imshow(shown, aspect="auto", cmap="RdYlGn_r", norm=LogNorm(1e-3, 1e3))
    axes.set_xticks(range(len(report.backends)), report.backends)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.xaxis.tick_top()
    for (i, j), share in np.ndenumerate(shares):
        text = f"{share:.0%}" if np.isfinite(share) and share < 10 else "fails"
        axes.text(j, i, text, ha="center", va="center", fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.5)
    bar.set_label("greatest error / what rounding allows")
    return _svg(figure)


def bits_picture(report: Report) -> str:
    """The share of elements that differ between backends, with the reproducible mode below."""
    rows = [row for row in (*report.rows, *report.real) if row.compared]
    rows = [row for row in rows if row.dtype in ("float32", "float32 in float64")]
    if len(report.backends) < 2 or not rows:
        return ""
    figure = Figure(figsize=(7.5, 0.2 * len(rows) + 0.9), layout="constrained")
    axes: Axes = figure.subplots()
    shares = [100 * row.differing / row.compared for row in rows]
    colors = ["#1a7f37" if row.reproducible else "#8b949e" for row in rows]
    axes.barh(range(len(rows)), shares, color=colors)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        label = f"{row.differing:,} of {row.compared:,}"
        axes.text(share + 0.7, i, label, va="center", fontsize=7)
    axes.set_xlim(0, 118)
    axes.set_xlabel("elements that differ in any bit between backends, %")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def map_picture(item: AttentionMap) -> str:
    """Who looks at whom, for the heads that look away from the punctuation most, as SVG."""
    size = len(item.tokens)
    spread = -np.sum(item.scores * np.log(item.scores + 1e-12), axis=-1).mean(-1)  # entropy
    heads = sorted(np.argsort(spread)[:: max(1, len(spread) // HEADS)][:HEADS])
    figure = Figure(figsize=(2.0 + 2.6 * len(heads), 3.6), layout="constrained")
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    for panel, head in zip(panels, heads, strict=True):
        panel.imshow(item.scores[head], cmap="Blues", vmin=0, vmax=1)
        panel.set_title(f"head {head}", fontsize=9)
        panel.set_xticks(range(size), item.tokens, rotation=90, fontsize=7)
        panel.set_yticks(range(size), item.tokens if head == heads[0] else [""] * size, fontsize=7)
    panels[0].set_ylabel("query")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element, text as paths so that it looks the same everywhere."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "anymha"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
