"""Right uses of the layers and functions, one a line with the mark; type checkers accept each.

`tests/test_typing.py` has them checked, and runs the function of each framework that is installed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anymha
from anymha import AttentionConfig
from anymha.parity import Comparison, assert_parity, compare, declare, decoding
from anymha.parity.adapters import Declared


def use_numpy() -> None:
    import ml_dtypes
    import numpy as np

    import anymha_numpy

    x = np.ones((1, 3, 8), dtype="float32")
    valid = np.ones((1, 3), dtype=bool)
    layer = anymha_numpy.MultiHeadAttention(2, 4)  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, 4, 0.1)  # right
    layer = anymha_numpy.MultiHeadAttention(num_heads=2, key_dim=4, query_features=8)  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, use_bias=("query", "value"))  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, output_shape=(2, 4), attention_axes=1)  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, dtype=np.float64, dropout_rng="native")  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, kernel_initializer="he_normal", seed=1)  # right
    output: np.ndarray = layer(x)  # right
    output = layer([x, x])  # right
    output = layer(x, x, x, value_mask=valid, query_mask=None)  # right
    assert layer(x).astype("float64").dtype == np.float64  # right
    assert layer(x, memory=layer.make_memory(x)).shape == x.shape  # right
    flag = bool(x.shape)
    output, scores = layer(x, return_attention_scores=flag)  # right
    options: dict[str, Any] = {"return_attention_scores": True}
    output, scores = layer(x, **options)  # right
    output, scores = layer(x, return_attention_scores=True)  # right
    output = layer(query=x, use_causal_mask=True, query_offset=1, training=None)  # right
    assert output.shape == (1, 3, 8)
    assert scores.shape == (1, 2, 3, 3)
    config: AttentionConfig = layer.config  # right
    anymha_numpy.MultiHeadAttention(**config.to_dict())  # right
    output, pullback = layer.vjp(x, use_causal_mask=True)  # right
    pullback(output)
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    cache = layer.make_cache(batch_size=1, max_length=10, dtype="float32", rewind=2)  # right
    output, cache = layer(x, cache=cache, value_mask=valid)  # right
    cache = cache.truncate([2]).truncate(2).truncate(np.array([1])).copy()  # right
    cache = anymha.join_caches([cache.reorder([0]), cache.reorder(np.array([0]))])  # right
    memory: anymha.Memory = layer.make_memory(x, key_positions=np.arange(3))  # right
    output = layer(x, memory=memory, seed=np.int64(3))  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, alibi=np.array([0.5, 0.25]))  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, dtype=np.dtype("float64"))  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, dtype=x.dtype, compute_dtype="float64")  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, dtype=ml_dtypes.bfloat16)  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, kernel_initializer={  # right
        "class_name": "HeNormal", "config": {"seed": 1},
    })  # fmt: skip
    layer = anymha_numpy.MultiHeadAttention(2, 4, kernel_regularizer="l2")  # right
    dtype: str = layer.config.dtype  # right
    assert dtype == "float32"
    layer = anymha_numpy.MultiHeadAttention(2, 4, alibi=(0.5, 0.25), use_bias=["key"])  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, rotary=anymha.Rotary(base=1e6))  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, rotary={"base": 1e6})  # right
    layer = anymha_numpy.MultiHeadAttention(2, 4, query_key_norm=anymha.QueryKeyNorm())  # right


def use_torch() -> None:
    import torch

    import anymha_torch

    x = torch.ones(1, 3, 8)
    valid = torch.ones(1, 3, dtype=torch.bool)
    layer = anymha_torch.MultiHeadAttention(2, 4, query_features=8)  # right
    layer = anymha_torch.MultiHeadAttention(2, 4, query_features=8, device="cpu")  # right
    layer = anymha_torch.MultiHeadAttention(2, 4, dtype=None, compute_dtype=torch.bfloat16)  # right
    layer = anymha_torch.MultiHeadAttention(2, 4, dtype=torch.get_default_dtype())  # right
    layer = anymha_torch.MultiHeadAttention(
        2, 4, kernel_initializer=torch.nn.init.xavier_normal_
    )  # right
    layer = anymha_torch.MultiHeadAttention(2, 4, dtype=torch.float32, softcap=30.0)  # right
    output: torch.Tensor = layer(x)  # right
    output, scores = layer(x, x, return_attention_scores=True, training=False)  # right
    output = layer(x, value_mask=valid, attention_bias=torch.zeros(1, 2, 3, 3))  # right
    output = layer.forward(x, use_causal_mask=True)  # right
    layer(x).sum().backward()  # right
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 8))  # right
    output = torch.compile(layer, backend="eager")(x)  # right
    assert model(x).shape == x.shape
    module: torch.nn.Module = layer.eval()  # right
    parameters: list[torch.nn.Parameter] = list(layer.parameters())  # right
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    cache = layer.make_cache(1, 10, torch.float32, rewind=1, donate=True)  # right
    output, cache = layer(x, cache=cache)  # right
    cache = cache.truncate(torch.tensor([2])).reorder(torch.tensor([0]))  # right
    memory: anymha.Memory = layer.make_memory(x, x)  # right
    output = layer(x, memory=memory, seed=torch.tensor(3))  # right
    assert output.shape == x.shape
    assert scores is not None
    assert module is layer
    assert parameters


def use_jax() -> None:
    import jax
    import jax.numpy as jnp

    import anymha_jax

    x = jnp.ones((1, 3, 8))
    layer = anymha_jax.MultiHeadAttention(2, 4, query_features=8, dtype=jnp.bfloat16)  # right
    layer = anymha_jax.MultiHeadAttention(2, 4, query_features=8, dtype=x.dtype)  # right
    initializer = jax.nn.initializers.he_normal()
    layer = anymha_jax.MultiHeadAttention(  # right
        2, 4, query_features=8, kernel_initializer=initializer
    )
    layer = anymha_jax.MultiHeadAttention(2, 4, query_features=8, seed=0)  # right
    layer = anymha_jax.MultiHeadAttention(2, 4, query_features=8, key=jax.random.key(0))  # right
    output: jax.Array = layer(x, use_causal_mask=True)  # right
    output = jax.jit(lambda layer, x: layer(x))(layer, x)  # right
    assert jax.grad(lambda layer: layer(x).sum())(layer) is not None  # right
    output = layer(x, training=True, seed=jax.random.key(0))  # right
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    output, cache = layer(x, cache=cache)  # right
    cache = cache.truncate(jnp.array([2]))  # right
    output = layer(x, memory=layer.make_memory(x))  # right
    assert output.shape == x.shape


def use_flax() -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import anymha_flax

    x = jnp.ones((1, 3, 8))
    layer = anymha_flax.MultiHeadAttention(2, 4, query_features=8, rngs=nnx.Rngs(0))  # right
    layer = anymha_flax.MultiHeadAttention(2, 4, query_features=8, deterministic=True)  # right
    output: jax.Array = layer(x, deterministic=True)  # right
    output = layer(x, x, x, rngs=nnx.Rngs(0), use_causal_mask=True)  # right
    module: nnx.Module = layer  # right
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    output, cache = layer(x, cache=cache)  # right
    assert output.shape == x.shape
    assert module is layer


def use_equinox() -> None:
    import jax
    import jax.numpy as jnp

    import anymha_equinox

    x = jnp.ones((1, 3, 8))
    key = jax.random.key(0)
    layer = anymha_equinox.MultiHeadAttention(2, 4, query_features=8, key=key)  # right
    layer = anymha_equinox.MultiHeadAttention(
        2, 4, query_features=8, seed=1, inference=True
    )  # right
    output: jax.Array = layer(x, inference=True)  # right
    output = layer(x, attention_mask=jnp.ones((3, 3), dtype=bool))  # right
    kernel: jax.Array = layer.query.kernel  # right
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    output = layer(x, memory=layer.make_memory(x))  # right
    assert cache.max_length == 10
    assert output.shape == x.shape
    assert kernel.shape == (8, 2, 4)


def use_tensorflow() -> None:
    import tensorflow as tf

    import anymha_tensorflow

    x = tf.ones((1, 3, 8))
    layer = anymha_tensorflow.MultiHeadAttention(2, 4, name="attention")  # right
    layer = anymha_tensorflow.MultiHeadAttention(2, 4, dtype=tf.float32)  # right
    layer = anymha_tensorflow.MultiHeadAttention(2, 4, query_features=8, scale=0.5)  # right
    output = layer(x, use_causal_mask=True)  # right
    output = layer([x, x, x], value_mask=tf.ones((1, 3), tf.bool))  # right
    cache: anymha.Cache = layer.make_cache(1, max_length=10)  # right
    output, cache = layer(x, cache=cache)  # right
    heads = tf.ones((1, 3, 2, 4))
    anymha.dot_product_attention(heads, heads, heads, mask=tf.ones((3, 3), tf.bool))  # right
    assert tuple(output.shape) == (1, 3, 8)


def use_keras() -> None:
    import keras

    import anymha_keras

    x = keras.ops.ones((1, 3, 8))
    layer = anymha_keras.MultiHeadAttention(2, 4, dtype="mixed_bfloat16")  # right
    policy = keras.DTypePolicy("float32")
    initializer, l2 = keras.initializers.HeNormal(), keras.regularizers.L2(1e-4)
    layer = anymha_keras.MultiHeadAttention(2, 4, dtype=policy, kernel_regularizer=l2)  # right
    layer = anymha_keras.MultiHeadAttention(2, 4, kernel_initializer=initializer)  # right
    layer = anymha_keras.MultiHeadAttention(2, 4, trainable=False, name="attention")  # right
    output = layer(x, x, use_causal_mask=True)  # right
    output, scores = layer(x, x, return_attention_scores=True, training=False)  # right
    cache: anymha.Cache = layer.make_cache(1, 10)  # right
    output, cache = layer(x, cache=cache)  # right
    assert tuple(output.shape) == (1, 3, 8)
    assert scores is not None


def use_functions() -> None:
    import numpy as np

    import anymha_numpy

    x, heads = np.ones((1, 3, 8)), np.ones((1, 3, 2, 4))
    config = AttentionConfig(2, 4, num_key_value_heads=1, sliding_window=2)  # right
    config = AttentionConfig.from_dict({"num_heads": 2, "key_dim": 4})  # right
    weights = {name: np.ones(shape) for name, shape in config.weight_shapes(8).items()}
    anymha.multi_head_attention(weights, x, config=config)  # right
    anymha.multi_head_attention(weights, x, x, x, config=config, use_causal_mask=True)  # right
    anymha.dot_product_attention(heads, heads, heads, is_causal=True, window=(1, None))  # right
    anymha.dot_product_attention(heads, heads, value=heads, scale=0.5, return_scores=True)  # right
    made = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")  # right
    numpy_layer: anymha_numpy.MultiHeadAttention = made  # right
    other: Any = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")  # right
    assert isinstance(made, anymha.MultiHeadAttention)  # right
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        anymha.save(path, other)  # right
        numpy_layer = anymha.load(path, backend="numpy")  # right
        numpy_layer = anymha.load(str(path), "numpy", prefix="")  # right
    numpy_layer = anymha.convert(numpy_layer, to="numpy")  # right
    numpy_layer = anymha.convert(numpy_layer, "numpy", weights_only=True)  # right
    mask = np.ones((3, 3), dtype=bool)
    anymha.dot_product_attention(heads, heads, heads, mask=mask, seed=np.int64(1))  # right
    anymha.merge_attention([heads], [np.ones((1, 2, 3))])  # right
    anymha.rotate(heads, np.arange(3), anymha.Rotary(dim=2), length=4)  # right
    canonical, config = anymha.to_canonical(weights, "anymha")  # right
    anymha.from_canonical(canonical, "torch.MultiheadAttention", config=config)  # right
    report: Comparison = compare(numpy_layer, numpy_layer, x, use_causal_mask=True)  # right
    declared: Declared = declare(numpy_layer, canonical, "anymha", num_heads=2)  # right
    report = compare(numpy_layer, decoding(numpy_layer, steps=(2, 1), join=True), x)  # right
    assert_parity(numpy_layer, declare(lambda query: numpy_layer(query), numpy_layer), x)  # right
    assert declared.layout == "anymha"
    names: list[str] = anymha.layouts()  # right
    assert report.passed
    assert names
    weights = anymha.get_weights(numpy_layer)  # right
    anymha.set_weights(numpy_layer, weights)  # right


def use_conversion() -> None:
    import anymha_jax
    import anymha_torch

    layer = anymha.MultiHeadAttention(2, 4, device="cpu", backend="torch")  # right
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="torch")  # right
    torch_layer: anymha_torch.MultiHeadAttention = layer  # right
    jax_layer: anymha_jax.MultiHeadAttention = anymha.convert(torch_layer, to="jax")  # right
    anymha.convert(jax_layer, to="torch").state_dict()  # right
    anymha.convert(torch_layer, to="torch.MultiheadAttention")  # right
