"""The weights of other libraries and model families, and the way to the canonical form and back.

A layout is data where it can be: the names of four linear layers. The family must be named, never
guessed: two of them may have the same names and shapes and mean different things.

References:
    transformers 5.23, ``models/bert/modeling_bert.py``, for `transformers.bert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.config import PROJECTIONS, AttentionConfig
from anymha.errors import UnknownLayoutError, WeightsError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class LinearLayout:
    """Four linear layers ``y = x . weight^T + bias``, heads one after another in their outputs.

    Args:
        layers: The name of the linear layer of each projection.
    """

    layers: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """All names that a layer of this layout has."""
        return tuple(f"{name}.{part}" for name in self.layers.values() for part in _PARTS)

    def to_canonical(
        self, arrays: Mapping[str, np.ndarray], num_heads: int, num_key_value_heads: int | None
    ) -> tuple[Arrays, AttentionConfig]:
        """The canonical weights and the config that they fit."""
        missing = [
            f"{name}.weight" for name in self.layers.values() if f"{name}.weight" not in arrays
        ]
        unknown = [name for name in arrays if name not in self.names()]
        if missing or unknown:
            raise WeightsError(
                f"The layout has the names {', '.join(self.names())}. Missing: "
                f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
            )
        shared = num_heads if num_key_value_heads is None else num_key_value_heads
        heads = {"query": num_heads, "key": shared, "value": shared, "output": num_heads}
        weights: Arrays = {}
        for projection, name in self.layers.items():
            matrix = np.asarray(arrays[f"{name}.weight"])  # (out, in)
            inside, count = projection == "output", heads[projection]
            if matrix.ndim != 2 or count < 1 or matrix.shape[int(inside)] % count:
                raise WeightsError(
                    f"`{name}.weight` must be a matrix whose {'columns' if inside else 'rows'} "
                    f"are {count} heads of equal size. Received: shape {matrix.shape}."
                )
            split = (count, matrix.shape[int(inside)] // count)
            shape = (*split, matrix.shape[0]) if inside else (matrix.shape[1], *split)
            weights[f"{projection}.kernel"] = matrix.T.reshape(shape).copy()
            if f"{name}.bias" in arrays:
                bias = np.array(arrays[f"{name}.bias"])
                if bias.shape != matrix.shape[:1]:
                    raise WeightsError(
                        f"`{name}.bias` must have shape {matrix.shape[:1]}, as `{name}.weight` has "
                        f"shape {matrix.shape}. Received: shape {bias.shape}."
                    )
                weights[f"{projection}.bias"] = bias if inside else bias.reshape(split)
        return weights, _config(weights)

    def from_canonical(self, weights: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays of this layout."""
        kernels = [f"{projection}.kernel" for projection in self.layers]
        held = {*kernels, *(f"{projection}.bias" for projection in self.layers)}
        missing = [name for name in kernels if name not in weights]
        unknown = [name for name in weights if name not in held]
        if missing or unknown:
            raise WeightsError(
                f"Canonical weights are {', '.join(kernels)} and their biases. Missing: "
                f"{', '.join(missing) or 'none'}. Unknown: {', '.join(unknown) or 'none'}."
            )
        arrays: Arrays = {}
        for projection, name in self.layers.items():
            kernel = np.asarray(weights[f"{projection}.kernel"])
            if kernel.ndim != 3:
                raise WeightsError(
                    f"`{projection}.kernel` must have 3 axes in this layout, which holds vectors "
                    f"only. Received: shape {kernel.shape}."
                )
            columns = kernel.shape[2] if projection == "output" else -1
            rows = -1 if projection == "output" else kernel.shape[0]
            arrays[f"{name}.weight"] = kernel.reshape(rows, columns).T.copy()
            if f"{projection}.bias" in weights:
                arrays[f"{name}.bias"] = np.array(weights[f"{projection}.bias"]).reshape(-1)
        return arrays


_PARTS = ("weight", "bias")

LAYOUTS: dict[str, LinearLayout] = {
    "transformers.bert": LinearLayout(
        {
            "query": "self.query",
            "key": "self.key",
            "value": "self.value",
            "output": "output.dense",
        }
    ),
}


def layouts() -> list[str]:
    """The names of all layouts."""
    return sorted(LAYOUTS)


def to_canonical(
    arrays: Mapping[str, np.ndarray],
    layout: str,
    *,
    num_heads: int,
    num_key_value_heads: int | None = None,
) -> tuple[Arrays, AttentionConfig]:
    """The canonical weights of one layer in a foreign layout, and the config that they fit.

    Args:
        arrays: The layer's arrays by their names in the layout, without the layer's prefix.
        layout: The layout's name; see `layouts`.
        num_heads: Query heads H, which the shapes do not tell.
        num_key_value_heads: Key and value heads K; default H.

    Raises:
        UnknownLayoutError: no layout has this name.
        WeightsError: names or shapes do not fit.

    Example:
        >>> import numpy as np
        >>> names = ("self.query", "self.key", "self.value", "output.dense")
        >>> arrays = {f"{name}.weight": np.ones((8, 8)) for name in names}
        >>> weights, config = to_canonical(arrays, "transformers.bert", num_heads=2)
        >>> weights["query.kernel"].shape, config.use_bias
        ((8, 2, 4), False)
    """
    return get_layout(layout).to_canonical(arrays, num_heads, num_key_value_heads)


def from_canonical(
    weights: Mapping[str, np.ndarray], layout: str, *, config: AttentionConfig | None = None
) -> Arrays:
    """The arrays of a foreign layout that hold these canonical weights.

    Args:
        weights: Canonical weights.
        layout: The layout's name; see `layouts`.
        config: The layer's options, for layouts whose form depends on them.

    Raises:
        UnknownLayoutError: no layout has this name.
        WeightsError: the layout cannot hold these weights.
    """
    return get_layout(layout).from_canonical(weights)


def get_layout(name: str) -> LinearLayout:
    """The layout of that name.

    Raises:
        UnknownLayoutError: there is none.
    """
    if name not in LAYOUTS:
        raise UnknownLayoutError(
            f"`layout` must be one of {', '.join(map(repr, layouts()))}. Received: {name!r}."
        )
    return LAYOUTS[name]


def _config(weights: Mapping[str, Any]) -> AttentionConfig:
    """The config of canonical weights whose scale is the default."""
    query, key = weights["query.kernel"], weights["key.kernel"]
    value, output = weights["value.kernel"], weights["output.kernel"]
    config = AttentionConfig(
        num_heads=query.shape[1],
        key_dim=query.shape[2],
        value_dim=value.shape[2],
        use_bias=tuple(name for name in PROJECTIONS if f"{name}.bias" in weights),
        output_shape=output.shape[2:],
        query_features=query.shape[0],
        value_features=value.shape[0],
        key_features=key.shape[0],
        num_key_value_heads=key.shape[1],
        dtype=query.dtype,
    )
    for name, shape in config.weight_shapes().items():
        if weights[name].shape != shape:
            raise WeightsError(
                f"The layers do not fit one another: `{name}` has shape {weights[name].shape}, "
                f"the others need {shape}."
            )
    return config
