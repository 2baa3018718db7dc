"""Gate: what the heads give is multiplied by numbers between 0 and 1 that the query decides.

    g       = sigmoid(query . W + b)
    context = context * g

W is a projection of the layer's query input, called as the other four: "gate.kernel" is
(D_q, H, d_v), or (D_q, H) with one number for each head. It acts after the values and before the
output projection, so that a framework's kernel computes the rest.

References:
    Z. Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and
    Attention-Sink-Free" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from anymha.attention.features.base import Feature
from anymha.errors import ConfigError
from anymha.framework.dtypes import working_dtype
from anymha.framework.protocol import Array, Ops

KINDS = ("elementwise", "head")


@dataclass(frozen=True)
class Gate(Feature):
    """The gate.

    Args:
        kind: "elementwise", a number for each of the (H, d_v) numbers of a row; or "head", one for
            each head.
    """

    option = "gate"
    ignores_a_constant = True

    kind: str

    @classmethod
    def checked(cls, value: Any) -> str | None:
        """The kind, "elementwise" or "head"; None and False are no gate.

        Raises:
            ConfigError: it is none of these.
        """
        if value is None or value is False:
            return None
        if isinstance(value, str) and value in KINDS:
            return value
        raise ConfigError(
            "`gate` must be 'elementwise', 'head', or None for no gate; its numbers are "
            f'the weights "gate.kernel" and "gate.bias". Received: {value!r}.'
        )

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has a gate."""
        return None if config.gate is None else cls(config.gate)

    def projections(self, config: Any) -> dict[str, tuple[int, ...]]:
        """One number for each of the context, or for each head."""
        heads = (config.num_heads,)
        return {"gate": heads if self.kind == "head" else (*heads, config.value_dim)}

    def activated(self, ops: Ops, name: str, y: Array) -> Array:
        """The gate's sigmoid, in float32 at least, without an exponential above 1."""
        if name != "gate":
            return y
        working = working_dtype(ops, y)
        y = y if y.dtype == working else ops.astype(y, working)
        positive = y > 0
        share = ops.exp(ops.where(positive, y * -1.0, y))
        return ops.where(positive, 1.0, share) / (share + 1.0)

    def context(self, ops: Ops, context: Array, arrays: Mapping[str, Array]) -> Array:
        """The context, multiplied by the gate, in the dtype of the context."""
        gate, dtype = arrays["gate"], context.dtype
        if self.kind == "head":
            gate = ops.reshape(gate, (*ops.shape(gate), 1))
        if dtype != gate.dtype:
            context = ops.astype(context, gate.dtype)
        context = context * gate
        return context if context.dtype == dtype else ops.astype(context, dtype)

    def why_not_fused(self, capabilities: Any) -> None:
        """A kernel gives the context, on which the gate acts."""
