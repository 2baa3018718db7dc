"""What is done with all weights of a layer: first values, penalties, constraints.

One generator makes the first values: the i-th weight in the canonical order draws from
``numpy.random.Generator(PCG64(SeedSequence(seed, spawn_key=(i,))))``, so that query, key and value
kernels are independent of each other. The spawn key of a feature's weight is 8 and the bytes of its
name in UTF-8. Values are drawn in float64 and rounded once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from anymha.errors import ConfigError, WeightsError
from anymha.framework.dtypes import accumulation_dtype, dtype_name
from anymha.framework.protocol import Array, Ops
from anymha.framework.validation import PROJECTIONS
from anymha.options.config import AttentionConfig
from anymha.options.constraints import constrained
from anymha.options.initializers import INITIALIZERS, Initializer
from anymha.options.regularizers import Regularizer, penalty
from anymha.options.serialization import resolved

Shape = tuple[int, ...]

NAMES = tuple(f"{projection}.{part}" for projection in PROJECTIONS for part in ("kernel", "bias"))
"""The canonical order; the weights of features follow."""


_draws: ContextVar[bool] = ContextVar("draws", default=True)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Let first weights be zeros: they are replaced at once, and drawing them may take long."""
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


def initial_weights(
    config: AttentionConfig, shapes: Mapping[str, Shape], seed: int, ops: Any = None
) -> dict[str, np.ndarray]:
    """Initial float64 values of each weight.

    Args:
        config: The layer's options.
        shapes: The weights' shapes, from `config.weight_shapes`.
        seed: A seed of any size; the same seed gives the same values everywhere. An initialiser
            with a seed of its own takes that instead.
        ops: The backend, for callables in its framework's own style; None for none.

    Raises:
        ConfigError: an initialiser of the user's cannot be called, or gives something else than
            finite numbers of the shape.
    """
    if not _draws.get():
        return {name: np.zeros(shape) for name, shape in shapes.items()}
    values = {}
    for name, shape in shapes.items():
        part = part_of(config, name)
        argument = f"{part}_initializer"
        initializer = getattr(config, argument) if part else _initial(config, name)
        known = isinstance(initializer, Initializer)
        own = getattr(initializer, "seed", None) if known else None
        sequence = _sequence(name, seed if own is None else own)
        if known:
            rng = np.random.Generator(np.random.PCG64(sequence))
            values[name] = initializer.values(rng, shape, _fans(name, shape))
        else:
            word, dtype = word_of(name, seed), accumulation_dtype(config.dtype)
            called = _called(initializer, argument, shape, as_matrix(name, shape), dtype, word, ops)
            values[name] = np.reshape(called, shape)
    return values


def part_of(config: AttentionConfig, name: str) -> str:
    """Which options of training a weight has: "kernel", "bias", or none."""
    own = config.feature_weights.get(name)
    return name.partition(".")[2] if own is None else own.part


def _initial(config: AttentionConfig, name: str) -> Initializer:
    return resolved(config.feature_weights[name].initial, INITIALIZERS, name)


def _sequence(name: str, seed: int) -> np.random.SeedSequence:
    key = (NAMES.index(name),) if name in NAMES else (len(NAMES), *name.encode())
    return np.random.SeedSequence(abs(seed), spawn_key=key)


def word_of(name: str, seed: int) -> int:
    """The 31 bits that the user's own initialiser of a weight draws from."""
    return int(_sequence(name, seed).generate_state(1)[0]) >> 1


def regularization_loss(ops: Ops, config: AttentionConfig, weights: Mapping[str, Array]) -> Array:
    """The sum of the penalties of all weights; 0 where the config has no regulariser.

    Args:
        ops: The backend.
        config: The layer's options.
        weights: Canonical names and arrays.

    Returns:
        An array of rank 0: float64 for float64 weights, else float32. In the reproducible mode it
        is computed in float64.

    Raises:
        WeightsError: there are no weights yet.
        ConfigError: a regulariser of the user's does not give a scalar.
    """

    def penalised(weights: Mapping[str, Array]) -> list[Array]:
        losses = []
        for name, weight in weights.items():
            part = part_of(config, name)
            argument = f"{part}_regularizer"
            regularizer = getattr(config, argument) if part else None
            if regularizer is None:
                continue
            of_matrix = isinstance(regularizer, Regularizer) and regularizer.as_matrix
            if of_matrix and part == "kernel":
                weight = ops.reshape(weight, as_matrix(name, tuple(weight.shape)))
            losses.append(penalty(ops, regularizer, weight, argument))
        return losses

    def total(weights: Mapping[str, Array]) -> Array:
        kernel = weights["query.kernel"]
        result = ops.dtype(accumulation_dtype(dtype_name(kernel.dtype)))
        working = ops.dtype(_working_dtype(config, kernel))
        losses = penalised({name: ops.astype(w, working) for name, w in weights.items()})
        loss = ops.asarray(0.0, dtype=working, device=ops.device(kernel))
        for one in losses:
            loss = loss + one
        return ops.astype(loss, result)

    return _computed(ops, config, weights, total)


def constrained_weights(
    ops: Ops, config: AttentionConfig, weights: Mapping[str, Array]
) -> dict[str, Array]:
    """The weights that have a constraint, as it wants them, in their own dtype.

    Raises:
        WeightsError: there are no weights yet.
        ConfigError: a constraint of the user's does not give an array of the weight's shape.
    """

    def function(weights: Mapping[str, Array]) -> dict[str, Array]:
        found = {}
        for name, weight in weights.items():
            part = part_of(config, name)
            argument = f"{part}_constraint"
            constraint = getattr(config, argument) if part else None
            if constraint is not None:
                working = ops.astype(weight, ops.dtype(_working_dtype(config, weight)))
                new = constrained(ops, constraint, working, argument)
                found[name] = ops.astype(new, weight.dtype)
        return found

    return _computed(ops, config, weights, function)


def _computed(
    ops: Ops, config: AttentionConfig, weights: Mapping[str, Array], function: Callable[..., Any]
) -> Any:
    """``function(weights)``, in float64 where the layer computes so."""
    if not weights:
        raise WeightsError(
            "The layer has no weights yet. Call it once, or pass `query_features` to its "
            "constructor."
        )
    if _working_dtype(config, weights["query.kernel"]) == "float64":
        return ops.in_float64(function, dict(weights))
    return function(weights)


def _working_dtype(config: AttentionConfig, weight: Array) -> str:
    dtypes = (config.compute_dtype, dtype_name(weight.dtype))
    return "float64" if "float64" in dtypes else "float32"


def as_matrix(name: str, shape: Shape) -> Shape:
    """A kernel's shape as the projection's matrix, (fan in, fan out); of a bias its length."""
    projection, _, part = name.partition(".")
    if part == "bias":
        return (math.prod(shape),)
    split = 2 if projection == "output" else 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def _fans(name: str, shape: Shape) -> tuple[int, int]:
    """Those of the projection as a matrix; of biases as Keras has them: their last two axes."""
    if name.endswith("kernel"):
        inputs, outputs = as_matrix(name, shape)
        return inputs, outputs
    *receptive, inputs, outputs = (1, *shape) if len(shape) > 1 else (*shape, *shape)
    return math.prod(receptive) * inputs, math.prod(receptive) * outputs


def _called(
    function: Callable[..., Any], argument: str, shape: Shape, matrix: Shape, dtype: str,
    seed: int, ops: Any,
) -> np.ndarray:  # fmt: skip
    """What an initialiser of the user's gives; its parameters' names tell its style."""
    style, takes_dtype = _style(function)
    own = None if ops is None else ops.capabilities.initializer_style
    if style == "shape":
        expected = shape
        found = function(shape, dtype=dtype) if takes_dtype else function(shape)
    elif style == own:
        expected = matrix
        found = ops.capabilities.initialize(function, matrix, dtype, seed)  # pyright: ignore
    else:
        also = f", or as {STYLES[own]}" if own else ""
        raise ConfigError(
            f"`{argument}` must be callable as {STYLES['shape']}{also}, with parameters of these "
            f"names. Received: {function!r}."
        )
    values = np.asarray(ops.to_numpy(found) if ops and ops.is_array(found) else found)
    if values.dtype == object:
        raise ConfigError(f"`{argument}` must give an array. Received: {type(found).__qualname__}.")
    if values.shape != expected or not np.all(np.isfinite(values.astype(np.float64))):
        raise ConfigError(
            f"`{argument}` must give finite numbers of shape {expected}. Received: shape "
            f"{values.shape}, {np.sum(~np.isfinite(values.astype(np.float64)))} not finite."
        )
    return values.astype(np.float64)


STYLES = {
    "shape": "f(shape, dtype)",
    "key": "f(key, shape, dtype)",
    "in place": "f(tensor), which fills it,",
}
"""How initialisers of the user's are called, and how error messages show it."""


def _style(function: Callable[..., Any]) -> tuple[str, bool]:
    """The style of an initialiser, and whether it takes a `dtype`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C do not tell
        return "shape", True
    if "key" in parameters:
        return "key", True
    if "shape" in parameters:
        several = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return "shape", several or "dtype" in parameters
    return "in place", False
