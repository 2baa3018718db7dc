"""Inputs for a comparison that make every feature of the call matter, and layers to be fed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.parity.oracle.cases import MatrixCase, make_problem
from anymha.parity.stages.saved_case import SavedLayer

CASES = ("self", "cross", "causal", "padded")
BATCH, QUERIES, KEYS = 2, 5, 7
FEATURES = 32


@dataclass(frozen=True)
class CallInputs:
    """Inputs and arguments of one comparison."""

    name: str  # Their name
    inputs: dict[str, Any]  # "query", and "value" and "key" where the call has them
    call: dict[str, Any]  # The call's other arguments


def make_cases(
    names: Collection[str], widths: tuple[int, int, int], dtype: Any = np.float32
) -> list[CallInputs]:
    """Some of `CASES` by name, for inputs of these widths.

    "self" has one input, the others a query (2, 5, D) and a value and a key (2, 7, D); "causal" the
    causal mask; "padded" a mask of its own for each query, one of which attends to nothing, and a
    second key sequence that is shorter.
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
    every = {
        "self": CallInputs("self", {"query": normal(KEYS, widths[0])}, {}),
        "cross": CallInputs("cross", cross, {}),
        "causal": CallInputs("causal", cross, {"use_causal_mask": True}),
        "padded": CallInputs("padded", cross, {"attention_mask": mask, "value_mask": padding}),
    }
    return [every[name] for name in CASES if name in names]


def make_layer(widths: tuple[int, int, int], dtype: str = "float32") -> SavedLayer:
    """Options and random weights, biases too, for query, value and key of these widths."""
    heads = next(count for count in (4, 2, 1) if widths[0] % count == 0)
    options = {"num_heads": heads, "key_dim": widths[0] // heads, "dtype": dtype}
    problem = make_problem(MatrixCase("compare", options, {}, widths=widths))
    return SavedLayer(problem.case.config, problem.weights)


def fit_functions(case: CallInputs, functions: Sequence[Callable[..., Any]]) -> CallInputs | str:
    """Fit inputs to plain functions; or say why that is not possible.

    A function that needs a value and a key gets them for self-attention too; one that takes no key
    gets none, and the value is the key.
    """
    least, most = len(case.inputs) if len(case.inputs) == 1 else 2, 3
    for function in functions:
        name = getattr(function, "__qualname__", "the function")
        needs, takes, names = _parameters_of(function)
        lacking = [f"`{n}`" for n in case.call if names is not None and n not in names]
        if lacking:
            return f"{name} does not take {', '.join(lacking)}"
        least, most = max(least, needs), min(most, takes)
        if most < least:
            counts = ("nothing", "one input alone", "two inputs alone")
            return f"{name} takes {counts[most]}" if takes == most else f"{name} needs {needs}"
    inputs = dict(case.inputs)
    for name in ("value", "key")[: least - 1]:
        inputs.setdefault(name, inputs["query"])
    if most < 3 and "key" in inputs:
        key = inputs.pop("key")
        if key.shape[-1] != inputs["value"].shape[-1]:
            return "a function takes no key, and keys are of another width than values"
    return CallInputs(case.name, inputs, case.call)


def _parameters_of(function: Callable[..., Any]) -> tuple[int, int, set[str] | None]:
    """The least and the greatest number of inputs of a function, and its names; None: any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of some functions that are written in C
        return 1, 3, None
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    inputs = [p for i, p in enumerate(places) if i < 3 and not _is_option(p.name)]
    least = sum(p.default is p.empty for p in inputs)
    most = 3 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(inputs)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return least, most, None if anything else names


def _is_option(name: str) -> bool:
    """Whether a parameter is one of the call's other arguments."""
    return name.endswith(("mask", "bias")) or name in ("training", "query_offset", "seed")
