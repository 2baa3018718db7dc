"""Time and memory over length, ours beside the peers, a column for each framework."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anymha.errors import UsageError
from benchmarks.results import CaseResult, Timing

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter
except ImportError as error:
    raise UsageError(
        f"The picture needs {error.name}, which is not installed. "
        "Install it with: pip install 'anymha[report]'."
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "anymha", "font.size": 10,
    "axes.edgecolor": "#8b949e", "xtick.color": "#57606a", "ytick.color": "#57606a",
}  # fmt: skip
"""Text as text; the same numbers give the same file."""

TITLES = {"numpy": "NumPy", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}
OURS, OTHER = "#cf222e", "#57606a"
COLORS = {
    "numpy.matmul": "#0969da", "torch.nn.MultiheadAttention": "#0969da", "tf.matmul": "#0969da",
    "flax": "#0969da", "Linear + SDPA": "#1a7f37", "equinox": "#1a7f37", "haiku": "#9a6700",
    "keras": "#8250df",
}  # fmt: skip
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
LEAST = 5e5
"""Bytes below which memory is drawn as this: less is noise."""


def to_svg(results: Sequence[CaseResult]) -> str:
    """The picture of the cases of the series, as an SVG document.

    Args:
        results: All results; those that are no points of the series are left out.

    Raises:
        UsageError: there is no point to draw.
    """
    points = [one for one in results if one.case.series and one.timings]
    frameworks = list(dict.fromkeys(one.framework for one in points))
    if not frameworks:
        raise UsageError("There is nothing to draw: no length was measured.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(frameworks) + 0.6, 6.6), layout="constrained")
        panels = figure.subplots(2, len(frameworks), squeeze=False, sharex=True)
        for column, framework in enumerate(frameworks):
            found = [one for one in points if one.framework == framework]
            _draw(panels[0, column], panels[1, column], found)
            panels[0, column].set_title(TITLES.get(framework, framework), fontsize=13)
            panels[1, column].set_xlabel("length")
            handles, labels = panels[0, column].get_legend_handles_labels()
            panels[1, column].legend(
                handles, labels, fontsize=9, frameon=False, loc="upper center",
                bbox_to_anchor=(0.5, -0.22), handlelength=1.6, borderpad=0, labelspacing=0.3,
            )  # fmt: skip
        for row, what in enumerate((_seconds, _bytes)):
            _share_limits(panels[row], what)
        panels[0, 0].set_ylabel("time of a call")
        panels[1, 0].set_ylabel("peak memory of a call")
        return _svg(figure)


def _draw(above: Axes, below: Axes, results: Sequence[CaseResult]) -> None:
    results = sorted(results, key=lambda one: one.case.length)
    peers = [t for one in results for t in one.timings if not t.ours]
    layers = {t.name: t.layer for t in peers}
    for i, name in enumerate(["", *layers]):
        found = [(one.case.length, _of(one, name)) for one in results]
        timed = [(length, t) for length, t in found if t is not None and t.seconds]
        if not timed:
            continue
        style: dict[str, Any] = {
            "color": COLORS.get(layers[name], OTHER) if name else OURS,
            "linestyle": "--" if name.endswith("tf.function") else "-",
            "marker": MARKERS[i % len(MARKERS)] if name else "o", "markersize": 4 if name else 5,
            "linewidth": 1.2 if name else 2.6, "zorder": 2 if name else 3, "markeredgewidth": 0,
            "label": name or "anymha",
        }  # fmt: skip
        above.plot([n for n, _ in timed], [t.median for _, t in timed], **style)
        held = [(n, max(float(t.memory), LEAST)) for n, t in timed if t.memory is not None]
        below.plot([n for n, _ in held], [m for _, m in held], **style)
    for axes in (above, below):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(which="major", color="#eaeef2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lengths = [one.case.length for one in results]
    step = 1 if len(lengths) <= 4 else 2
    below.set_xticks(lengths[::-1][::step][::-1])
    below.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    below.xaxis.set_minor_formatter(NullFormatter())


def _of(result: CaseResult, name: str) -> Timing | None:
    """A layer by its name; ours in its fastest form by ""."""
    if not name:
        return result.best_own
    return next((one for one in result.timings if one.name == name), None)


def _share_limits(panels: Any, what: Any) -> None:
    """The same limits in all panels of a row, and units instead of powers of ten."""
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        panel.yaxis.set_major_formatter(FuncFormatter(what))
        panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)


def _seconds(value: float, _: Any) -> str:
    return _unit(value * 1e6, ("µs", "ms", "s"))


def _bytes(value: float, _: Any) -> str:
    return _unit(value / 1e3, ("kB", "MB", "GB"))


def _unit(value: float, units: tuple[str, ...]) -> str:
    """The number in the largest unit in which it is at least one."""
    i = 0
    while value >= 999.5 and i < len(units) - 1:
        value, i = value / 1000, i + 1
    return f"{value:g} {units[i]}"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()
