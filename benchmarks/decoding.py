"""Decoding step by step with a cache, beside a layer by hand with arrays made beforehand.

    python -m benchmarks.decoding                                   # every framework
    python -m benchmarks.decoding --frameworks torch --held 2048 --batch 8
    python -m benchmarks.decoding --frameworks torch --dtype bfloat16
    python -m benchmarks.decoding --frameworks torch --functions              # no module by hand
    python -m benchmarks.decoding --frameworks torch --compiled --room 4096   # by torch.compile
    python -m benchmarks.decoding --steps 2000                      # how the time of a step grows

A layer by hand has the same four projections without biases, keys and values (B, H, S, d) that are
written in place where the framework can (NumPy, PyTorch, variables of TensorFlow, donated arrays of
JAX), and no masks where it needs none. In PyTorch it is a module with four linear layers, but for
`--functions`, where it is functions of tensors. In TensorFlow its weights are variables. In JAX and
TensorFlow both layers are compiled by the user, in PyTorch with `--compiled`, where both read all
slots. Both take turns in one process, `--times` times; medians of the time of a step. One token a
step after `--held` positions, in float32, in PyTorch also in half precision; values are compared
first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from anymha.framework.registry import get_backend, get_layer
from benchmarks.calls import FRAMEWORKS, with_threads
from benchmarks.measure import resident

STEPS = 20
"""How many steps are one measurement."""

Run = Callable[[int, int], Any]
"""Takes so many steps after so many positions; gives the last output as a NumPy array."""


class Sizes:
    """The sizes of a comparison."""

    def __init__(
        self, batch: int, heads: int, width: int, held: int, room: int, dtype: str = "float32"
    ) -> None:
        self.batch, self.heads, self.width, self.held, self.room = batch, heads, width, held, room
        self.dtype = dtype
        draw = np.random.default_rng(0)
        features = heads * width
        self.prompt = draw.standard_normal((batch, held, features)).astype(np.float32)
        self.token = draw.standard_normal((batch, 1, features)).astype(np.float32)


def runs(
    framework: str, sizes: Sizes, compiled: bool = False, functions: bool = False
) -> dict[str, Run]:
    """A step of our layer and of the one by hand, with the same weights."""
    features = sizes.heads * sizes.width
    layer: Any = get_layer(framework)(
        sizes.heads, sizes.width, query_features=features, seed=0, use_bias=False,
        dtype=sizes.dtype,
    )  # fmt: skip
    ops = get_backend(framework).ops
    weights = {
        name.partition(".")[0]: np.ascontiguousarray(ops.to_numpy(x).reshape(features, features))
        for name, x in layer.canonical_weights().items()
    }
    by_hand: Any = _HAND[framework]
    if framework == "torch":
        by_hand = partial(_torch, compiled=compiled, functions=functions)
    return {
        "anymha": _ours(framework, layer, sizes, compiled),
        "by hand": by_hand(weights, sizes),
    }


def _ours(framework: str, layer: Any, sizes: Sizes, compiled: bool) -> Run:
    ops = get_backend(framework).ops
    prompt, token = (
        ops.astype(ops.from_numpy(x), ops.dtype(sizes.dtype)) for x in (sizes.prompt, sizes.token)
    )
    step: Any = lambda x, cache: layer(x, cache=cache)  # noqa: E731
    prefill = step
    if framework == "jax":
        import jax

        prefill, step = jax.jit(step), jax.jit(step, donate_argnums=1)
    elif framework == "tensorflow":
        import tensorflow as tf

        step = tf.function(step)
        prefill = tf.function(prefill)
    elif compiled:
        import torch

        step = torch.compile(step, fullgraph=True)
    caches: list[Any] = []

    def run(steps: int, _: int) -> Any:
        if not steps:
            made = layer.make_cache(sizes.batch, sizes.room, donate=True)
            caches[:] = [prefill(prompt, made)[1]]
            return ops.to_numpy(caches[0].lengths)
        cache, output = caches.pop(), None
        for _ in range(steps):
            output, cache = step(token, cache)
        caches.append(cache)
        return ops.to_numpy(output).astype(np.float32)

    return _without_gradients(framework, run)


def _without_gradients(framework: str, run: Run) -> Run:
    if framework != "torch":
        return run
    import torch

    return torch.no_grad()(run)


def _numpy(weights: Any, sizes: Sizes) -> Run:
    batch, heads, width = sizes.batch, sizes.heads, sizes.width
    keys, values = (np.zeros((batch, heads, sizes.room, width), np.float32) for _ in range(2))
    scale = np.float32(width**-0.5)

    def project(x: np.ndarray, name: str) -> np.ndarray:
        y = x.reshape(-1, x.shape[-1]) @ weights[name]
        return y.reshape(batch, -1, heads, width).swapaxes(1, 2)

    def run(steps: int, at: int) -> Any:
        if not steps:
            keys[:, :, : sizes.held] = project(sizes.prompt, "key")
            values[:, :, : sizes.held] = project(sizes.prompt, "value")
            return None
        output = None
        for end in range(at + 1, at + steps + 1):
            q = project(sizes.token, "query") * scale
            keys[:, :, end - 1 : end] = project(sizes.token, "key")
            values[:, :, end - 1 : end] = project(sizes.token, "value")
            logits = q @ keys[:, :, :end].swapaxes(2, 3)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            context = (p / p.sum(-1, keepdims=True)) @ values[:, :, :end]
            output = context.swapaxes(1, 2).reshape(batch, 1, -1) @ weights["output"]
        return output

    return run


def _torch(weights: Any, sizes: Sizes, compiled: bool = False, functions: bool = False) -> Run:
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    batch, heads, width = sizes.batch, sizes.heads, sizes.width
    dtype = getattr(torch, sizes.dtype)
    keys, values = (torch.zeros(batch, heads, sizes.room, width, dtype=dtype) for _ in range(2))
    prompt, token = (torch.from_numpy(x).to(dtype) for x in (sizes.prompt, sizes.token))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, w in weights.items():
                matrix = torch.from_numpy(np.ascontiguousarray(w.T, np.float32)).to(dtype)
                own = torch.nn.Linear(*matrix.shape[::-1], bias=False, dtype=dtype)
                own.weight = torch.nn.Parameter(matrix)
                setattr(self, name, own)

        def forward(self, x: Any, keys: Any, values: Any, at: Any) -> Any:
            return (step_of_all_slots if compiled else step)(x, keys, values, at)

    layer = Layer()
    projections: dict[str, Any] = dict(layer.named_children())
    if functions:
        projections = {name: partial(linear, weight=w.weight) for name, w in projections.items()}

    def project(x: Any, name: str) -> Any:
        return projections[name](x).view(batch, -1, heads, width).transpose(1, 2)

    def merged(context: Any) -> Any:
        return projections["output"](context.transpose(1, 2).reshape(batch, 1, -1))

    def step(x: Any, keys: Any, values: Any, at: int) -> Any:
        q, end = project(x, "query"), at + 1
        keys[:, :, at:end] = project(x, "key")
        values[:, :, at:end] = project(x, "value")
        context = scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end])
        return merged(context), end

    def step_of_all_slots(x: Any, keys: Any, values: Any, at: Any) -> Any:
        q = project(x, "query")
        keys[:, :, at] = project(x, "key")
        values[:, :, at] = project(x, "value")
        seen = (torch.arange(sizes.room) <= at)[None, None]
        return merged(scaled_dot_product_attention(q, keys, values, seen)), at + 1

    taken: Any = step if functions else layer
    own: Any = torch.compile(taken, fullgraph=True) if compiled else taken

    def run(steps: int, at: int) -> Any:
        if not steps:
            keys[:, :, : sizes.held] = project(prompt, "key")
            values[:, :, : sizes.held] = project(prompt, "value")
            return None
        place: Any = torch.tensor([at]) if compiled else at
        output: Any = None
        for _ in range(steps):
            output, place = own(token, keys, values, place)
        return output.float().numpy()

    return torch.no_grad()(run)


def _jax(weights: Any, sizes: Sizes) -> Run:
    import jax
    import jax.numpy as jnp

    batch, heads, width = sizes.batch, sizes.heads, sizes.width
    matrices = {name: jnp.asarray(w) for name, w in weights.items()}
    prompt, token = jnp.asarray(sizes.prompt), jnp.asarray(sizes.token)
    zeros = jnp.zeros((batch, heads, sizes.room, width))

    def project(matrices: Any, x: Any, name: str) -> Any:
        return jnp.swapaxes((x @ matrices[name]).reshape(batch, -1, heads, width), 1, 2)

    @jax.jit
    def fill(matrices: Any) -> Any:
        start = (0, 0, 0, 0)
        return tuple(
            jax.lax.dynamic_update_slice(zeros, project(matrices, prompt, name), start)
            for name in ("key", "value")
        )

    def step(matrices: Any, x: Any, keys: Any, values: Any, at: Any) -> Any:
        q = project(matrices, x, "query")
        place = (0, 0, at, 0)
        keys = jax.lax.dynamic_update_slice(keys, project(matrices, x, "key"), place)
        values = jax.lax.dynamic_update_slice(values, project(matrices, x, "value"), place)
        logits = jnp.matmul(q, jnp.swapaxes(keys, 2, 3)) * width**-0.5
        p = jax.nn.softmax(jnp.where(jnp.arange(sizes.room) <= at, logits, -jnp.inf))
        context = jnp.swapaxes(p @ values, 1, 2).reshape(batch, 1, -1)
        return context @ matrices["output"], keys, values, at + 1

    compiled = jax.jit(step, donate_argnums=(2, 3))
    kept: list[Any] = []

    def run(steps: int, at: int) -> Any:
        if not steps:
            kept[:] = [fill(matrices)]
            return np.asarray(kept[0][0][0, 0, 0])
        (keys, values), place, output = kept.pop(), jnp.int32(at), None
        for _ in range(steps):
            output, keys, values, place = compiled(matrices, token, keys, values, place)
        kept.append((keys, values))
        return np.asarray(output)

    return run


def _tensorflow(weights: Any, sizes: Sizes) -> Run:
    import tensorflow as tf

    batch, heads, width = sizes.batch, sizes.heads, sizes.width
    matrices = {name: tf.Variable(w) for name, w in weights.items()}
    prompt, token = tf.constant(sizes.prompt), tf.constant(sizes.token)
    keys, values = (tf.Variable(tf.zeros((batch * heads * sizes.room, width))) for _ in range(2))
    full = (batch, heads, sizes.room, width)

    def project(x: Any, name: str) -> Any:
        y = tf.reshape(x, (-1, x.shape[-1])) @ matrices[name]
        return tf.transpose(tf.reshape(y, (batch, -1, heads, width)), (0, 2, 1, 3))

    @tf.function
    def step(x: Any, at: Any) -> Any:
        rows = tf.reshape(tf.range(batch * heads) * sizes.room + at, (-1, 1))
        q = project(x, "query")
        keys.scatter_nd_update(rows, tf.reshape(project(x, "key"), (-1, width)))
        values.scatter_nd_update(rows, tf.reshape(project(x, "value"), (-1, width)))
        held = [tf.reshape(kept, full)[:, :, : at + 1] for kept in (keys, values)]
        p = tf.nn.softmax(tf.matmul(q, held[0], transpose_b=True) * width**-0.5)
        context = tf.transpose(p @ held[1], (0, 2, 1, 3))
        return tf.reshape(context, (batch, -1)) @ matrices["output"], at + 1

    def run(steps: int, at: int) -> Any:
        if not steps:
            for kept, name in ((keys, "key"), (values, "value")):
                rest = tf.zeros((batch, heads, sizes.room - sizes.held, width))
                made = tf.concat([project(prompt, name), rest], axis=2)
                kept.assign(tf.reshape(made, (-1, width)))
            return None
        place, output = tf.constant(at), tf.constant(0.0)
        for _ in range(steps):
            output, place = step(token, place)
        return tf.reshape(output, (batch, 1, -1)).numpy()

    return run


_HAND = {"numpy": _numpy, "torch": _torch, "tensorflow": _tensorflow, "jax": _jax}


def measured(
    framework: str, sizes: Sizes, times: int, compiled: bool = False, functions: bool = False
) -> dict[str, float]:
    """The median time of a step of each, in microseconds; values are compared first."""
    both = runs(framework, sizes, compiled, functions)
    found = {}
    for name, run in both.items():
        run(0, 0)
        found[name] = np.asarray(run(3, sizes.held)).reshape(-1)
    np.testing.assert_allclose(*found.values(), atol=1e-4 if sizes.dtype == "float32" else 2e-2)
    spent: dict[str, list[float]] = {name: [] for name in both}
    for number in range(times):
        order = list(both) if number % 2 else list(both)[::-1]
        for name in order:
            both[name](0, 0)
            began = time.perf_counter()
            both[name](STEPS, sizes.held)
            spent[name].append((time.perf_counter() - began) / STEPS * 1e6)
    return {name: statistics.median(each) for name, each in spent.items()}


def grown(framework: str, sizes: Sizes, steps: int) -> list[tuple[int, float, float]]:
    """Positions held, the median time of a step there, and resident MB more than at the start."""
    run = runs(framework, sizes)["anymha"]
    run(0, 0)
    run(STEPS, sizes.held)
    before, held, rows = resident("VmRSS"), sizes.held + STEPS, []
    while held + STEPS <= min(sizes.room, sizes.held + steps):
        began = time.perf_counter()
        run(STEPS, held)
        held += STEPS
        rows.append((held, (time.perf_counter() - began) / STEPS * 1e6, resident("VmRSS") - before))
    part = max(len(rows) // 8, 1)
    return [
        (rows[at][0], statistics.median(r[1] for r in rows[at : at + part]), rows[at][2])
        for at in range(0, len(rows) - part + 1, part)
    ]


def main(argv: list[str] | None = None) -> int:
    """Compare, each framework in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--held", type=int, default=512)
    parser.add_argument("--room", type=int, default=640, help="max_length of the cache")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="show how a step grows instead")
    parser.add_argument("--compiled", action="store_true", help="PyTorch's steps, both of them")
    parser.add_argument(
        "--functions", action="store_true", help="PyTorch's layer by hand without a module"
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of PyTorch's layers")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.frameworks.split(",")
    for name in ("compiled", "functions"):
        if getattr(options, name) and names != ["torch"]:
            parser.error(f"--{name} is about PyTorch: pass --frameworks torch, too")
    if options.compiled and options.functions:
        parser.error("--functions is about steps that are not compiled: leave --compiled out")
    if options.dtype != "float32" and names != ["torch"]:
        parser.error("--dtype is about PyTorch: pass --frameworks torch, too")
    if options.here is None:
        given = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "benchmarks.decoding", *given, "--here"]
        return max(
            subprocess.call([*command, name], env=with_threads(name, options.threads))
            for name in names
        )
    room = max(options.room, options.held + options.steps + STEPS)
    sizes = Sizes(options.batch, options.heads, options.width, options.held, room, options.dtype)
    if options.here == "torch":
        import torch

        torch.set_num_threads(options.threads)
    table = Table(
        title=f"{options.here}: {options.batch} rows, {options.heads * options.width} wide"
    )
    if options.steps:
        for column in ("held", "us a step", "MB more"):
            table.add_column(column, justify="right")
        for held, spent, more in grown(options.here, sizes, options.steps):
            table.add_row(str(held), f"{spent:.0f}", f"{more / 1e6:.1f}")
    else:
        for column in ("held", "anymha, us a step", "by hand", "ratio"):
            table.add_column(column, justify="right")
        found = measured(options.here, sizes, options.times, options.compiled, options.functions)
        ratio = found["anymha"] / found["by hand"]
        cells = [f"{found[name]:.0f}" for name in ("anymha", "by hand")]
        table.add_row(str(sizes.held), *cells, f"{ratio:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
