"""One tree's layer in one framework, for `benchmarks.calls`; a process runs this file.

It imports nothing of `benchmarks`: the tree that it measures comes first in the path, and may have
others. Commands and answers are pickled: (method of `Worker`, its arguments), (is it good, what it
gives or what went wrong).
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np


def enter_tree(tree: Path) -> None:
    """Let everything be imported from a tree, whatever else is installed."""
    sys.path[:0] = [str(tree), str(tree / "backends")]


def check_origin(tree: Path) -> None:
    """Everything of the project that was imported is the tree's.

    Raises:
        ImportError: something is from elsewhere.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) if name.startswith("anymha") else None
        if file is not None and not Path(file).resolve().is_relative_to(tree):
            raise ImportError(f"{name} is from {file}, not from {tree}")


class Worker:
    """What the process does when it is told.

    Args:
        tree: The folder that has `anymha` and `backends`.
        framework: "numpy", "torch", "tensorflow" or "jax".
        clock: Tells seconds.
    """

    def __init__(self, tree: Path, framework: str, clock: Callable[[], float]) -> None:
        import anymha

        self._new_layer: Callable[..., Any] = anymha.MultiHeadAttention
        self._set_weights: Callable[..., Any] = anymha.set_weights
        self._framework, self._clock = framework, clock
        self._array, self._wait = _framework(framework)
        self._new_layer(num_heads=1, key_dim=1, query_features=1, backend=framework)
        check_origin(tree)

    def prepare(
        self,
        options: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        flags: Mapping[str, Any],
        cut: Sequence[str],
        lengths: Sequence[int] | None,
        gradients: bool,
    ) -> list[np.ndarray]:
        """Take a case; gives what a layer of its own gives for the arrays as they are.

        Args:
            options: The constructor's.
            weights: By canonical name.
            arrays: Arguments of the call.
            flags: Arguments of the call that are no arrays.
            cut: The arrays of which each call gets another length.
            lengths: The lengths; None for calls with the arrays as they are.
            gradients: Whether torch records what gradients need.
        """
        self._options, self._weights = {**options, "backend": self._framework}, dict(weights)
        self._context = _context(self._framework, gradients)
        self._calls: list[tuple[list[Any], dict[str, Any]]] = []
        for length in [None] if lengths is None else lengths:
            given = {
                name: self._array(np.ascontiguousarray(array[:, :length]) if name in cut else array)
                for name, array in arrays.items()
            }
            places = [given.pop(name) for name in ("query", "value") if name in given]
            self._calls.append((places, {**given, **flags}))
        self.fresh()
        with self._context():
            whole = {name: self._array(array) for name, array in arrays.items()}
            result = self._layer(**whole, **flags)
        self.fresh()
        members = result if isinstance(result, tuple) else (result,)
        return [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in members]

    def fresh(self) -> None:
        """Make a new layer, which has seen nothing."""
        self._layer = self._set_weights(self._new_layer(**self._options), self._weights)

    def run(self, times: int, start: int = 0, stop: int | None = None) -> float:
        """Seconds that the calls from `start` to `stop` take, all of them so many times.

        Args:
            times: How many times.
            start: The first call's index.
            stop: The index after the last one's; None for all.
        """
        layer, wait, calls = self._layer, self._wait, self._calls[start:stop]
        clock = self._clock
        with self._context():
            began = clock()
            if wait is None:
                for _ in range(times):
                    for places, rest in calls:
                        layer(*places, **rest)
            else:
                for _ in range(times):
                    for places, rest in calls:
                        wait(layer(*places, **rest))
            return clock() - began


def _framework(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any] | None]:
    """What makes an array, and what waits for a result, where calls return before it is there."""
    if name == "numpy":
        return np.asarray, None
    if name == "torch":
        import torch

        return torch.from_numpy, None
    if name == "jax":
        import jax

        return jax.numpy.asarray, jax.block_until_ready
    import tensorflow as tf

    wait = tf.test.experimental.sync_devices
    return tf.constant, lambda result: wait()


def _context(framework: str, gradients: bool) -> Callable[[], AbstractContextManager[Any]]:
    if framework != "torch" or gradients:
        return nullcontext
    import torch

    return torch.no_grad


def main() -> None:
    """Make the worker and do what standard input says, until it ends."""
    tree, framework = Path(sys.argv[1]).resolve(), sys.argv[2]
    clock: Callable[[], float] = getattr(time, sys.argv[3])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    enter_tree(tree)
    worker: Worker | None = None
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            worker = worker or Worker(tree, framework, clock)
            answer = (True, getattr(worker, method)(*arguments))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
