"""The layer for PyTorch: a `torch.nn.Module` that holds the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import ml_dtypes  # noqa: F401  (gives NumPy the name "bfloat16")
import numpy as np
import torch
from torch import nn

from anymha.errors import WeightsError
from anymha.framework.dtypes import dtype_name
from anymha.layer.forward import multi_head_attention
from anymha.layer.native import (
    CallOptions,
    checked_values,
    first_weights,
    takes_call,
    takes_options,
    widths_of,
)
from anymha.layer.weights import constrained_weights, regularization_loss
from anymha.options.config import PROJECTIONS, AttentionConfig
from anymha_torch import ops

_NAMES = [(f"{name}.{part}", name, part) for name in PROJECTIONS for part in ("kernel", "bias")]


class _Projection(nn.Module):
    """Holds one kernel and, maybe, one bias, so that they get their canonical names."""

    kernel: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("kernel", None)
        self.register_parameter("bias", None)


class MultiHeadAttention(nn.Module):
    """Multi-head attention as a `torch.nn.Module`, batch first.

    The constructor takes the options of `anymha.AttentionConfig` and torch's `device`; the call
    the arguments of `anymha.multi_head_attention`, where ``training=None`` means
    ``module.training``. Parameters have the canonical names (``query.kernel``). Without
    `query_features` they are made at the first call, or by `load_state_dict`.

    Differs from:
        `torch.nn.MultiheadAttention`: the call is ``(query, value, key)``; a boolean mask is True
        where a query may attend; scores come per head and before dropout.

    Example:
        >>> import torch
        >>> from anymha_torch import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, query_features=8, seed=0)
        >>> tuple(layer(torch.ones(1, 3, 8)).shape)
        (1, 3, 8)
    """

    config: AttentionConfig
    _like: torch.Tensor

    @takes_options
    def __init__(self, config: AttentionConfig, *, device: Any = None) -> None:
        super().__init__()
        self.config = config
        for name in PROJECTIONS:
            self.add_module(name, _Projection())
        # What `.to()` or `.double()` says before the weights exist holds for them once they do.
        like = torch.empty(0, dtype=ops.dtype(config.dtype), device=device)
        self.register_buffer("_like", like, persistent=False)
        if config.query_features is not None:
            self._build()

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return "_like" not in self._buffers

    def _build(self, widths: Sequence[int] = (), device: Any = None) -> dict[str, torch.Tensor]:
        meta = (self._like if device is None else torch.empty(0, device=device)).is_meta
        values = {} if meta else first_weights(self.config, widths, ops.draw_seed, ops)
        self._allocate(self.config.weight_shapes(*widths), device)
        self._fill(values)
        return self.canonical_weights()

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]], device: Any = None) -> None:
        like = self._like
        del self._like
        for name, shape in shapes.items():
            projection, _, part = name.partition(".")
            tensor = like.new_empty(shape, device=device)
            self.get_submodule(projection).register_parameter(part, nn.Parameter(tensor))

    @torch.no_grad()
    def _fill(self, values: Mapping[str, np.ndarray]) -> None:
        mine = self.canonical_weights()
        # NumPy rounds, since torch goes from float64 to half precision by way of float32.
        rounded = {
            name: value.astype(dtype_name(mine[name].dtype)) for name, value in values.items()
        }
        for name, value in rounded.items():
            mine[name].copy_(ops.from_numpy(value))

    def reset_parameters(self) -> None:
        """Give the weights initial values, as at the start; after `to_empty`, for example."""
        mine = self.canonical_weights()
        if mine:
            self._fill(first_weights(self.config, widths_of(mine), ops.draw_seed, ops))

    @takes_call
    def forward(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> Any:
        if call.get("training") is None:
            call["training"] = self.training
        weights = self.canonical_weights() or (lambda w: self._build(w, _first(query).device))
        return multi_head_attention(ops, self.config, weights, query, value, key, **call)

    def regularization_loss(self) -> torch.Tensor:
        """The sum of the penalties of all weights; 0 where there are no regularisers."""
        return regularization_loss(ops, self.config, self.canonical_weights())

    @torch.no_grad()
    def apply_constraints(self) -> MultiHeadAttention:
        """This layer, its weights changed to what the constraints want."""
        mine = self.canonical_weights()
        for name, value in constrained_weights(ops, self.config, mine).items():
            mine[name].copy_(value)
        return self

    def canonical_weights(self) -> dict[str, torch.Tensor]:
        """The parameters by canonical name."""
        modules: Any = self._modules  # torch's own `getattr` takes as long as a small product
        found = {}
        for full, name, part in _NAMES:
            held = modules[name]._parameters
            tensor = held[part] if part in held else getattr(modules[name], part)
            if tensor is not None:
                found[full] = tensor
        return found

    def with_canonical_weights(self, weights: Mapping[str, np.ndarray]) -> MultiHeadAttention:
        """This layer, now with these weights, in its own dtype and on its own device.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        mine = self.canonical_weights()
        values = checked_values(self.config, mine, weights)
        if not mine:
            self._allocate({name: value.shape for name, value in values.items()})
        if any(tensor.is_meta for tensor in self.parameters()):
            self.to_empty(device=torch.get_default_device())
        self._fill(values)
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:
        names = self.config.weight_shapes(1)
        found = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        if found and not self.built:
            try:
                self._allocate(_fitting_shapes(self.config, found))
            except WeightsError as error:
                errors: list[str] = args[-1]
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.config.num_heads}, key_dim={self.config.key_dim}"


def _first(query: Any) -> torch.Tensor:
    return query[0] if isinstance(query, (list, tuple)) else query


def _fitting_shapes(
    config: AttentionConfig, weights: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a state dict.

    Raises:
        WeightsError: they are not those that the config gives them.
    """
    shapes = config.weight_shapes(*widths_of(weights))
    for name, shape in shapes.items():
        received = tuple(weights[name].shape) if name in weights else None
        if received != shape:
            raise WeightsError(f"`{name}` must have shape {shape}. Received: {received}.")
    return shapes
