"""Cached decoding: what is appended piece by piece gives what one causal call gives."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from tests.conftest import BACKENDS
from tests.pairs import pairs
from tests.support import bits, normal
from tests.test_options_together import LAYER, TOGETHER

pytestmark = pytest.mark.usefixtures("quick_programs")

WIDTH = 16
LENGTH = 17
PIECES = (1, 3, 7, 1)
LENGTHS = (5, 2, 4)
"""What the rows hold before the pieces."""

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0],
        "original_max_position_embeddings": 8, "factor": 4.0,
    },
    "proportional": {"factor": 2.0},
}  # fmt: skip
SCALED = {
    kind: {"rotary": {"scaling": {"rope_type": kind, **fields}, "max_position_embeddings": 32}}
    for kind, fields in SCALINGS.items()
}
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "window of one": {"sliding_window": 1, "rotary": True},
    "window without causality": {"sliding_window": 5, "alibi": True},
}
OPTIONS = {**PLAIN, **TOGETHER, **SCALED}


def layer_of(backend: Backend, options: dict[str, Any], **more: Any) -> Any:
    """A layer with the weights that the layer of NumPy has."""
    made = anymha.MultiHeadAttention(**LAYER, **options, **more, backend=backend.name)
    reference = anymha.MultiHeadAttention(**LAYER, **options, **more, backend="numpy")
    return anymha.set_weights(made, anymha.get_weights(reference)) or made


def native(backend: Backend, x: Any) -> Any:
    return backend.ops.from_numpy(np.ascontiguousarray(x))


def plain(backend: Backend, x: Any) -> np.ndarray:
    return np.asarray(backend.ops.to_numpy(x))


def padded(rows: Sequence[np.ndarray], length: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths in one array, NaN as padding; and where they are."""
    x = np.full((len(rows), length, rows[0].shape[-1]), np.nan, rows[0].dtype)
    valid = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        places = np.arange(length)
        if side == "front":
            chosen = places[length - len(row) :]
        elif side == "behind":
            chosen = places[: len(row)]
        else:  # between
            chosen = np.sort(np.random.default_rng(number).permutation(length)[: len(row)])
        x[number, chosen] = row
        valid[number, chosen] = True
    return x, valid


def whole(backend: Backend, layer: Any, x: np.ndarray, **call: Any) -> np.ndarray:
    return plain(backend, layer(native(backend, x), use_causal_mask=True, **call))


def calling(backend: Backend, layer: Any) -> Any:
    """The layer; in JAX compiled, which for new shapes is many times faster than bit by bit."""
    if backend.name != "jax":
        return layer
    return functools.partial(_compiled(), layer)


@functools.cache
def _compiled() -> Any:
    """One function, whose programs serve all layers of the same options."""
    return importlib.import_module("jax").jit(lambda layer, x, **call: layer(x, **call))


def decoded(
    backend: Backend, layer: Any, x: np.ndarray, side: str = "front", **made: Any
) -> tuple[list[np.ndarray], Any]:
    """The outputs of each row of `x`, a prompt of its own length first, and then pieces."""
    batch = len(LENGTHS)
    cache = layer.make_cache(batch, LENGTH, **made)
    call = calling(backend, layer)
    prompts, valid = padded([x[b, :n] for b, n in enumerate(LENGTHS)], 6, side)
    output, cache = call(native(backend, prompts), cache=cache, value_mask=native(backend, valid))
    rows = [[plain(backend, output)[b][valid[b]]] for b in range(batch)]
    places = np.array(LENGTHS)
    for count in PIECES:
        piece = np.stack([x[b, p : p + count] for b, p in enumerate(places)])
        output, cache = call(native(backend, piece), cache=cache)
        for b, row in enumerate(plain(backend, output)):
            rows[b].append(row)
        places += count
    assert plain(backend, cache.lengths).tolist() == places.tolist()
    assert not plain(backend, cache.overflowed).any()
    return [np.concatenate(row) for row in rows], cache


AS_USERS_COMPILE = ("qwen 3", "everything", "bloom", "window of one")
"""The bits of each option in JAX's programs of one call: see tests/test_options_together.py."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.as_users_compile] * (name in AS_USERS_COMPILE))
        for name in OPTIONS
    ],
)
def test_prefill_and_steps_have_the_bits_of_one_causal_call(name: str, backend: Backend) -> None:
    """In reproducible mode, with rows of other lengths; of each framework those of NumPy."""
    layer = layer_of(backend, OPTIONS[name], compute_dtype="float64")
    reference = anymha.MultiHeadAttention(
        **LAYER, **OPTIONS[name], compute_dtype="float64", backend="numpy"
    )
    x = normal((3, LENGTH, WIDTH), "x").astype(np.float32)
    found, _ = decoded(backend, layer, x)
    grows = name in ("dynamic", "longrope")  # the turn depends on what is held by then
    for b, row in enumerate(found):
        if not grows:
            expected = reference(x[b : b + 1, : len(row)], use_causal_mask=True)[0]
            assert np.array_equal(bits(row), bits(expected)), b
            continue
        ends = np.cumsum([LENGTHS[b], *PIECES])
        for begin, end in zip([0, *ends], ends, strict=False):
            expected = reference(x[b : b + 1, :end], use_causal_mask=True)[0, begin:]
            np.testing.assert_allclose(row[begin:end], expected, atol=1e-6)


@pytest.mark.as_users_compile
@pytest.mark.parametrize("name", AS_USERS_COMPILE)
@pytest.mark.parametrize("side", ["behind", "between"])
def test_padding_anywhere_gives_the_same_bits(name: str, side: str, backend: Backend) -> None:
    layer = layer_of(backend, OPTIONS[name], compute_dtype="float64")
    x = normal((3, LENGTH, WIDTH), "x").astype(np.float32)
    expected, _ = decoded(backend, layer, x, "front")
    found, _ = decoded(backend, layer, x, side)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(bits(one), bits(other))


DTYPES = [("float32", None, 2e-6), ("float32", "bfloat16", 0.05), ("bfloat16", None, 0.1),
          ("float32", "float16", 0.01)]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "name", "dtypes"),
    pairs(backend=BACKENDS, name=["plain", "qwen 3", "everything", "gpt-oss"], dtypes=DTYPES),
    indirect=["backend"],
)
def test_other_dtypes_agree_within_rounding(
    name: str, dtypes: tuple[str, str | None, float], backend: Backend
) -> None:
    dtype, held, within = dtypes
    layer = layer_of(backend, OPTIONS[name], dtype=dtype)
    exact = anymha.MultiHeadAttention(**LAYER, **OPTIONS[name], dtype="float64", backend="numpy")
    anymha.set_weights(exact, anymha.get_weights(layer))
    x = normal((3, LENGTH, WIDTH), "x")
    given = x.astype(np.float32) if dtype == "float32" else x.astype(backend_dtype(dtype))
    found, cache = decoded(backend, layer, given, dtype=held)
    assert plain(backend, cache.keys).dtype.name == (held or dtype)
    for b, row in enumerate(found):
        wide = given[b : b + 1, : len(row)].astype(np.float64)
        expected = exact(wide, use_causal_mask=True)[0]
        np.testing.assert_allclose(row.astype(np.float64), expected, atol=within)


def backend_dtype(name: str) -> Any:
    import ml_dtypes  # noqa: PLC0415

    return getattr(ml_dtypes, name)


@pytest.mark.as_users_compile
@pytest.mark.parametrize("window", [None, 4])
def test_packed_prompts_have_the_bits_of_one_causal_call(
    window: int | None, backend: Backend
) -> None:
    """Segments go on over the pieces; one begins in a piece, one in a step; negative ids too."""
    options = {"rotary": True, "sliding_window": window, "compute_dtype": "float64"}
    layer, reference = (layer_of(b, options) for b in (backend, usable_numpy()))
    x = normal((2, 12, WIDTH), "x").astype(np.float32)
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, -1, -1, 1, 1, 1, 1, 3, 3]])
    ids = ids.astype(np.int32)
    places = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 0, 0, 2, 3, 4, 5, 0, 1]])
    places = places.astype(np.int32)
    call = {"segment_ids": ids, "positions": places, "key_positions": places}
    expected = reference(x, use_causal_mask=True, **call)
    cache, begin = layer.make_cache(2, 12), 0
    step = calling(backend, layer)
    for end in (5, 10, 11, 12):
        part = {n: native(backend, a[:, begin:end]) for n, a in call.items()}
        del part["key_positions"]
        output, cache = step(native(backend, x[:, begin:end]), cache=cache, **part)
        assert np.array_equal(bits(plain(backend, output)), bits(expected[:, begin:end])), begin
        begin = end


def usable_numpy() -> Backend:
    from tests.conftest import usable  # noqa: PLC0415

    return usable("numpy")


@pytest.mark.as_users_compile
def test_going_past_the_end_is_an_error_that_changes_nothing(backend: Backend) -> None:
    layer = layer_of(backend, {"rotary": True})
    x = native(backend, normal((2, 4, WIDTH), "x").astype(np.float32))
    cache = layer(x, cache=layer.make_cache(2, 6))[1]
    before = {n: plain(backend, getattr(cache, n)).copy() for n in ("keys", "values", "lengths")}
    with pytest.raises(ValueError, match=r"has room for 6 positions of a row.*rows \[0, 1\]"):
        layer(x, cache=cache)
    for name, array in before.items():
        assert np.array_equal(plain(backend, getattr(cache, name)), array)
    two = normal((2, 2, WIDTH), "y").astype(np.float32)
    output, cache = layer(native(backend, two), cache=cache)
    assert plain(backend, cache.lengths).tolist() == [6, 6]
    both = np.concatenate([plain(backend, x), two], axis=1)
    np.testing.assert_allclose(
        plain(backend, output), whole(backend, layer, both)[:, 4:], atol=1e-6
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_a_cache_goes_on_twice_as_if_copied(
    window: int | None, count: int, backend: Backend
) -> None:
    """Each value keeps its meaning, whatever has been appended to one that shares its arrays."""
    layer = layer_of(backend, {"sliding_window": window, "rotary": True})
    x = normal((2, 12, WIDTH), "x").astype(np.float32)
    other = normal((2, 12, WIDTH), "other").astype(np.float32)
    kept = [layer.make_cache(2, 12)]
    for place in range(6):
        kept.append(layer(native(backend, x[:, place : place + 1]), cache=kept[-1])[1])
    for length, cache in reversed(list(enumerate(kept))):
        rest = np.concatenate([x[:, :length], other], axis=1)[:, :12]
        expected, place = whole(backend, layer, rest), length
        while place + count <= min(12, length + 6):
            piece = native(backend, rest[:, place : place + count])
            output, cache = layer(piece, cache=cache)
            expected_part = expected[:, place : place + count]
            np.testing.assert_allclose(plain(backend, output), expected_part, atol=2e-6)
            place += count
    gc.collect()


@pytest.mark.parametrize("keeps", [True, False])
def test_truncate_takes_positions_back(keeps: bool, backend: Backend) -> None:
    """What is refused leaves no trace, be it NaN; rows go back by numbers of their own."""
    layer = layer_of(backend, {"rotary": True, "query_key_norm": "rms"})
    x = normal((2, 9, WIDTH), "x").astype(np.float32)
    wrong = np.full((2, 4, WIDTH), np.nan, np.float32)
    cache = layer(native(backend, x[:, :4]), cache=layer.make_cache(2, 9))[1]
    draft = layer(native(backend, np.concatenate([x[:, 4:5], wrong], axis=1)), cache=cache)[1]
    cache = draft.truncate(np.array([5, 3]))
    if not keeps:  # so that the arrays are written in place
        del draft
    rest = np.stack([x[0, 5:7], x[1, 3:5]])
    output, cache = layer(native(backend, rest), cache=cache)
    expected = whole(backend, layer, x)
    found = plain(backend, output)
    np.testing.assert_allclose(found[0], expected[0, 5:7], atol=2e-6)
    np.testing.assert_allclose(found[1], expected[1, 3:5], atol=2e-6)
    for lengths in ([8, 1], [-1, 2], 9):
        with pytest.raises(ValueError, match=r"`lengths` must be from 0 to .* \[7, 5\]"):
            cache.truncate(lengths)
    with pytest.raises(ValueError, match="must have shape"):
        cache.truncate([1, 2, 3])
    with pytest.raises(TypeError, match="must be integers"):
        cache.truncate(1.5)


@pytest.mark.parametrize(
    ("backend", "dtype", "window"),
    pairs(backend=BACKENDS, dtype=["bfloat16", "float16"], window=[None, 3]),
    indirect=["backend"],
)
def test_rows_of_a_half_precision_cache_go_back_in_it(
    dtype: str, window: int | None, backend: Backend
) -> None:
    layer = layer_of(backend, {"sliding_window": window}, dtype=dtype)
    x = backend.ops.astype(native(backend, normal((2, 9, WIDTH), "x").astype(np.float32)),
                           backend.ops.dtype(dtype))  # fmt: skip
    more = {} if window is None else {"rewind": 2}
    first, cache = layer(x[:, :6], cache=layer.make_cache(2, 9, **more))
    cache = layer(x[:, 1:3], cache=cache)[1].truncate(np.array([6, 6]))
    assert cache.keys.dtype == cache.values.dtype == first.dtype
    rest, _ = layer(x[:, 6:], cache=cache)
    once = layer(x[:, 6:], cache=layer(x[:, :6], cache=layer.make_cache(2, 9))[1])[0]
    np.testing.assert_array_equal(
        plain(backend, backend.ops.astype(rest, backend.ops.float32)),
        plain(backend, backend.ops.astype(once, backend.ops.float32)),
    )


def test_a_ring_goes_back_as_far_as_it_holds(backend: Backend) -> None:
    layer = layer_of(backend, {"rotary": True, "sliding_window": 4})
    x = normal((1, 16, WIDTH), "x").astype(np.float32)
    expected = whole(backend, layer, x)
    for rewind in (0, 3):
        cache = layer(native(backend, x[:, :12]), cache=layer.make_cache(1, 20, rewind=rewind))[1]
        assert cache.keys.shape[2] == 4 + rewind
        back = cache.truncate(12 - rewind - 1)
        output, _ = layer(native(backend, x[:, 11 - rewind : 13]), cache=back)
        np.testing.assert_allclose(plain(backend, output), expected[:, 11 - rewind : 13], atol=2e-6)
        with pytest.raises(ValueError, match=f"ring holds the last {4 + rewind} positions"):
            cache.truncate(12 - rewind - 2)
        with pytest.raises(ValueError, match="ring"):
            back.truncate(10 - rewind)


def test_a_ring_with_room_for_all_keeps_its_window(backend: Backend) -> None:
    layer = layer_of(backend, {"rotary": True, "sliding_window": 3})
    x = normal((1, 5, WIDTH), "x").astype(np.float32)
    expected, cache = whole(backend, layer, x), layer.make_cache(1, 5, rewind=4)
    first, cache = layer(native(backend, x[:, :4]), cache=cache)
    last, cache = layer(native(backend, x[:, 4:]), cache=cache)
    found = np.concatenate([plain(backend, first), plain(backend, last)], axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    again, _ = layer(native(backend, x[:, 1:3]), cache=cache.truncate(1))
    np.testing.assert_allclose(plain(backend, again), expected[:, 1:3], atol=2e-6)


@pytest.mark.parametrize(
    "taken",
    [lambda c: c, copy.copy, lambda c: c.reorder([0]), lambda c: anymha.join_caches([c])],
    ids=["itself", "copy", "reorder", "join"],
)
def test_an_old_ring_does_not_go_back_to_what_is_overwritten(
    taken: Callable[[Any], Any], backend: Backend
) -> None:
    layer = layer_of(backend, {"rotary": True, "sliding_window": 2})
    x = normal((1, 8, WIDTH), "x").astype(np.float32)
    expected = whole(backend, layer, x)
    _, old = layer(native(backend, x[:, :5]), cache=layer.make_cache(1, 8, rewind=2))
    new = old
    for i in (5, 6, 7):
        _, new = layer(native(backend, x[:, i : i + 1]), cache=new)
        kept = taken(old)
        np.testing.assert_allclose(
            plain(backend, layer(native(backend, x[:, 5:]), cache=kept)[0]), expected[:, 5:],
            atol=2e-6,
        )  # fmt: skip
        if new.keys is old.keys:
            with pytest.raises(ValueError, match="overwritten"):
                taken(old).truncate(2)
        else:
            output, _ = layer(native(backend, x[:, 2:4]), cache=taken(old).truncate(2))
            np.testing.assert_allclose(plain(backend, output), expected[:, 2:4], atol=2e-6)


def test_a_call_that_keeps_nothing_in_an_empty_cache(backend: Backend) -> None:
    call: dict[str, Any] = {
        "value_mask": np.zeros((2, 1), bool), "segment_ids": np.zeros((2, 1), np.int32),
        "positions": np.ones((2, 1), np.int32), "attention_mask": np.ones((2, 1, 1, 4), bool),
    }  # fmt: skip
    given = {name: native(backend, array) for name, array in call.items()}
    for window in (None, 1):
        layer = layer_of(backend, {"sliding_window": window, "rotary": True})
        x = native(backend, normal((2, 1, WIDTH), "x").astype(np.float32))
        output, cache = layer(x, cache=layer.make_cache(2, 4), **given)
        bias = anymha.get_weights(layer)["output.bias"]
        np.testing.assert_allclose(plain(backend, output), np.broadcast_to(bias, output.shape))
        assert plain(backend, cache.lengths).tolist() == [0, 0]


def test_beams_and_joined_prompts(backend: Backend) -> None:
    layer = layer_of(backend, {"rotary": True, "sliding_window": 6, "sinks": True})
    x = normal((3, 12, WIDTH), "x").astype(np.float32)
    expected = whole(backend, layer, x)
    caches = []
    for b, length in enumerate((7, 2, 9)):
        one = layer.make_cache(1, 14)
        caches.append(layer(native(backend, x[b : b + 1, :length]), cache=one)[1])
    cache = anymha.join_caches(caches)
    assert plain(backend, cache.lengths).tolist() == [7, 2, 9]
    piece = np.stack([x[0, 7:9], x[1, 2:4], x[2, 9:11]])
    output, cache = layer(native(backend, piece), cache=cache)
    for b, begin in enumerate((7, 2, 9)):
        part = expected[b, begin : begin + 2]
        np.testing.assert_allclose(plain(backend, output)[b], part, atol=2e-6)
    beams = cache.reorder([2, 2, 0, 1])
    piece = np.stack([x[2, 11:12], x[0, 9:10], x[0, 9:10], x[1, 4:5]])
    output, beams = layer(native(backend, piece), cache=beams)
    found = plain(backend, output)
    np.testing.assert_allclose(found[0, 0], expected[2, 11], atol=2e-6)
    np.testing.assert_allclose(found[2, 0], expected[0, 9], atol=2e-6)
    np.testing.assert_allclose(found[3, 0], expected[1, 4], atol=2e-6)
    with pytest.raises(ValueError, match="numbers of rows, 0 to 3"):
        beams.reorder([4])
    with pytest.raises(ValueError, match="must be of one layer"):
        anymha.join_caches([cache, layer.make_cache(1, 15)])
    with pytest.raises(TypeError, match="at least one cache"):
        anymha.join_caches([])


@pytest.mark.parametrize("options", [{}, {"rotary": True, "query_key_norm": "rms"},
                                     {"alibi": True}, SCALED["dynamic"]])  # fmt: skip
def test_a_memory_is_projected_once(options: dict[str, Any], backend: Backend) -> None:
    layer = layer_of(backend, options, compute_dtype="float64")
    value = normal((2, 6, WIDTH), "value").astype(np.float32)
    value[1, 4:] = np.nan
    mask = native(backend, ~np.isnan(value[..., 0]))
    x = normal((2, 3, WIDTH), "x").astype(np.float32)
    memory = layer.make_memory(native(backend, value))
    call = calling(backend, layer)
    expected = call(native(backend, x), value=native(backend, value), value_mask=mask)
    for part in (slice(0, 3), slice(0, 1)):
        found = call(native(backend, x[:, part]), memory=memory, value_mask=mask)
        expected_part = plain(backend, expected)[:, part]
        assert np.array_equal(bits(plain(backend, found)), bits(expected_part))


@pytest.mark.parametrize("window", [None, 5])
def test_layers_share_keys_through_the_cache(window: int | None, backend: Backend) -> None:
    """Queries of another layer see what the cache's last call has appended, and what was before."""
    options = {"rotary": True, "sliding_window": window}
    first = layer_of(backend, options)
    second = anymha.MultiHeadAttention(**{**LAYER, "seed": 5}, **options, backend=backend.name)
    weights = anymha.get_weights(second)
    shared = {n: w for n, w in anymha.get_weights(first).items() if n.startswith(("key", "value"))}
    both = anymha.MultiHeadAttention(**LAYER, **options, backend=backend.name)
    both = anymha.set_weights(both, {**weights, **shared}) or both
    x = normal((2, 14, WIDTH), "x").astype(np.float32)
    expected = whole(backend, both, x)
    cache, begin = first.make_cache(2, 14, rewind=4), 0
    for count in (4, 1, 3, 1, 5):
        piece = native(backend, x[:, begin : begin + count])
        _, cache = first(piece, cache=cache)
        found = plain(backend, second(piece, memory=cache))
        np.testing.assert_allclose(found, expected[:, begin : begin + count], atol=2e-6)
        begin += count
    with pytest.raises(ValueError, match="must be the positions that its last call appended"):
        second(native(backend, x[:, :2]), memory=cache)


def test_a_ring_that_was_written_to_is_no_memory_of_its_past(backend: Backend) -> None:
    """Queries of another layer come too late once the ring's next step is there."""
    layer = layer_of(backend, {"sliding_window": 3})
    x = normal((1, 8, WIDTH), "x").astype(np.float32)
    expected = whole(backend, layer, x)
    cache = layer.make_cache(1, 20)
    for place in range(6):
        cache = layer(native(backend, x[:, place : place + 1]), cache=cache)[1]
    last = native(backend, x[:, 5:6])
    found = plain(backend, layer(last, memory=cache))
    np.testing.assert_allclose(found, expected[:, 5:6], atol=2e-6)
    later = layer(native(backend, x[:, 6:7]), cache=cache)[1]
    if later.keys is cache.keys:
        with pytest.raises(ValueError, match="no longer holds"):
            layer(last, memory=cache)
    else:
        np.testing.assert_allclose(plain(backend, layer(last, memory=cache)), found, atol=2e-6)


def test_scores_are_by_position(backend: Backend) -> None:
    """(B, H, T, max_length): zero where nothing is held, or nothing is seen."""
    x = normal((2, 9, WIDTH), "x").astype(np.float32)
    for window in (None, 3):
        layer = layer_of(backend, {"sliding_window": window})
        _, scores = layer(native(backend, x), use_causal_mask=True, return_attention_scores=True)
        expected = np.zeros((2, 4, 9, 11), np.float32)
        expected[..., :9] = plain(backend, scores)
        cache, begin = layer.make_cache(2, 11), 0
        for count in (3, 1, 4, 1):
            piece = native(backend, x[:, begin : begin + count])
            _, found, cache = layer(piece, cache=cache, return_attention_scores=True)
            np.testing.assert_allclose(
                plain(backend, found), expected[:, :, begin : begin + count], atol=1e-6
            )
            begin += count


def test_masks_and_biases_are_over_the_positions_of_the_cache(backend: Backend) -> None:
    x = normal((2, 8, WIDTH), "x").astype(np.float32)
    mask = normal((2, 4, 8, 10), "mask") > -0.5
    bias = normal((1, 4, 8, 10), "bias").astype(np.float32)
    for window in (None, 3):
        layer = layer_of(backend, {"sliding_window": window})
        expected = whole(
            backend, layer, x,
            attention_mask=native(backend, mask[..., :8]),
            attention_bias=native(backend, bias[..., :8]),
        )  # fmt: skip
        cache, begin = layer.make_cache(2, 10), 0
        for count in (2, 1, 4, 1):
            rows = slice(begin, begin + count)
            output, cache = layer(
                native(backend, x[:, rows]), cache=cache,
                attention_mask=native(backend, mask[:, :, rows]),
                attention_bias=native(backend, bias[:, :, rows]),
            )  # fmt: skip
            np.testing.assert_allclose(plain(backend, output), expected[:, rows], atol=2e-6)
            begin += count


@pytest.mark.as_users_compile
def test_two_thousand_steps_keep_nothing(backend: Backend) -> None:
    """The memory of Python's objects and NumPy's arrays stays, and so do plans and programs."""
    layer = layer_of(backend, {"rotary": True})
    steps, x = 2000, native(backend, normal((2, 1, WIDTH), "x").astype(np.float32))
    step: Any = lambda x, cache: layer(x, cache=cache)  # noqa: E731
    traced = []
    if backend.name in ("jax", "tensorflow"):
        framework: Any = importlib.import_module(backend.framework)
        compile = framework.jit if backend.name == "jax" else framework.function

        def counted(x: Any, cache: Any) -> Any:
            traced.append(1)
            return layer(x, cache=cache)

        step = compile(counted)
    if backend.name == "torch":  # whose graph of the gradients would keep all steps
        step = importlib.import_module("torch").no_grad()(step)
    cache = layer.make_cache(2, steps + 1)
    held = []
    for number in range(steps):
        if number in (100, steps - 1):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0)
        if number == 90:
            tracemalloc.start()
        _, cache = step(x, cache)
    tracemalloc.stop()
    assert plain(backend, cache.lengths).tolist() == [steps, steps]
    assert len(traced) == (1 if backend.name in ("jax", "tensorflow") else 0)
    assert held[1] - held[0] < 200_000
    assert len(layer.plans.calls) + len(layer.plans.plans) + len(layer.plans.seen_once) < 20
