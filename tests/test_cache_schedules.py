"""Random schedules of cached decoding against the oracle: each row's sequence alone.

A schedule appends pieces with padding anywhere, goes back, follows beams, takes rows apart and
joins them, goes on from older values, and runs past the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymha
from anymha.framework.registry import Backend
from anymha.parity.oracle.features import sections_of
from anymha.parity.oracle.recipe import Recipe, ordered
from tests.support import normal

pytestmark = pytest.mark.usefixtures("quick_programs")

WIDTH, ROWS, MOST = 8, 2, 12
LAYER = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 4, "query_features": WIDTH, "seed": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "rotary and norms": {"rotary": True, "query_key_norm": "rms"},
    "ring": {"rotary": True, "sliding_window": 3, "sinks": True},
    "alibi": {"alibi": True, "softcap": 5.0},
    "length": {
        "rotary": {
            "scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 6,
        },
    },
}  # fmt: skip
REWIND = 2

piece = st.tuples(
    st.just("append"), st.sampled_from([1, 3]), st.sampled_from(["all", "some", "none"]),
    st.integers(0, 1 << 16),
)  # fmt: skip
events = st.one_of(
    piece,
    piece,
    piece,
    st.tuples(st.just("truncate"), st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("join"), st.permutations(range(ROWS))),
    st.tuples(st.just("older"), st.integers(0, 8)),
)


@dataclass
class State:
    """A cache, and what its rows have read.

    Args:
        cache: The cache.
        rows: Of each row the positions (n, D).
        first: Of each row the first position that is still held.
    """

    cache: Any
    rows: list[np.ndarray]
    first: list[int]


class Schedule:
    """Runs a schedule on a layer, and compares each output with the oracle."""

    def __init__(self, backend: Backend, layer: Any, config: Any, weights: Any) -> None:
        self.backend, self.layer, self.config, self.weights = backend, layer, config, weights
        made = layer.make_cache(ROWS, MOST, rewind=REWIND)
        empty = np.zeros((0, WIDTH), np.float32)
        self.states = [State(made, [empty] * ROWS, [0] * ROWS)]
        self.slots = made.keys.shape[2]

    def native(self, x: Any) -> Any:
        return self.backend.ops.from_numpy(np.ascontiguousarray(x))

    def plain(self, x: Any) -> np.ndarray:
        return np.asarray(self.backend.ops.to_numpy(x))

    def expected(self, row: np.ndarray) -> np.ndarray:
        """The outputs (n, D) of one causal call over a row's sequence alone."""
        weights = {n: np.asarray(w, np.float64) for n, w in self.weights.items()}
        x = row[None].astype(np.float64)
        place, key_place = (np.arange(len(row)).reshape(shape) for shape in ((-1, 1), (1, -1)))
        allowed = key_place <= place
        if self.config.sliding_window is not None:
            allowed &= key_place > place - self.config.sliding_window
        recipe = Recipe(
            weights, {"query": x, "value": x, "key": x}, 1 / math.sqrt(self.config.key_dim),
            {"allowed": allowed[None, None]}, sections=ordered(sections_of(self.config)),
        )  # fmt: skip
        return recipe.stages["output"][0]

    def append(self, count: int, padding: str, seed: int) -> None:
        state, draw = self.states[-1], np.random.default_rng(seed)
        x = draw.standard_normal((ROWS, count, WIDTH)).astype(np.float32)
        valid = np.ones((ROWS, count), bool)
        if padding == "some":
            valid = draw.random((ROWS, count)) < 0.6
        call = {} if padding == "all" else {"value_mask": self.native(valid)}
        rows = [np.concatenate([row, x[b, valid[b]]]) for b, row in enumerate(state.rows)]
        x[~valid] = np.nan
        if any(len(row) > MOST for row in rows):
            before = self.plain(state.cache.lengths).tolist()
            with pytest.raises(anymha.AnymhaError, match="has room for"):
                self.layer(self.native(x), cache=state.cache, **call)
            assert self.plain(state.cache.lengths).tolist() == before
            return
        output, cache = self.layer(self.native(x), cache=state.cache, **call)
        found = self.plain(output)
        assert np.isfinite(found).all()
        for b, row in enumerate(rows):
            begin = len(state.rows[b])
            if len(row) > begin:
                expected = self.expected(row)[begin:]
                np.testing.assert_allclose(found[b, valid[b]], expected, atol=1e-5)
        assert self.plain(cache.lengths).tolist() == [len(row) for row in rows]
        first = [max(f, len(row) - self.slots) for f, row in zip(state.first, rows, strict=True)]
        self.states.append(State(cache, rows, first))

    def truncate(self, back: list[int]) -> None:
        state = self.states[-1]
        lengths = [max(len(row) - n, 0) for row, n in zip(state.rows, back, strict=True)]
        window = self.config.sliding_window or 0
        lost = [
            first > max(0, n - window + 1) and n != len(row)
            for first, n, row in zip(state.first, lengths, state.rows, strict=True)
        ]
        if any(lost):
            with pytest.raises(anymha.AnymhaError, match="ring holds"):
                state.cache.truncate(lengths)
            return
        cache = state.cache.truncate(lengths)
        rows = [row[:n] for row, n in zip(state.rows, lengths, strict=True)]
        self.states.append(State(cache, rows, list(state.first)))

    def reorder(self, indices: list[int]) -> None:
        state = self.states[-1]
        cache = state.cache.reorder(indices)
        rows, first = ([kept[i] for i in indices] for kept in (state.rows, state.first))
        self.states.append(State(cache, rows, first))

    def join(self, order: list[int]) -> None:
        state = self.states[-1]
        cache = anymha.join_caches([state.cache.reorder([i]) for i in order])
        rows, first = ([kept[i] for i in order] for kept in (state.rows, state.first))
        self.states.append(State(cache, rows, first))

    def older(self, back: int) -> None:
        """Go on from what an earlier call gave."""
        self.states.append(self.states[max(len(self.states) - 1 - back, 0)])


@pytest.mark.parametrize("name", OPTIONS)
def test_random_schedules_agree_with_the_oracle(name: str, backend: Backend) -> None:
    layer = anymha.MultiHeadAttention(**LAYER, **OPTIONS[name], backend=backend.name)
    weights = anymha.get_weights(layer)
    widths = (WIDTH,) * 3
    config = layer.config
    assert set(weights) == set(config.weight_shapes(*widths))
    weights = {n: w + 0.1 * normal(w.shape, n).astype(w.dtype) for n, w in weights.items()}
    layer = anymha.set_weights(layer, weights) or layer
    flat = {
        n: w.reshape(*w.shape[:2], -1) if n == "output.kernel" else w for n, w in weights.items()
    }

    @settings(max_examples=50, deadline=None)
    @given(st.lists(events, min_size=3, max_size=10))
    def check(schedule: list[tuple[Any, ...]]) -> None:
        run = Schedule(backend, layer, config, flat)
        for event, *arguments in schedule:
            getattr(run, event)(*arguments)

    check()
