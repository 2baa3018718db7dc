"""The layer for PyTorch: a `torch.nn.Module` that holds the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from anymha.config import PROJECTIONS, AttentionConfig
from anymha.layer import multi_head_attention
from anymha.shell import (
    CallOptions,
    checked_values,
    first_weights,
    input_widths,
    takes_call,
    takes_options,
    widths_of,
)
from anymha_torch import ops


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
    the arguments of `anymha.layer.multi_head_attention`, where ``training=None`` means
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

    @takes_options
    def __init__(self, config: AttentionConfig, *, device: Any = None) -> None:
        super().__init__()
        self.config = config
        for name in PROJECTIONS:
            self.add_module(name, _Projection())
        if config.query_features is not None:
            self._build(None, device)

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.query.kernel is not None

    def _build(self, widths: tuple[int, int, int] | None, device: Any) -> None:
        values = first_weights(self.config, widths, ops.draw_seed)
        self._hold({name: torch.from_numpy(value) for name, value in values.items()}, device)

    def _hold(self, values: Mapping[str, torch.Tensor], device: Any) -> None:
        for name, value in values.items():
            projection, _, part = name.partition(".")
            tensor = value.to(device=device, dtype=ops.dtype(self.config.dtype), copy=True)
            self.get_submodule(projection).register_parameter(part, nn.Parameter(tensor))

    @takes_call
    def forward(
        self, query: Any, value: Any = None, key: Any = None, **call: Unpack[CallOptions]
    ) -> Any:
        if not self.built:
            first = query[0] if isinstance(query, (list, tuple)) else query
            self._build(input_widths(query, value, key), getattr(first, "device", None))
        if call.get("training") is None:
            call["training"] = self.training
        weights = self.canonical_weights()
        return multi_head_attention(ops, self.config, weights, query, value, key, **call)

    def canonical_weights(self) -> dict[str, torch.Tensor]:
        """The parameters by canonical name."""
        return {
            f"{name}.{part}": tensor
            for name in PROJECTIONS
            for part, tensor in self.get_submodule(name)._parameters.items()
            if tensor is not None
        }

    def with_canonical_weights(self, weights: Mapping[str, np.ndarray]) -> MultiHeadAttention:
        """This layer, now with these weights, in its own dtype and on its own device.

        Raises:
            WeightsError: names or shapes do not fit; the layer is left as it was.
        """
        values = checked_values(weights, self.config.weight_shapes(*widths_of(weights)))
        tensors = {name: ops.from_numpy(value) for name, value in values.items()}
        if not self.built:
            self._hold(tensors, None)
        mine = self.canonical_weights()
        for name, tensor in tensors.items():
            if mine[name].shape == tensor.shape:
                mine[name].data.copy_(tensor)
            else:
                self._hold({name: tensor}, mine[name].device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = self.config.weight_shapes(1)
        found = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        if not self.built and len(found) == len(names):
            self._hold(found, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.config.num_heads}, key_dim={self.config.key_dim}"
