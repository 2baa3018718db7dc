"""The options of `dot_product_attention`, its log-sum-exp, and parts of the keys merged by it."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, DtypeError, MixedBackendsError, ShapeError
from anymha.framework.registry import Backend, get_backend
from anymha.parity.stages.layer_call import gradients_of
from tests.conftest import usable
from tests.pairs import pairs
from tests.peer_layers import need
from tests.support import native, normal

pytestmark = pytest.mark.usefixtures("quick_programs")

B, T, S, H, K, D = 2, 6, 9, 4, 2, 4
IDS = np.array([[0, 0, 1, 1, 2, -1], [3, 3, 3, 4, 4, 4]], np.int32)
KEY_IDS = np.array([[0, 0, 1, 1, 1, 2, -1, -1, 0], [3, 3, 4, 4, 4, 4, 3, -1, 3]], np.int32)
ARRAYS = {
    "query": normal((B, T, H, D), "q"), "key": normal((B, S, K, D), "k"),
    "value": normal((B, S, K, D), "v"), "sinks": normal((H,), "s"),
    "alibi_slopes": np.array([0.5, 0.25, 0.1, 1.0]),
}  # fmt: skip
INPUTS = ("query", "key", "value")
PARTS = (slice(0, 3), slice(3, 6), slice(6, 9))
"""The keys of three devices; of one length, so that JAX compiles for one."""

Call = dict[str, Any]
CALLS: dict[str, Call] = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 2},
    "window": {"window": (2, 1), "query_offset": -1},
    "sinks": {"sinks": ARRAYS["sinks"], "is_causal": True, "query_offset": -2},
    "alibi": {"alibi_slopes": ARRAYS["alibi_slopes"], "query_offset": 2, "softcap": 1.5},
    "positions": {"alibi_slopes": ARRAYS["alibi_slopes"],
                  "positions": np.array([[3, 1, 4, 1, 5, 9], [0, 2, 4, 6, 8, 10]], np.int32)},
    "segments": {"segment_ids": IDS, "key_segment_ids": KEY_IDS, "sinks": ARRAYS["sinks"]},
    "padding": {"value_mask": np.arange(S) < np.array([[5], [0]])},
    "mask": {"mask": normal((B, H, T, S), "mask") > 0.5, "bias": normal((H, T, S), "b")},
}  # fmt: skip


BUDGETS = (None, 64)
calls_and_budgets: Any = pytest.mark.parametrize(
    ("backend", "name", "budget"),
    [
        *itertools.product(("numpy", "torch"), CALLS, BUDGETS),
        *pairs(backend=["tensorflow", "jax"], name=CALLS, budget=BUDGETS),  # which take longer
    ],
    indirect=["backend"],
)


def by_hand(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, probabilities and log-sum-exp, in float64."""
    key, value = (np.repeat(ARRAYS[n], H // K, axis=2) for n in ("key", "value"))
    logits = np.einsum("bthd,bshd->bhts", ARRAYS["query"], key) / 2  # sqrt(d_k) is 2
    if "softcap" in call:
        logits = call["softcap"] * np.tanh(logits / call["softcap"])
    index = np.arange(T) + call.get("query_offset", 0)
    if "alibi_slopes" in call:
        places = np.broadcast_to(call.get("positions", index), (B, T))
        distance = np.abs(places[:, None, :, None] - np.arange(S))
        logits = logits - call["alibi_slopes"][:, None, None] * distance
    logits = logits + call.get("bias", 0.0)
    apart = np.arange(S) - index[:, None]
    seen = np.broadcast_to(call.get("mask", np.ones((B, H, T, S), bool)), (B, H, T, S))
    if call.get("is_causal"):
        seen = seen & (apart <= 0)
    if "window" in call:
        seen = seen & (apart >= -call["window"][0]) & (apart <= call["window"][1])
    if "segment_ids" in call:
        ids, key_ids = call["segment_ids"][:, :, None], call["key_segment_ids"][:, None]
        seen = seen & ((ids == key_ids) & (ids >= 0))[:, None]
    if "value_mask" in call:
        seen = seen & call["value_mask"][:, None, None]
    weights = np.where(seen, np.exp(logits), 0.0)
    sinks = call.get("sinks")
    total = weights.sum(-1) + (0.0 if sinks is None else np.exp(sinks)[:, None])
    scores = weights / np.where(total > 0, total, 1.0)[..., None]
    with np.errstate(divide="ignore"):
        return np.einsum("bhts,bshd->bthd", scores, value), scores, np.log(total)


def part_of(call: Call, keys: slice, first: bool) -> Call:
    """The call for some of the keys; the sinks join one part."""
    own = {**call, "query_offset": call.get("query_offset", 0) - keys.start}
    if "alibi_slopes" in call:
        index = np.arange(T, dtype=np.int32) + call.get("query_offset", 0)
        own["positions"] = call.get("positions", index)
        own["key_positions"] = np.arange(keys.start, keys.stop, dtype=np.int32)
    for name in {"mask", "bias", "key_segment_ids", "value_mask"} & own.keys():
        own[name] = np.ascontiguousarray(own[name][..., keys])
    if not first:
        own.pop("sinks", None)
    return own


def prepared(ops: Any, call: Call, dtype: str = "float32") -> Call:
    """The call in a backend's arrays."""
    real = {n: x.astype(dtype) for n, x in call.items()
            if isinstance(x, np.ndarray) and x.dtype == np.float64}  # fmt: skip
    return native(ops, {**call, **real})


def numpy_of(ops: Any, results: Any) -> list[np.ndarray]:
    return [ops.to_numpy(x) for x in results]


@cache
def plain_context(name: str) -> np.ndarray:
    ops = usable(name).ops
    arrays = prepared(ops, {n: ARRAYS[n] for n in INPUTS})
    return ops.to_numpy(anymha.dot_product_attention(**arrays))


@calls_and_budgets
def test_context_scores_and_lse_are_those_of_the_definition(
    backend: Backend, name: str, budget: int | None
) -> None:
    ops, call = backend.ops, prepared(backend.ops, CALLS[name])
    arrays = prepared(ops, {n: ARRAYS[n] for n in INPUTS})
    attention = anymha.dot_product_attention
    call["memory_budget"] = budget
    results = attention(**arrays, **call, return_scores=True, return_lse=True)
    for got, expected in zip(numpy_of(ops, results), by_hand(CALLS[name]), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-6)
    alone = attention(**arrays, **call)
    np.testing.assert_allclose(ops.to_numpy(alone), by_hand(CALLS[name])[0], atol=3e-6)
    assert len(attention(**arrays, **call, return_lse=True)) == 2
    if name != "plain":  # each option matters
        assert np.max(np.abs(plain_context(backend.name) - ops.to_numpy(alone))) > 1e-3


@calls_and_budgets
def test_parts_of_the_keys_merge_into_the_whole(
    backend: Backend, name: str, budget: int | None
) -> None:
    ops, parts = backend.ops, []
    for number, keys in enumerate(PARTS):
        call = part_of(CALLS[name], keys, number == 0)
        arrays = {"query": ARRAYS["query"], **{n: ARRAYS[n][:, keys] for n in ("key", "value")}}
        arrays = prepared(ops, {**arrays, **call, "memory_budget": budget})
        parts.append(anymha.dot_product_attention(**arrays, return_lse=True))
    contexts, lses = zip(*parts, strict=True)
    context, _, lse = by_hand(CALLS[name])
    for order in (slice(None), slice(None, None, -1)):
        merged = numpy_of(ops, anymha.merge_attention(contexts[order], lses[order]))
        np.testing.assert_allclose(merged[0], context, atol=3e-6)
        np.testing.assert_allclose(merged[1], lse, atol=3e-6)
    hidden = np.isneginf(lse).swapaxes(1, 2)
    assert not merged[0][hidden].any()
    assert np.isneginf(merged[1].swapaxes(1, 2)[hidden]).all()


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("name", ["torch", "tensorflow", "jax"])  # NumPy's functions have none
def test_gradients_pass_through_context_and_lse(name: str, merging: bool) -> None:
    need(name)
    ops = get_backend(name).ops
    constant = native(ops, {"mask": normal((B, H, T, S), "mask") > 0.7})
    halves = [native(ops, {"mask": np.ascontiguousarray(m)}) for m in
              np.split(np.asarray(ops.to_numpy(constant["mask"])), (4,), axis=-1)]  # fmt: skip

    def function(ops: Any, arrays: Any) -> Any:
        options = {n: arrays[n] for n in ("sinks", "alibi_slopes")} if not merging else {}
        query, key, value = (arrays[n] for n in INPUTS)
        if not merging:
            results = anymha.dot_product_attention(
                query, key, value, **constant, **options, return_lse=True
            )
        else:
            parts = [
                anymha.dot_product_attention(
                    query, key[:, keys], value[:, keys], **mask, return_lse=True
                )
                for keys, mask in zip((slice(0, 4), slice(4, 9)), halves, strict=True)
            ]
            results = anymha.merge_attention(*zip(*parts, strict=True))
        context, lse = results
        # A row that sees nothing has no log-sum-exp whose gradient anybody could take.
        return context, ops.where(lse > -np.inf, lse, 0.0)

    names = INPUTS if merging else ARRAYS
    values = {n: ARRAYS[n].astype(np.float32) for n in names}
    to = (normal((B, T, H, D), "dc").astype(np.float32), normal((B, H, T), "dl").astype(np.float32))
    got = gradients_of(ops, function, native(ops, values), tuple(map(ops.from_numpy, to)))
    exact = get_backend("numpy").ops
    constant = {"mask": normal((B, H, T, S), "mask") > 0.7}
    halves = [{"mask": m} for m in np.split(constant["mask"], (4,), axis=-1)]

    def loss(arrays: Any) -> float:
        context, lse = function(exact, arrays)
        return float(np.sum(context * to[0]) + np.sum(lse * to[1]))

    wide = {n: ARRAYS[n] for n in names}
    for which, array in wide.items():
        assert np.all(np.isfinite(got[which]))
        for at in (0, -1):
            step = np.zeros(array.shape)
            step.flat[at] = 1e-6
            up, down = (loss({**wide, which: array + s}) for s in (step, -step))
            np.testing.assert_allclose(got[which].flat[at], (up - down) / 2e-6, atol=2e-5)


def test_dtypes_are_kept_and_lse_is_float32_at_least(backend: Backend) -> None:
    ops = backend.ops
    for dtype, wide in (("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        arrays = {n: ARRAYS[n].astype(np.float64) for n in INPUTS}

        def cast(arrays: Any, dtype: str = dtype) -> Any:
            own = {n: ops.astype(x, ops.dtype(dtype)) for n, x in arrays.items()}
            context, lse = anymha.dot_product_attention(**own, return_lse=True)
            return (context, lse, *anymha.merge_attention([context] * 2, [lse] * 2))

        results = ops.in_float64(cast, native(ops, arrays))
        names = [str(x.dtype).rpartition(".")[2].strip("<>' ") for x in results]
        assert all(dtype in n for n in names[::2]), names
        assert all(wide in n for n in names[1::2]), names
        context, lse, _, twice = numpy_of(ops, results)
        assert np.all(np.isfinite(context.astype(np.float64)))
        np.testing.assert_allclose(twice, lse + np.log(2.0), rtol=1e-6)


def test_great_logits_do_not_overflow(backend: Backend) -> None:
    ops = backend.ops
    lses = [np.full((1, 1, 2), n, np.float32) for n in (3e4, 3e4 + 1, -np.inf)]
    contexts = [np.full((1, 2, 1, 1), n, np.float32) for n in (0.0, 1.0, 7.0)]
    context, lse = numpy_of(ops, anymha.merge_attention(
        [ops.from_numpy(x) for x in contexts], [ops.from_numpy(x) for x in lses]))  # fmt: skip
    np.testing.assert_allclose(context, np.e / (1 + np.e), rtol=1e-6)
    np.testing.assert_allclose(lse, 3e4 + np.log1p(np.e), rtol=1e-6)


def test_lse_is_that_of_flash_attention() -> None:
    torch: Any = need("torch")
    arrays = [torch.from_numpy(ARRAYS[n]).float() for n in INPUTS]
    q, k, v = (x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2) for x in arrays)
    context, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    ours = anymha.dot_product_attention(*arrays, return_lse=True)
    torch.testing.assert_close(ours[0], context.transpose(1, 2))
    torch.testing.assert_close(ours[1], lse)


def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    ops = backend.ops
    x = native(ops, {n: ARRAYS[n].astype(np.float32) for n in INPUTS})
    attention = anymha.dot_product_attention
    bad = native(ops, {"few": np.ones(3, np.float32), "int": np.ones(H, np.int32),
                       "row": np.ones((1, S), np.int32)})  # fmt: skip
    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(ShapeError, match=rf"`{name}` .*\(4,\)"):
            attention(**x, **{name: bad["few"]})
        with pytest.raises(DtypeError, match=f"`{name}` must be floating"):
            attention(**x, **{name: bad["int"]})
    with pytest.raises(ShapeError, match=r"`positions` .*\(2, 6\)"):
        attention(**x, positions=bad["row"])
    context, lse = attention(**x, return_lse=True)
    merge = anymha.merge_attention
    for wrong in ([], context):
        with pytest.raises(ArgumentError, match="`contexts` must be a list or tuple of arrays"):
            merge(wrong, [lse])
    with pytest.raises(ArgumentError, match=r"Received: 2 and 1. Pass both of each part"):
        merge([context, context], [lse])
    with pytest.raises(ShapeError, match=r"`lses\[1\]` must have shape \(2, 4, 6\)"):
        merge([context] * 2, [lse, lse[:, :, :5]])
    with pytest.raises(ShapeError, match=r"`contexts\[0\]` must have 4 axes"):
        merge([lse], [lse])
    half = ops.astype(context, ops.dtype("float16"))
    with pytest.raises(DtypeError, match=r"`contexts` must have one dtype. Received: float32 and"):
        merge([context, half], [lse, lse])
    if backend.name != "numpy":
        with pytest.raises(MixedBackendsError):
            merge([context, np.zeros((B, T, H, D), "f")], [lse, lse])


def test_numbers_of_heads_are_one_for_each() -> None:
    x = normal((1, 3, 2, 4), "x").astype(np.float32)
    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(ShapeError, match=rf"`{name}` must have shape \(2,\)"):
            anymha.dot_product_attention(x, x, x, **{name: np.ones(1, np.float32)})
        with pytest.raises(ArgumentError, match=f"`{name}`: Expected an array"):
            anymha.dot_product_attention(x, x, x, **{name: [1.0, 2.0]})
