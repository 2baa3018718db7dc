"""The benchmark of calls with ever new lengths: both layers agree, and the command prints a row."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

import pytest

from anymha.framework.registry import Backend
from benchmarks.new_lengths import layers, measure_times
from tests.frameworks import required

PEERS = {
    "numpy": "by hand",
    "torch": "packed Linear + SDPA",
    "jax": "Flax under jit",
    "tensorflow": "Keras",
}
MODULES = {"jax": "flax", "tensorflow": "keras"}


def test_both_layers_have_the_same_values_and_are_timed(backend: Backend) -> None:
    if backend.name in MODULES:
        required(MODULES[backend.name])
    options = Namespace(batch=2, features=16, heads=2, shortest=3, count=2)
    framework, peer, *cells = measure_times(options, backend.name)
    assert (framework, peer) == (backend.name, PEERS[backend.name])
    assert [cell.endswith(" ms") for cell in cells] == [True, False, True, False]
    assert list(layers(backend.name, 16, 2)) == ["anymha", peer]


def test_command() -> None:
    sizes = ("--count", "3", "--batch", "1", "--features", "16", "--heads", "2")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.new_lengths", "--frameworks", "numpy", *sizes],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "by hand" in done.stdout
    assert done.stdout.count(" MB") == 2


@pytest.mark.parametrize("options", [("--count", "none"), ("--size", "3")])
def test_wrong_options_are_refused(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.new_lengths", *options], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
