"""Keras's own tests of `keras.layers.MultiHeadAttention`, on `anymha_keras`'s layer.

Run by `test_keras_layer.py` in a process of its own for each Keras backend.
"""

from __future__ import annotations

from typing import Any

import keras
import pytest
from keras.src.layers.attention import multi_head_attention_test as theirs

import anymha_keras

pytestmark = [pytest.mark.filterwarnings("ignore")]  # they are Keras's own

# Tests of Keras's private methods and attributes, which the layer does not have.
EXCLUDED = {
    "test_causal_only_skipped_for_subclass": "overrides a private method",
    "test_compute_attention_combines_causal_and_explicit_mask_fused_fallback": "private method",
    "test_compute_attention_combines_causal_and_explicit_mask_manual_path": "private method",
    "test_sliding_window_serialization": "private attribute",
}


class Layers:
    """`keras.layers` with another attention layer."""

    MultiHeadAttention = anymha_keras.MultiHeadAttention

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
