"""Keras's own tests of `keras.layers.MultiHeadAttention`, on `anymha_keras`'s layer.

Run by `test_keras_layer.py` in a process of its own for each Keras backend.
"""

from __future__ import annotations

from typing import Any

import keras
import pytest
from keras.src.layers.attention import multi_head_attention_test as theirs

import anymha_keras

# Tests of what is Keras's alone: private attributes, gates, quantisation.
EXCLUDED = {
    "test_initializer": "all of it has gates",
    "test_mha_constraints": "all of it has gates",
    "test_lora": "all of it has gates",
    "test_causal_only_skipped_for_subclass": "overrides a private method",
    "test_compute_attention_combines_causal_and_explicit_mask_fused_fallback": "private method",
    "test_compute_attention_combines_causal_and_explicit_mask_manual_path": "private method",
    "test_sliding_window_serialization": "private attribute",
    "test_flash_attention_with_errors": "private attribute",
    "test_dtype_policy_map": "quantisation",
    "test_quantize_int8": "quantisation",
}


def make(*args: Any, use_gate: bool = False, **options: Any) -> Any:
    """The layer under test; where a test goes on with gated layers, those are Keras's."""
    if use_gate:
        return keras.layers.MultiHeadAttention(*args, use_gate=True, **options)
    return anymha_keras.MultiHeadAttention(*args, **options)


class Layers:
    """`keras.layers` with another attention layer."""

    MultiHeadAttention = staticmethod(make)

    def __getattr__(self, name: str) -> Any:
        return getattr(keras.layers, name)


theirs.layers = Layers()
setattr(theirs.MultiHeadAttentionTest, "__test__", False)  # noqa: B010


class TestOwn(theirs.MultiHeadAttentionTest):
    __test__ = True

    def assertRaisesRegex(self, kind: Any, words: Any) -> Any:  # pyright: ignore
        """The errors are of the same kind; their words are anymha's own."""
        return pytest.raises(kind)


for name in EXCLUDED:
    assert callable(getattr(TestOwn, name)), f"{name} is no test of Keras's any more"
    setattr(TestOwn, name, None)
