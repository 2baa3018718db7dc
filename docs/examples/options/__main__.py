"""The pictures of the options' pages, drawn from what the library computes.

    python docs/examples/options docs/images

It needs Matplotlib: ``pip install 'anymha[report]'``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import anymha

INK, MAIN, OTHER, THIRD = "#768390", "#0969da", "#cf222e", "#1a7f37"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "anymha", "font.size": 10, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def rotary(figure: Figure) -> None:
    """Three pairs of columns at positions 0 to 7, as `anymha.rotate` turns the vector (1, 0)."""
    positions = np.arange(8)
    x = np.zeros((1, 8, 1, 6), np.float32)
    x[..., :3] = 1  # the first member of each pair, in halves
    turned = anymha.rotate(x, positions, anymha.Rotary(base=30.0))[0, :, 0]
    for pair, axes in enumerate(figure.subplots(1, 3)):
        for position in positions:
            a, b = turned[position, pair], turned[position, pair + 3]
            axes.plot([0, a], [0, b], color=MAIN, alpha=0.25 + 0.1 * position)
            if pair < 2 or position in (0, 7):  # the third turns too slowly for all
                axes.text(1.18 * a, 1.18 * b, str(position), ha="center", va="center", fontsize=9)
        axes.set(aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), title=f"pair {pair}")
        axes.axis("off")


def query_key_norm(figure: Figure) -> None:
    """The greatest logit over the size of the weights, with a norm and without."""
    axes, sizes = figure.subplots(), np.logspace(-1, 1, 9)
    x = np.random.default_rng(0).standard_normal((1, 16, 32))
    both: list[tuple[Any, str, str]] = [
        (None, OTHER, "plain"), ("rms", MAIN, 'query_key_norm="rms"'),
    ]  # fmt: skip
    for norm, color, label in both:
        layer: Any = anymha.MultiHeadAttention(
            2, 16, query_features=32, seed=0, query_key_norm=norm, dtype="float64", backend="numpy"
        )
        first, greatest = anymha.get_weights(layer), []
        for size in sizes:
            scaled = {n: w * size if n.endswith("kernel") else w for n, w in first.items()}
            anymha.set_weights(layer, scaled)
            _, scores = layer(x, return_attention_scores=True)
            logs = np.log(scores)
            greatest.append(np.max(logs.max(-1) - logs.min(-1)))
        axes.loglog(sizes, greatest, color=color, marker="o", label=label)
    axes.set(xlabel="factor of all kernels", ylabel="range of the logits of a row")
    axes.legend(frameon=False)


def softcap(figure: Figure) -> None:
    """The capped logit over the logit."""
    axes, logits = figure.subplots(), np.linspace(-10, 10, 201)
    axes.plot(logits, logits, color=INK, linestyle=":", label="no cap")
    for cap, color in ((2.0, OTHER), (5.0, MAIN)):
        axes.plot(logits, cap * np.tanh(logits / cap), color=color, label=f"softcap={cap:g}")
    axes.set(xlabel="logit", ylabel="capped logit", ylim=(-7, 7))
    axes.legend(frameon=False)


def alibi(figure: Figure) -> None:
    """The probabilities of a query at position 31 whose products with all keys are equal."""
    axes, heads = figure.subplots(), 8
    q = np.zeros((1, 1, heads, 4), np.float32)
    k = np.zeros((1, 32, heads, 4), np.float32)
    slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    _, scores = anymha.dot_product_attention(
        q, k, k, alibi_slopes=slopes, is_causal=True, query_offset=31, return_scores=True
    )
    for head in range(heads):
        row = scores[0, head, 0]
        axes.semilogy(row, color=MAIN, alpha=1 - 0.1 * head)
        at = int(np.argmax(row > 2e-4))
        words = f"slope 1/{2 ** (head + 1)}" if head < 5 else ""
        axes.text(at, row[at], words, ha="right", va="center", fontsize=8)
    axes.set(xlabel="position of the key; the query is at 31", ylabel="probability")
    axes.set(xlim=(-5, 31.5), ylim=(1e-4, 1))


def sinks(figure: Figure) -> None:
    """The probabilities of one row, without a sink and with sinks of 0 and 2."""
    axes = figure.subplots()
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    q = np.ones((1, 1, 1, 1), np.float32)
    k = logits.reshape(1, 4, 1, 1)
    given: tuple[tuple[float | None, str], ...] = ((None, INK), (0.0, MAIN), (2.0, OTHER))
    for place, (sink, color) in enumerate(given):
        array = None if sink is None else np.array([sink], np.float32)
        _, scores = anymha.dot_product_attention(q, k, k, sinks=array, return_scores=True)
        row = scores[0, 0, 0]
        label = "no sink" if sink is None else f"sink {sink:g}, which takes {1 - row.sum():.0%}"
        axes.bar(np.arange(4) + 0.27 * (place - 1), row, 0.25, color=color, label=label)
    axes.set(xlabel="logit of the key", ylabel="probability", xticks=range(4))
    axes.set_xticklabels([f"{one:g}" for one in logits])
    axes.legend(frameon=False)


PICTURES: dict[str, Callable[[Figure], None]] = {
    "rotary": rotary, "query-key-norm": query_key_norm, "softcap": softcap, "alibi": alibi,
    "sinks": sinks,
}  # fmt: skip


def main(folder: Path) -> None:
    """Draw all of them into a folder."""
    for name, draw in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6.4, 2.6), layout="constrained")
            draw(figure)
            figure.savefig(
                folder / f"{name}.svg", transparent=True, metadata={"Date": None, "Creator": None}
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
