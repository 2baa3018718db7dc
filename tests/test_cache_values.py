"""A cache is a value: whatever others, failed calls and gradients have made of its arrays."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from threading import Thread
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.dtypes import dtype_name
from anymha.framework.registry import Backend
from tests.conftest import usable
from tests.frameworks import required
from tests.support import normal

WIDTH, MOST = 8, 20
SIZES = {"num_heads": 4, "key_dim": 4, "query_features": WIDTH, "seed": 0}


@pytest.fixture(params=["numpy", "torch"])
def home(request: pytest.FixtureRequest) -> Backend:
    """Frameworks in which arrays are written in place."""
    return usable(request.param)


def make(backend: Backend, **options: Any) -> Any:
    return anymha.MultiHeadAttention(**{**SIZES, **options}, backend=backend.name)


def plain(backend: Backend, x: Any) -> np.ndarray:
    return np.asarray(backend.ops.to_numpy(x))


def rows(count: int, length: int, name: str = "x") -> np.ndarray:
    return normal((count, length, WIDTH), name).astype(np.float32)


def writing(backend: Backend) -> Any:
    """Where arrays are written in place, as far as the framework does it."""
    return required("torch").no_grad() if backend.name == "torch" else nullcontext()


def last_of(backend: Backend, layer: Any, x: np.ndarray) -> np.ndarray:
    """The output (D,) of the last position of a sequence (T, D)."""
    output = layer(backend.ops.from_numpy(x[None]), use_causal_mask=True)
    return plain(backend, output)[0, -1]


def ragged(backend: Backend, layer: Any, x: np.ndarray, rewind: int) -> Any:
    """A cache of the first 3 positions of row 0, and the first 8 of row 1."""
    valid = np.ones((2, 8), bool)
    valid[0, 3:] = False
    native = backend.ops.from_numpy
    cache = layer.make_cache(2, MOST, rewind=rewind)
    return layer(native(x[:, :8].copy()), cache=cache, value_mask=native(valid))[1]


def check_next(backend: Backend, layer: Any, x: np.ndarray, cache: Any) -> None:
    """The position 8 of `x`, after what a `ragged` cache holds."""
    output = plain(backend, layer(backend.ops.from_numpy(x[:, 8:9].copy()), cache=cache)[0])
    expected = last_of(backend, layer, np.concatenate([x[0, :3], x[0, 8:9]]))
    np.testing.assert_allclose(output[0, 0], expected, atol=2e-6)
    np.testing.assert_allclose(output[1, 0], last_of(backend, layer, x[1, :9]), atol=2e-6)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_what_another_cache_has_written_leaves_no_trace(
    window: int | None, kept: bool, home: Backend
) -> None:
    """Not even NaN, beyond a row that is shorter than others; be that cache gone or not."""
    layer = make(home, sliding_window=window)
    x = rows(2, 9)
    wrong = home.ops.from_numpy(np.full((2, 1, WIDTH), np.nan, np.float32))
    with writing(home):
        cache = ragged(home, layer, x, rewind=8)
        draft = cache
        for _ in range(4):
            _, draft = layer(wrong, cache=draft)
        if not kept:
            del draft
            gc.collect()
        check_next(home, layer, x, cache)
        check_next(home, layer, x, cache.reorder([0, 1]))
        check_next(home, layer, x, anymha.join_caches([cache]))


@pytest.mark.parametrize("window", [None, 3])
def test_a_call_that_fails_in_the_middle_leaves_no_trace(
    window: int | None, home: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(home, sliding_window=window)
    x = rows(2, 9)
    wrong = home.ops.from_numpy(np.full((2, 1, WIDTH), np.nan, np.float32))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with writing(home):
        cache = ragged(home, layer, x, rewind=0 if window is None else 2)
        with monkeypatch.context() as patch:
            patch.setattr("anymha.layer.forward.attend", fail)
            with pytest.raises(KeyboardInterrupt):
                layer(wrong, cache=cache)
        if window is not None:  # the ring of 5 held position 3 of row 1, and does no more
            with pytest.raises(ValueError, match="overwritten"):
                cache.truncate([0, 5])
        check_next(home, layer, x, cache)


@pytest.mark.parametrize("kept", [False, True])
def test_a_ring_knows_what_another_one_has_overwritten(kept: bool, home: Backend) -> None:
    """What is lost to a cache is lost to those that come from it."""
    layer = make(home, sliding_window=2, rotary=True)
    native = home.ops.from_numpy
    x, other = rows(1, 11), native(rows(1, 1, "other"))
    with writing(home):
        _, cache = layer(native(x[:, :10].copy()), cache=layer.make_cache(1, MOST, rewind=3))
        longer = cache
        for _ in range(3):
            _, longer = layer(other, cache=longer)
        shares = longer.keys is cache.keys
        if not kept:
            del longer
            gc.collect()
        _, cache = layer(native(x[:, 10:].copy()), cache=cache)
        if shares:
            with pytest.raises(ValueError, match="overwritten"):
                cache.truncate(8)
            return
        output, _ = layer(native(x[:, 8:9].copy()), cache=cache.truncate(8))
    expected = last_of(home, layer, x[0, :9])
    np.testing.assert_allclose(plain(home, output)[0, 0], expected, atol=2e-6)


def test_a_ring_that_is_replaced_knows_what_others_have_overwritten(home: Backend) -> None:
    layer, native = make(home, sliding_window=3), home.ops.from_numpy
    x = rows(1, 7)
    with writing(home):
        _, first = layer(native(x[:, :3].copy()), cache=layer.make_cache(1, MOST))
        _, later = layer(native(x[:, 3:4].copy()), cache=first)
        replaced = dataclasses.replace(dataclasses.replace(first))
        assert later.keys is replaced.keys
        for cache in (first, replaced):
            with pytest.raises(anymha.AnymhaError, match="no longer"):
                layer(native(x[:, :3].copy()), memory=cache)


@pytest.mark.parametrize("window", [None, 2])
def test_a_call_without_positions(window: int | None, backend: Backend) -> None:
    """Its cache has the same arrays; each goes on by itself."""
    layer = make(backend, sliding_window=window, rotary=True)
    native = backend.ops.from_numpy
    x, ids = rows(2, 6), native(np.zeros((2, 0), np.int32))
    with writing(backend):
        _, first = layer(native(x[:, :3].copy()), cache=layer.make_cache(2, MOST))
        _, longer = layer(native(x[:, 3:4].copy()), cache=first)
        output, same = layer(native(x[:, :0].copy()), cache=first)
        assert tuple(output.shape) == (2, 0, WIDTH)
        layer(native(x[:, 5:6].copy()), cache=same)
        output, _ = layer(native(x[:, 4:5].copy()), cache=longer)
        layer(native(x[:, :0].copy()), cache=layer.make_cache(2, MOST), segment_ids=ids)
    for b, row in enumerate(plain(backend, output)):
        np.testing.assert_allclose(row[0], last_of(backend, layer, x[b, :5]), atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"alibi": True}, {"sliding_window": 2, "alibi": True}])
def test_a_cache_without_rows(options: dict[str, Any], backend: Backend) -> None:
    layer = make(backend, **options)
    native = backend.ops.from_numpy
    cache = layer.make_cache(0, 5)
    for count in (3, 1, 1):
        output, cache = layer(native(rows(0, count)), cache=cache)
        assert tuple(output.shape) == (0, count, WIDTH)
    one = layer(native(rows(1, 2)), cache=layer.make_cache(1, 5))[1]
    none = np.zeros(0, np.int32)
    for empty in (
        *(cache.reorder(none), cache.truncate(none), one.reorder(none)),
        *(cache.reorder([]), cache.truncate([]), one.reorder([])),
    ):
        joined = anymha.join_caches([empty, one])
        assert plain(backend, joined.lengths).tolist() == [2]
        layer(native(rows(0, 1)), cache=empty)


def test_a_row_that_was_not_truncated_is_taken_alone(backend: Backend) -> None:
    layer = make(backend)
    native = backend.ops.from_numpy
    x = rows(2, 6)
    with writing(backend):
        _, cache = layer(native(x[:, :5].copy()), cache=layer.make_cache(2, MOST))
        cache = cache.truncate([1, 5]).reorder([1, 1])
        output, _ = layer(native(x[[1, 1], 5:].copy()), cache=cache)
    expected = last_of(backend, layer, x[1])
    np.testing.assert_allclose(plain(backend, output)[:, 0], [expected] * 2, atol=2e-6)


def replaced(cache: Any, view: Callable[[Any], Any]) -> Any:
    """A cache of views of another one's arrays, made of it by `dataclasses.replace`."""
    names = [name for name in type(cache).ARRAYS if getattr(cache, name) is not None]
    return dataclasses.replace(cache, **{name: view(getattr(cache, name)) for name in names})


def mapped(cache: Any, view: Callable[[Any], Any]) -> Any:
    """The same by the tree of PyTorch."""
    return importlib.import_module("torch.utils._pytree").tree_map(view, cache)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x[:1],
    "whole": lambda x: x[:],
    "stacked": lambda x: x[None][0],
    "keys and values alone": lambda x: x[:1] if x.ndim == 4 else x[:1] + 0,
}


@pytest.mark.parametrize("made", [replaced, mapped])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_of_views_is_not_overwritten(
    window: int | None, name: str, made: Callable[..., Any], home: Backend
) -> None:
    """Nor is the one that they are views of."""
    if made is mapped and home.name != "torch":
        pytest.skip("NumPy has no trees")
    layer, native, x = (
        make(home, sliding_window=window, rotary=True),
        home.ops.from_numpy,
        rows(2, 9),
    )
    with writing(home):
        _, cache = layer(native(x[:, :5].copy()), cache=layer.make_cache(2, MOST, rewind=2))
        view = made(cache, VIEWS[name])
        count = len(view.lengths)
        on = cache.truncate(4)
        for at in (8, 7, 6, 5):
            _, on = layer(native(x[:, at : at + 1].copy()), cache=on)
        seen = layer(native(x[:count, 5:6].copy()), cache=view)[0]
        same = layer(native(x[:, 5:6].copy()), cache=cache)[0]
    for output in (seen, same):
        for b, row in enumerate(plain(home, output)):
            np.testing.assert_allclose(row[0], last_of(home, layer, x[b, :6]), atol=2e-6)


def test_a_memory_has_other_rows_and_is_joined(backend: Backend) -> None:
    """Beams and batches of a decoder with cross-attention; positions of all rows or of each."""
    layer, native = make(backend, rotary=True), backend.ops.from_numpy
    x, value = rows(3, 2), rows(2, 5, "value")
    taken, beams = np.array([1, 0, 1]), native(x)
    for places in (np.arange(5)[None], np.arange(10).reshape(2, 5), None):
        given = {} if places is None else {"key_positions": native(places.astype(np.int32))}
        memory = layer.make_memory(native(value), **given)
        own = {} if places is None or len(places) == 1 else {"key_positions": places[taken]}
        own = {n: native(p.astype(np.int32)) for n, p in own.items()} or given
        expected = plain(backend, layer(beams, native(value[taken]), **own))
        found = layer(beams, memory=memory.reorder(taken))
        np.testing.assert_allclose(plain(backend, found), expected, atol=2e-6)
        parts = [memory.reorder([int(row)]) for row in taken]
        found = layer(beams, memory=anymha.join_caches(parts))
        np.testing.assert_allclose(plain(backend, found), expected, atol=2e-6)
    with pytest.raises(anymha.errors.CacheError, match="numbers of rows, 0 to 1"):
        memory.reorder([2])
    longer = layer.make_memory(native(rows(2, 6)))
    with pytest.raises(anymha.errors.CacheError, match="values of one length"):
        anymha.join_caches([memory, longer])


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_rows_that_a_memory_lacks_are_nan_in_a_program(name: str) -> None:
    backend = usable(name)
    framework: Any = importlib.import_module(backend.framework)
    compiled: Callable[[Any], Any] = framework.jit if name == "jax" else framework.function
    layer, native = make(backend), backend.ops.from_numpy
    memory = layer.make_memory(native(rows(2, 3)))
    step = compiled(lambda x, indices: layer(x, memory=memory.reorder(indices)))
    output = plain(backend, step(native(rows(3, 1)), native(np.array([1, 2, -1], np.int32))))
    assert np.isnan(output).all((1, 2)).tolist() == [False, True, True]


def test_float64_is_pickled(backend: Backend) -> None:
    layer, native = make(backend, compute_dtype="float64"), backend.ops.from_numpy
    _, cache = layer(native(rows(1, 3)), cache=layer.make_cache(1, 8))
    for held in (cache, layer.make_memory(native(rows(1, 3)))):
        for found in (pickle.loads(pickle.dumps(held)), copy.deepcopy(held), copy.copy(held)):
            assert dtype_name(found.keys.dtype) == dtype_name(found.values.dtype) == "float64"
            np.testing.assert_array_equal(plain(backend, found.keys), plain(backend, held.keys))
    again = pickle.loads(pickle.dumps(cache))
    x = native(rows(1, 1))
    one, other = (plain(backend, layer(x, cache=c)[0]) for c in (cache, again))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_queries_that_are_not_those_of_the_cache_are_nan_in_a_program(name: str) -> None:
    backend = usable(name)
    framework: Any = importlib.import_module(backend.framework)
    compiled: Callable[[Any], Any] = framework.jit if name == "jax" else framework.function
    layer, other, native = make(backend), make(backend, seed=1), backend.ops.from_numpy
    x, valid = native(rows(2, 3)), native(np.array([[True, False, True], [True, True, True]]))

    def append(x: Any, cache: Any, valid: Any) -> Any:
        return layer(x, cache=cache, value_mask=valid)

    def read(x: Any, cache: Any) -> Any:
        return other(x, memory=cache)

    _, cache = compiled(append)(x, layer.make_cache(2, 5), valid)
    for queries, lost in ((x, [True, False]), (x[:, :2], [False, True])):
        output = plain(backend, compiled(read)(queries, cache))
        assert np.isnan(output).all((1, 2)).tolist() == lost
        assert np.isnan(output).any((1, 2)).tolist() == lost


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3, "alibi": True}])
def test_a_function_of_tensorflow_for_all_lengths_takes_masks(options: dict[str, Any]) -> None:
    backend = usable("tensorflow")
    tensorflow: Any = required("tensorflow")
    layer = make(backend, rotary=True, **options)
    x, native = rows(2, 12), backend.ops.from_numpy
    mask = normal((2, 4, 12, 12), "mask") > -0.5
    expected = layer(native(x), use_causal_mask=True, attention_mask=native(mask))

    def step(x: Any, cache: Any, valid: Any, mask: Any) -> Any:
        return layer(x, cache=cache, value_mask=valid, attention_mask=mask)

    call = tensorflow.function(step, reduce_retracing=True)
    cache, begin = layer.make_cache(2, 12), 0
    for count in (3, 1, 2, 0, 1, 5):
        end = begin + count
        valid = native(np.ones((2, count), bool))
        parts = native(x[:, begin:end]), cache, valid, native(mask[:, :, begin:end])
        output, cache = call(*parts)
        found, wanted = plain(backend, output), plain(backend, expected)[:, begin:end]
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        begin = end
    assert call.experimental_get_tracing_count() <= 2


@pytest.mark.parametrize("trained", ["all", "query"])
def test_gradients_through_steps_of_torch(trained: str) -> None:
    """Of all weights, or of the queries' alone; going on without them spoils nothing."""
    torch: Any = required("torch")
    layer = make(usable("torch"), rotary=True)
    if trained == "query":
        for parameter in (*layer.key.parameters(), *layer.value.parameters()):
            parameter.requires_grad_(False)
    x = torch.from_numpy(rows(2, 8))
    cache, outputs = layer.make_cache(2, 10), []
    for begin, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 8)):
        output, cache = layer(x[:, begin:end], cache=cache)
        outputs.append(output)
    with torch.no_grad():
        for _ in range(2):
            _, cache = layer(x[:, :1], cache=cache)
    torch.cat(outputs, 1).square().sum().backward()
    found = layer.query.weight.grad.clone()
    layer.query.weight.grad = None
    layer(x, use_causal_mask=True).square().sum().backward()
    torch.testing.assert_close(found, layer.query.weight.grad)


def test_a_hook_sees_the_axes_of_every_call_in_torch() -> None:
    torch: Any = required("torch")
    layer, shapes = make(usable("torch")), []
    x, cache = torch.from_numpy(rows(2, 1)), layer.make_cache(2, 10)
    with torch.no_grad():
        for _ in range(5):
            _, cache = layer(x, cache=cache)
        layer.value.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
        for _ in range(3):
            _, cache = layer(x, cache=cache)
    assert shapes == [(2, 1, 16)] * 3


def test_joined_caches_have_ids_of_one_dtype(backend: Backend) -> None:
    layer, native = make(backend), backend.ops.from_numpy
    caches = []
    for dtype in ("int16", "int32"):
        ids = native(np.ones((1, 2), dtype))
        caches.append(layer(native(rows(1, 2)), cache=layer.make_cache(1, 5), segment_ids=ids)[1])
    with pytest.raises(ValueError, match=r"`segment_ids` of one dtype\. Received: int16 and int32"):
        anymha.join_caches(caches)
    joined = anymha.join_caches([layer.make_cache(1, 5), caches[0]])
    assert plain(backend, joined.segment_ids).dtype == np.int16
    assert plain(backend, joined.segment_ids).tolist() == [[0] * 5, [1, 1, 0, 0, 0]]


def test_arrays_that_are_read_only_are_copied() -> None:
    backend = usable("numpy")
    layer, x = make(backend), rows(2, 3)
    _, cache = layer(x[:, :2], cache=layer.make_cache(2, 5))
    cache.keys.flags.writeable = False
    output, _ = layer(x[:, 2:], cache=cache)
    np.testing.assert_allclose(output[0, 0], last_of(backend, layer, x[0]), atol=2e-6)


def test_threads_go_on_from_one_cache(home: Backend) -> None:
    """As servers do whose requests have a prompt in common."""
    layer, native = make(home, rotary=True), home.ops.from_numpy
    sequences = [np.concatenate([rows(1, 5), rows(1, 25, f"x{i}")], 1) for i in range(4)]
    _, prompt = layer(native(rows(1, 5)), cache=layer.make_cache(1, 30))
    found: dict[int, list[np.ndarray]] = {}

    def run(number: int) -> None:
        cache, outputs = prompt, []
        with writing(home):
            for place in range(5, 30):
                x = native(sequences[number][:, place : place + 1].copy())
                output, cache = layer(x, cache=cache)
                outputs.append(plain(home, output)[0, 0])
        found[number] = outputs

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for number, x in enumerate(sequences):
        expected = plain(home, layer(native(x), use_causal_mask=True))[0, 5:]
        np.testing.assert_allclose(found[number], expected, atol=2e-6)
