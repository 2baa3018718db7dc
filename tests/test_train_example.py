"""The training example: a few steps of it in each framework, and what its judge sees."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anymha.framework.registry import BUILT_IN
from tests.frameworks import skip_or_fail

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/train"
# What each needs beside its own module: the frameworks whose arrays it has.
NEEDS = {
    **{b.name: [b.framework] for b in BUILT_IN if b.name != "numpy"},
    "keras": ["keras", "torch"],
    "flax": ["flax", "jax"],
    "equinox": ["equinox", "jax"],
}


def load_task():
    spec = importlib.util.spec_from_file_location("train_task", EXAMPLE / "task.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task = load_task()


@functools.cache
def ran() -> subprocess.CompletedProcess[str]:
    """The example in all frameworks that are installed, in a process of its own.

    Importing Keras fixes its backend.
    """
    names = [name for name in NEEDS if all(map(importlib.util.find_spec, NEEDS[name]))]
    return subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps=5", f"--frameworks={','.join(['numpy', *names])}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("framework", list(NEEDS))
def test_five_steps_are_those_of_numpy(framework: str) -> None:
    for name in NEEDS[framework]:
        if importlib.util.find_spec(name) is None:
            skip_or_fail(framework, f"{name} is not installed")
    result = ran()
    rows = [line.split(" | ") for line in result.stdout.splitlines() if f"| {framework} |" in line]
    assert len(rows) == 1, result.stdout + result.stderr
    _, first, last, relative, losses, weights = (cell.strip("| ") for cell in rows[0])
    assert float(last) < float(first)
    assert float(relative) <= 1e-5
    assert (losses, weights) == ("0", "0")


def test_the_example_says_that_the_bounds_hold() -> None:
    result = ran()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The bounds hold" in result.stdout


@pytest.fixture
def runs():
    losses = np.array([4.0, 3.0], "float32")
    return {
        mode: task.Run(losses.copy(), {"kernel": np.ones((2, 2), "float32")})
        for mode in (False, True)
    }


def test_equal_runs_pass(runs) -> None:
    verdict = task.judge(runs, runs)
    assert verdict.passed
    assert (verdict.first, verdict.last, verdict.relative) == (4.0, 3.0, 0.0)


def test_a_curve_too_far_off_fails(runs) -> None:
    for factor, passed in ((1 + 5e-6, True), (1 + 2e-5, False), (np.nan, False)):
        losses = runs[False].losses * np.float32(factor)
        found = {**runs, False: replace(runs[False], losses=losses)}
        assert task.judge(runs, found).passed is passed


def test_one_bit_of_a_reproducible_run_fails(runs) -> None:
    kernel = np.ones((2, 2), "float32")
    kernel[1, 0] = np.nextafter(kernel[1, 0], np.float32(2))
    weights = {**runs, True: replace(runs[True], weights={"kernel": kernel})}
    assert (task.judge(runs, weights).weights, task.judge(runs, weights).passed) == (1, False)
    losses = np.nextafter(runs[True].losses, np.float32(0))
    both = {**runs, True: replace(runs[True], losses=losses)}
    assert (task.judge(runs, both).losses, task.judge(runs, both).passed) == (2, False)


def test_the_text_and_the_batches_are_the_same_each_time() -> None:
    one, two = task.Task(3, False), task.Task(3, True)
    assert len(one.text) == 20_000
    for a, b in zip(one.batches(), two.batches(), strict=True):
        np.testing.assert_array_equal(a[0][:, 1:], a[1][:, :-1])
        np.testing.assert_array_equal(a[0], b[0])
        assert a[2] == b[2]
