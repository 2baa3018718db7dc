"""Rows of a cache that are emptied for another text: each is as in a new cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from tests.support import compilers, normal

WINDOWS = (None, 3)

# Of torch's compiler, where a cache that carries gradients is an input.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.usefixtures("quick_programs"),
]


def layer_of(backend: Backend, window: int | None) -> Any:
    return anymha.MultiHeadAttention(
        2, 4, query_features=6, rotary=True, sliding_window=window, seed=0, backend=backend.name
    )


def apart(backend: Backend, layer: Any, output: Any, row: int, text: np.ndarray) -> float:
    """How far a row's output is from that of a causal call with the row's text (T, D) alone."""
    whole = layer(backend.ops.from_numpy(text[None]), use_causal_mask=True)
    whole, output = backend.ops.to_numpy(whole)[0], backend.ops.to_numpy(output)[row]
    return float(np.max(np.abs(output - whole[-len(output) :])))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_is_read_anew_and_the_other_goes_on(backend: Backend, window: int | None) -> None:
    layer, ops = layer_of(backend, window), backend.ops
    first, then = normal((2, 8, 6), 0).astype("f"), normal((2, 5, 6), 1).astype("f")
    _, cache = layer(ops.from_numpy(first), cache=layer.make_cache(2, 20))
    cache = cache.truncate(np.array([8, 0]))
    for start, end in ((0, 2), (2, 3), (3, 5)):
        output, cache = layer(ops.from_numpy(then[:, start:end]), cache=cache)
        went_on = np.concatenate([first[0], then[0, :end]])
        assert apart(backend, layer, output, 0, went_on) < 1e-5
        assert apart(backend, layer, output, 1, then[1, :end]) < 1e-5
    assert ops.to_numpy(cache.lengths).tolist() == [13, 5]


def test_rows_that_have_overflowed_are_read_anew(backend: Backend) -> None:
    layer, ops = layer_of(backend, 3), backend.ops
    text = normal((2, 4, 6), 2).astype("f")

    def read(x: Any, cache: Any, kept: Any) -> Any:
        return layer(x, cache=cache.truncate(kept))

    for run in compilers(backend, read):
        if run is read:
            pytest.skip("there is no compiler; where lengths are known, to overflow is an error")
        cache, x = layer.make_cache(2, 6), ops.from_numpy(text)
        for kept, is_lost in ((0, False), (4, True), (0, False)):
            output, cache = run(x, cache, ops.from_numpy(np.full(2, kept, np.int32)))
            assert (np.isnan(ops.to_numpy(output)) == is_lost).all()
            assert (ops.to_numpy(cache.overflowed) == is_lost).all()
        for row in range(2):
            assert apart(backend, layer, output, row, text[row]) < 1e-5
