"""`LiveLayer`: a live layer of another library as arrays of its layout, with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.framework.registry import as_numpy, backend_of


@dataclass(frozen=True)
class LiveLayer:
    """A live layer of another library.

    Args:
        layout: The name of its layout.
        arrays: Its arrays by their names there; none where the layer has no weights yet.
        write: Writes new values of these arrays and returns the layer: itself, or a new one where
            layers are frozen. The values have the arrays' names, shapes and dtypes.
        sizes: Sizes and options that the layer states, as `to_canonical` takes them.
        options: Further options of its configuration.
        needs: Further steps of its forward pass that anymha's layer lacks, in words.
    """

    layout: str
    arrays: Mapping[str, Any]
    write: Callable[[Mapping[str, np.ndarray]], Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def like(array: Any, value: np.ndarray) -> Any:
    """The values as an array of the same framework and dtype, rounded once."""
    dtype = as_numpy(array).dtype
    return backend_of(array).ops.from_numpy(np.array(value.astype(dtype), order="C"))
