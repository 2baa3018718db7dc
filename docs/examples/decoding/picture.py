"""The time of each letter over the length of the text, with caches and without, in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from writer import Written

INK = "#768390"
COLORS = {"numpy": "#1a7f37", "torch": "#cf222e", "jax": "#0969da"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "anymha", "font.size": 10, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
GROUP = 16  # letters whose median is drawn


def draw(written: Mapping[str, tuple[Written, Written]], prompt: int, path: Path) -> None:
    """Draw what homes took for each letter, with caches and without.

    Args:
        written: By the home's name: what it wrote with caches, and without.
        prompt: The length of the prompt.
        path: The picture, an .svg.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, color in COLORS.items():
            for one, line in zip(written.get(name, ()), ("-", ":"), strict=False):
                groups = [
                    one.seconds[i : i + GROUP]
                    for i in range(0, len(one.seconds) - GROUP + 1, GROUP)
                ]
                at = prompt + GROUP * (np.arange(len(groups)) + 0.5)
                label = f"{name}, cache" if line == "-" else f"{name}, no cache"
                times = [1e3 * np.median(group) for group in groups]
                axes.plot(at, times, line, color=color, label=label)
        axes.set(xlabel="letters so far", ylabel="milliseconds for the next letter")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
