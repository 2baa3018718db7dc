"""`Opened`: a live layer of another library as arrays of its layout, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.errors import LayoutError
from anymha.framework.registry import backend_of
from anymha.interchange.writing import as_numpy
from anymha.options.config import AttentionConfig


@dataclass(frozen=True)
class Opened:
    """A live layer of another library.

    Args:
        layout: The name of its layout.
        arrays: Its arrays by their names there; none where the layer has no weights yet.
        write: Gives the layer with new values of these arrays: itself, or a new one where layers
            are frozen. The values have the arrays' names, shapes and dtypes.
        sizes: What it tells of itself, as `to_canonical` takes it.
        options: Further options of its configuration.
        needs: What its forward pass needs that anymha's layer lacks, beside what its layout says.
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


EVERYWHERE = (
    "num_heads", "key_dim", "value_dim", "dropout", "use_bias", "output_shape", "query_features",
    "value_features", "key_features", "num_key_value_heads", "scale", "dtype", "dropout_rng",
    "kernel_initializer", "bias_initializer", "seed", "name",
)  # fmt: skip
"""Options that a maker need not know: it has them, or they are past, or checked elsewhere."""


def check_options(layout: str, config: AttentionConfig, *held: str) -> None:
    """That a library's layer has all that the config asks for.

    Args:
        layout: The layout's name.
        config: The config.
        *held: Options that it has beside those of every library.

    Raises:
        LayoutError: it lacks one.
    """
    default = AttentionConfig(config.num_heads, config.key_dim)
    lacking = {
        name: getattr(config, name)
        for name in config.to_dict()
        if name not in (*EVERYWHERE, *held) and getattr(config, name) != getattr(default, name)
    }
    if lacking.get("attention_axes") in ((1,), (-2,)):  # what inputs (B, T, D) have anyway
        del lacking["attention_axes"]
    if lacking:
        told = ", ".join(f"{name}={value!r}" for name, value in lacking.items())
        raise LayoutError(
            f"A layer of {layout} has no option for {told}. Make a layer without, for example with "
            f"`dataclasses.replace(config, {next(iter(lacking))}=None)`; or convert the weights "
            "alone, with `anymha.from_canonical`."
        )
