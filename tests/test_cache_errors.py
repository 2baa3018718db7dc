"""Misuse of caches and memories: a message that says what to do, and nothing lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import AnymhaError, CacheError
from anymha.framework.registry import Backend
from tests.conftest import usable
from tests.frameworks import required
from tests.support import normal

SIZES = {"num_heads": 2, "key_dim": 4, "query_features": 8, "seed": 0}
MOST = 6


@pytest.fixture(params=["numpy", "torch"])
def home(request: pytest.FixtureRequest) -> Backend:
    """Frameworks in which each case is tried."""
    return usable(request.param)


def make(home: Backend, **options: Any) -> Any:
    return anymha.MultiHeadAttention(**{**SIZES, **options}, backend=home.name)


def array(home: Backend, *shape: int, dtype: str = "float32") -> Any:
    return home.ops.from_numpy(normal(shape, "x").astype(dtype))


def boolean(home: Backend, *shape: int) -> Any:
    return home.ops.from_numpy(np.ones(shape, bool))


def stacked(cache: Any) -> Any:
    """Three caches in one, as of the layers of a model."""
    names = [name for name in type(cache).ARRAYS if getattr(cache, name) is not None]
    arrays = {name: getattr(cache, name)[None] for name in names}
    arrays = {n: x[np.zeros(3, int)] for n, x in arrays.items()}
    return dataclasses.replace(cache, **arrays)


def other(home: Backend) -> Backend:
    return usable("torch" if home.name == "numpy" else "numpy")


Case = Callable[[Backend, Any, Any, Any], Any]
"""Of the home, a layer, its cache with 3 of 6 positions in 2 rows, and inputs (2, 2, 8)."""

CALLS: dict[str, tuple[Case, str]] = {
    "no room": (
        lambda b, layer, c, x: layer(array(b, 2, 4, 8), cache=c),
        r"room for 6 positions.*rows \[0, 1\] would have \[7, 7\].*`truncate` this one",
    ),
    "no cache": (
        lambda b, layer, c, x: layer(x, cache=(c.keys, c.values)),
        r"`cache` must be a cache of `layer.make_cache.*Received: tuple",
    ),
    "a memory as a cache": (
        lambda b, layer, c, x: layer(x, cache=layer.make_memory(x)),
        r"`cache` must be a cache of `layer.make_cache.*Received: Memory",
    ),
    "no memory": (
        lambda b, layer, c, x: layer(x, memory=x),
        "`memory` must be a memory of `layer.make_memory",
    ),
    "both": (
        lambda b, layer, c, x: layer(x, cache=c, memory=layer.make_memory(x)),
        "Received: both. Pass one",
    ),
    "another framework": (
        lambda b, layer, c, x: layer(x, cache=make(other(b)).make_cache(2, MOST)),
        "of one framework|array of",
    ),
    "another batch": (
        lambda b, layer, c, x: layer(array(b, 3, 1, 8), cache=c),
        "must have the batch of `query`, 3 rows. Received: 2 rows",
    ),
    "another number of heads": (
        lambda b, layer, c, x: layer(x, cache=make(b, num_heads=4).make_cache(2, MOST)),
        "must be of a layer with 2 key heads.*Received: 4",
    ),
    "another width": (
        lambda b, layer, c, x: layer(x, cache=make(b, key_dim=3).make_cache(2, MOST)),
        "key_dim=4.*Received: 2, 3 and 3. Make it by this layer",
    ),
    "a ring for a layer without a window": (
        lambda b, layer, c, x: layer(x, cache=make(b, sliding_window=2).make_cache(2, MOST)),
        "sliding_window=None. Received: a cache of 2 slots, window=2",
    ),
    "a whole cache for a layer with a window": (
        lambda b, layer, c, x: make(b, sliding_window=2)(x, cache=c),
        "sliding_window=2. Received: a cache of 6 slots, window=None",
    ),
    "value": (
        lambda b, layer, c, x: layer(x, array(b, 2, 2, 8), cache=c),
        "takes the queries alone.*Received: also `value`",
    ),
    "key": (
        lambda b, layer, c, x: layer(x, x, array(b, 2, 2, 8), cache=c),
        "takes the queries alone.*Received: also `key`",
    ),
    "value with a memory": (
        lambda b, layer, c, x: layer(x, array(b, 2, 3, 8), memory=layer.make_memory(x)),
        "takes the queries alone.*Received: also `value`",
    ),
    "query_offset": (
        lambda b, layer, c, x: layer(x, cache=c, query_offset=3),
        "positions from the cache. Received: `query_offset`",
    ),
    "key_segment_ids": (
        lambda b, layer, c, x: layer(
            x, cache=c, key_segment_ids=b.ops.from_numpy(np.ones((2, 2), "int32"))
        ),
        "takes no `key_segment_ids`",
    ),
    "a value_mask of the cache's length": (
        lambda b, layer, c, x: layer(x, cache=c, value_mask=boolean(b, 2, MOST)),
        r"`value_mask` must broadcast to shape \(2, 2\).*\(2, 6\)",
    ),
    "an attention_mask of the call's length": (
        lambda b, layer, c, x: layer(x, cache=c, attention_mask=boolean(b, 2, 2)),
        r"`attention_mask` must broadcast to shape \(2, 6\).*\(2, 2\)",
    ),
    "integers": (
        lambda b, layer, c, x: layer(array(b, 2, 2, 8, dtype="int32"), cache=c),
        "`query` must be floating|floating",
    ),
    "another input width": (
        lambda b, layer, c, x: layer(array(b, 2, 2, 7), cache=c),
        "8",
    ),
    "dropout in training": (
        lambda b, layer, c, x: make(b, dropout=0.5)(x, cache=c, training=True, seed=1),
        "Dropout does not act in calls with a cache.*pass training=False",
    ),
    "too far back": (
        lambda b, layer, c, x: c.truncate([3, -1]),
        r"from 0 to the lengths that the rows have, \[3, 3\]. Received: \[3, -1\]",
    ),
    "forward": (lambda b, layer, c, x: c.truncate(4), r"Received: \[4, 4\]"),
    "lengths that are no integers": (
        lambda b, layer, c, x: c.truncate(1.5),
        "`lengths` must be integers",
    ),
    "lengths of several lengths": (
        lambda b, layer, c, x: c.truncate([[1], [2, 3]]),
        "`lengths` must be integers",
    ),
    "a stack of caches whose rows change places": (
        lambda b, layer, c, x: stacked(c).reorder([0, 1]),
        r"`cache.lengths` must be \(B,\).*\(3, 2\).*several caches in one",
    ),
    "a stack of caches to truncate": (
        lambda b, layer, c, x: stacked(c).truncate(1), "several caches in one",
    ),
    "a stack of caches to join": (
        lambda b, layer, c, x: anymha.join_caches([stacked(c)]), "several caches in one",
    ),
    "caches of several layers to save": (
        lambda b, layer, c, x: anymha.save("caches.safetensors", [c, c]),
        "One cache or one memory is written or converted at a time. Received: several, in a list",
    ),
    "caches of several layers to convert": (
        lambda b, layer, c, x: anymha.convert({"first": c}, to="numpy"),
        "Received: several, in a dict",
    ),
    "lengths of another batch": (
        lambda b, layer, c, x: c.truncate([1, 2, 3]),
        r"`lengths` must have shape \(2,\), or one integer",
    ),
    "no such row": (
        lambda b, layer, c, x: c.reorder([0, 2]),
        r"numbers of rows, 0 to 1. Received: \[0, 2\]",
    ),
    "a row beyond 32 bits": (
        lambda b, layer, c, x: c.reorder([2**32]), r"integers of 32 bits. Received: \[4294967296\]",
    ),
    "a length beyond 32 bits": (
        lambda b, layer, c, x: c.truncate(b.ops.from_numpy(np.full(2, 2**32 + 1))),
        r"integers of 32 bits. Received: \[4294967297, 4294967297\]",
    ),
    "one cache to join": (lambda b, layer, c, x: anymha.join_caches(c), r"a list.*Received: Cache"),
    "rows that are no integers": (
        lambda b, layer, c, x: c.reorder([0.5]),
        "`indices` must be integers",
    ),
    "nothing to join": (lambda b, layer, c, x: anymha.join_caches([]), "at least one cache"),
    "what is no cache to join": (
        lambda b, layer, c, x: anymha.join_caches([c, x]),
        "`caches` must be a list",
    ),
    "caches of two lengths to join": (
        lambda b, layer, c, x: anymha.join_caches([c, layer.make_cache(1, 5)]),
        "made with the same `max_length`",
    ),
    "another layer's cache too late": (
        lambda b, layer, c, x: make(b, seed=1)(x, memory=c),
        r"positions that its last call appended, \[3, 3\] in each row. Received: 2",
    ),
    "ids of nothing": (
        lambda b, layer, c, x: layer(
            array(b, 2, 3, 8), memory=c, segment_ids=b.ops.from_numpy(np.ones((2, 3), "int32"))
        ),
        "holds no ids of segments",
    ),
    "a cache wider than the layer": (
        lambda b, layer, c, x: layer(
            x, cache=make(b, dtype="float64").make_cache(2, MOST)
        ),
        "must not be wider than the layer computes, in float32. Received: float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_failed_call_says_why_and_leaves_the_cache(home: Backend, name: str) -> None:
    call, message = CALLS[name]
    layer = make(home)
    x = array(home, 2, 3, 8)
    _, cache = layer(x, cache=layer.make_cache(2, MOST))
    before = {n: np.array(home.ops.to_numpy(getattr(cache, n))) for n in ("keys", "lengths")}
    with pytest.raises(AnymhaError, match=f"(?s){message}") as raised:
        call(home, layer, cache, array(home, 2, 2, 8))
    assert "Received" in str(raised.value)
    for part, array_before in before.items():
        np.testing.assert_array_equal(home.ops.to_numpy(getattr(cache, part)), array_before)
    output, cache = layer(x, cache=cache)
    assert home.ops.to_numpy(cache.lengths).tolist() == [6, 6]
    assert np.isfinite(home.ops.to_numpy(output)).all()


MAKING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no rows": ({}, {"batch_size": -1}, "`batch_size` must be an integer, at least 0"),
    "no length": ({}, {"max_length": 0}, "`max_length` must be an integer, at least 1"),
    "a length beyond 32 bits": ({"sliding_window": 3}, {"max_length": 2**31}, "at most 2147483647"),
    "half a row": ({}, {"batch_size": 1.5}, "`batch_size` must be an integer"),
    "a flag": ({}, {"batch_size": True}, "`batch_size` must be an integer"),
    "a negative rewind": ({}, {"rewind": -1}, "`rewind` must be an integer"),
    "integers": ({}, {"dtype": "int8"}, "`dtype` must be float16, bfloat16 or float32"),
    "too wide": ({}, {"dtype": "float64"}, "a layer that computes in float32"),
    "other axes": ({"attention_axes": (1, 2)}, {}, r"attention_axes=\(1, 2\)"),
}


@pytest.mark.parametrize("name", MAKING)
def test_a_cache_that_cannot_be_made(home: Backend, name: str) -> None:
    options, arguments, message = MAKING[name]
    sizes = {"batch_size": 2, "max_length": 4, **arguments}
    with pytest.raises(CacheError, match=f"(?s){message}.*Received|Received.*{message}"):
        make(home, **options).make_cache(**sizes)


def test_the_next_window_must_be_in_the_ring(home: Backend) -> None:
    layer = make(home, sliding_window=2)
    x = array(home, 1, 5, 8)
    _, cache = layer(x, cache=layer.make_cache(1, 8))
    with pytest.raises(CacheError, match=r"(?s)the last 2 positions.*rows \[0\].*`rewind=`"):
        cache.truncate(3)
    _, cache = layer(x, cache=layer.make_cache(1, 8, rewind=1))
    assert home.ops.to_numpy(cache.truncate(3).lengths).tolist() == [3]


def test_segments_are_told_in_every_call_or_in_none(home: Backend) -> None:
    layer = make(home)
    x = array(home, 2, 3, 8)
    ids = home.ops.from_numpy(np.ones((2, 3), "int32"))
    _, cache = layer(x, cache=layer.make_cache(2, 6), segment_ids=ids)
    with pytest.raises(AnymhaError, match=r"(?s)holds the ids.*Pass those of the new positions"):
        layer(x, cache=cache)
    _, cache = layer(x, cache=cache, segment_ids=ids)
    assert home.ops.to_numpy(cache.lengths).tolist() == [6, 6]


def test_a_memory_needs_weights() -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, backend="torch")
    with pytest.raises(AnymhaError, match="first call makes the weights, and a memory needs them"):
        layer.make_memory(torch.ones(1, 2, 8))


def test_a_cache_is_made_before_the_weights() -> None:
    torch = required("torch")
    layer = anymha.MultiHeadAttention(2, 4, backend="torch", seed=0)
    cache = layer.make_cache(1, 4)
    _, cache = layer(torch.ones(1, 2, 8), cache=cache)
    assert cache.lengths.tolist() == [2]


def test_rows_that_overflow_in_a_program_say_so_and_stay_lost(backend: Backend) -> None:
    layer = make(backend)
    ops = backend.ops
    x = array(backend, 2, 3, 8)
    _, cache = layer(x, cache=layer.make_cache(2, 4))
    flags = ops.from_numpy(np.array([True, False]))
    cache = dataclasses.replace(cache, overflowed=flags)  # as a compiled call leaves it
    output, cache = layer(x[:, :1], cache=cache)
    output = ops.to_numpy(output)
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1]).all()
    assert ops.to_numpy(cache.lengths).tolist() == [3, 4]
    assert ops.to_numpy(cache.overflowed).tolist() == [True, False]
