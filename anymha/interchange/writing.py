"""Prepare canonical weights for another layout: check them, and match its biases."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anymha.errors import BiasWarning, LayoutError, WeightsError
from anymha.framework.registry import check_named, named_arrays
from anymha.interchange.forms import FEATURE_WEIGHTS
from anymha.interchange.packing import NAMES, Arrays, Piece, Sizes
from anymha.options.config import PROJECTIONS


def check_weights(weights: Mapping[str, Any]) -> tuple[Arrays, Sizes]:
    """Canonical weights in NumPy, and their sizes; `check_biases` checks the biases.

    Raises:
        ArgumentError: they are no dict of arrays.
        WeightsError: names or shapes are not canonical, or do not fit one another.
    """
    check_named(weights, "weights")
    kernels = [f"{projection}.kernel" for projection in PROJECTIONS]
    known = {*NAMES, *FEATURE_WEIGHTS}
    missing = [name for name in kernels if name not in weights]
    unknown = [name for name in weights if name not in known]
    if "gate.bias" in weights and "gate.kernel" not in weights:
        missing.append("gate.kernel")
    if missing or unknown:
        raise WeightsError(
            f"Canonical weights are {', '.join(kernels)} and their biases, and those of options: "
            f"{', '.join(FEATURE_WEIGHTS)}. Missing: {', '.join(missing) or 'none'}. Unknown: "
            f"{', '.join(unknown) or 'none'}."
        )
    values = named_arrays(weights)
    for name in kernels:
        if values[name].ndim < 3 or (name != "output.kernel" and values[name].ndim > 3):
            raise WeightsError(f"`{name}` must have 3 axes. Received: shape {values[name].shape}.")
    _, heads, key_dim = values["query.kernel"].shape
    _, shared, value_dim = values["value.kernel"].shape
    sizes = Sizes(heads, shared, key_dim, value_dim)
    for projection in _projections(values):
        _check_kernel(projection, values, sizes)
    if 0 in (heads, shared, key_dim, value_dim) or heads % shared:
        raise WeightsError(
            "Query heads must be a multiple of key and value heads, and all at least 1 wide. "
            f"Received: `query.kernel` of shape {values['query.kernel'].shape}, `value.kernel` of "
            f"shape {values['value.kernel'].shape}."
        )
    return values, sizes


def split_features(values: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
    """The weights of the projections, and those of options."""
    features = {name: values[name] for name in FEATURE_WEIGHTS if name in values}
    return {name: array for name, array in values.items() if name not in features}, features


def check_biases(values: Arrays) -> None:
    """Check that the biases fit the kernels.

    Raises:
        WeightsError: one does not fit.
    """
    for projection in _projections(values):
        bias = values.get(f"{projection}.bias")
        if bias is not None and bias.shape != _bias_shape(projection, values):
            raise WeightsError(
                f"`{projection}.bias` must have shape {_bias_shape(projection, values)}, as "
                f"`{projection}.kernel` has shape {values[f'{projection}.kernel'].shape}. "
                f"Received: shape {bias.shape}."
            )


def _projections(weights: Iterable[str]) -> list[str]:
    """The projections that have a kernel among these names."""
    return [name.partition(".")[0] for name in weights if name.endswith(".kernel")]


def _check_kernel(projection: str, values: Arrays, sizes: Sizes) -> None:
    shape, split = values[f"{projection}.kernel"].shape, sizes.split(projection)
    expected = (*split, *shape[2:]) if projection == "output" else (shape[0], *split)
    if projection == "gate":  # with a number for each head it has no widths
        inputs = values["query.kernel"].shape[0]
        expected = (inputs, *split) if len(shape) > 2 else (inputs, split[0])
    if shape != expected:
        raise WeightsError(
            f"The layers do not fit one another: `{projection}.kernel` has shape {shape}, "
            f"the others need {expected}."
        )


def _bias_shape(projection: str, values: Arrays) -> tuple[int, ...]:
    shape = values[f"{projection}.kernel"].shape
    return shape[2:] if projection == "output" else shape[1:]


def with_layout_biases(
    target: str, pieces: Sequence[Piece], together: Sequence[str], values: Mapping[str, np.ndarray]
) -> Arrays:  # fmt: skip
    """The weights with the biases that a layout has: zeros added, or left out, with a warning.

    Args:
        target: Its name, for messages.
        pieces: Its arrays.
        together: Projections that all have a bias or none of them.
        values: Canonical weights.

    Raises:
        LayoutError: a bias that is not zero has no place.
    """
    known = {name for piece in pieces for name in piece.names}
    wanted = {name: None for name in values if name in known}
    for group in (together, *(piece.holds for piece in pieces if piece.part == "bias")):
        names = [f"{name}.bias" for name in group if f"{name}.kernel" in values]
        if any(name in wanted for name in names):
            wanted |= dict.fromkeys(names)
    return match_biases(target, wanted, values)


def match_biases(target: str, wanted: Iterable[str], values: Mapping[str, np.ndarray]) -> Arrays:
    """The weights with the biases of a target: zeros added, or left out, with a warning.

    Args:
        target: Its name, for messages.
        wanted: The canonical names that the target has.
        values: Canonical weights.

    Raises:
        LayoutError: a bias that is not zero has no place.
    """
    wanted = set(wanted)
    homeless = [name for name in values if name not in wanted]
    full = [n for n in homeless if n.endswith(".kernel") or np.any(values[n] != 0)]
    if full:
        raise LayoutError(
            f"{target} has no {' and no '.join(f'`{name}`' for name in full)}; the weights do, and "
            "without it the results would change. Use a layout that holds it."
        )
    result = {name: array for name, array in values.items() if name in wanted}
    added = [name for name in NAMES if name in wanted and name not in values]
    for name in added:
        projection = name.partition(".")[0]
        dtype = values[f"{projection}.kernel"].dtype
        result[name] = np.zeros(_bias_shape(projection, result), dtype)
    if homeless or added:
        done = [
            f"{', '.join(names)} {verb}"
            for names, verb in ((added, "added as zeros"), (homeless, "of zeros left out"))
            if names
        ]
        warnings.warn(
            f"{target} has other biases than these weights: {'; '.join(done)}. The results are "
            "the same, but the way back does not know which biases were absent.",
            BiasWarning,
            stacklevel=2,
        )
    return {name: result[name] for name in NAMES if name in result}
