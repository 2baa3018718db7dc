"""Real weights: the attention layers of a checkpoint as problems for the matrix.

The inputs come from an ``.npz`` file: ``hidden_states_N`` (B, T, D) for layer N, and if there are
any ``padding_mask`` (B, T) booleans, True = token, what another implementation returned,
``attention_output_N`` (B, T, O) and ``attention_scores_N`` (B, H, T, T), and ``tokens`` (B, T).
Without a file they are drawn from a normal distribution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from anymha.errors import UsageError
from anymha.interchange.layouts import get_layout, to_canonical
from anymha.parity.cases import Arrays, Case, Problem

MODES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("float32", {}),
    ("float64", {"dtype": "float64"}),
    ("reproducible", {"compute_dtype": "float64"}),
)


@dataclass(frozen=True)
class Recorded:
    """What another implementation returned for the same weights and inputs.

    Args:
        results: "output" and "scores", as far as they were recorded.
        counts: Booleans (B, T): the positions at which they mean something.
    """

    results: Arrays
    counts: np.ndarray


@dataclass(frozen=True)
class RealProblem:
    """A layer of a checkpoint in one mode.

    Args:
        problem: The problem.
        recorded: What another implementation returned, or None.
        layer: The layer's prefix in the file.
    """

    problem: Problem
    recorded: Recorded | None
    layer: str


def real_problems(
    path: Path, layout: str, num_heads: int, prefix: str | None, inputs: Path | None
) -> Iterator[RealProblem]:
    """Each layer of the file, in float32, in float64 and in the reproducible mode.

    Args:
        path: A safetensors file.
        layout: The layout of each layer.
        num_heads: Query heads H, which the shapes do not tell.
        prefix: What a layer's names begin with in the file; default every layer that is found.
        inputs: The ``.npz`` file of inputs.

    Raises:
        UsageError: a file cannot be read, or holds no such layer or inputs.
    """
    given = _read_inputs(inputs) if inputs else {}
    with _open(path) as file:
        names = list(file.keys())
        for start in _prefixes(names, layout, prefix, path):
            known = get_layout(layout).names()
            arrays = {
                name: file.get_tensor(start + name) for name in known if start + name in names
            }
            weights, _ = to_canonical(arrays, layout, num_heads=num_heads)
            for mode, options in MODES:
                yield _problem(start, mode, options, weights, given)


def _problem(
    start: str, mode: str, options: Mapping[str, str], weights: Arrays, given: Arrays
) -> RealProblem:
    number = (re.findall(r"\d+", start) or ["0"])[-1]
    heads, width = weights["query.kernel"].shape[1], weights["query.kernel"].shape[0]
    rng = np.random.default_rng(0)
    query = given.get(f"hidden_states_{number}")
    if query is None:
        if given:
            raise UsageError(
                f"The inputs hold no hidden_states_{number} for the layer {start!r}. "
                f"They hold: {', '.join(given)}."
            )
        query = rng.standard_normal((8, 32, width)).astype(np.float32)
    mask = given.get("padding_mask")
    shape = {} if mask is None else {"value_mask": mask.shape}
    config = {
        "num_heads": heads,
        "key_dim": weights["query.kernel"].shape[2],
        "value_dim": weights["value.kernel"].shape[2],
        "num_key_value_heads": weights["key.kernel"].shape[1],
        "use_bias": tuple(n.partition(".")[0] for n in weights if n.endswith(".bias")),
        "output_shape": weights["output.kernel"].shape[2:],
        **options,
    }
    case = Case(f"layer {number}, {mode}", config, {}, query.shape[:2], None, (width,) * 3, shape)
    dtype = np.dtype(options.get("dtype", "float32"))
    batch, length = query.shape[:2]
    outputs = weights["output.kernel"].shape[2:]
    problem = Problem(
        case,
        {name: array.astype(dtype) for name, array in weights.items()},
        {"query": query.astype(dtype)},
        {} if mask is None else {"value_mask": mask},
        rng.standard_normal((batch, length, *outputs)).astype(dtype),
        rng.standard_normal((batch, heads, length, length)).astype(dtype),
    )
    kinds = ("output", "scores")
    recorded = {
        kind: given[f"attention_{kind}_{number}"]
        for kind in kinds
        if f"attention_{kind}_{number}" in given
    }
    counts = np.ones(query.shape[:2], bool) if mask is None else mask
    return RealProblem(problem, Recorded(recorded, counts) if recorded else None, start)


def _prefixes(names: list[str], layout: str, prefix: str | None, path: Path) -> list[str]:
    """Where the layers of this layout begin, in the file's names."""
    mark = get_layout(layout).layers["query"] + ".weight"
    found = [name.removesuffix(mark) for name in names if name.endswith(mark)]
    if prefix is not None:
        found = [start for start in found if start.startswith(prefix)]
    if not found:
        raise UsageError(
            f"{path} holds no layer of the layout {layout!r}"
            + (f" whose names begin with {prefix!r}" if prefix else "")
            + f": none of its {len(names)} names ends with {mark!r}. "
            f"The first are: {', '.join(names[:4])}."
        )
    return found


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as a safetensors file: {error}.") from error


def _read_inputs(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as an .npz file: {error}.") from error


def tokens_of(path: Path | None) -> list[list[str]]:
    """The tokens of each sentence in a file of inputs, without padding; empty if it has none."""
    given = _read_inputs(path) if path else {}
    if not {"tokens", "padding_mask"} <= set(given):
        return []
    pairs = zip(given["tokens"], given["padding_mask"], strict=True)
    return [[str(token) for token in row[mask]] for row, mask in pairs]
