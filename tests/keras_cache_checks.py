"""What caches do in Keras, on the Keras backend that is set; run by `test_keras_layer.py`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import anymha
from anymha.errors import AnymhaError
from anymha_keras import MultiHeadAttention
from tests.support import normal

BACKEND = keras.config.backend()
LENGTH, WIDTH = 6, 8

pytestmark = [
    # Keras's torch backend, when it makes NumPy arrays.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def plain(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x))


def tensor(x: np.ndarray) -> Any:
    return keras.ops.convert_to_tensor(x)


def make(**options: Any) -> Any:
    return MultiHeadAttention(
        **{"num_heads": 4, "key_dim": 4, "query_features": WIDTH, "seed": 0, **options}
    )


def symbolic(value: Any) -> Any:
    """Inputs of a functional model for a cache, of any batch."""
    return keras.tree.map_structure(
        lambda x: keras.Input(
            batch_shape=(None, *x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype)
        ),
        value,
    )


X = normal((2, LENGTH, WIDTH), "x").astype("float32")


def steps(step: Any, cache: Any, expected: np.ndarray) -> Any:
    """Check outputs position by position; the last cache."""
    found = []
    for i in range(LENGTH):
        output, cache = step(tensor(X[:, i : i + 1]), cache)
        found.append(plain(output))
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=2e-6)
    return cache


def test_eager_calls() -> None:
    layer = make(sliding_window=3)
    cache = steps(
        lambda x, cache: layer(x, cache=cache),
        layer.make_cache(2, LENGTH),
        plain(layer(X, use_causal_mask=True)),
    )
    with pytest.raises(AnymhaError, match="room for 6"):
        layer(X[:, :1], cache=cache)


@pytest.mark.skipif(BACKEND == "numpy", reason="NumPy compiles nothing")
def test_compiled_steps() -> None:
    layer = make(sliding_window=3)
    expected = plain(layer(X, use_causal_mask=True))
    cache: Any = layer.make_cache(2, LENGTH)
    if BACKEND == "jax":
        import jax  # noqa: PLC0415  there is no other framework's here

        values = [v.value for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]
        step = jax.jit(lambda x, cache: layer.stateless_call(values, state, x, cache=cache)[0])
        steps(step, cache, expected)
        assert step._cache_size() == 1
    elif BACKEND == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        step = tf.function(lambda x, cache: layer(x, cache=cache))
        steps(step, cache, expected)
        assert step.experimental_get_tracing_count() == 1
    elif BACKEND == "torch":
        import torch  # noqa: PLC0415

        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        step = torch.compile(lambda x, cache: layer(x, cache=cache), backend=backend)
        with torch.no_grad():
            steps(step, cache, expected)
        assert len(graphs) == 1


def _inputs(layer: Any, dtype: Any = None) -> tuple[Any, Any]:
    return keras.Input((None, WIDTH)), symbolic(layer.make_cache(1, LENGTH, dtype))


@pytest.mark.parametrize("window", [None, 3])
def test_functional_models_take_caches_and_give_caches(window: int | None) -> None:
    layer = make(sliding_window=window)
    x, cache = _inputs(layer)
    output, after = layer(x, cache=cache)
    assert isinstance(after, anymha.Cache)
    assert after.lengths.shape == (None,)
    model = keras.Model([x, cache], [output, after])
    expected = plain(layer(X, use_causal_mask=True))
    cache = steps(lambda x, cache: model([x, cache]), layer.make_cache(2, LENGTH), expected)
    assert plain(cache.lengths).tolist() == [LENGTH, LENGTH]


def test_a_functional_model_of_two_layers() -> None:
    first, second = make(), make(seed=1)
    x, cache = _inputs(first)
    other = symbolic(second.make_cache(1, LENGTH))
    y, after = first(x, cache=cache)
    z, other_after = second(x + y, cache=other)
    model = keras.Model([x, [cache, other]], [z, [after, other_after]])
    expected = first(X, use_causal_mask=True)
    expected = plain(second(tensor(X) + expected, use_causal_mask=True))
    caches = [one.make_cache(2, LENGTH) for one in (first, second)]
    steps(lambda x, caches: model([x, caches]), caches, expected)


def test_symbolic_results_are_as_the_eager_ones() -> None:
    layer = make(sliding_window=3, rotary={"scaling": {"type": "dynamic", "factor": 2.0},
                                           "max_position_embeddings": 4})  # fmt: skip
    ids = np.array([[0, 0, 0, 0, 1, 1]] * 2, "int32")
    arguments = {
        "value_mask": np.array([[1, 1, 0, 1, 1, 0]] * 2, bool),
        "attention_mask": normal((2, LENGTH, LENGTH), "mask") > -1,
        "segment_ids": ids,
        "positions": ids * 0 + np.arange(3, 3 + LENGTH, dtype="int32"),
    }
    call = {name: tensor(x) for name, x in arguments.items()}
    x, cache = _inputs(layer, "bfloat16")
    inputs = {
        name: keras.Input(a.shape[1:], dtype=keras.backend.standardize_dtype(a.dtype))
        for name, a in arguments.items()
    }
    results = layer(x, cache=cache, return_attention_scores=True, **inputs)
    model = keras.Model([x, cache, list(inputs.values())], list(results))
    own = layer.make_cache(2, LENGTH, "bfloat16")
    found = model([tensor(X), own, list(call.values())])
    wanted = layer(tensor(X), cache=own, return_attention_scores=True, **call)
    flat = [keras.tree.flatten(list(parts)) for parts in (results, found, wanted)]
    assert len(flat[0]) == len(flat[1]) == len(flat[2]) == 2 + 8
    for shape, one, other in zip(*flat, strict=True):
        assert keras.backend.standardize_dtype(one.dtype) == shape.dtype
        sizes = [n for n in shape.shape if n is not None]
        assert sizes == [n for n, known in zip(one.shape, shape.shape, strict=True) if known]
        np.testing.assert_array_equal(
            plain(keras.ops.cast(one, "float32")), plain(keras.ops.cast(other, "float32"))
        )


def test_memories_in_functional_models() -> None:
    layer = make(value_features=5, rotary=True)
    value = tensor(normal((2, 3, 5), "value").astype("float32"))
    memory = layer.make_memory(value)
    x, own = keras.Input((None, WIDTH)), symbolic(memory)
    model = keras.Model([x, own], list(layer(x, memory=own, return_attention_scores=True)))
    wanted = layer(tensor(X), value, return_attention_scores=True)
    for one, other in zip(model([tensor(X), memory]), wanted, strict=True):
        np.testing.assert_allclose(plain(one), plain(other), atol=1e-6)


def test_a_cache_keeps_its_dtype() -> None:
    layer = make()
    for dtype in ("float16", "bfloat16"):
        _, cache = layer(X, cache=layer.make_cache(2, LENGTH, dtype))
        assert keras.backend.standardize_dtype(cache.keys.dtype) == dtype
    mixed = make(dtype="mixed_bfloat16")
    output, cache = mixed(X, cache=mixed.make_cache(2, LENGTH))
    assert keras.backend.standardize_dtype(cache.keys.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    _, cache = mixed(X, cache=mixed.make_cache(2, LENGTH, "float32"))
    assert keras.backend.standardize_dtype(cache.keys.dtype) == "float32"


def test_a_layer_around_passes_caches_on() -> None:
    layer = make()

    class Block(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def call(self, x: Any, cache: Any = None, use_causal_mask: bool = False) -> Any:
            if cache is None:
                return x + self.attention(x, use_causal_mask=use_causal_mask)
            output, cache = self.attention(x, cache=cache)
            return x + output, cache

    block = Block()
    expected = plain(block(X, use_causal_mask=True))
    cache = layer.make_cache(2, LENGTH)
    assert keras.tree.map_structure(lambda x: x, cache) is cache  # so arrays stay where they are
    steps(lambda x, cache: block(x, cache=cache), cache, expected)
    if BACKEND == "numpy":  # where Keras finds shapes by calls with arrays that nothing has filled
        return
    x, own = _inputs(layer)
    model = keras.Model([x, own], block(x, cache=own))
    steps(lambda x, cache: model([x, cache]), cache, expected)


def test_a_mask_that_keras_attaches_is_padding() -> None:
    layer = make()
    valid = np.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]], bool)
    x = keras.layers.Masking()(tensor(np.where(valid[..., None], X, 0)))
    output, cache = layer(x, cache=layer.make_cache(2, LENGTH))
    wanted, other = layer(tensor(X), cache=layer.make_cache(2, LENGTH), value_mask=tensor(valid))
    assert plain(cache.lengths).tolist() == plain(other.lengths).tolist() == [4, 5]
    np.testing.assert_allclose(plain(output)[valid], plain(wanted)[valid], atol=1e-6)


def test_symbolic_calls_have_the_same_errors() -> None:
    layer = make()
    x, cache = _inputs(layer)
    _, other = _inputs(make(num_heads=2))
    for arguments, message in (
        ({"cache": other}, "must be of a layer with 4 key heads"),
        ({"cache": 3}, "`cache` must be a cache of"),
        ({"cache": cache, "memory": cache}, "Received: both"),
        ({"cache": cache, "value": keras.Input((3, WIDTH))}, "Received: also `value`"),
        ({"cache": cache, "attention_mask": np.ones((2, 5, 5), bool)}, "must broadcast"),
    ):
        with pytest.raises(AnymhaError, match=message):
            layer(x, **arguments)


def test_the_activity_penalty_of_a_step_is_a_loss_of_the_layer() -> None:
    layer = make(activity_regularizer="l2")
    results = layer(X, cache=layer.make_cache(2, LENGTH), return_attention_scores=True)
    assert len(results) == 3
    assert isinstance(results[2], anymha.Cache)
    cached = [float(plain(loss)) for loss in layer.losses]
    layer(X, use_causal_mask=True)
    whole = [float(plain(loss)) for loss in layer.losses]
    assert len(cached) == 1
    np.testing.assert_allclose(cached, whole[-1:], rtol=1e-5)


def test_conversion_takes_keras_for_the_framework_that_it_runs_on() -> None:
    layer = make()
    _, cache = layer(X[:, :3], cache=layer.make_cache(2, LENGTH))
    expected = plain(layer(X, use_causal_mask=True))
    for kept in (anymha.convert(cache, to="keras"), anymha.convert(cache, to="numpy")):
        kept = anymha.convert(kept, to="keras")
        assert type(kept.keys) is type(cache.copy().keys)
        output, _ = layer(tensor(X[:, 3:]), cache=kept)
        np.testing.assert_allclose(plain(output), expected[:, 3:], atol=2e-6)
