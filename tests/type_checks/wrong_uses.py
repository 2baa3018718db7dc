"""Wrong uses of the layers and functions, one a line with the mark; type checkers refuse each.

`tests/test_typing.py` has them checked. Nothing here is run.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import torch

import anymha
import anymha_equinox
import anymha_flax
import anymha_jax
import anymha_keras
import anymha_numpy
import anymha_tensorflow
import anymha_torch
from anymha import AttentionConfig
from anymha.parity import compare, declare, decoding

ARRAY = np.ones((1, 3, 8), dtype="float32")
TENSOR = torch.ones(1, 3, 8)
JAX_ARRAY = jax.numpy.ones((1, 3, 8))
PATH = Path("layer.safetensors")
CACHE = anymha_numpy.MultiHeadAttention(2, 4).make_cache(2, 3)

# The constructors.
anymha_numpy.MultiHeadAttention(num_heads="four", key_dim=4)  # wrong
anymha_numpy.MultiHeadAttention(2)  # wrong
anymha_numpy.MultiHeadAttention(2, 4, nonsense=3)  # wrong
anymha_numpy.MultiHeadAttention(2, 4, dropout="0.1")  # wrong
anymha_numpy.MultiHeadAttention(2, 4, dropout_rng="protable")  # wrong
anymha_numpy.MultiHeadAttention(2, 4, device="cpu")  # wrong
anymha_numpy.MultiHeadAttention(2, 4, embed_dim=8)  # wrong
anymha_torch.MultiHeadAttention(2, 4, embed_dim=8)  # wrong
anymha_torch.MultiHeadAttention(2, 4, batch_first=True)  # wrong
anymha_torch.MultiHeadAttention(2, 4, query_features=8.5)  # wrong
anymha_torch.MultiHeadAttention(2, 4, device=["cpu"])  # wrong
anymha_torch.MultiHeadAttention("2", 4)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_feature=8)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8, key="seed")  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8, rngs=None)  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8, qkv_features=8)  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8, rngs=7)  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8, inference=True)  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_size=8)  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8, inference="yes")  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8, deterministic=True)  # wrong
anymha_tensorflow.MultiHeadAttention(2, 4, name=3)  # wrong
anymha_tensorflow.MultiHeadAttention(2, 4, head_size=4)  # wrong
anymha_tensorflow.MultiHeadAttention(2)  # wrong
anymha_keras.MultiHeadAttention(2, 4, use_gate="yes")  # wrong
anymha_keras.MultiHeadAttention(2, 4, trainabel=True)  # wrong
anymha_keras.MultiHeadAttention(2, "4")  # wrong
AttentionConfig(2, 4, heads=2)  # wrong
AttentionConfig(2, 4, softcap="30")  # wrong
AttentionConfig(num_heads=2)  # wrong
AttentionConfig(2, 4, dtype=32)  # wrong
AttentionConfig(2, 4, compute_dtype=16)  # wrong
AttentionConfig(2, 4, kernel_initializer=0.02)  # wrong
AttentionConfig(2, 4, kernel_initializer=None)  # wrong
AttentionConfig(2, 4, bias_regularizer=1e-4)  # wrong
AttentionConfig(2, 4).dtype.to_numpy()  # wrong

anymha_numpy.MultiHeadAttention(2, 4, dtype=None)  # wrong
anymha_numpy.MultiHeadAttention(2, 4, dtype=ARRAY)  # wrong
anymha_numpy.MultiHeadAttention(2, 4, kernel_constraint=1.0)  # wrong
anymha_torch.MultiHeadAttention(2, 4, dtype=16)  # wrong
anymha_torch.MultiHeadAttention(2, 4, dtype=TENSOR)  # wrong
anymha_torch.MultiHeadAttention(2, 4, kernel_initializer=TENSOR)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8, dtype=JAX_ARRAY)  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8, compute_dtype=16)  # wrong
anymha_keras.MultiHeadAttention(2, 4, dtype=16)  # wrong
anymha_keras.MultiHeadAttention(2, 4, kernel_initializer=0)  # wrong
anymha_numpy.MultiHeadAttention(2, 4, use_bias="query")  # wrong
anymha_torch.MultiHeadAttention(2, 4, use_bias=("q", "k"))  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8, alibi="yes")  # wrong
anymha.Rotary(theta=1e4)  # wrong
anymha.Rotary(layout="neox")  # wrong
anymha.QueryKeyNorm(epsilon=1e-6)  # wrong
AttentionConfig(2, 4).weight_shapes("8")  # wrong

# The calls.
anymha_numpy.MultiHeadAttention(2, 4)(ARRAY, mask=None)  # wrong
anymha_numpy.MultiHeadAttention(2, 4)(TENSOR)  # wrong
anymha_numpy.MultiHeadAttention(2, 4)()  # wrong
anymha_numpy.MultiHeadAttention(2, 4)(ARRAY, use_causal_mask="yes")  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, attn_mask=None)  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, key_padding_mask=None)  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, value_mask=ARRAY)  # wrong
anymha_torch.MultiHeadAttention(2, 4).forward(TENSOR, need_weights=True)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, deterministic=True)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, training="no")  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8)(inputs_q=JAX_ARRAY)  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, decode=True)  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, key_=JAX_ARRAY)  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, inference=3)  # wrong
anymha_tensorflow.MultiHeadAttention(2, 4)(ARRAY, attention_masks=None)  # wrong
anymha_tensorflow.MultiHeadAttention(2, 4)(ARRAY, return_attention_scores="all")  # wrong
anymha_keras.MultiHeadAttention(2, 4)(ARRAY, flash_attention=True)  # wrong
anymha_keras.MultiHeadAttention(2, 4)(ARRAY, return_activity_loss=True)  # wrong

anymha_jax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, seed="x")  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, query_offset="1")  # wrong

# What the calls give.
anymha_numpy.MultiHeadAttention(2, 4)(ARRAY).numpy()  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR).astype("float32")  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, return_attention_scores=True).sum()  # wrong
anymha_torch.MultiHeadAttention(2, 4)(TENSOR, cache=CACHE)[1].append(TENSOR)  # wrong
anymha_jax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY).numpy()  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY, rngs=None).numpy()  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8)(JAX_ARRAY).numpy()  # wrong

# Caches and memories.
anymha_numpy.MultiHeadAttention(2, 4).make_cache(2)  # wrong
anymha_numpy.MultiHeadAttention(2, 4).make_cache(2, max_len=3)  # wrong
anymha_torch.MultiHeadAttention(2, 4).make_cache(2)  # wrong
anymha_torch.MultiHeadAttention(2, 4).make_cache(2, 3, device="cpu")  # wrong
anymha_torch.MultiHeadAttention(2, 4).make_cache("2", 3)  # wrong
anymha_torch.MultiHeadAttention(2, 4).make_cache(2, 3).keys_of()  # wrong
anymha_tensorflow.MultiHeadAttention(2, 4).make_cache(batch=2, max_length=3)  # wrong
anymha_keras.MultiHeadAttention(2, 4).make_cache(2, 3, rewind="all")  # wrong
anymha_flax.MultiHeadAttention(2, 4, query_features=8).make_cache()  # wrong
anymha_equinox.MultiHeadAttention(2, 4, query_features=8).make_cache(2, 3, 4, 5)  # wrong
anymha_numpy.MultiHeadAttention(2, 4).make_memory()  # wrong
anymha_torch.MultiHeadAttention(2, 4).make_memory(TENSOR, values=TENSOR)  # wrong
anymha_numpy.MultiHeadAttention(2, 4)(ARRAY, cache=ARRAY)  # wrong
anymha_numpy.MultiHeadAttention(2, 4)(ARRAY, memory=ARRAY)  # wrong
anymha_numpy.MultiHeadAttention(2, 4).vjp(ARRAY, causal=True)  # wrong
CACHE.truncate("3")  # wrong
CACHE.truncate()  # wrong
CACHE.reorder(3)  # wrong
CACHE.reorder(beam_idx=[0])  # wrong
CACHE.copy(True)  # wrong
anymha.join_caches(CACHE)  # wrong
anymha.join_caches([ARRAY])  # wrong

# Comparisons.
compare(ARRAY, ARRAY)  # wrong
compare(reference=ARRAY, other=ARRAY, inputs=ARRAY)  # wrong
compare(ARRAY, ARRAY, ARRAY).to_json(3)  # wrong
declare()  # wrong
declare(ARRAY, layout=3)  # wrong
decoding(ARRAY, steps=3)  # wrong
decoding(ARRAY, piece=3)  # wrong

# The functions.
anymha.to_canonical({})  # wrong
anymha.to_canonical([ARRAY], "anymha")  # wrong
anymha.from_canonical({}, lay="anymha")  # wrong
anymha.save(3, ARRAY)  # wrong
anymha.save(PATH)  # wrong
anymha.dot_product_attention(ARRAY, ARRAY, ARRAY, mask="x")  # wrong
anymha.dot_product_attention(ARRAY, ARRAY, 3)  # wrong
anymha.dot_product_attention(ARRAY, ARRAY, ARRAY, seed="x")  # wrong
anymha.merge_attention([ARRAY])  # wrong
anymha.rotate(ARRAY, ARRAY)  # wrong
anymha.dot_product_attention(ARRAY, ARRAY)  # wrong
anymha.dot_product_attention(ARRAY, ARRAY, ARRAY, attn_mask=None)  # wrong
anymha.dot_product_attention(ARRAY, ARRAY, ARRAY, window=3)  # wrong
anymha.multi_head_attention({}, ARRAY)  # wrong
anymha.multi_head_attention({}, ARRAY, config=AttentionConfig(2, 4), causal=True)  # wrong
anymha.multi_head_attention({}, ARRAY, config={"num_heads": 2})  # wrong

# The layer by the name of its backend.
anymha.MultiHeadAttention(2, 4)  # wrong
anymha.MultiHeadAttention("2", 4, backend="torch")  # wrong
anymha.MultiHeadAttention(2, 4, backend="jax", device="cpu")  # wrong
anymha.MultiHeadAttention(2, 4, framework="torch")  # wrong
anymha.MultiHeadAttention(2, 4, backend=torch)  # wrong
in_torch: anymha_torch.MultiHeadAttention = anymha.MultiHeadAttention(2, 4, backend="jax")  # wrong
anymha.MultiHeadAttention(2, 4, backend="torch")(ARRAY)  # wrong
in_jax: anymha_jax.MultiHeadAttention = anymha.load(PATH, backend="torch")  # wrong
in_jax = anymha.load(PATH)  # wrong
anymha.load(PATH, framework="torch")  # wrong
anymha.load(3, backend="torch")  # wrong
in_jax = anymha.convert(in_torch, to="numpy")  # wrong
anymha.convert(in_torch)  # wrong
anymha.convert(in_torch, to=3)  # wrong
anymha.convert(in_torch, to="numpy").state_dict()  # wrong
