"""Eager calls with a length that is new each time, as batches of texts have, beside a peer's layer.

    python -m benchmarks.new_lengths                                # every framework, 600 lengths
    python -m benchmarks.new_lengths --frameworks tensorflow --batch 16 --features 256

Both layers of a framework are in one process and take each length in turn, in an order drawn anew.
A ratio is the sum of our times over the sum of the peer's, for a first pass over the lengths and
for a second one. What a layer keeps is the growth of resident memory from the 50th new length on,
in a process that runs that layer alone. Self-attention in float32 with a padding mask; values are
compared first.
A process has one thread, and a time is the processor time that it took.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from anymha.framework.registry import get_backend, get_layer
from benchmarks.calls import FRAMEWORKS, with_threads
from benchmarks.measure import resident

Layer = Callable[[np.ndarray, np.ndarray], Any]
"""Of an input (B, T, D) and a padding mask (B, T); waits for the result."""

WARM = 50


def layers(framework: str, features: int, heads: int) -> dict[str, Layer]:
    """Our layer and the peer's, with the same weights, by name."""
    width = features // heads
    ours: Any = get_layer(framework)(heads, width, query_features=features, seed=0)
    weights = {
        name: get_backend(framework).ops.to_numpy(x) for name, x in ours.canonical_weights().items()
    }
    return {"anymha": _OURS[framework](ours)} | _PEERS[framework](weights, heads, width)


def _numpy(weights: Any, heads: int, width: int) -> dict[str, Layer]:
    def by_hand(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        def project(name: str) -> np.ndarray:
            kernel = weights[f"{name}.kernel"].reshape(x.shape[-1], -1)
            y = x @ kernel + weights[f"{name}.bias"].reshape(-1)
            return y.reshape(*x.shape[:2], heads, width).transpose(0, 2, 1, 3)

        q, k, v = map(project, ("query", "key", "value"))
        logits = np.where(mask[:, None, None], (q * width**-0.5) @ k.swapaxes(2, 3), -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        context = (p / p.sum(-1, keepdims=True)) @ v
        kernel = weights["output.kernel"].reshape(heads * width, -1)
        return (
            context.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ kernel
            + weights["output.bias"]
        )

    return {"by hand": by_hand}


def _torch_ours(layer: Any) -> Layer:
    import torch

    @torch.no_grad()
    def run(x: np.ndarray, mask: np.ndarray) -> Any:
        return layer(torch.from_numpy(x), value_mask=torch.from_numpy(mask))

    return run


def _torch(weights: Any, heads: int, width: int) -> dict[str, Layer]:
    import torch

    def flat(name: str) -> Any:
        kernel = torch.from_numpy(weights[f"{name}.kernel"])
        kernel = kernel.reshape(-1, kernel.shape[-1]) if name == "output" else kernel.flatten(1)
        return kernel.T.contiguous(), torch.from_numpy(weights[f"{name}.bias"]).flatten()

    packed = [torch.cat(both) for both in zip(*map(flat, ("query", "key", "value")), strict=True)]
    output, linear = flat("output"), torch.nn.functional.linear

    @torch.no_grad()
    def run(x: np.ndarray, mask: np.ndarray) -> Any:
        qkv = linear(torch.from_numpy(x), *packed).unflatten(-1, (3, heads, width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = torch.from_numpy(mask)[:, None, None]
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return linear(context.transpose(1, 2).flatten(2), *output)

    return {"packed Linear + SDPA": run}


def _jax_ours(layer: Any) -> Layer:
    from jax import device_put  # `jnp.asarray` compiles a program for each shape

    return lambda x, mask: layer(device_put(x), value_mask=device_put(mask)).block_until_ready()


def _jax(weights: Any, heads: int, width: int) -> dict[str, Layer]:
    import jax
    import jax.numpy as jnp
    from flax import linen

    module: Any = linen.MultiHeadDotProductAttention(heads)
    variables: dict[str, Any] = {}
    for name, array in weights.items():
        projection, _, part = name.partition(".")
        own = "out" if projection == "output" else projection
        variables.setdefault(own, {})[part] = jnp.asarray(array)

    @jax.jit
    def apply(x: Any, mask: Any) -> Any:
        return module.apply({"params": variables}, x, mask=mask[:, None, None], deterministic=True)

    put = jax.device_put
    return {"Flax under jit": lambda x, mask: apply(put(x), put(mask)).block_until_ready()}


def _tensorflow_ours(layer: Any) -> Layer:
    import tensorflow as tf

    return lambda x, mask: layer(tf.constant(x), value_mask=tf.constant(mask)).numpy()


def _tensorflow(weights: Any, heads: int, width: int) -> dict[str, Layer]:
    import keras
    import tensorflow as tf

    features = weights["query.kernel"].shape[0]
    layer: Any = keras.layers.MultiHeadAttention(heads, width)
    layer.build((None, None, features), (None, None, features))
    parts = [f"{n}.{p}" for n in ("query", "key", "value", "output") for p in ("kernel", "bias")]
    layer.set_weights([weights[name] for name in parts])

    def run(x: np.ndarray, mask: np.ndarray) -> Any:
        tensor = tf.constant(x)
        return layer(tensor, tensor, attention_mask=tf.constant(mask[:, None])).numpy()

    return {"Keras": run}


_OURS: dict[str, Callable[[Any], Layer]] = {
    "numpy": lambda layer: lambda x, mask: layer(x, value_mask=mask),
    "torch": _torch_ours,
    "jax": _jax_ours,
    "tensorflow": _tensorflow_ours,
}
_PEERS: dict[str, Callable[..., dict[str, Layer]]] = {
    "numpy": _numpy, "torch": _torch, "jax": _jax, "tensorflow": _tensorflow,
}  # fmt: skip


def arrays(options: argparse.Namespace, length: int) -> tuple[np.ndarray, np.ndarray]:
    """An input and a mask of a length."""
    rng = np.random.default_rng(length)
    x = rng.standard_normal((options.batch, length, options.features), dtype=np.float32)
    hidden = np.arange(options.batch)[:, None] * length // (2 * options.batch)
    return x, np.arange(length) < length - hidden


def measure_times(options: argparse.Namespace, framework: str) -> list[str]:
    """The cells of a row: our mean milliseconds and the ratio, for both passes, and the peer."""
    ours, peer = layers(framework, options.features, options.heads).items()
    one, other = [np.asarray(layer(*arrays(options, 24))) for _, layer in (ours, peer)]
    np.testing.assert_allclose(one, other, atol=1e-4)
    lengths = [*range(options.shortest, options.shortest + options.count)]
    random.Random(0).shuffle(lengths)
    cells = [framework, peer[0]]
    for _ in range(2):
        seconds = {ours[0]: 0.0, peer[0]: 0.0}
        for length in lengths:
            given = arrays(options, length)
            for name, layer in random.sample((ours, peer), 2):
                began = time.process_time()
                layer(*given)
                seconds[name] += time.process_time() - began
        mean = seconds[ours[0]] / len(lengths) * 1e3
        cells += [f"{mean:.2f} ms", f"{seconds[ours[0]] / seconds[peer[0]]:.2f}"]
    return cells


def measure_memory(options: argparse.Namespace, framework: str, which: int) -> float:
    """By how many MB the process grows in the calls of one layer after the first `WARM`."""
    layer = list(layers(framework, options.features, options.heads).values())[which]
    lengths = [*range(options.shortest, options.shortest + options.count)]
    random.Random(0).shuffle(lengths)
    before = 0
    layer(*arrays(options, max(lengths)))
    for number, length in enumerate(lengths):
        if number == min(WARM, len(lengths) - 1):
            before = resident("VmRSS")
        layer(*arrays(options, length))
    return (resident("VmRSS") - before) / 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    for name, default in {"count": 600, "shortest": 16, "batch": 4, "features": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        framework, what = options.only.split(":")
        cells = measure_times(options, framework) if what == "times" else None
        print("\t".join(cells or [f"{measure_memory(options, framework, int(what)):.1f}"]))
        return
    table = Table("framework", "peer", "new", "ratio", "again", "ratio", "kept", "by the peer")
    table.title = "mean time of a call"
    for framework in options.frameworks.split(","):
        rows = []
        for what in ("times", "0", "1"):
            own = ["-m", "benchmarks.new_lengths", *sys.argv[1:], "--only", f"{framework}:{what}"]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *own],
                env=with_threads(framework, 1), stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            rows += done.stdout.splitlines()[-1].split("\t")
        table.add_row(*rows[:-2], *[f"{mb} MB" for mb in rows[-2:]])
    Console().print(table)


if __name__ == "__main__":
    main()
