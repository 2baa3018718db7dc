"""A call of an implementation, and its results, as NumPy arrays of any framework."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from anymha.errors import ArgumentError, DtypeError
from anymha.framework.dtypes import accumulation_dtype
from anymha.framework.registry import backend_of
from anymha.layer.other_names import unexpected
from anymha.options.config import AttentionConfig
from anymha.parity.oracle.cases import MatrixCase, OracleProblem, result_shapes, trio
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import STEPS, Arrays
from anymha.parity.stages.tolerance import eps

STAGES = tuple(STEPS)
"""The stages in order."""

INPUTS = ("query", "value", "key")
POSITIONS = ("positions", "key_positions")
SEGMENTS = ("segment_ids", "key_segment_ids")
MASKS = ("attention_mask", "query_mask", "value_mask", "key_mask")


@dataclass(frozen=True)
class Request:
    """One call, in NumPy."""

    inputs: Arrays  # "query", and "value" and "key" where the call has them; features last
    masks: Arrays = field(default_factory=dict)  # Boolean masks by argument
    bias: np.ndarray | None = None  # The attention bias
    # The call's other arguments, as anymha's layer takes them
    call: Mapping[str, Any] = field(default_factory=dict)
    # The inputs in the caller's own arrays, for plain functions
    originals: Mapping[str, Any] = field(default_factory=dict)
    decoded: Decoded | None = None  # How its sequences are read, where they are read step by step

    @property
    def three(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, value and key; a missing one is what it defaults to."""
        return trio(self.inputs)

    @property
    def training(self) -> bool:
        """Whether dropout acts."""
        return bool(self.call.get("training"))

    def arguments(self) -> dict[str, Any]:
        """The arguments of anymha's layer apart from the inputs, in NumPy."""
        bias = {} if self.bias is None else {"attention_bias": self.bias}
        return {**self.masks, **bias, **self.call}

    def with_inputs(self, inputs: Arrays, **changes: Any) -> Request:
        """The request with other inputs, also in the caller's framework."""
        own: Mapping[str, Any] = inputs
        if self.originals:
            ops = backend_of(self.originals["query"]).ops
            own = {name: ops.from_numpy(array) for name, array in inputs.items()}
        return replace(self, inputs=inputs, originals=own, **changes)


def make_request(inputs: Any, call: Mapping[str, Any]) -> Request:
    """The request for the inputs and arguments of a user.

    Args:
        inputs: An array, a sequence of query, value and key, or a mapping of them by name.
        call: Arguments of the call by the names of anymha's layer.

    Raises:
        ArgumentError: there is no query, or a name is not known.
    """
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif isinstance(inputs, Sequence) and not hasattr(inputs, "shape"):
        named = dict(zip(INPUTS, inputs, strict=False))
        if len(inputs) > 3:
            raise ArgumentError(f"`inputs` has at most query, value, key. Received: {len(inputs)}.")
    else:
        named = {"query": inputs}
    named |= dict(call)
    rest = {name: named.pop(name) for name in list(named) if name not in (*INPUTS, *MASKS)}
    bias = rest.pop("attention_bias", None)
    named = {name: array for name, array in named.items() if array is not None}
    if "query" not in named:
        raise ArgumentError(
            f"`inputs` must have a 'query'. Received: {', '.join(named) or 'nothing'}."
        )
    known = {*SEGMENTS, *POSITIONS, "training", "use_causal_mask", "query_offset", "seed"}
    unknown = sorted(set(rest) - known)
    if unknown:
        every = (*MASKS, *SEGMENTS, *POSITIONS, "attention_bias", *sorted(known))
        raise unexpected(unknown[0], dict.fromkeys(every))
    # Copies: a function that writes into its inputs must not change the reference's.
    arrays = {name: np.array(as_numpy(array)) for name, array in named.items()}
    for name, array in arrays.items():
        if array.size == 0:
            raise ArgumentError(
                f"`{name}` is empty, there is nothing to compare: shape {array.shape}."
            )
    return Request(
        {name: arrays[name] for name in INPUTS if name in arrays},
        {name: _boolean(name, arrays[name]) for name in MASKS if name in arrays},
        None if bias is None else as_numpy(bias),
        {n: as_numpy(v) if hasattr(v, "shape") else v for n, v in rest.items() if v is not None},
        {name: named[name] for name in INPUTS if name in named},
    )


def _boolean(name: str, mask: np.ndarray) -> np.ndarray:
    if mask.dtype != np.bool_:
        raise DtypeError(
            f"`{name}` must be boolean, True = may attend. Received: {mask.dtype.name}. "
            "An additive mask is an `attention_bias`; one of 0 and 1 becomes boolean by "
            f"`{name} != 0`."
        )
    return mask


def differs_between_calls(result: np.ndarray, again: np.ndarray) -> bool:
    """Whether two calls gave two results, by more than the order of sums explains."""
    if result.shape != again.shape:
        return True
    one, other = result.astype(np.float64), again.astype(np.float64)
    size = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
    dtype, near = name_of_dtype(result), 0.0
    if "float" in dtype:
        near = 2 * eps(dtype) + 256 * eps(accumulation_dtype(dtype))
    return not np.allclose(one, other, rtol=0, atol=near * size, equal_nan=True)


def check_numbers(name: str, results: Mapping[str, np.ndarray]) -> None:
    """Raise a DtypeError where a result of the implementation `name` is not of real numbers."""
    for which, array in results.items():
        dtype = name_of_dtype(array)
        if array.dtype.kind not in "fiub" and "float" not in dtype:
            raise DtypeError(
                f"The {which} of `{name}` must be real numbers, floating or integers. Received: "
                f"shape {array.shape}, dtype {dtype}. Cast it, or return real and imaginary parts "
                "by themselves."
            )


def fresh(array: Any) -> Any:
    """A copy of what can be written into, as arrays of NumPy or torch; another array as it is."""
    if isinstance(array, np.ndarray) or hasattr(array, "assign"):
        return copy.deepcopy(array)
    return array.clone() if hasattr(array, "clone") else array


def as_numpy(array: Any) -> np.ndarray:
    """An array of any framework, or a number or list, as a NumPy array."""
    if isinstance(array, (np.ndarray, float, int, list)):
        return np.asarray(array)
    if hasattr(array, "value") and not hasattr(array, "__array__"):
        array = array.value  # a variable of Keras, or of Flax
    return np.asarray(backend_of(array).ops.to_numpy(array))


@dataclass(frozen=True)
class Trace:
    """The results of an implementation."""

    name: str  # What it is
    output: np.ndarray  # Its output, in the caller's shape
    scores: np.ndarray | None = None  # Its probabilities (B, H, T, S), where it returns them
    # The stages that it reports, by name, in the shapes of the recipe
    stages: Arrays = field(default_factory=dict)
    # Of the sum of the output times a fixed cotangent, by canonical name; empty where it has none
    gradients: Arrays = field(default_factory=dict)
    without_gradients: str = ""  # Why it has none, in words
    weights: Arrays | None = None  # Its canonical weights, where they are known
    config: AttentionConfig | None = None  # Its options, where they are known
    accumulated: str | None = None  # The dtype of its sums; None: that which anymha would take
    # The dtype in which it stores the results of sums; None: that of the sums
    stored: str | None = None
    random: bool = False  # Whether two calls gave two results
    notes: tuple[str, ...] = ()  # What its users should know
    # Arrays of its steps besides plain attention, by name: norms of queries and keys, sinks, and
    # the "cos" and "sin" of rotary positions (B, T, d)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    # Where stages count, by name: booleans that broadcast to them; elsewhere a mask excludes them
    settled: Arrays = field(default_factory=dict)
    # Another call, with random inputs of the same shapes from a seed: query, value and key, and
    # its results; None where it cannot be called again
    again: Callable[[int], tuple[Arrays, Trace]] | None = field(
        default=None, repr=False, compare=False
    )


class Adapter(Protocol):
    """An implementation that can be called and compared."""

    name: str

    def trace(self, request: Request, cotangent: np.ndarray | None) -> Trace:
        """Its results; with a cotangent of the output its gradients too, where it has them."""
        ...


def problem_of(config: AttentionConfig, weights: Arrays, request: Request) -> OracleProblem:
    """The request to a layer with these options and weights, for the oracle."""
    query, value, key = request.three
    widths = (query.shape[-1], value.shape[-1], key.shape[-1])
    options = config.to_dict()
    for name in ("query_features", "value_features", "key_features"):
        options.pop(name, None)
    inputs = dict(request.inputs)
    if request.bias is not None:
        inputs["attention_bias"] = request.bias
    own = None if set(request.inputs) == {"query"} else value.shape[:-1]
    if own is not None:
        inputs |= {"value": value, "key": key}
    case = MatrixCase("compare", options, dict(request.call), query.shape[:-1], own, widths)
    output, scores = result_shapes(case)
    return OracleProblem(case, weights, inputs, request.masks, np.zeros(output), np.zeros(scores))


def name_of_dtype(array: np.ndarray) -> str:
    """The name of an array's dtype, "bfloat16" included."""
    return array.dtype.name
