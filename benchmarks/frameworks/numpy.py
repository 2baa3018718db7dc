"""NumPy: our layer, and the layer that one would write with `matmul`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from anymha.framework.registry import get_layer
from benchmarks.cases import Arrays, Problem
from benchmarks.entries import (
    EXACT,
    NATIVE,
    OURS,
    Entry,
    Machine,
    Ready,
    modern,
    our_call,
    pack,
    to_linear,
)

LIBRARIES = {}


def machine(device: str) -> Machine:
    """What NumPy says about where it runs."""
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return Machine({"numpy": np.__version__, "blas": f"{blas.get('name')} {blas.get('version')}"})


def entries(problem: Problem, device: str) -> list[Entry]:
    """The layers of a case."""
    case = problem.case
    if case.dtype != "float32":
        return []
    found = [Entry(OURS, "", "", lambda: _ours(problem))]
    if case.dropout:
        found.append(Entry(OURS, "", NATIVE, lambda: _ours(problem, dropout_rng="native")))
    if case.exact:
        found.append(Entry(OURS, "", EXACT, lambda: _ours(problem, compute_dtype="float64")))
    if case.peers and not case.training:
        found.append(Entry("numpy.matmul", "", "", lambda: _plain(problem)))
    return found


def _ours(problem: Problem, **options: Any) -> Ready:
    case, x = problem.case, problem.x
    layer = get_layer("numpy")(**problem.layer_options, **options)
    layer = layer.with_canonical_weights(problem.weights)
    call = our_call(problem, np.asarray)

    def forward() -> Any:
        return layer(x, **call)

    def train(dropping: bool = bool(case.dropout)) -> Any:
        output, pullback = layer.vjp(x, **call, training=dropping, seed=7)
        return output, pullback(problem.cotangent)

    def values(result: Any) -> Arrays:
        if not case.training:
            return (
                dict(zip(("output", "scores"), result, strict=True))
                if case.scores
                else {"output": result}
            )
        gradients = dict(result[1])
        return {"output": result[0], "x": gradients.pop("query"), **gradients}

    return (
        Ready(train, values, lambda: train(False))
        if case.training
        else Ready(forward, values, forward)
    )


def _plain(problem: Problem) -> Ready:
    """Fused projection, `matmul`, softmax, all in place where NumPy can."""
    case, x = problem.case, problem.x
    b, t, h, d = case.batch, case.length, case.heads, case.key_dim
    packed = pack(to_linear(problem.weights))
    into, out = packed["packed.kernel"].T.copy(), packed["output.kernel"].T.copy()
    scale = np.float32(1 / math.sqrt(d))
    mask = problem.allowed(np.arange(t))
    mask = None if mask is None else np.broadcast_to(mask, (b, t, t))[:, None]

    today = modern(
        problem,
        np.asarray,
        lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)),
        partial(np.concatenate, axis=-1),
    )

    def call() -> Any:
        projected = (x @ into + packed["packed.bias"]).reshape(b, t, 3, h, d)
        q, k, v = projected.transpose(2, 0, 3, 1, 4)
        if today is not None:
            q, k = today.heads(q, k)
        scores = (q * scale) @ k.swapaxes(-1, -2)
        if mask is not None:
            np.copyto(scores, np.float32(-1e30), where=~mask)
        greatest = scores.max(-1, keepdims=True)
        if today is not None:
            greatest = np.maximum(greatest, today.sinks)
        scores -= greatest
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        if today is not None:
            total += np.exp(today.sinks - greatest)
        scores /= total
        context = (scores @ v).swapaxes(1, 2).reshape(b, t, h * d)
        return context @ out + packed["output.bias"], scores

    def values(result: Any) -> Arrays:
        found = {"output": result[0], "scores": result[1]}
        return found if case.scores else {"output": found["output"]}

    return Ready(call, values, call)
