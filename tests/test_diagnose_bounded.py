"""Clipped stages, and heads in whole numbers with a fixed factor, are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare

pytestmark = pytest.mark.usefixtures("folded_once")

HEADS, WIDTH = 4, 8
FEATURES = HEADS * WIDTH
X = np.random.default_rng(4).standard_normal((2, 6, FEATURES)).astype(np.float32)
Change = Callable[[np.ndarray], np.ndarray]


def layer_of(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 4, **options}
    return anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)


def turned(x: np.ndarray) -> np.ndarray:
    half = WIDTH // 2
    angles = np.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def named(layer: Any, changes: dict[str, Change]) -> str | None:
    """What is said of a port in which stages are changed."""
    w = {name: a.astype(np.float64) for name, a in anymha.get_weights(layer).items()}
    changes = {name: changes.get(name, lambda x: x) for name in (
        "query", "key", "value", "logits", "context")}  # fmt: skip

    def port(query: Any) -> Any:
        x = query.astype(np.float64)
        heads = {n: np.einsum("btd,dhk->bthk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"]
                 for n in ("query", "key", "value")}  # fmt: skip
        if layer.config.rotary is not None:
            heads |= {n: turned(heads[n]) for n in ("query", "key")}
        q, k, v = (changes[n](heads[n]) for n in heads)
        logits = changes["logits"](np.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = shares / shares.sum(-1, keepdims=True)
        context = changes["context"](np.einsum("bhts,bshv->bthv", shares, v))
        y = np.einsum("bthv,hvo->bto", context, w["output.kernel"]) + w["output.bias"]
        return y.astype(query.dtype)

    report = compare(layer, port, X)
    return None if report.passed else str(report.diagnosis).partition(" (or: ")[0]


def cut(most: float) -> Change:
    return lambda x: np.clip(x, -most, most)


def whole(factor: float, low: int, most: int) -> Change:
    return lambda x: np.clip(np.round(x / factor), low, most) * factor


def wrapped(x: np.ndarray) -> np.ndarray:
    return np.round(64 * x).astype(np.int64).astype(np.int8) / 64


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": cut(1.5), "value": cut(1.5)}, "stage clipped (key and value at 1.5 and -1.5)"),
        ({"value": cut(0.7)}, "stage clipped (value at 0.7 and -0.7)"),
        ({"logits": cut(0.4)}, "another softcap (0.4 in place of none, by clipping)"),
        ({"context": cut(0.25)}, "stage clipped (context at 0.25 and -0.25)"),
        (dict.fromkeys(("key", "value"), whole(1 / 127, -128, 127)),
         "(key and value in int8 with a factor of 1/127, clipped to -128 and 127)"),
        (dict.fromkeys(("query", "key", "value"), whole(0.01, -127, 127)),
         "(query, key and value in int8 with a factor of 0.01, clipped to -127 and 127)"),
        ({"value": whole(0.2, -8, 7)},
         "(value in int4 with a factor of 0.2, clipped to -8 and 7)"),
        ({"key": wrapped}, "(key in int8 with a factor of 0.015625, wrapped round beyond 127)"),
    ],
)  # fmt: skip
def test_bounded_stages_are_named(changes, words, rotary) -> None:
    told = named(layer_of(rotary=rotary), changes)
    assert told is not None
    assert words in told, told


def test_what_reaches_no_limit_agrees() -> None:
    assert named(layer_of(rotary=True), {"key": cut(50.0), "logits": cut(50.0)}) is None
