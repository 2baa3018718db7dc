"""A layer that takes part, as each framework's module describes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases import Arrays, Problem

OURS = "anymha"
NATIVE, EXACT = "native dropout", "reproducible"
"""What sets a form of our layer apart."""


@dataclass(frozen=True)
class Ready:
    """A layer with its weights and inputs in place.

    Args:
        call: Runs it once and waits for the result.
        values: The result as NumPy arrays: "output", maybe "scores", and in training the
            gradients by the weights' canonical names and "x".
        plain: As `call`, without dropout.
    """

    call: Callable[[], Any]
    values: Callable[[Any], Arrays]
    plain: Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """A layer by name, which is made only when its turn comes.

    Args:
        layer: Whose it is: "anymha", or the peer's own name.
        form: How it runs: "" for eager, else the compiler.
        option: What sets it apart: "native dropout", "reproducible", or nothing.
        make: Makes it.
    """

    layer: str
    form: str
    option: str
    make: Callable[[], Ready]

    @property
    def ours(self) -> bool:
        """Whether it is our layer."""
        return self.layer == OURS

    @property
    def name(self) -> str:
        """All that it is, in words."""
        return named(self.layer, self.form, self.option)


def named(layer: str, form: str, option: str) -> str:
    """A layer's name with how it runs and what sets it apart."""
    return ", ".join(part for part in (layer, form, option) if part)


@dataclass(frozen=True)
class Machine:
    """What a framework says about where it runs.

    Args:
        facts: Threads, devices, versions, by name.
        peak_memory: Measures a call's memory; None for the process's resident memory.
        absent: Peers that are not installed.
    """

    facts: dict[str, Any]
    peak_memory: Callable[[Callable[[], Any]], int | None] | None = None
    absent: tuple[str, ...] = ()


def our_call(problem: Problem, convert: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """The arguments of our layer's call that a case needs, beside those of its dropout.

    Args:
        problem: The problem.
        convert: Makes an array of the framework out of one of NumPy.
    """
    case = problem.case
    found: dict[str, Any] = {
        "use_causal_mask": case.mask == "causal",
        "return_attention_scores": case.scores,
    }
    if problem.attention_mask is not None:
        found["attention_mask"] = convert(problem.attention_mask)
    if problem.padding is not None:
        found["value_mask"] = convert(problem.padding)
    return found


@dataclass(frozen=True)
class Modern:
    """Norms, rotary positions and sinks as one writes them by hand.

    Args:
        scales: The norms' weights for queries and keys.
        sinks: (1, H, 1, 1).
        tables: Cosines and sines, of `Problem.tables`.
        rms: Divides by the root of the mean square over the last axis.
        concat: Joins arrays along the last axis.
    """

    scales: Sequence[Any]
    sinks: Any
    tables: Sequence[Any]
    rms: Callable[[Any], Any]
    concat: Callable[[Sequence[Any]], Any]

    def heads(self, *heads: Any) -> list[Any]:
        """Queries and keys (..., d_k), normed and rotated; tables broadcast to them."""
        cos, sin = self.tables
        normed = [self.rms(x) * scale for x, scale in zip(heads, self.scales, strict=True)]
        half = normed[0].shape[-1] // 2
        turned = [self.concat([-x[..., half:], x[..., :half]]) for x in normed]
        return [x * cos + y * sin for x, y in zip(normed, turned, strict=True)]


def modern(
    problem: Problem,
    convert: Callable[[np.ndarray], Any],
    rms: Callable[[Any], Any],
    concat: Callable[[Sequence[Any]], Any],
) -> Modern | None:
    """What a case of options of today's models needs; None of another case."""
    if not problem.case.modern:
        return None
    scales = [convert(problem.weights[f"{name}_norm.scale"]) for name in ("query", "key")]
    sinks = convert(problem.weights["sinks"].reshape(1, -1, 1, 1))
    return Modern(scales, sinks, [convert(table) for table in problem.tables], rms, concat)


def absent(packages: Mapping[str, str]) -> tuple[str, ...]:
    """The names of packages of peers that are not installed, from their modules."""
    return tuple(name for name, module in packages.items() if not installed(module))


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    return importlib.util.find_spec(module) is not None


def to_linear(weights: Mapping[str, np.ndarray]) -> Arrays:
    """Matrices (out, in) and flat biases, as linear layers of most libraries hold them."""
    found: Arrays = {}
    for name, array in weights.items():
        projection, _, part = name.partition(".")
        if part == "bias":
            found[name] = array.reshape(-1)
        else:
            columns = array.shape[-1] if projection == "output" else array.shape[0]
            flat = (-1, columns) if projection == "output" else (columns, -1)
            found[name] = np.ascontiguousarray(array.reshape(flat).T)
    return found


def from_linear(arrays: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> Arrays:
    """The way back, into the shapes of `like`."""
    return {
        name: (array.T if name.endswith("kernel") else array).reshape(like[name].shape)
        for name, array in arrays.items()
    }


PACKED = ("query", "key", "value")


def pack(linear: Mapping[str, np.ndarray]) -> Arrays:
    """Query, key and value as one linear layer "packed", in this order, and "output"."""
    return {
        f"packed.{part}": np.concatenate([linear[f"{name}.{part}"] for name in PACKED])
        for part in ("kernel", "bias")
    } | {f"output.{part}": linear[f"output.{part}"] for part in ("kernel", "bias")}


def unpack(packed: Mapping[str, np.ndarray]) -> Arrays:
    """The way back."""
    found = {name: array for name, array in packed.items() if name.startswith("output")}
    for part in ("kernel", "bias"):
        thirds = np.split(packed[f"packed.{part}"], 3)
        found |= {f"{name}.{part}": third for name, third in zip(PACKED, thirds, strict=True)}
    return found
