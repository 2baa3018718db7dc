"""How far a trace may be from float64, stage by stage and position by position."""

from __future__ import annotations

import numpy as np

from anymha.parity.oracle.recipe import Recipe
from anymha.parity.stages.tolerance import eps, smallest, tolerance
from anymha.parity.stages.trace import Trace, name_of_dtype


class Tolerances:
    """How far a trace may be from float64 at each stage, in the dtype of the reference at most."""

    def __init__(self, recipe: Recipe, reference: Trace | None = None) -> None:
        self.reference, self.sizes = reference, recipe.sizes
        widths = [array.shape[-1] for array in recipe.inputs.values()]
        widths += [recipe.weights[f"{name}.kernel"].shape[2] for name in ("query", "value")]
        heads, width, _ = recipe.weights["output.kernel"].shape
        self.length = max(*widths, recipe.lengths[2], heads * width)

    def of(self, stage: str, trace: Trace) -> np.ndarray:
        """The greatest error that rounding explains, of each position; broadcasts to the stage."""
        reference = self.reference
        if reference and eps(computed_dtype(trace)) > eps(computed_dtype(reference)):
            trace = reference
        dtype, size = computed_dtype(trace), self.sizes[stage]
        relative = tolerance(
            dtype, self.length, 1.0, accumulated=trace.accumulated, stored=trace.stored
        )
        return relative * size + smallest(dtype) * self.length


def computed_dtype(trace: Trace) -> str:
    """The narrowest dtype through which a trace's numbers went."""
    names = [name_of_dtype(trace.output)]
    if "float" not in names[0]:
        names = ["float64"]  # integers have no rounding of their own
    config = trace.config
    if config is not None:
        names += [config.dtype, config.compute_dtype or config.dtype]
        if config.compute_dtype == "float64":  # rounded once, from float64
            return names[0]
    return max(names, key=eps)


def reproducible(trace: Trace) -> bool:
    """Whether the layer of a trace is in reproducible mode, where every bit is defined."""
    config = trace.config
    return config is not None and (config.dtype, config.compute_dtype) == ("float32", "float64")


def error_shares(apart: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Errors as shares of the errors that rounding explains; infinite where it explains none."""
    try:
        limits = np.broadcast_to(limits, apart.shape)
    except ValueError:  # a mistake turned the axes
        limits = np.full(apart.shape, np.max(limits, initial=0.0))
    shares = np.where(apart > 0, np.inf, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        np.divide(apart, limits, out=shares, where=limits > 0)
    return np.nan_to_num(shares, nan=np.inf, posinf=np.inf)
