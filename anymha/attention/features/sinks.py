"""Sinks: a learned logit for each head, which joins the softmax of each row and has no value.

    p_j = exp(l_j) / (sum_k exp(l_k) + exp(s))

It is neither scaled nor capped nor biased, and no mask hides it: the probabilities of a row sum to
less than 1, and a row that sees no key stays zero.

References:
    G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2024).
    OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from anymha.attention.features.base import Feature, Weight
from anymha.errors import ConfigError
from anymha.framework.dtypes import working_dtype
from anymha.framework.protocol import Array, Ops

INITIAL = {"class_name": "RandomNormal", "config": {"mean": 0.0, "stddev": 0.02}}
"""As gpt-oss starts them."""


@dataclass(frozen=True)
class Sinks(Feature):
    """The further logit of each head."""

    option = "sinks"

    @classmethod
    def checked(cls, value: Any) -> bool:
        """True or False.

        Raises:
            ConfigError: it is neither.
        """
        if value is None or value is False or value is True:
            return bool(value)
        raise ConfigError(
            '`sinks` must be True or False: the logits themselves are the weight "sinks" (H). '
            f"Received: {value!r}."
        )

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has sinks."""
        return cls() if config.sinks else None

    def weights(self, config: Any, query_features: int) -> dict[str, Weight]:
        """One number for each query head."""
        return {"sinks": Weight((config.num_heads,), initial=INITIAL)}

    def tiled(self, ops: Ops, arrays: Mapping[str, Array], like: Array) -> dict[str, Array]:
        """The sinks of the heads, in the dtype of the logits."""
        sinks, dtype = arrays["sinks"], working_dtype(ops, like)
        sinks = sinks if sinks.dtype == dtype else ops.astype(sinks, dtype)
        return {"sinks": ops.reshape(sinks, (1, -1, 1, 1))}

    def why_not_fused(self, capabilities: Any) -> str | None:
        """Only some kernels take a logit that joins the softmax."""
        return None if capabilities.fused_sinks else super().why_not_fused(capabilities)

    def joining(self, arrays: Mapping[str, Array]) -> Array:
        """The logit that joins each row."""
        return arrays["sinks"]
