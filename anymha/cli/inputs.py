"""Inputs for a comparison that make every feature of the call matter, and layers to be fed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from anymha.parity.adapters import Declared
from anymha.parity.oracle.cases import MatrixCase, make_problem, trio
from anymha.parity.stages.saved_case import SavedLayer
from anymha.parity.stages.trace import MASKS

SELF = {"cross": "self", "causal": "self-causal", "padded": "self-masked"}
"""The case of self-attention for each case of cross-attention."""

CASES = ("self", "self-causal", "self-masked", "cross", "causal", "padded")
DECODED = "decoded"
"""The case for implementations that decode step by step; of others none asks for it."""

OF_KEYS = re.compile(r"(?:^|_)(?:k|kv|keys?|values?|v)(?:_|$)|kv$|context|memory")
BATCH, QUERIES, KEYS = 2, 5, 7
FEATURES = 32


@dataclass(frozen=True)
class CallInputs:
    """Inputs and arguments of one comparison."""

    name: str  # Their name
    inputs: dict[str, Any]  # "query", and "value" and "key" where the call has them
    call: dict[str, Any]  # The call's other arguments


def make_cases(
    names: Collection[str], widths: tuple[int, int, int], dtype: Any = np.float32,
    longest: int = 13,
) -> list[CallInputs]:  # fmt: skip
    """Some of `CASES` and `DECODED` by name, for inputs of these widths.

    Those of "self" have one input, the others a query (2, 5, D) and a value and a key (2, 7, D);
    "causal" has the causal mask; "padded" and "self-masked" a mask of its own for each query, one
    of which attends to nothing, and a second key sequence that is shorter. "decoded" has three
    sequences of the length `longest`, with padding in front, at the end and between.
    """
    rng = np.random.default_rng(20170612)

    def normal(length: int, width: int) -> np.ndarray:
        return rng.standard_normal((BATCH, length, width)).astype(dtype)

    arrays = map(normal, (QUERIES, KEYS, KEYS), widths)
    cross: dict[str, Any] = dict(zip(("query", "value", "key"), arrays, strict=True))
    mask = rng.random((BATCH, QUERIES, KEYS)) < 0.6
    mask[:, :, 0] = True  # so that one row alone is empty
    mask[0, 1] = False
    padding = np.arange(KEYS) < np.array([[KEYS - 1], [KEYS - 3]])
    alone = {"query": normal(KEYS, widths[0])}
    own = rng.random((BATCH, KEYS, KEYS)) < 0.6
    own[:, np.arange(KEYS), np.arange(KEYS)] = own[:, :, 0] = True
    own[0, 1] = False
    masked = {"attention_mask": own, "value_mask": padding}
    every = {
        "self": CallInputs("self", alone, {}),
        "self-causal": CallInputs("self-causal", alone, {"use_causal_mask": True}),
        "self-masked": CallInputs("self-masked", alone, masked),
        "cross": CallInputs("cross", cross, {}),
        "causal": CallInputs("causal", cross, {"use_causal_mask": True}),
        "padded": CallInputs("padded", cross, {"attention_mask": mask, "value_mask": padding}),
    }
    made = [every[name] for name in CASES if name in names]
    if DECODED in names:
        rng = np.random.default_rng(20170612)
        query = rng.standard_normal((3, longest, widths[0])).astype(dtype)
        valid = np.ones(query.shape[:2], bool)
        valid[0, 3:5] = valid[0, -2] = valid[1, 1] = valid[2, :3] = False
        call = {"value_mask": valid, "use_causal_mask": True}
        made.append(CallInputs(DECODED, {"query": query}, call))
    return made


def make_layer(widths: tuple[int, int, int], dtype: str = "float32") -> SavedLayer:
    """Options and random weights, biases too, for query, value and key of these widths."""
    heads = next(count for count in (4, 2, 1) if widths[0] % count == 0)
    options = {"num_heads": heads, "key_dim": widths[0] // heads, "dtype": dtype}
    problem = make_problem(MatrixCase("compare", options, {}, widths=widths))
    return SavedLayer(problem.case.config, problem.weights)


def variants(case: CallInputs) -> Iterator[CallInputs]:
    """The case, then others like it for implementations that take less.

    They have no key, one mask of two, or a mask in place of `use_causal_mask`.
    """
    masks = [name for name in MASKS if name in case.call]
    subsets = [masks, *([name] for name in masks)] if len(masks) > 1 else [masks]
    rest = {name: value for name, value in case.call.items() if name not in masks}
    inputs = [case.inputs]
    if "key" in case.inputs and case.inputs["key"].shape == case.inputs["value"].shape:
        inputs.append({name: case.inputs[name] for name in ("query", "value")})
    for names in subsets:
        for some in inputs:
            yield CallInputs(case.name, some, {**{n: case.call[n] for n in names}, **rest})
    if case.call.get("use_causal_mask"):
        for some in inputs:
            _, value, _ = trio(some)
            batch, queries, _ = some["query"].shape
            seen = np.tile(np.tri(queries, value.shape[1], dtype=bool), (batch, 1, 1))
            call = {n: v for n, v in case.call.items() if n != "use_causal_mask"}
            yield CallInputs(case.name, some, {**call, "attention_mask": seen})


def widths_of(implementation: Any) -> tuple[int, int, int] | None:
    """The widths of query, value and key, as an implementation's linear layers tell them.

    These are looked for in its parts, and in what a function refers to. The first tells the width
    of the query; one whose name speaks of keys tells those of key and value.
    """
    found = list(_linear_widths(implementation, "", 0, set()))
    if not found:
        return None
    query = found[0][1]
    other = next((width for name, width in found if OF_KEYS.search(name)), query)
    return query, other, other


def _linear_widths(thing: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, int]]:
    if id(thing) in seen or depth > 5:
        return
    seen.add(id(thing))
    for attribute in ("in_features", "in_channels"):
        width = getattr(thing, attribute, None)
        if isinstance(width, int):
            yield name, width
            return
    kernel = getattr(thing, "kernel", None)
    if type(thing).__name__ == "Dense" and kernel is not None:
        yield name, int(kernel.shape[0])
        return
    for part, value in _parts_of(thing):
        if not isinstance(value, (int, float, str, bytes, type(None), type, ModuleType)):
            yield from _linear_widths(value, part, depth + 1, seen)


def _parts_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, or what a function refers to, by name."""
    if isinstance(thing, partial):
        yield from (("", value) for value in (thing.func, *thing.args, *thing.keywords.values()))
    elif isinstance(thing, FunctionType):
        yield from ((n, thing.__globals__[n]) for n in thing.__code__.co_names
                    if n in thing.__globals__)  # fmt: skip
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells)
    elif isinstance(thing, Declared):
        yield "", thing.implementation
    elif isinstance(thing, Mapping):
        yield from ((str(name), value) for name, value in thing.items())
    elif hasattr(thing, "__dict__") and not isinstance(thing, (np.ndarray, ModuleType)):
        own = vars(thing)
        yield from own.items()
        yield from dict(own.get("_modules") or {}).items()
