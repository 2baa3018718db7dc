"""Train a small language model, and decode with it in every framework.

`python docs/examples/decoding --help`; it needs PyTorch, in which the model is trained.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import numpy as np
from homes import NAMES
from text import LETTERS, decode, encode
from training import train
from writer import Writer, Written

PROMPT = "The import statement"
BOUND = 1e-3


def main() -> int:
    """Print the table and the text; 0 if all frameworks write the same, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frameworks", default=",".join(NAMES), help="by commas")
    parser.add_argument("--letters", type=int, help="how many each writes")
    parser.add_argument("--small", action="store_true", help="train and write for a few seconds")
    parser.add_argument("--image", type=Path, help="where to draw the times")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "torch"

    steps, length, letters = (20, 32, 40) if arguments.small else (800, 128, 480)
    weights, layers = train(steps, 16, length, lambda line: print(line, flush=True))
    size = (arguments.letters or letters, len(LETTERS))
    noise = np.random.default_rng(0).gumbel(size=size)
    prompt = encode(PROMPT)

    print("| framework | letters a second | without a cache | logits differ by | same text |")
    print("|---|---|---|---|---|")
    written: dict[str, tuple[Written, Written]] = {}
    passed = True
    for name in arguments.frameworks.split(","):
        writer = Writer(name, weights, layers)
        both = written[name] = (writer.write(prompt, noise), writer.write_anew(prompt, noise))
        first = next(iter(written.values()))[0]
        same = all(np.array_equal(one.letters, first.letters) for one in both)
        apart = max(float(np.max(np.abs(one.logits - first.logits))) for one in both)
        passed = passed and same and apart <= BOUND
        print(
            f"| {name} | {both[0].rate:.0f} | {both[1].rate:.0f} | {apart:.1e} "
            f"| {'yes' if same else 'NO'} |",
            flush=True,
        )
    if arguments.image:
        importlib.import_module("picture").draw(written, len(prompt), arguments.image)
    print(f"One text: {'yes' if passed else 'NO'}.\n\n{PROMPT}{decode(first.letters)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
