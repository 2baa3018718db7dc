"""Train one small model in every framework, and compare: `python docs/examples/train --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import numpy as np
from task import BOUND, Run, Task, judge

FRAMEWORKS = ("numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox")


def main() -> int:
    """Print the table; 0 if all frameworks agree, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="by commas")
    parser.add_argument("--image", type=Path, help="where to draw the loss curves")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "torch"

    reference: dict[bool, Run] = {}
    curves: dict[str, np.ndarray] = {}
    passed = True
    print("| framework | first loss | last loss | float32: relative | losses | weights |")
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(("numpy", *arguments.frameworks.split(","))):
        train = importlib.import_module(f"with_{name}").train
        runs = {mode: train(Task(arguments.steps, mode)) for mode in (False, True)}
        reference = reference or runs
        verdict = judge(reference, runs)
        print(
            f"| {name} | {verdict.first:.6f} | {verdict.last:.6f} | {verdict.relative:.1e} "
            f"| {verdict.losses} | {verdict.weights} |",
            flush=True,
        )
        curves[name] = runs[False].losses
        passed = passed and verdict.passed
    if arguments.image:
        importlib.import_module("picture").draw(curves, arguments.image)
    held = "hold" if passed else "do NOT hold"
    print(f"The bounds {held}: relative at most {BOUND:g}, no differing bit in reproducible mode.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
