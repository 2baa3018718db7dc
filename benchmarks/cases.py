"""What is timed: the cases, and the arrays that all layers of a case are given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from anymha.errors import UsageError
from anymha.parity.oracle.cases import numpy_dtype

Arrays = dict[str, np.ndarray]

MODES = ("forward", "train")
MASKS = ("none", "causal", "bool", "padding")
SERIES = (128, 256, 512, 1024, 2048, 4096, 8192)
"""The lengths that are drawn where none are named."""


@dataclass(frozen=True)
class Case:
    """One problem that every layer is given.

    Args:
        name: Its name, as `--cases` has it.
        batch: B.
        length: T, of queries and keys alike: self-attention.
        features: D, of inputs and outputs.
        heads: H, each of D/H features.
        mode: "forward", or "train": forward, and backward to the input and all parameters.
        mask: "none", "causal", "bool" (B, T, T) or "padding" (B, T).
        window: With the causal mask: how many keys a query sees, its own counted; None for all.
        modern: Whether heads of queries and keys have RMS norms and rotary positions, and each
            head a sink.
        dtype: Of weights and inputs.
        dropout: The rate at which probabilities are dropped.
        scores: Whether the probabilities are returned.
        exact: Whether our layer is timed in reproducible mode too.
        peers: Whether other layers are timed.
        eager: Whether compiled layers are timed uncompiled too.
        essential: Whether it is timed where no case is named.
        device: The only device on which it is timed; None for all.
        series: Whether it is a point of the picture.
    """

    name: str
    batch: int
    length: int
    features: int = 512
    heads: int = 8
    mode: str = "forward"
    mask: str = "none"
    window: int | None = None
    modern: bool = False
    dtype: str = "float32"
    dropout: float = 0.0
    scores: bool = False
    exact: bool = False
    peers: bool = True
    eager: bool = False
    essential: bool = False
    device: str | None = None
    series: bool = False

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == "train"

    @property
    def key_dim(self) -> int:
        """Features of a head."""
        return self.features // self.heads

    @property
    def dense_bytes(self) -> int:
        """What a layer takes that holds all probabilities, at the least."""
        copies = 4 if self.training else 2
        return copies * 4 * self.batch * self.heads * self.length**2

    def to_dict(self) -> dict[str, Any]:
        """All its fields, for JSON."""
        return dataclasses.asdict(self)


def _cases() -> tuple[Case, ...]:
    s128: dict[str, Any] = {"batch": 8, "length": 128}
    m1k: dict[str, Any] = {"batch": 2, "length": 1024}
    l4k: dict[str, Any] = {"batch": 1, "length": 4096}
    x8k: dict[str, Any] = {"batch": 1, "length": 8192}
    train: dict[str, Any] = {"mode": "train"}
    return (
        Case("tiny", 1, 16, 64, 4, eager=True, essential=True),
        Case("s128", **s128, eager=True),
        Case("s128-causal", **s128, mask="causal"),
        Case("s128-train", **s128, **train),
        Case("s128-train-dropout", **s128, **train, dropout=0.1),
        Case("m1k", **m1k, essential=True),
        Case("m1k-causal", **m1k, mask="causal", essential=True),
        Case("m1k-bool", **m1k, mask="bool"),
        Case("m1k-padding", **m1k, mask="padding"),
        Case("m1k-scores", **m1k, scores=True),
        Case("m1k-bfloat16", **m1k, dtype="bfloat16"),
        Case("m1k-float16", **m1k, dtype="float16", device="cuda"),
        Case("m1k-modern", **m1k, mask="causal", window=256, modern=True),
        Case("m1k-exact", **m1k, exact=True, peers=False),
        Case("m1k-train", **m1k, **train, essential=True),
        Case("m1k-train-causal", **m1k, **train, mask="causal"),
        Case("m1k-train-dropout", **m1k, **train, dropout=0.1),
        Case("m1k-train-exact", **m1k, **train, exact=True, peers=False),
        Case("l4k", **l4k),
        Case("l4k-causal", **l4k, mask="causal"),
        Case("l4k-train", **l4k, **train),
        Case("x8k", **x8k),
        Case("x8k-causal", **x8k, mask="causal"),
        Case("32k", 1, 32768, peers=False),
    )


CASES = _cases()


def choose(
    patterns: Sequence[str] | None, modes: Sequence[str], *, every: bool, device: str
) -> list[Case]:
    """The cases that are asked for, in the order of `CASES`.

    Args:
        patterns: Names of cases, or shell patterns such as ``m1k*``; None for the usual ones.
        modes: "forward", "train" or both.
        every: Whether the usual ones are all.
        device: "cpu" or "cuda".

    Raises:
        UsageError: a pattern fits no case, or a mode is unknown, or nothing is left.
    """
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"`--modes` must be of {', '.join(MODES)}. Received: {mode!r}.")
    known = [case for case in CASES if case.device in (None, device)]
    for pattern in patterns or ():
        if not any(fnmatchcase(case.name, pattern) for case in known):
            names = ", ".join(case.name for case in known)
            raise UsageError(f"`--cases` must be of {names}. Received: {pattern!r}.")
    if patterns is not None:
        known = [case for case in known if any(fnmatchcase(case.name, p) for p in patterns)]
    elif not every:
        known = [case for case in known if case.essential]
    found = [case for case in known if case.mode in modes]
    if not found:
        raise UsageError(f"None of these cases has a mode of {', '.join(modes)}.")
    return found


def series(lengths: Iterable[int]) -> list[Case]:
    """A case for each length, for the picture: batch 1, 512 features, 8 heads, no mask."""
    return [Case(f"length-{length}", 1, length, series=True) for length in sorted(set(lengths))]


@dataclass(frozen=True)
class Problem:
    """A case's arrays, in float32; of a half precision case, rounded to it.

    Args:
        case: The case.
        weights: Canonical weights.
        x: (B, T, D).
        cotangent: (B, T, D), of the output.
        attention_mask: (B, T, T) booleans, True = may attend, where the case has one.
        padding: (B, T) booleans, True = a token, where the case has padding.
    """

    case: Case
    weights: Arrays
    x: np.ndarray
    cotangent: np.ndarray
    attention_mask: np.ndarray | None = None
    padding: np.ndarray | None = None

    def allowed(self, rows: np.ndarray) -> np.ndarray | None:
        """(B, R, T) booleans: which keys the queries at `rows` see; None for all."""
        if self.case.mask == "causal":
            places, rows = np.arange(self.case.length), rows[None, :, None]
            first = -1 if self.case.window is None else rows - self.case.window
            return (places <= rows) & (places > first)
        if self.attention_mask is not None:
            return self.attention_mask[:, rows]
        return None if self.padding is None else self.padding[:, None]

    @cached_property
    def layer_options(self) -> dict[str, Any]:
        """The options of our layer's constructor."""
        case = self.case
        return {
            "num_heads": case.heads, "key_dim": case.key_dim, "query_features": case.features,
            "dropout": case.dropout, "dtype": case.dtype, "sliding_window": case.window,
            "rotary": case.modern, "query_key_norm": "rms" if case.modern else None,
            "sinks": case.modern,
        }  # fmt: skip

    @cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines (T, d_k) of rotary positions, each half of them the same."""
        width = self.case.key_dim
        frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
        angles = np.tile(np.arange(self.case.length)[:, None] * frequencies, 2)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def make_problem(case: Case) -> Problem:
    """The arrays of a case: the same in every process.

    Logits are about normal, as at the start of a training.
    """
    rng = np.random.default_rng(17)
    b, t, d, h, k = case.batch, case.length, case.features, case.heads, case.key_dim

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32) * np.float32(size)
        return drawn.astype(numpy_dtype(case.dtype)).astype(np.float32)

    weights: Arrays = {}
    for name in ("query", "key", "value"):
        weights[f"{name}.kernel"] = normal(d, h, k, size=1 / math.sqrt(d))
        weights[f"{name}.bias"] = normal(h, k, size=0.02)
    weights["output.kernel"] = normal(h, k, d, size=1 / math.sqrt(d))
    weights["output.bias"] = normal(d, size=0.02)
    if case.modern:
        weights |= {f"{name}_norm.scale": 1 + normal(k, size=0.1) for name in ("query", "key")}
        weights["sinks"] = normal(h)
    x, cotangent = normal(b, t, d), normal(b, t, d)
    mask = padding = None
    if case.mask == "bool":
        mask = rng.random((b, t, t), np.float32) < 0.7
        mask |= np.eye(t, dtype=bool)  # peers differ on rows that see nothing
    if case.mask == "padding":
        lengths = t - np.arange(b) * t // (2 * b) - t // 8
        padding = np.arange(t) < lengths[:, None]
    return Problem(case, weights, x, cotangent, mask, padding)
