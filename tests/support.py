"""Problems for the layer, their results on a backend, and their comparison with the oracle."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from anymha.framework import autodiff as tape
from anymha.framework.dtypes import accumulation_dtype, output_dtype
from anymha.framework.registry import Backend
from anymha.layer.forward import multi_head_attention
from anymha.layer.plan import Plans
from anymha.options.config import AttentionConfig
from anymha.parity.oracle.features import sections_of
from anymha.parity.oracle.oracle import Truth
from anymha.parity.stages.tolerance import tolerance
from tests.written_oracle import attention_oracle

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """One call with its numbers.

    Args:
        config: The layer's options.
        weights: Canonical weights.
        inputs: "query", "value", "key"; "attention_bias" where there is one. Self attention has
            the query alone.
        d_output: Cotangent of the output.
        d_scores: Cotangent of the scores.
        call: The call's other arguments; NumPy arrays among them become the backend's.
    """

    config: AttentionConfig
    weights: Arrays
    inputs: Arrays
    d_output: np.ndarray
    d_scores: np.ndarray
    call: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Problem:
        """The same problem with other fields."""
        return dataclasses.replace(self, **changes)

    def calling(self, **call: Any) -> Problem:
        """The same problem with further arguments of the call; a bias is differentiated too."""
        inputs = dict(self.inputs)
        if "attention_bias" in call:
            inputs["attention_bias"] = call.pop("attention_bias").astype(
                np_dtype(self.config.dtype)
            )
        return self.but(inputs=inputs, call={**self.call, **call})


@dataclass(frozen=True)
class Result:
    """What a backend gave, as NumPy arrays; no gradients where they were not asked for."""

    output: np.ndarray
    scores: np.ndarray
    gradients: Arrays

    @property
    def all(self) -> Arrays:
        return {"output": self.output, "scores": self.scores, **self.gradients}


def np_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def normal(shape: tuple[int, ...], *seed: Any, spread: float = 1.0) -> np.ndarray:
    """Normal numbers that depend on nothing but the seed and the shape."""
    words = [byte for part in seed for byte in str(part).encode()]
    return np.asarray(spread * np.random.default_rng(words).standard_normal(shape))


def make(
    query: tuple[int, ...] = (2, 5),
    value: tuple[int, ...] | None = (2, 6),
    widths: tuple[int, int, int] = (7, 6, 5),
    *,
    seed: int = 0,
    score_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Problem:
    """A problem whose logits are of order one, so that the softmax is neither flat nor hard.

    Args:
        query: Shape of the query without its features.
        value: Shape of value and key without theirs; None for self attention.
        widths: Widths of query, value and key; self attention has the first for all.
        seed: Another one gives other numbers.
        score_shape: Shape of the scores where they are not (B, H, T, S).
        **options: Options of the config.
    """
    if value is None:
        widths = (widths[0], widths[0], widths[0])
    names = ("query_features", "value_features", "key_features")
    sizes = {"num_heads": 4, "key_dim": 3, **dict(zip(names, widths, strict=True))}
    config = AttentionConfig(**{**sizes, **options})
    dtype = np_dtype(config.dtype)
    narrow = np_dtype(output_dtype(config.dtype, config.compute_dtype or config.dtype))
    spread = 1.3 / math.sqrt(widths[0])
    weights = {
        name: normal(shape, seed, name, spread=0.5 if "bias" in name else spread).astype(dtype)
        for name, shape in config.weight_shapes().items()
    }
    shapes = {"query": query} if value is None else {"query": query, "value": value, "key": value}
    inputs = {
        name: normal((*shape, width), seed, name).astype(dtype)
        for (name, shape), width in zip(shapes.items(), widths, strict=False)
    }
    keys = value or query
    if score_shape is None:
        score_shape = (query[0], config.num_heads, math.prod(query[1:]), math.prod(keys[1:]))
    out: Any = (widths[0],) if config.output_shape is None else config.output_shape
    return Problem(
        config,
        weights,
        inputs,
        normal((*query, *out), seed, "d_output").astype(narrow),
        normal(score_shape, seed, "d_scores").astype(narrow),
    )


def run(backend: Backend, problem: Problem, *, gradients: bool = True) -> Result:
    """Output, scores and gradients of the problem on a backend, by the layer's function.

    Problems of the same options and shapes share their plans, as calls of one layer do, and on
    JAX the program that differentiates, which takes masks as arguments.
    """
    ops = backend.ops
    config, plans, programs = _planned(backend.name, problem.config, _kinds(problem))
    arrays = native(ops, {**problem.weights, **problem.inputs})
    call = native(ops, problem.call)
    cotangents = (ops.from_numpy(problem.d_output), ops.from_numpy(problem.d_scores))
    names = tuple(problem.weights)

    def function(ops: Any, call: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        named = {name: a for name, a in arrays.items() if name not in names}
        parts = [named.pop(name, None) for name in ("query", "value", "key")]
        held = {name: arrays[name] for name in names}
        return multi_head_attention(
            ops,
            config,
            held,
            *parts,
            **named,
            **call,
            return_attention_scores=True,
            plans=plans,
        )

    if not gradients:
        (output, scores), pulled = function(ops, call, arrays), {}
    elif backend.name == "jax":
        fixed = {name: x for name, x in call.items() if isinstance(x, FIXED)}
        kinds = tuple((name, type(x), x) for name, x in fixed.items())
        if kinds not in programs:

            def differentiate(given: Any, arrays: Any, cotangents: Any) -> Any:
                attend = partial(function, ops, {**fixed, **given})
                return ops.capabilities.vjp(attend, arrays, cotangents)

            programs[kinds] = importlib.import_module("jax").jit(differentiate)
        given = {name: x for name, x in call.items() if name not in fixed}
        (output, scores), pulled = programs[kinds](given, arrays, cotangents)
    elif ops.capabilities.vjp is not None:
        attend = partial(function, ops, call)
        (output, scores), pulled = ops.capabilities.vjp(attend, arrays, cotangents)
    else:
        (output, scores), pull = tape.vjp(
            ops, lambda ops, arrays: function(ops, call, arrays), arrays
        )
        pulled = pull(cotangents)
    return Result(
        ops.to_numpy(output),
        ops.to_numpy(scores),
        {name: ops.to_numpy(gradient) for name, gradient in pulled.items()},
    )


FIXED = (bool, int, float, str, np.generic, type(None))
"""What is a part of a program in a call; all else, arrays, is an argument of it."""


@lru_cache(maxsize=64)
def _planned(
    backend: str, config: AttentionConfig, kinds: tuple[Any, ...]
) -> tuple[AttentionConfig, Plans, dict[Any, Callable[..., Any]]]:
    """The config, the plans and the programs of all problems of these options and shapes."""
    return config, Plans(), {}


def _kinds(problem: Problem) -> tuple[Any, ...]:
    """What tells programs apart: names, shapes and dtypes of the problem's arrays."""
    arrays = {**problem.weights, **problem.inputs, **problem.call}
    kinds = [
        (name, np.shape(value), str(getattr(value, "dtype", type(value))))
        for name, value in arrays.items()
    ]
    # What was compiled in a hurry has other bits; see `quick_programs` in tests/conftest.py.
    return (*kinds, os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS"))


def compilers(backend: Backend, function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The function under each compiler of the framework; NumPy, which has none, just calls it."""
    framework: Any = importlib.import_module(backend.framework)
    if backend.name == "torch":
        return [framework.compile(function, fullgraph=True, backend="aot_eager")]
    if backend.name == "tensorflow":
        return [framework.function(function), framework.function(function, jit_compile=True)]
    if backend.name == "jax":
        return [framework.jit(function)]
    return [function]


def native(ops: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The NumPy arrays among the values as arrays of the backend."""
    return {
        name: ops.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arrays.items()
    }


def truth(
    problem: Problem, *, allowed: np.ndarray | None = None, kept: np.ndarray | None = None
) -> Truth:
    """The oracle's answer for inputs (B, T, D).

    Args:
        problem: The problem; of its call only the bias is looked at, the rest is `allowed`.
        allowed: What the masks of the call mean, broadcastable to (B, H, T, S).
        kept: What dropout multiplies the probabilities with.
    """
    config = problem.config
    compute = config.compute_dtype or config.dtype
    arrays = {**problem.weights, **problem.inputs}
    dtypes = dict.fromkeys(arrays, compute) | {"attention_bias": accumulation_dtype(compute)}
    exact = {n: x.astype(np_dtype(dtypes[n])).astype(np.float64) for n, x in arrays.items()}
    weights = {name: exact[name] for name in problem.weights}
    heads, d_v, *features = weights["output.kernel"].shape
    weights["output.kernel"] = weights["output.kernel"].reshape(heads, d_v, math.prod(features))
    if "output.bias" in weights:
        weights["output.bias"] = weights["output.bias"].reshape(-1)
    value = exact.get("value", exact["query"])
    found = attention_oracle(
        weights,
        {"query": exact["query"], "value": value, "key": exact.get("key", value)},
        scale=1 / math.sqrt(config.key_dim) if config.scale is None else config.scale,
        allowed=allowed,
        bias=exact.get("attention_bias"),
        kept=kept,
        sections=sections_of(config),
        d_output=problem.d_output.reshape(*problem.d_output.shape[:2], math.prod(features)),
        d_scores=problem.d_scores,
        dtype=config.compute_dtype or config.dtype,
    )
    return dataclasses.replace(
        found,
        output=found.output.reshape(problem.d_output.shape),
        gradients=_shaped(found.gradients, problem),
        magnitudes=_shaped(found.magnitudes, problem),
        rounding=_shaped(found.rounding, problem) if found.rounding else {},
    )


def _shaped(arrays: Arrays, problem: Problem) -> Arrays:
    """Gradients in the shapes of the problem; those of one array in two roles are summed."""
    arrays = dict(arrays)
    if "value" not in problem.inputs:
        arrays["query"] = arrays["query"] + arrays.pop("value") + arrays.pop("key")
    elif "key" not in problem.inputs:
        arrays["value"] = arrays["value"] + arrays.pop("key")
    for name, weight in problem.weights.items():
        arrays[name] = arrays[name].reshape(weight.shape)
    return arrays


def check(
    backend: Backend,
    problem: Problem,
    *,
    allowed: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> Result:
    """Hold a backend's output, scores and gradients against the oracle; gives the result."""
    return agree(run(backend, problem), truth(problem, allowed=allowed, kept=kept), problem)


def agree(result: Result, exact: Truth, problem: Problem) -> Result:
    """Fail unless a result is the oracle's but for rounding."""
    config = problem.config
    compute = config.compute_dtype or config.dtype
    narrow, working = output_dtype(config.dtype, compute), accumulation_dtype(compute)
    assert result.output.dtype == result.scores.dtype == np_dtype(narrow)
    wanted = {"output": exact.output, "scores": exact.scores, **exact.gradients}
    length = longest_sum(problem)
    assert set(result.gradients) == set(exact.gradients)
    for name, got in result.all.items():
        rounded = tolerance(narrow, 0, float(np.max(np.abs(wanted[name]), initial=0)))
        summed = tolerance(working, length, float(np.max(exact.magnitudes[name], initial=0)))
        staged = 2 * float(np.max(exact.rounding.get(name, 0.0), initial=0))
        close(got, wanted[name], rounded + summed + staged, name)
    return result


def close(got: np.ndarray, want: np.ndarray, margin: float, name: str = "result") -> None:
    """Fail unless both have one shape and are at most `margin` apart everywhere."""
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    error = np.max(np.abs(got.astype(np.float64) - want), initial=0.0)
    assert error <= margin, f"{name}: off by {error:.3g}, at most {margin:.3g} may be"


def longest_sum(problem: Problem) -> int:
    """The length of the longest sum of the problem, over features, keys or all positions."""
    lengths = [max(array.shape, default=1) for array in problem.weights.values()]
    positions = [math.prod(array.shape[:-1]) for array in problem.inputs.values()]
    return max(*lengths, *positions)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bytes: equal only where every bit is."""
    return np.ascontiguousarray(array).view(np.uint8)
