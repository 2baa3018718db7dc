"""Real weights: the attention layers of a checkpoint as problems for the matrix.

The inputs come from an ``.npz`` file: ``hidden_states_N`` (B, T, D) for layer N, and if there are
any ``padding_mask`` (B, T) booleans, True = token, what another implementation returned,
``attention_output_N`` (B, T, O) and ``attention_scores_N`` (B, H, T, T), and ``tokens`` (B, T).
Without a file they are drawn from a normal distribution.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anymha.errors import UsageError, WeightsError
from anymha.interchange.files.formats import open_file
from anymha.interchange.layouts import get_layout, to_canonical
from anymha.parity.oracle.cases import Arrays, MatrixCase, OracleProblem
from anymha.text import listed, quoted, shown

MODES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("float32", {}),
    ("float64", {"dtype": "float64"}),
    ("reproducible", {"compute_dtype": "float64"}),
)


@dataclass(frozen=True)
class RecordedResults:
    """Results of another implementation for the same weights and inputs.

    Args:
        results: "output" and "scores", as far as they were recorded.
        counts: Booleans (B, T): the positions that are compared.
    """

    results: Arrays
    counts: np.ndarray


@dataclass(frozen=True)
class CheckpointProblem:
    """A layer of a checkpoint in one mode.

    Args:
        problem: The problem.
        recorded: The results of another implementation, or None.
        layer: The layer's prefix in the file.
    """

    problem: OracleProblem
    recorded: RecordedResults | None
    layer: str


def checkpoint_problems(
    path: Path, layout: str, num_heads: int, prefix: str | None, inputs: Path | None
) -> Iterator[CheckpointProblem]:
    """Each layer of the file, in float32, in float64 and in the reproducible mode.

    Args:
        path: A file of any format of `anymha.interchange.files`.
        layout: The layout of each layer.
        num_heads: Query heads H, which do not follow from the shapes.
        prefix: The beginning of a layer's names in the file; default every layer of the layout.
        inputs: The ``.npz`` file of inputs.

    Raises:
        UsageError: a file holds no such layer or inputs, or the inputs cannot be read.
        FileError: the file of weights cannot be read.
    """
    inputs_by_name = read_inputs(inputs) if inputs else {}
    known = get_layout(layout).names()
    with open_file(path) as file:
        names = list(file.tensors)
        starts = _prefixes(names, layout, prefix, path)
        for start, label in zip(starts, _labels(starts), strict=True):
            arrays = {n: file.read(start + n) for n in known if start + n in names}
            try:
                weights, _ = to_canonical(arrays, layout, num_heads=num_heads)
            except WeightsError as error:
                raise UsageError(
                    f"{shown(path)}, layer {quoted(start)}: {shown(error, 1000)}"
                ) from error
            for mode, options in MODES:
                case = MatrixCase(f"{label}, {mode}", options)
                yield _problem(start, case, weights, inputs_by_name)


def _number(start: str) -> str:
    """The layer's number, which the names of its inputs have."""
    return (re.findall(r"\d+", start) or ["0"])[-1]


def _labels(starts: list[str]) -> list[str]:
    """The layers' names: their numbers, or their prefixes where two numbers are equal."""
    numbers = [_number(start) for start in starts]
    if len(set(numbers)) == len(numbers):
        return [f"layer {number}" for number in numbers]
    return [shown(start.rstrip(".")) for start in starts]


def _problem(start: str, case: MatrixCase, weights: Arrays, stored: Arrays) -> CheckpointProblem:
    number = _number(start)
    width, heads, key_dim = weights["query.kernel"].shape
    outputs = weights["output.kernel"].shape[2:]
    rng = np.random.default_rng(0)
    query, recorded = _inputs_of(stored, number, start, (width, heads, *outputs))
    if query is None:
        query = rng.standard_normal((8, 32, width)).astype(np.float32)
    mask = stored.get("padding_mask")
    config = {
        "num_heads": heads,
        "key_dim": key_dim,
        "value_dim": weights["value.kernel"].shape[2],
        "num_key_value_heads": weights["key.kernel"].shape[1],
        "use_bias": tuple(n.partition(".")[0] for n in weights if n.endswith(".bias")),
        "output_shape": outputs,
        **case.options,
    }
    batch, length = query.shape[:2]
    shapes = {} if mask is None else {"value_mask": mask.shape}
    case = MatrixCase(case.name, config, {}, (batch, length), None, (width,) * 3, shapes)
    dtype = np.dtype(config.get("dtype", "float32"))
    problem = OracleProblem(
        case,
        {name: array.astype(dtype) for name, array in weights.items()},
        {"query": query.astype(dtype)},
        {} if mask is None else {"value_mask": mask},
        rng.standard_normal((batch, length, *outputs)).astype(dtype),
        rng.standard_normal((batch, heads, length, length)).astype(dtype),
    )
    counts = np.ones((batch, length), bool) if mask is None else mask
    return CheckpointProblem(
        problem, RecordedResults(recorded, counts) if recorded else None, start
    )


def _inputs_of(
    stored: Arrays, number: str, start: str, sizes: tuple[int, ...]
) -> tuple[np.ndarray | None, Arrays]:
    """The hidden states of a layer, and the results recorded for it; shapes are checked."""
    width, heads, *outputs = sizes
    name = f"hidden_states_{number}"
    if not stored:
        return None, {}
    if name not in stored:
        raise UsageError(
            f"The inputs hold no {name} for the layer {quoted(start)}. They hold: {listed(stored)}."
        )
    query = stored[name]
    batch, length = (*query.shape, 0, 0)[:2]
    if "padding_mask" in stored:
        batch, length = stored["padding_mask"].shape
    output, scores = f"attention_output_{number}", f"attention_scores_{number}"
    wanted = {
        name: (batch, length, width),
        output: (batch, length, *outputs),
        scores: (batch, heads, length, length),
    }
    for one, shape in wanted.items():
        array = stored.get(one)
        if array is None:
            continue
        if array.shape != shape or array.dtype.kind != "f":
            raise UsageError(
                f"`{one}` of the inputs must be floats of shape {shape}. Received: "
                f"{array.dtype} of shape {array.shape}."
            )
    if not np.isfinite(query).all():
        raise UsageError(f"`{name}` of the inputs holds NaN or infinity.")
    kinds = {"output": output, "scores": scores}
    return query, {kind: stored[name] for kind, name in kinds.items() if name in stored}


def _prefixes(names: list[str], layout: str, prefix: str | None, path: Path) -> list[str]:
    """The prefixes of the layers of this layout in the file."""
    every = get_layout(layout).prefixes(names)
    if not every:
        mark = get_layout(layout).required()[0][0]
        raise UsageError(
            f"{shown(path)} holds no layer of the layout {layout!r}: none of its {len(names)} "
            f"names ends with {mark!r}. The first are: {listed(names[:4])}."
        )
    chosen = [start for start in every if start.startswith(prefix or "")]
    if not chosen:
        raise UsageError(
            f"{shown(path)} holds no layer whose names begin with {quoted(prefix)}. Its layers "
            f"begin with {listed([quoted(one) for one in every[:4]])}."
        )
    return chosen


def read_inputs(path: Path) -> Arrays:
    """The arrays of a file of inputs.

    Raises:
        UsageError: it cannot be read, or mask and tokens do not fit each other.
    """
    try:
        with path.open("rb") as stream:
            stored: Arrays | None = {} if zipfile.is_zipfile(stream) else None
        if stored is not None:
            with np.load(path, allow_pickle=False) as file:
                stored = dict(file)
    except OSError as error:
        raise UsageError(f"{shown(path)} cannot be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{shown(path)} cannot be read as an .npz file: {shown(error)}."
        ) from error
    if stored is None:
        raise UsageError(f"{shown(path)} is not an .npz file.")
    mask, tokens = stored.get("padding_mask"), stored.get("tokens")
    if mask is not None and (mask.ndim != 2 or mask.dtype != bool):
        raise UsageError(
            "`padding_mask` of the inputs must be booleans of shape (B, T), True = token. "
            f"Received: {mask.dtype} of shape {mask.shape}."
        )
    if mask is not None and tokens is not None and tokens.shape != mask.shape:
        raise UsageError(
            f"`tokens` of the inputs must have the shape of `padding_mask`, {mask.shape}. "
            f"Received: shape {tokens.shape}."
        )
    return stored


def tokens_of(stored: Arrays) -> list[list[str]]:
    """The tokens of each sentence of the inputs, without padding; empty if there are none."""
    if not {"tokens", "padding_mask"} <= set(stored):
        return []
    pairs = zip(stored["tokens"], stored["padding_mask"], strict=True)
    return [[str(token) for token in row[mask]] for row, mask in pairs]
