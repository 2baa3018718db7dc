"""What a keep mask costs, beside the framework's own dropout: ``python benchmarks/dropout.py``.

One process, all frameworks that are installed, the candidates of a framework interleaved, medians.
A number is nanoseconds for each element of a (4, 8, 512, 1024) mask. `--bits` compares the masks of
all backends instead, eager and compiled, over 10^8 positions.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from anymha.attention.dropout import Dropout
from anymha.framework.registry import get_backend

SHAPE = (4, 8, 512, 1024)
LARGE = (2, 4, 2501, 5003)
THRESHOLD = 6554
RATE = THRESHOLD / 65536
NAMES = ("numpy", "torch", "tensorflow", "jax")


def keep_mask(ops: Any, seed: Any, shape: tuple[int, ...] = SHAPE) -> Any:
    """The mask as the layer makes it."""
    return Dropout(THRESHOLD, seed).keep(ops, shape, like=ops.from_numpy(np.ones(1, np.float32)))


def candidates(name: str) -> dict[str, Callable[[], Any]]:
    """What is timed in a framework; the first is ours, eager or as users would compile it."""
    ops: Any = get_backend(name).ops
    if name == "numpy":
        rng = np.random.default_rng(0)
        return {
            "anymha": lambda: keep_mask(ops, 1),
            "Generator.random(float32) >= p": lambda: rng.random(SHAPE, np.float32) >= RATE,
        }
    if name == "torch":
        import torch

        x = torch.ones(SHAPE)
        compiled = torch.compile(lambda seed: keep_mask(ops, seed))
        seed = torch.tensor(1)
        return {
            "anymha": lambda: keep_mask(ops, 1),
            "anymha, torch.compile": lambda: compiled(seed),
            "F.dropout": lambda: torch.nn.functional.dropout(x, RATE),
            "bernoulli_": lambda: torch.empty(SHAPE).bernoulli_(1 - RATE),
        }
    if name == "jax":
        import jax

        jitted = jax.jit(lambda seed: keep_mask(ops, seed))
        own = jax.jit(lambda key: jax.random.bernoulli(key, 1 - RATE, SHAPE))
        return {
            "anymha, jit": lambda: jitted(1).block_until_ready(),
            "jax.random.bernoulli, jit": lambda: own(jax.random.key(1)).block_until_ready(),  # pyright: ignore[reportCallIssue]
        }
    import tensorflow as tf

    x, seed = tf.ones(SHAPE), tf.constant(1)

    @tf.function(autograph=False)
    def ours(seed):
        return keep_mask(ops, seed)

    @tf.function(autograph=False, jit_compile=True)
    def ours_xla(seed):
        return keep_mask(ops, seed)

    @tf.function(autograph=False)
    def own():
        return tf.nn.dropout(x, RATE)

    @tf.function(autograph=False, jit_compile=True)
    def own_xla(seed):
        return tf.nn.experimental.stateless_dropout(x, RATE, seed=seed)

    pair = tf.constant([1, 0])
    return {
        "anymha, tf.function": lambda: ours(seed),
        "tf.nn.dropout, tf.function": own,
        "anymha, XLA": lambda: ours_xla(seed),
        "stateless_dropout, XLA": lambda: own_xla(pair),
    }


def time_all(repeats: int) -> Table:
    """Each framework's candidates, interleaved."""
    table = Table("framework", "what", "ns an element", title="Cost of a keep mask")
    for name in NAMES:
        if not get_backend(name).installed:
            continue
        functions = candidates(name)
        times: dict[str, list[float]] = {what: [] for what in functions}
        for what in functions:
            functions[what]()  # compiles
        for _ in range(repeats):
            for what, function in functions.items():
                began = time.perf_counter()
                function()
                times[what].append(time.perf_counter() - began)
        for what, seconds in times.items():
            cost = statistics.median(seconds) / math.prod(SHAPE) * 1e9
            table.add_row(name, what, f"{cost:.2f}")
    return table


def compare_bits(console: Console) -> bool:
    """Whether all backends, eager and compiled, make the same 10^8 booleans."""
    same = True
    reference = keep_mask(get_backend("numpy").ops, 5, LARGE)
    for name in NAMES[1:]:
        if not get_backend(name).installed:
            continue
        ops: Any = get_backend(name).ops
        for what, function in compilers(name).items():
            mask = function(lambda seed, ops=ops: keep_mask(ops, seed, LARGE))
            seed = ops.from_numpy(np.array(5, np.int32))
            differing = int(np.sum(ops.to_numpy(mask(seed)) != reference))
            console.print(f"{name:12} {what:12} {differing} of {reference.size:,} bits differ")
            same &= differing == 0
    return same


def compilers(name: str) -> dict[str, Callable[[Any], Any]]:
    """The ways in which a framework can run a function."""
    eager: dict[str, Callable[[Any], Any]] = {"eager": lambda function: function}
    if name == "torch":
        import torch

        return eager | {"compiled": torch.compile}
    if name == "jax":
        import jax

        return eager | {"jit": jax.jit}
    import tensorflow as tf

    return eager | {
        "tf.function": lambda function: tf.function(function, autograph=False),
        "XLA": lambda function: tf.function(function, autograph=False, jit_compile=True),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", action="store_true", help="compare bits instead of times")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    console = Console()
    if options.bits:
        raise SystemExit(0 if compare_bits(console) else 1)
    console.print(time_all(options.repeats))
