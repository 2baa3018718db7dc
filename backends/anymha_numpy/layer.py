"""The layer for NumPy: a callable object that holds a dict of arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import is_
from typing import Any, Unpack, cast

import numpy as np

from anymha.framework.autodiff import vjp
from anymha.layer.checks import unpack_inputs
from anymha.layer.forward import Projections, multi_head_attention
from anymha.layer.native import (
    Call,
    CallOptions,
    NativeLayer,
    first_weights,
    takes_call,
    takes_options,
    typed_as,
    widths_of,
)
from anymha.layer.plan import Plans, WeightsKind
from anymha.options.config import AttentionConfig, shown_options
from anymha_numpy import ops

EXACT = ("float32", "float64")
"""The dtypes of weights that are computed with as they are."""


_where_small_numbers_vanish = np.errstate(under="ignore")
"""Decorates what `np.seterr` must not stop at a number so small that it becomes zero."""


class MultiHeadAttention(NativeLayer):
    """Multi-head attention on NumPy arrays.

    The constructor takes the options of `anymha.AttentionConfig`, the call the arguments of
    `anymha.multi_head_attention`. The weights are in `weights`, a dict of arrays by canonical
    name, empty until they exist.

    Example:
        >>> import numpy as np
        >>> from anymha_numpy import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> layer(np.ones((1, 3, 8), dtype="float32")).shape
        (1, 3, 8)
    """

    ops = ops

    @takes_options(AttentionConfig)
    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.plans = Plans()
        self.weights: dict[str, np.ndarray] = {}
        if config.query_features is not None:
            self._build()

    def _build(self, widths: Any = ()) -> dict[str, np.ndarray]:
        self._assigned(first_weights(self.config, widths, ops.draw_seed, ops))
        return self.weights

    @typed_as[Call[np.ndarray]]()
    @takes_call
    def __call__(
        self,
        query: np.ndarray | Sequence[np.ndarray],
        value: np.ndarray | None = None,
        key: np.ndarray | None = None,
        **call: Unpack[CallOptions[np.ndarray]],
    ) -> Any:
        given: Any = call
        training = given.get("training")
        if self.config.dropout and training is not None and training is not False:
            seed = given.get("seed")
            if seed is None or callable(seed):
                given["seed"] = cache(seed or ops.draw_seed)
        weights: Any = self._prepared() if self.weights else self._build
        if self.weights:
            try:
                return multi_head_attention(
                    ops, self.config, weights, query, value, key, plans=self.plans, **given
                )
            except FloatingPointError:  # where `np.seterr` says so; with the same seed once more
                pass
        with np.errstate(under="ignore"):  # around each call it would take time
            return multi_head_attention(
                ops, self.config, weights, query, value, key, plans=self.plans, **given
            )

    def __repr__(self) -> str:
        return f"MultiHeadAttention({shown_options(self.config)})"

    def _prepared(self) -> Projections | dict[str, np.ndarray]:
        """Projections on views of the weights, kept as long as these are the same arrays.

        The weights themselves where they are rounded for the computation, or have no such views.
        """
        names, arrays, kept = tuple(self.weights), self.weights.values(), self.plans.prepared
        if (
            kept is not None
            and kept[0] is self.config
            and kept[1] == names
            and all(map(is_, kept[2], arrays))
        ):
            return kept[3]
        config, dtype = self.config, ops.dtype(self.config.dtype)
        exact = config.dtype in EXACT and config.compute_dtype in (None, config.dtype)
        if not exact or any(w.dtype != dtype or not w.flags.c_contiguous for w in arrays):
            return self.weights
        functions: dict[str, Any] = {}
        linear: Any = ops.capabilities.linear
        for name in config.projections:
            kernel, bias = self.weights[f"{name}.kernel"], self.weights.get(f"{name}.bias")
            inner = kernel.shape[0] * (kernel.shape[1] if name == "output" else 1)
            matrix = kernel.reshape(inner, -1)
            bias = None if bias is None else bias.reshape(-1)
            functions[name] = partial(linear, matrix=matrix, bias=bias)
        query, value, key = widths_of(self.weights)
        kind = WeightsKind(config.dtype, (query, value, key))
        key_bias = self.weights.get("key.bias") if config.activity_regularizer else None
        own = {name: self.weights[name] for name in config.feature_weights}
        projections = Projections(functions, kind, key_bias, of_rows=True, weights=own, plain=True)
        self.plans.prepared = config, names, list(arrays), projections
        return projections

    @_where_small_numbers_vanish
    def vjp(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        **call: Unpack[CallOptions[np.ndarray]],
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
        rest: dict[str, Any] = {**call}
        arrays = {"query": query, "attention_bias": rest.pop("attention_bias", None)}
        if value is not query:
            arrays["value"] = value
        if key is not query and key is not value:
            arrays["key"] = key
        arrays = {name: x for name, x in arrays.items() if x is not None} | self.weights

        def function(tape: Any, variables: dict[str, Any]) -> Any:
            weights = {name: variables.pop(name) for name in self.weights}
            if key is query and value is not query:
                variables["key"] = variables["query"]
            return multi_head_attention(tape, self.config, weights, **variables, **rest)

        result, pullback = vjp(ops, function, arrays)
        return result, _where_small_numbers_vanish(pullback)

    cast(Any, vjp).__signature__ = inspect.signature(__call__)

    def regularization_loss(self) -> np.ndarray:
        """The sum of the penalties of all weights; 0 where there are no regularisers."""
        return np.asarray(super().regularization_loss())

    def canonical_weights(self) -> dict[str, np.ndarray]:
        """The weights by canonical name."""
        return dict(self.weights)

    def _assigned(self, values: Mapping[str, Any]) -> MultiHeadAttention:
        dtype = ops.dtype(self.config.dtype)
        for name, value in {n: np.array(v, dtype) for n, v in values.items()}.items():
            if name in self.weights:
                self.weights[name][...] = value
            else:
                self.weights[name] = value
        return self
