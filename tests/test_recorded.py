"""Programs that do again what the core did: the same bits, and only where that is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend, get_backend
from anymha.layer.recorded import Recorder, Replayed, Unrecordable, record

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scores": {"return_attention_scores": True},
    "causal": {"use_causal_mask": True},
    "padded": {"value_mask": np.array([[True, True, False, True, True], [True] * 5])},
    "masked": {"attention_mask": np.tri(3, 5, dtype=bool)},
    "biased": {"attention_bias": np.linspace(-1, 1, 15, dtype="float32").reshape(3, 5)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2, "value_dim": 6},
    "window": {"sliding_window": 2, "use_bias": False},
    "float64": {"dtype": "float64"},
    "half": {"dtype": "bfloat16"},
}


def made(backend: str = "numpy", **options: Any) -> tuple[Any, Any, Any]:
    """A layer, and a query and a value of its framework."""
    layer = anymha.MultiHeadAttention(4, 8, backend=backend, query_features=8, seed=1, **options)
    ops, rng = get_backend(backend).ops, np.random.default_rng(0)
    dtype = np.float32 if options.get("dtype") == "bfloat16" else options.get("dtype", "float32")
    return (
        layer,
        ops.from_numpy(rng.standard_normal((2, 3, 8)).astype(dtype)),
        ops.from_numpy(rng.standard_normal((2, 5, 8)).astype(dtype)),
    )


def programs(layer: Any) -> list[Any]:
    """What was recorded of a layer's calls; None for a call that has no program."""
    return [plan.replayed and plan.replayed.program for plan in layer.config.plans.values()]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_program_gives_the_bits_of_the_call(backend: Backend, call: str, options: str) -> None:
    layer, query, value = made(backend.name, **OPTIONS[options])
    ops = backend.ops
    replays = hasattr(ops, "situation")
    given = {
        n: ops.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in CALLS[call].items()
    }

    def results() -> list[np.ndarray]:
        found = layer(query, value, **given)
        found = found if isinstance(found, tuple) else (found,)
        return [np.asarray(ops.to_numpy(x)) for x in found]

    first = results()
    assert not any(programs(layer))
    second, third = results(), results()
    assert all(map(callable, programs(layer))) == replays
    for a, b, c in zip(first, second, third, strict=True):
        assert a.tobytes() == b.tobytes() == c.tobytes()
        assert a.dtype == c.dtype


def test_new_weights_and_inputs_go_into_a_program() -> None:
    layer, query, value = made()
    for _ in range(3):
        layer(query, value)
    other = anymha.MultiHeadAttention(4, 8, backend="numpy", query_features=8, seed=2)
    expected = other(value, query)
    layer.with_canonical_weights(other.canonical_weights())
    for _ in range(3):
        np.testing.assert_array_equal(layer(value, query), expected)


def test_calls_of_other_kinds_are_not_mixed_up() -> None:
    layer, query, value = made()
    kinds = [
        ((query,), {}),
        ((query, value), {}),
        ((query,), {"use_causal_mask": True}),
        ((query, value), {"use_causal_mask": True, "query_offset": 2}),
        ((query,), {"training": True}),
    ]
    for _ in range(4):
        for args, call in kinds:
            fresh = anymha.MultiHeadAttention(4, 8, backend="numpy", query_features=8, seed=1)
            np.testing.assert_array_equal(layer(*args, **call), fresh(*args, **call))


def test_other_weights_with_the_same_options_are_not_mixed_up() -> None:
    layer, query, value = made()
    weights = layer.canonical_weights()
    less = {name: x for name, x in weights.items() if name != "query.bias"}
    wide = weights | {"value.kernel": weights["value.kernel"].astype(np.float64)}
    for held in (weights, less, wide):
        first, *others = (
            anymha.multi_head_attention(held, query, value, config=layer.config) for _ in range(4)
        )
        for other in others:
            np.testing.assert_array_equal(first, other)
            assert first.dtype == other.dtype == np.float32


def test_dropout_draws_anew_in_each_call() -> None:
    layer, query, value = made(dropout=0.5)
    seeds = [layer(query, value, training=True, seed=seed) for seed in (0, 0, 0, 1, 1)]
    np.testing.assert_array_equal(seeds[0], seeds[2])
    assert not np.array_equal(seeds[2], seeds[3])


def test_loops_are_not_recorded_but_computed() -> None:
    layer, query, value = made(memory_budget=16)
    expected, *others = (layer(query, value) for _ in range(4))
    assert programs(layer) == [None]
    for other in others:
        np.testing.assert_array_equal(other, expected)


def test_errors_in_a_recorded_call_are_the_users_to_see() -> None:
    calls = []

    def function(ops: Any, arrays: Any) -> Any:
        calls.append(ops)
        raise ValueError("of the user's")

    replayed = Replayed(get_backend("numpy").ops, function)
    for _ in range(3):
        with pytest.raises(ValueError, match="of the user's"):
            replayed({"x": np.zeros(1)})


def test_what_came_about_out_of_sight_is_not_recorded() -> None:
    ops, hidden = get_backend("numpy").ops, np.ones(2)
    with pytest.raises(Unrecordable):
        record(ops, lambda ops, a: ops.where(hidden > 0, a["x"], 0.0), {"x": np.ones(2)})
    with pytest.raises(Unrecordable):
        record(ops, lambda ops, a: ops.map(lambda i, x: x, 1, a, {}, {}), {"x": np.ones((1, 2))})


def test_a_program_lets_go_of_what_it_does_not_need() -> None:
    recorder = Recorder(get_backend("numpy").ops)
    x = recorder.named(np.ones(2), "arrays['x']")
    unused = recorder.exp(x)
    twice = recorder.reshape(x, (1, 2)) + recorder.reshape(x, (1, 2))
    program = recorder.program(twice)
    assert unused.name not in program.__code__.co_varnames
    assert len(program.__code__.co_varnames) == 4  # arrays, x, one view, and their sum
    np.testing.assert_array_equal(program({"x": np.full(2, 3.0)}), [[6.0, 6.0]])
