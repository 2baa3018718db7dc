"""The layer for NumPy: a callable object that holds a dict of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from anymha.config import AttentionConfig
from anymha.layer import multi_head_attention
from anymha.shell import (
    CallOptions,
    checked_values,
    first_weights,
    takes_call,
    takes_options,
)
from anymha_numpy import ops


class MultiHeadAttention:
    """Multi-head attention on NumPy arrays.

    The constructor takes the options of `anymha.AttentionConfig`, the call the arguments of
    `anymha.layer.multi_head_attention`. The weights are in `weights`, a dict of arrays by
    canonical name, empty until they exist.

    Example:
        >>> import numpy as np
        >>> from anymha_numpy import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> layer(np.ones((1, 3, 8), dtype="float32")).shape
        (1, 3, 8)
    """

    @takes_options
    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.weights: dict[str, np.ndarray] = {}
        if config.query_features is not None:
            self._build()

    def _build(self, widths: Sequence[int] = ()) -> dict[str, np.ndarray]:
        self._hold(first_weights(self.config, widths, ops.draw_seed))
        return self.weights

    def _hold(self, values: Mapping[str, np.ndarray]) -> None:
        dtype = ops.dtype(self.config.dtype)
        self.weights = {name: np.array(value, dtype) for name, value in values.items()}

    @takes_call
    def __call__(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> Any:
        weights = self.weights or self._build
        return multi_head_attention(ops, self.config, weights, query, value, key, **call)

    def canonical_weights(self) -> dict[str, np.ndarray]:
        """The weights by canonical name."""
        return dict(self.weights)

    def with_canonical_weights(self, weights: Mapping[str, np.ndarray]) -> MultiHeadAttention:
        """This layer, now with these weights, in its own dtype.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        self._hold(checked_values(self.config, self.weights, weights))
        return self
