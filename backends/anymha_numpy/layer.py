"""The layer for NumPy: a callable object that holds a dict of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from anymha.framework.autodiff import vjp
from anymha.layer.checks import unpack_inputs
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    checked_values,
    first_weights,
    takes_call,
    takes_options,
)
from anymha.layer.weights import constrained_weights, regularization_loss
from anymha.options.config import AttentionConfig
from anymha_numpy import ops


class MultiHeadAttention:
    """Multi-head attention on NumPy arrays.

    The constructor takes the options of `anymha.AttentionConfig`, the call the arguments of
    `anymha.multi_head_attention`. The weights are in `weights`, a dict of arrays by
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
        self._hold(first_weights(self.config, widths, ops.draw_seed, ops))
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

    def vjp(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> tuple[Any, Callable[[Any], dict[str, np.ndarray]]]:
        """The call's result, and the pullback that turns its cotangent into gradients.

        Args:
            query: As in the call, likewise `value` and `key`.
            value: As in the call.
            key: As in the call.
            **call: As in the call.

        Returns:
            What the call gives, and a function of its cotangent (of the same shapes; a tuple where
            the call gives one) that gives the gradients, in the dtypes of what they belong to, by
            the names of the weights, "query", "value" and "key" as far as they were passed, and
            "attention_bias".

        Example:
            >>> import numpy as np
            >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
            >>> output, pullback = layer.vjp(np.ones((1, 3, 8), dtype="float32"))
            >>> gradients = pullback(np.ones_like(output))
            >>> gradients["query.kernel"].shape, gradients["query"].shape
            ((8, 2, 4), (1, 3, 8))
        """
        if not self.weights:
            self(query, value, key, **call)
        query, value, key = unpack_inputs(query, value, key)
        inputs = {"query": query, "value": value, "key": key}
        rest: dict[str, Any] = {**call}
        given = {"attention_bias": rest.pop("attention_bias", None)}
        given |= {n: x for n, x in inputs.items() if n == "query" or x is not query}
        if key is value:
            given.pop("key", None)
        arrays = {name: x for name, x in given.items() if x is not None} | self.weights

        def function(tape: Any, traced: dict[str, Any]) -> Any:
            weights = {name: traced.pop(name) for name in self.weights}
            bias = traced.pop("attention_bias", None)
            return multi_head_attention(
                tape, self.config, weights, **traced, attention_bias=bias, **rest
            )

        return vjp(ops, function, arrays)

    def regularization_loss(self) -> np.ndarray:
        """The sum of the penalties of all weights; 0 where there are no regularisers."""
        return np.asarray(regularization_loss(ops, self.config, self.weights))

    def apply_constraints(self) -> MultiHeadAttention:
        """This layer, its weights changed to what the constraints want."""
        for name, value in constrained_weights(ops, self.config, self.weights).items():
            self.weights[name][...] = value
        return self

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
