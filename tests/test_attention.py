"""The softmax, and `dot_product_attention` with everything that it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.dropout import keep_mask, rate_threshold
from anymha.attention.formula import softmax
from anymha.framework.registry import Backend, get_backend
from anymha.parity.stages.tolerance import tolerance
from tests.support import Arrays, close, native, normal, np_dtype
from tests.written_oracle import attention_oracle

pytestmark = pytest.mark.usefixtures("quick_programs")

B, T, S, H = 2, 5, 6, 4
ROW, COLUMN = np.arange(T)[:, None], np.arange(S)[None, :]


def _softmax(backend: Backend, logits: Any) -> np.ndarray:
    ops = backend.ops
    return ops.to_numpy(softmax(ops, ops.from_numpy(np.asarray(logits, np.float32))))


def test_softmax_by_hand(backend: Backend) -> None:
    got = _softmax(backend, [[0, math.log(3)], [5, 5], [-math.inf, 2]])
    np.testing.assert_allclose(got, [[0.25, 0.75], [0.5, 0.5], [0, 1]], rtol=1e-6)


def test_softmax_of_a_row_of_minus_infinity_is_zero(backend: Backend) -> None:
    assert not _softmax(backend, [[-math.inf] * 3]).any()


def test_softmax_of_great_numbers_does_not_overflow(backend: Backend) -> None:
    got = _softmax(backend, [[1e38, 1e38, -1e38], [-1e38, -1e38, -math.inf]])
    assert got.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0]]


def test_softmax_over_no_keys_is_empty(backend: Backend) -> None:
    assert _softmax(backend, np.zeros((2, 3, 0))).shape == (2, 3, 0)


def _arrays(dtype: str = "float32", shared: int = H, width: int = 2) -> Arrays:
    shapes = {"query": (B, T, H, 3), "key": (B, S, shared, 3), "value": (B, S, shared, width)}
    return {name: normal(shape, name).astype(np_dtype(dtype)) for name, shape in shapes.items()}


def _ask(backend: Backend, arrays: Arrays, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    given = native(backend.ops, {**arrays, **call})
    found = anymha.dot_product_attention(**given, return_scores=True)
    output, scores = (backend.ops.to_numpy(array) for array in found)
    alone = backend.ops.to_numpy(anymha.dot_product_attention(**given))
    assert alone.tobytes() == output.tobytes()
    return output, scores


def _truth(
    arrays: Arrays,
    allowed: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Plain loops over batch and heads."""
    query, key, value = (arrays[n].astype(np.float64) for n in ("query", "key", "value"))
    shape = (B, H, T, S)
    seen = np.broadcast_to(True if allowed is None else allowed, shape)
    added = np.broadcast_to(0.0 if bias is None else bias, shape)
    kept = np.ones(shape) if kept is None else kept
    output, scores = np.zeros((B, T, H, value.shape[-1])), np.zeros(shape)
    for b in range(B):
        for h in range(H):
            g = h // (H // key.shape[2])
            logits = query[b, :, h] @ key[b, :, g].T * (scale or 1 / math.sqrt(3))
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.where(seen[b, h], np.exp(logits + added[b, h]), 0.0)
            total = weights.sum(-1, keepdims=True)
            scores[b, h] = weights / np.where(total == 0, 1, total)
            output[b, :, h] = (scores[b, h] * kept[b, h]) @ value[b, :, g]
    return output, scores


def _check(backend: Backend, arrays: Arrays, call: dict[str, Any], **truth: Any) -> None:
    got, want = _ask(backend, arrays, **call), _truth(arrays, **truth)
    dtype = arrays["query"].dtype
    for array, exact, name in zip(got, want, ("output", "scores"), strict=True):
        assert array.dtype == dtype
        magnitude = 4 * np.max(np.abs(exact), initial=1.0)  # the logits are some 4 at most
        close(array, exact, tolerance(dtype.name, S, float(magnitude)), name)


MASK = normal((B, H, T, S), "mask") > -0.4
BIAS = normal((B, H, T, S), "bias")
OFFSETS = np.array([2, -1], np.int32)
QUERY_MASK = np.array([[True] * 5, [False, True, True, False, True]])
VALUE_MASK = np.array([[True] * 4 + [False] * 2, [False] + [True] * 5])
PLACE = ROW + OFFSETS[:, None, None, None]  # where each query stands among the keys

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "mask (T, S)": ({"mask": MASK[0, 0]}, {"allowed": MASK[0, 0]}),
    "mask (H, T, S)": ({"mask": MASK[0]}, {"allowed": MASK[0]}),
    "mask (B, 1, 1, S)": ({"mask": MASK[:, :1, :1]}, {"allowed": MASK[:, :1, :1]}),
    "mask (B, H, T, S)": ({"mask": MASK}, {"allowed": MASK}),
    "bias (S,)": ({"bias": BIAS[0, 0, 0]}, {"bias": BIAS[0, 0, 0]}),
    "bias (H, T, S)": ({"bias": BIAS[0]}, {"bias": BIAS[0]}),
    "bias of -inf": (
        {"bias": np.where(MASK, BIAS, -np.inf)},
        {"bias": BIAS, "allowed": MASK},
    ),
    "query mask": ({"query_mask": QUERY_MASK}, {"allowed": QUERY_MASK[:, None, :, None]}),
    "value mask": ({"value_mask": VALUE_MASK}, {"allowed": VALUE_MASK[:, None, None]}),
    "causal": ({"is_causal": True}, {"allowed": COLUMN <= ROW}),
    "causal, offset": (
        {"is_causal": True, "query_offset": -3},
        {"allowed": COLUMN <= ROW - 3},
    ),
    "causal, offset by batch": (
        {"is_causal": True, "query_offset": OFFSETS},
        {"allowed": PLACE >= COLUMN},
    ),
    "window (1, 2)": (
        {"window": (1, 2)},
        {"allowed": (ROW - 1 <= COLUMN) & (COLUMN <= ROW + 2)},
    ),
    "window (1, open)": ({"window": (1, None)}, {"allowed": ROW - 1 <= COLUMN}),
    "window (open, 0)": ({"window": (None, 0)}, {"allowed": COLUMN <= ROW}),
    "window (open, open)": ({"window": (None, None)}, {}),
    "window (0, 0), offset": (
        {"window": (0, 0), "query_offset": 1},
        {"allowed": COLUMN == ROW + 1},
    ),
    "window (2, 2), causal, offset by batch": (
        {"window": [2, 2], "is_causal": True, "query_offset": OFFSETS},
        {"allowed": (PLACE - 2 <= COLUMN) & (PLACE >= COLUMN)},
    ),
    "scale": ({"scale": 0.2}, {"scale": 0.2}),
    "softcap": ({"softcap": 0.7}, {"softcap": 0.7}),
    "softcap before bias and mask": (
        {"softcap": 0.7, "scale": 1.1, "bias": BIAS, "mask": MASK},
        {"softcap": 0.7, "scale": 1.1, "bias": BIAS, "allowed": MASK},
    ),
    "no row sees a key": ({"mask": np.zeros((1, 1), bool)}, {"allowed": np.zeros((1, 1), bool)}),
    "all of them": (
        {
            "mask": MASK, "bias": BIAS, "query_mask": QUERY_MASK, "value_mask": VALUE_MASK,
            "is_causal": True, "window": (2, None), "query_offset": OFFSETS, "softcap": 2.0,
        },
        {
            "allowed": MASK & QUERY_MASK[:, None, :, None] & VALUE_MASK[:, None, None]
            & (PLACE - 2 <= COLUMN) & (PLACE >= COLUMN),
            "bias": BIAS, "softcap": 2.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("shared", [4, 2], ids=["", "grouped"])
@pytest.mark.parametrize(("call", "truth"), CASES.values(), ids=CASES)
def test_agrees_with_plain_loops(
    backend: Backend, shared: int, call: dict[str, Any], truth: dict[str, Any]
) -> None:
    call = {n: a.astype(np.float32) if n == "bias" else a for n, a in call.items()}
    _check(backend, _arrays(shared=shared), call, **truth)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_agrees_in_each_dtype(backend: Backend, dtype: str) -> None:
    bias = BIAS.astype(np_dtype(dtype))
    call = {"bias": bias, "is_causal": True, "softcap": 1.5}
    _check(
        backend, _arrays(dtype, shared=1), call,
        bias=bias.astype(np.float64), allowed=COLUMN <= ROW, softcap=1.5,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_dropout_acts_wherever_it_is_not_zero(backend: Backend, rate: float) -> None:
    threshold = rate_threshold(rate)
    kept = keep_mask(get_backend("numpy").ops, 9, threshold, (B, H, T, S))
    kept = kept * (65536 / (65536 - threshold))
    assert (kept == 0).any()
    _check(backend, _arrays(), {"dropout": rate, "seed": 9}, kept=kept)


def test_softcap_bounds_the_logits(backend: Backend) -> None:
    # Logits within [-c, c] keep any two scores of a row within a factor of exp(2 c).
    arrays = _arrays()
    arrays["query"] *= 100
    _, scores = _ask(backend, arrays, softcap=0.5)
    assert (scores.max(-1) / scores.min(-1)).max() <= math.e * (1 + 1e-5)


def test_excluded_values_may_be_anything(backend: Backend) -> None:
    arrays = _arrays()
    clean, _ = _ask(backend, arrays, value_mask=VALUE_MASK, query_mask=QUERY_MASK)
    for name, mask in (("key", VALUE_MASK), ("value", VALUE_MASK), ("query", QUERY_MASK)):
        arrays[name] = np.where(mask[..., None, None], arrays[name], np.float32(np.nan))
    dirty, _ = _ask(backend, arrays, value_mask=VALUE_MASK, query_mask=QUERY_MASK)
    assert clean.tobytes() == dirty.tobytes()


def test_padding_masks_broadcast_along_the_batch(backend: Backend) -> None:
    arrays = _arrays()
    one = _ask(backend, arrays, value_mask=VALUE_MASK[:1], query_mask=QUERY_MASK[1:])
    both = _ask(
        backend, arrays,
        value_mask=VALUE_MASK[[0, 0]], query_mask=QUERY_MASK[[1, 1]],
    )  # fmt: skip
    assert one[0].tobytes() == both[0].tobytes()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_is_no_error(backend: Backend, empty: str) -> None:
    b, t, s = (0 if empty == name else n for name, n in (("batch", B), ("queries", T), ("keys", S)))
    arrays = {
        "query": np.ones((b, t, H, 3), np.float32),
        "key": np.ones((b, s, 2, 3), np.float32),
        "value": np.ones((b, s, 2, 2), np.float32),
    }
    masks = {"query_mask": np.ones((b, t), bool), "value_mask": np.ones((b, s), bool)}
    output, scores = _ask(backend, arrays, **masks, is_causal=True, dropout=0.5, seed=1)
    assert output.shape == (b, t, H, 2)
    assert scores.shape == (b, H, t, s)
    assert not output.any()


def test_is_the_layer_without_projections(backend: Backend) -> None:
    # The oracle of the layer, its projections made of unit matrices, is a second witness.
    arrays = _arrays("float64", width=3)
    unit = np.eye(H * 3)
    weights = {f"{n}.kernel": unit.reshape(H * 3, H, 3) for n in ("query", "key", "value")}
    weights["output.kernel"] = unit.reshape(H, 3, H * 3)
    flat = {name: array.reshape(*array.shape[:2], H * 3) for name, array in arrays.items()}
    exact = attention_oracle(weights, flat, scale=1 / math.sqrt(3), allowed=COLUMN <= ROW)
    output, scores = _ask(backend, arrays, is_causal=True)
    np.testing.assert_allclose(output.reshape(B, T, -1), exact.output, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(scores, exact.scores, rtol=1e-13)
