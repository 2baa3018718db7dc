"""The loss curves in one picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Draw the loss curves into one picture, each line thinner than the one below it."""
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "anymha"  # the same picture, the same file
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for i, (name, losses) in enumerate(curves.items()):
        axes.plot(losses, label=name, linewidth=2 * (len(curves) - i), alpha=0.8)
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="One run, every framework")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
