"""A case in an ``.npz`` file: the inputs of a comparison, so that it can be repeated.

The file has the inputs, masks and arguments of the call under their own names; "framework", whose
arrays a plain function gets; for each of "reference" and "candidate" whose weights are known
"reference.config", its options as JSON, and "reference.weights.query.kernel" and so on; and
"bfloat16", as JSON the names of the arrays that NumPy cannot store as what they are and that are
stored as float32, which holds them exactly.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anymha.errors import AnymhaError, FileError
from anymha.framework.registry import backend_of, get_backend
from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.npz import open_npz
from anymha.options.config import AttentionConfig
from anymha.options.training import OBJECTS
from anymha.parity.stages.trace import (
    INPUTS,
    MASKS,
    POSITIONS,
    SEGMENTS,
    Arrays,
    Request,
    Trace,
)
from anymha.text import listed, quoted, shown

SIDES = ("reference", "candidate")
ARGUMENTS = ("attention_bias", "use_causal_mask", "training", "query_offset", "seed",
             *SEGMENTS, *POSITIONS)  # fmt: skip
EXTRA = ("framework", "bfloat16", *(f"{side}.config" for side in SIDES))


@dataclass(frozen=True)
class SavedLayer:
    """Options and weights of a layer."""

    config: AttentionConfig
    weights: Arrays  # Its canonical weights


@dataclass(frozen=True)
class SavedCase:
    """The content of a file."""

    # "query", and "value" and "key" where the case has them, in the saved framework
    inputs: dict[str, Any]
    call: dict[str, Any]  # The call's other arguments
    # "reference" and "candidate", where their weights are known
    layers: dict[str, SavedLayer] = field(default_factory=dict)


def save_case(path: Path, request: Request, traces: tuple[Trace, Trace]) -> None:
    """Write a case into an ``.npz`` file; whole or not at all."""
    if path.suffix != ".npz":
        raise FileError(f"A case is saved as an .npz file. Received: {shown(path)}.")
    with atomic_file(path) as stream:
        stream.write(case_bytes(request, traces))


def case_bytes(request: Request, traces: tuple[Trace, Trace]) -> bytes:
    """A case as the bytes of its file."""
    arrays: dict[str, Any] = {**request.inputs, **request.arguments()}
    arrays = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    for side, trace in zip(SIDES, traces, strict=True):
        if trace.weights is None or trace.config is None:
            continue
        options = {n: v for n, v in trace.config.to_dict().items() if n not in OBJECTS}
        arrays[f"{side}.config"] = np.asarray(json.dumps(options))
        arrays |= {f"{side}.weights.{name}": array for name, array in trace.weights.items()}
    narrow = [name for name, array in arrays.items() if array.dtype == ml_dtypes.bfloat16]
    arrays |= {name: arrays[name].astype(np.float32) for name in narrow}
    arrays["bfloat16"] = np.asarray(json.dumps(narrow))
    arrays["framework"] = np.asarray(_framework(request))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def load_case(path: Path, framework: str | None = None) -> SavedCase:
    """Read a case, or any ``.npz`` file with a query.

    Plain functions get the arrays of this framework; default: as saved.

    Raises:
        FileError: it cannot be read, has no query, or holds what no call has.
        BackendNotInstalledError: the framework is not installed.
    """
    with open_npz(path) as reader:
        arrays = {name: reader.read(name) for name in reader.tensors}
    known = (*INPUTS, *MASKS, *ARGUMENTS, *EXTRA)
    unknown = [n for n in arrays if n not in known and n.split(".weights.")[0] not in SIDES]
    if "query" not in arrays or unknown:
        lacking = "" if "query" in arrays else " has no 'query'"
        others = (
            f" has {listed([quoted(one) for one in unknown])}, which no call takes"
            if unknown
            else ""
        )
        both = f"{lacking}{' and' if lacking and others else ''}{others}"
        raise FileError(
            f"{shown(path)}{both}. A case has: {', '.join((*INPUTS, *MASKS, *ARGUMENTS))}; of "
            "these only the query must be there."
        )
    for name in _json(path, arrays, "bfloat16", []):
        if name in arrays:
            arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)
    ops = get_backend(framework or str(arrays.get("framework", "numpy"))).ops
    inputs = {name: ops.from_numpy(arrays[name]) for name in INPUTS if name in arrays}
    call = {n: arrays[n] for n in (*MASKS, *ARGUMENTS) if n in arrays}
    call = {n: a.item() if a.ndim == 0 else a for n, a in call.items()}
    return SavedCase(inputs, call, _layers(path, arrays))


def _layers(path: Path, arrays: Arrays) -> dict[str, SavedLayer]:
    layers = {}
    for side in SIDES:
        options = _json(path, arrays, f"{side}.config", None)
        start = f"{side}.weights."
        weights = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        if options is None or not weights:
            continue
        try:
            layers[side] = SavedLayer(AttentionConfig.from_dict(options), weights)
        except (AnymhaError, TypeError, AttributeError) as error:
            raise FileError(f"{shown(path)} has a broken {side!r}: {shown(error, 1000)}") from error
    return layers


def _json(path: Path, arrays: Arrays, name: str, default: Any) -> Any:
    if name not in arrays:
        return default
    try:
        return json.loads(str(arrays[name]))
    except ValueError as error:
        raise FileError(f"{shown(path)} has a broken {name!r}: it is no JSON.") from error


def _framework(request: Request) -> str:
    try:
        return backend_of(request.originals["query"]).name
    except (AnymhaError, KeyError):
        return "numpy"  # a list
