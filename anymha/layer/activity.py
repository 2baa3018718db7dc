"""The activity penalty: what a regulariser gives for the outputs of the projections.

sum over query, key, value, output of  penalty(projection's output) / batch size

and of a gate its sigmoid, as in Keras.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymha.framework.protocol import Array, Ops
from anymha.framework.shapes import is_known, product
from anymha.layer.axes import unfold
from anymha.layer.call_shape import CallShape
from anymha.options.config import AttentionConfig
from anymha.options.regularizers import penalty


class Activity:
    """Keeps what the projections of a call give, and sums up its penalties.

    Args:
        config: The layer's options.
        ops: The backend.
        shape: The call's lengths and axes.
    """

    def __init__(self, config: AttentionConfig, ops: Ops, shape: CallShape) -> None:
        self._config, self._ops, self._shape = config, ops, shape
        self._outputs: dict[str, Array] = {}

    def see(self, projection: str, value: Array) -> None:
        """Keep what a projection gives, before features change it."""
        self._outputs[projection] = value

    def loss(self, arrays: Mapping[str, Array], dtype: Any) -> Array:
        """The penalty of what was observed, an array of rank 0.

        Positions that padding masks exclude count as zero.

        Args:
            arrays: The call's arrays by name, weights and masks among them.
            dtype: The dtype of the result.
        """
        ops, regularizer = self._ops, self._config.activity_regularizer
        free = self._config.free_columns
        output = self._outputs["output"]
        loss = ops.asarray(0.0, dtype=output.dtype, device=ops.device(output))
        if regularizer is not None:
            rows, columns = self._shape.padding(ops, arrays)
            for stage, value in self._outputs.items():
                own = stage not in ("key", "value")  # of queries
                if stage == "key" and any(free) and "key.bias" in arrays:
                    # Attention is indifferent to this bias and passes it no gradient; this is not.
                    bias = ops.astype(arrays["key.bias"], value.dtype)
                    still = ops.asarray(free, dtype=ops.bool, device=ops.device(value))
                    value = value + ops.where(still, bias - ops.stop_gradient(bias), 0.0)
                lengths = self._shape.queries if own else self._shape.keys
                value = self._seen(value, rows if own else columns)
                value = unfold(ops, value, self._shape.axes, (*self._shape.batch, *lengths))
                found = penalty(ops, regularizer, value, "activity_regularizer")
                loss = loss + self._averaged(found, ops.shape(value)[0], output.dtype)
        return ops.astype(loss, dtype)

    def _seen(self, value: Array, mask: Array | None) -> Array:
        """`value` (B, length, ...), zero where a mask (B, 1, T, 1) or (B, 1, 1, S) is False."""
        if mask is None:
            return value
        ops = self._ops
        batch, _, *lengths = ops.shape(mask)
        ones = (1,) * (len(value.shape) - 2)
        return ops.where(ops.reshape(mask, (batch, product(lengths), *ones)), value, 0.0)

    def _averaged(self, found: Any, count: Any, dtype: Any) -> Any:
        """A penalty over the batch size, of which a traced program may not know the number."""
        ops = self._ops
        if is_known(count):
            return found / max(count, 1)
        count = ops.astype(ops.asarray(count, dtype=ops.int32), dtype)
        return found / ops.where(count < 1, 1.0, count)
