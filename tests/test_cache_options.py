"""The arguments and the options of a layer in calls with a cache or a memory.

Each case cuts a sequence into a prompt and steps, and compares with one causal call over all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from tests.conftest import usable
from tests.support import normal
from tests.test_cache import calling

pytestmark = pytest.mark.usefixtures("quick_programs")

WIDTH, LENGTH, MOST = 8, 7, 9
SIZES = {"num_heads": 4, "key_dim": 4, "query_features": WIDTH, "seed": 0}
CUTS = (0, 3, 4, LENGTH)
OVER = ("attention_mask", "attention_bias")
CAUSAL = {"use_causal_mask": True}


def make(backend: Backend, **options: Any) -> Any:
    return anymha.MultiHeadAttention(**{**SIZES, **options}, backend=backend.name)


def inputs(seed: int = 0, length: int = LENGTH, dtype: str = "float32") -> np.ndarray:
    return normal((2, length, WIDTH), "x", seed).astype(dtype)


@pytest.fixture(params=["numpy", "torch"])
def quick(request: pytest.FixtureRequest) -> Backend:
    """Frameworks that compile nothing, for the many cases."""
    return usable(request.param)


class Runner:
    """Calls of a layer with arrays of NumPy; in JAX operation by operation, or `compiled`."""

    def __init__(self, backend: Backend, layer: Any, *, compiled: bool = False) -> None:
        self.ops, self.layer = backend.ops, layer
        self.called = calling(backend, layer) if compiled else layer

    def __call__(self, *arrays: np.ndarray, layer: Any = None, **call: Any) -> Any:
        own = {n: self.ops.from_numpy(x) if isinstance(x, np.ndarray) else x
               for n, x in call.items()}  # fmt: skip
        found = (layer or self.called)(*map(self.ops.from_numpy, arrays), **own)
        parts = found if isinstance(found, tuple) else (found,)
        plain = [x if isinstance(x, anymha.Cache) else self.ops.to_numpy(x) for x in parts]
        return plain if isinstance(found, tuple) else plain[0]

    def cut(
        self, x: np.ndarray, cache: Any, by_query: Mapping[str, np.ndarray], **call: Any
    ) -> tuple[list[np.ndarray], Any]:
        """The results (B, T, ...) of calls one after another, but for the cache, put together.

        Args:
            x: (B, T, D).
            cache: The cache.
            by_query: Arguments that are cut too, (B, T), or (..., T, S) those in `OVER`.
            call: The other arguments.
        """
        pieces: list[list[np.ndarray]] = []
        for begin, end in pairwise(CUTS):
            own = {
                n: a[..., begin:end, :] if n in OVER else a[:, begin:end]
                for n, a in by_query.items()
            }
            *found, cache = self(x[:, begin:end], cache=cache, **own, **call)
            pieces.append(found)
        joined = [np.concatenate(parts, 2 if i else 1)
                  for i, parts in enumerate(zip(*pieces, strict=True))]  # fmt: skip
        return joined, cache


def full_width(mask: np.ndarray, fill: Any) -> np.ndarray:
    """A mask or a bias (..., T, T) over the positions of a cache (..., T, MOST)."""
    wide = np.full((*mask.shape[:-1], MOST), fill, mask.dtype)
    wide[..., :LENGTH] = mask
    return wide


@pytest.mark.parametrize("window", [None, 3])
def test_scores_are_over_all_positions_of_the_cache(quick: Backend, window: int | None) -> None:
    run = Runner(quick, make(quick, sliding_window=window))
    x = inputs()
    cache = run.layer.make_cache(2, MOST)
    (output, scores), _ = run.cut(x, cache, {}, return_attention_scores=True)
    expected = run(x, return_attention_scores=True, **CAUSAL)
    np.testing.assert_allclose(output, expected[0], atol=1e-6)
    np.testing.assert_allclose(scores[..., :LENGTH], expected[1], atol=1e-6)
    assert not scores[..., LENGTH:].any()


def test_results_come_in_one_order(quick: Backend) -> None:
    run = Runner(quick, make(quick, activity_regularizer="l2"))
    x = inputs()
    call = {"return_attention_scores": True, "return_activity_loss": True}
    output, scores, loss, cache = run(x, cache=run.layer.make_cache(2, LENGTH), **call)
    expected = run(x, **call, **CAUSAL)
    assert isinstance(cache, anymha.Cache)
    assert loss > 0
    for found, wanted in zip((output, scores, loss), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", [(), (2,), (2, 4)])
def test_masks_and_biases_are_over_the_positions_of_the_cache(
    quick: Backend, shape: tuple[int, ...], window: int | None
) -> None:
    run = Runner(quick, make(quick, sliding_window=window))
    x, cache = inputs(), run.layer.make_cache(2, MOST)
    mask = normal((*shape, LENGTH, LENGTH), "mask") > -0.5
    heads = (4,) if len(shape) == 1 else shape
    bias = normal((*heads, LENGTH, LENGTH), "bias").astype("float32")
    by_query = {"attention_mask": full_width(mask, True), "attention_bias": full_width(bias, 0.0)}
    (output,), _ = run.cut(x, cache, by_query)
    expected = run(x, attention_mask=mask, attention_bias=bias, **CAUSAL)
    assert abs(expected - run(x, **CAUSAL)).max() > 0.01
    np.testing.assert_allclose(output, expected, atol=1e-6)


def test_a_query_mask_hides_queries_and_no_keys(quick: Backend) -> None:
    run = Runner(quick, make(quick, bias_initializer="ones"))
    x, mask = inputs(), normal((2, LENGTH), "mask") > 0
    (output,), _ = run.cut(x, run.layer.make_cache(2, MOST), {"query_mask": mask})
    np.testing.assert_allclose(output, run(x, query_mask=mask, **CAUSAL), atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_prompts(quick: Backend, window: int | None) -> None:
    run = Runner(quick, make(quick, sliding_window=window, rotary=True))
    x, ids = inputs(), np.array([[0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, -1, 6, 6]], "int32")
    (output,), cache = run.cut(x, run.layer.make_cache(2, MOST), {"segment_ids": ids})
    np.testing.assert_allclose(output, run(x, segment_ids=ids, **CAUSAL), atol=1e-6)
    assert cache.segment_ids is not None


@pytest.mark.parametrize("options", [{"rotary": True}, {"alibi": True}], ids=["rotary", "alibi"])
@pytest.mark.parametrize("window", [None, 3])
def test_positions_of_a_call_are_those_of_its_keys(
    quick: Backend, options: Mapping[str, Any], window: int | None
) -> None:
    run = Runner(quick, make(quick, sliding_window=window, **options))
    x = inputs()
    places = np.cumsum(1 + (normal((2, LENGTH), "places") > 0), axis=1).astype("int32")
    (output,), _ = run.cut(x, run.layer.make_cache(2, MOST), {"positions": places})
    expected = run(x, positions=places, key_positions=places, **CAUSAL)
    assert abs(expected - run(x, **CAUSAL)).max() > 1e-3
    np.testing.assert_allclose(output, expected, atol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"num_key_value_heads": 2},
    "value_dim": {"value_dim": 3, "output_shape": 5},
    "no biases": {"use_bias": False},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "rotary": {"rotary": True},
    "norm": {"query_key_norm": "rms"},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": True},
    "gate": {"gate": "head"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "float64": {"compute_dtype": "float64"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(quick: Backend, name: str) -> None:
    run = Runner(quick, make(quick, **OPTIONS[name]))
    x = inputs()
    (output,), cache = run.cut(x, run.layer.make_cache(2, MOST), {})
    expected = run(x, **CAUSAL).astype("float32")
    tolerance = 0.05 if name == "bfloat16" else 1e-6
    np.testing.assert_allclose(output.astype("float32"), expected, atol=tolerance)
    assert quick.ops.to_numpy(cache.lengths).tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("window", [None, 3])
def test_options_and_arguments_together(backend: Backend, window: int | None) -> None:
    options = {
        "num_key_value_heads": 2, "value_dim": 3, "output_shape": 5, "rotary": True,
        "query_key_norm": "rms", "gate": "head", "softcap": 2.0, "sinks": True,
        "sliding_window": window,
    }  # fmt: skip
    run = Runner(backend, make(backend, **options))
    x = inputs()
    mask = normal((2, 4, LENGTH, LENGTH), "mask") > -1
    bias = normal((LENGTH, LENGTH), "bias").astype("float32")
    ids = np.array([[0, 0, 0, 0, 1, 1, 1]], "int32").repeat(2, 0)
    own = {"query_mask": normal((2, LENGTH), "query mask") > -1, "segment_ids": ids}
    own["positions"] = np.arange(3, 3 + 2 * LENGTH, 2, dtype="int32")[None].repeat(2, 0)
    over = {"attention_mask": full_width(mask, True), "attention_bias": full_width(bias, 0.0)}
    (output, scores), _ = run.cut(
        x, run.layer.make_cache(2, MOST), {**own, **over}, return_attention_scores=True
    )
    expected = run(
        x, attention_mask=mask, attention_bias=bias, key_positions=own["positions"], **own,
        return_attention_scores=True, **CAUSAL,
    )  # fmt: skip
    np.testing.assert_allclose(output, expected[0], atol=1e-6)
    np.testing.assert_allclose(scores[..., :LENGTH], expected[1], atol=1e-6)


def test_rotation_by_the_length_goes_by_what_has_been_read(quick: Backend) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    rotary = {"scaling": scaling, "max_position_embeddings": 4}
    run = Runner(quick, make(quick, rotary=rotary))
    x = inputs()
    (output,), _ = run.cut(x, run.layer.make_cache(2, MOST), {})
    for begin, end in pairwise(CUTS):
        expected = run(x[:, :end], **CAUSAL)[:, begin:]
        np.testing.assert_allclose(output[:, begin:end], expected, atol=1e-6)


@pytest.mark.as_users_compile
def test_pieces_of_any_length_give_the_same_bits_in_float64(backend: Backend) -> None:
    options = {"compute_dtype": "float64", "rotary": True, "sliding_window": 3}
    run = Runner(backend, make(backend, **options), compiled=True)
    x = inputs()
    (pieces,), _ = run.cut(x, run.layer.make_cache(2, MOST), {})
    whole, _ = run(x, cache=run.layer.make_cache(2, MOST))
    assert pieces.dtype == np.float32
    np.testing.assert_array_equal(pieces, whole)
    run.called = run.layer  # an option is no array
    np.testing.assert_array_equal(pieces, run(x, **CAUSAL))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_cache_has_a_dtype_of_its_own(quick: Backend, dtype: str) -> None:
    run = Runner(quick, make(quick))
    x, cache = inputs(), run.layer.make_cache(2, MOST, dtype)
    (output,), cache = run.cut(x, cache, {})
    assert dtype in str(cache.keys.dtype)
    assert dtype in str(cache.values.dtype)
    assert output.dtype == np.float32
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-6)
    error = abs(output - run(x, **CAUSAL)).max()
    assert error < tolerance
    assert (error > 1e-6) == (dtype in ("float16", "bfloat16"))


def test_a_memory_gives_what_its_arrays_give(backend: Backend) -> None:
    options = {"num_key_value_heads": 2, "query_key_norm": "rms", "rotary": True}
    run = Runner(backend, make(backend, value_features=6, key_features=5, **options))
    x = inputs()
    value, key = (normal((2, 4, n), n).astype("float32") for n in (6, 5))
    mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    places = np.array([3, 4, 6, 9], "int32")
    native = backend.ops.from_numpy
    memory = run.layer.make_memory(native(value), native(key), key_positions=native(places))
    for call in ({}, {"value_mask": mask}, {"attention_mask": normal((LENGTH, 4), "m") > 0}):
        found = run(x, memory=memory, return_attention_scores=True, **call)
        wanted = run(x, value, key, key_positions=places, return_attention_scores=True, **call)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_a_layer_reads_another_ones_cache(backend: Backend, window: int | None) -> None:
    options = {"sliding_window": window, "rotary": True}
    first = make(backend, **options)
    weights = anymha.get_weights(make(backend, **{**options, "seed": 1}))
    shared = {n: w for n, w in anymha.get_weights(first).items() if n[:3] in ("key", "val")}
    second = anymha.set_weights(make(backend, **options), dict(weights) | shared)
    run = Runner(backend, first)
    x, y = inputs(), inputs(1)
    cache = first.make_cache(2, MOST, rewind=2)
    # Queries of y over keys and values of x, causal.
    expected = run(y, x, layer=second, **CAUSAL)
    found = []
    for begin, end in pairwise(CUTS):
        _, cache = run(x[:, begin:end], cache=cache)
        found.append(run(y[:, begin:end], layer=second, memory=cache))
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-6)


def test_weights_as_arrays(quick: Backend) -> None:
    layer = make(quick, rotary=True)
    weights = layer.canonical_weights()
    run = Runner(quick, lambda x, **call: anymha.multi_head_attention(
        weights, x, config=layer.config, **call))  # fmt: skip
    x = inputs()
    (output,), cache = run.cut(x, layer.make_cache(2, MOST), {})
    np.testing.assert_allclose(output, run(x, **CAUSAL), atol=1e-6)
    np.testing.assert_allclose(run(x[:, 4:], memory=cache), output[:, 4:], atol=1e-6)


def test_explain_says_which_way_a_step_takes(quick: Backend) -> None:
    layer = make(quick)
    x, native = inputs(), quick.ops.from_numpy
    _, cache = layer(native(x[:, :3]), cache=layer.make_cache(2, MOST))
    assert len(anymha.explain(layer, native(x[:, 3:4]), cache=cache).splitlines()) == 1
    assert cache.lengths.shape == (2,)
