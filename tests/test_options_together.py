"""Options of today's models together: each acts in its place, with the same bits everywhere."""

from __future__ import annotations

import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.framework.registry import Backend
from anymha.parity import compare
from tests.conftest import usable
from tests.support import Problem, Result, bits, make, native, normal, run

LAYER = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 8, "query_features": 16, "seed": 0}
TOGETHER: dict[str, dict[str, Any]] = {
    "qwen 3": {"query_key_norm": "rms", "rotary": True, "sliding_window": 3},
    "gemma": {
        "query_key_norm": {"kind": "rms", "scale": "one_plus_weight"},
        "rotary": {"base": 100.0, "scaling": {"rope_type": "linear", "factor": 2.0}},
        "softcap": 2.0,
    },
    "qwen 3 next": {
        "query_key_norm": {"kind": "rms", "scale": "one_plus_weight"},
        "rotary": {"dim": 4},
        "gate": "elementwise",
        "use_bias": False,
    },
    "gate of each head with sinks": {"gate": "head", "sinks": True, "alibi": True},
    "olmo 2": {"query_key_norm": {"kind": "rms", "over": "width"}, "rotary": {"dim": 4}},
    "norm after rotary": {
        "query_key_norm": {"kind": "layer", "use_bias": True, "after_rotary": True},
        "rotary": {"layout": "interleaved", "columns": "last", "dim": 4},
    },
    "gpt-oss": {
        "sinks": True,
        "rotary": {
            "scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
            "max_position_embeddings": 8,
        },
        "sliding_window": 3,
    },
    "bloom": {"alibi": True, "softcap": 3.0},
    "l2 of each head": {
        "query_key_norm": {"kind": "l2", "over": "heads"},
        "rotary": {
            "scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
            },
        },
    },
    "everything": {
        "query_key_norm": "layer",
        "rotary": {"dim": 6},
        "softcap": 5.0,
        "alibi": [0.5, 0.25, 0.125, 0.0],
        "sinks": True,
        "gate": "elementwise",
        "sliding_window": 4,
        "output_shape": 5,
    },
}  # fmt: skip


PACKED = {
    "positions": np.array([[0, 1, 2, 0, 1, 2, 3], [5, 6, 0, 1, 2, 0, 0]], np.int32),
    "key_positions": np.array([[0, 1, 2, 0, 1, 2, 3], [5, 6, 0, 1, 2, 0, 0]], np.int32),
    "segment_ids": np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2, 2, -1, -1]], np.int32),
}


def inputs(backend: Backend) -> dict[str, Any]:
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]], np.int32)
    arrays = {"query": normal((2, 7, 16), "x"), "positions": positions, "key_positions": positions}
    return native(backend.ops, arrays)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("name", TOGETHER)
def test_they_agree_with_the_definition(name: str, backend: Backend) -> None:
    ours, reference = (
        anymha.MultiHeadAttention(**LAYER, **TOGETHER[name], backend=b)
        for b in (backend.name, "numpy")
    )
    anymha.set_weights(ours, anymha.get_weights(reference))
    report = compare(reference, ours, normal((2, 7, 16), "x"), use_causal_mask=True)
    assert report.passed, report


def _packed(name: str) -> Problem:
    options = {**LAYER, **TOGETHER[name], "compute_dtype": "float64"}
    widths = (options.pop("query_features"),) * 3
    return make((2, 7), None, widths, **options).calling(**PACKED, use_causal_mask=True)


@cache
def _of_numpy(name: str) -> Result:
    return run(usable("numpy"), _packed(name))


OPTIONS_OF_OTHERS = ("gemma", "qwen 3 next", "gpt-oss", "bloom")
"""Each of their options is in another one too; JAX compiles these for less long."""


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.as_users_compile] * (name not in OPTIONS_OF_OTHERS))
        for name in TOGETHER
    ],
)
def test_the_reproducible_mode_has_the_bits_of_numpy(name: str, backend: Backend) -> None:
    """Output, scores and all gradients, of packed sequences with positions of their own."""
    problem = _packed(name)
    expected = _of_numpy(name).all
    found = run(backend, problem).all
    assert found.keys() == expected.keys() >= {"output", "scores", "query", "key.kernel"}
    differing = [n for n, x in expected.items() if not np.array_equal(bits(x), bits(found[n]))]
    assert not differing


@cache
def _output(name: str, backend: str, budget: int | None) -> np.ndarray:
    found = usable(backend)
    layer = found.layer(**LAYER, **TOGETHER[name], memory_budget=budget)
    return found.ops.to_numpy(layer(**inputs(found), use_causal_mask=True))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("name", TOGETHER)
def test_tiles_give_what_one_piece_gives(name: str, backend: Backend) -> None:
    """The piece is NumPy's; that of each framework agrees with it above."""
    found = _output(name, backend.name, 64)
    np.testing.assert_allclose(_output(name, "numpy", None), found, atol=2e-6)


ALONE: dict[str, dict[str, Any]] = {
    "rotary": {"rotary": {"layout": "interleaved"}},
    "query_key_norm": {"query_key_norm": "layer"},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "gate": {"gate": "elementwise"},
    "segment_ids": {},
}


@pytest.mark.parametrize("name", ALONE)
def test_memory_grows_with_the_length_and_not_with_its_square(name: str) -> None:
    """Of NumPy's arrays, forward and backward; one (T, S) array of float32 would be 17 MB."""
    layer = anymha.MultiHeadAttention(
        2, 4, query_features=8, memory_budget=1 << 18, seed=0, backend="numpy", **ALONE[name]
    )
    peaks = []
    for length in (1024, 2048):
        x = normal((1, length, 8), "x").astype(np.float32)
        ids = np.arange(length, dtype=np.int32)[None] // 100
        call = {"segment_ids": ids} if name == "segment_ids" else {}
        tracemalloc.start()
        output, pullback = layer.vjp(x, **call)
        pullback(output)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.5 * peaks[0]
    assert peaks[1] < 8e6
