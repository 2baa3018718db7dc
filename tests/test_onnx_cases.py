"""ONNX's own conformance cases of Attention-23, -24 and -25 and RotaryEmbedding-23.

The cases and their expected numbers come from the package `onnx`. What the operators have besides
attention is done here in NumPy: heads are packed and unpacked, keys of a past stand before the new
ones, a short mask hides what lies after it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.attention.features.rotary import RotaryPositions
from anymha.framework.registry import Backend
from tests.conftest import BACKENDS, usable
from tests.frameworks import required
from tests.support import native

pytestmark = pytest.mark.usefixtures("quick_programs")

required("onnx")

AFTER_SOFTMAX = 3
"""The mode of `qk_matmul_output` that are the probabilities; the others are logits."""


@dataclass(frozen=True)
class Case:
    """One case: inputs, attributes and expected outputs of a node, by ONNX's names."""

    inputs: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any]
    outputs: Mapping[str, np.ndarray]


def _cases(module: str, name: str) -> dict[str, Case]:
    """The cases of an operator, by name; the package's own functions make them."""
    helper = importlib.import_module("onnx.helper")
    folder = importlib.import_module(f"onnx.backend.test.case.node.{module}")
    maker, found = getattr(folder, name), dict[str, Case]()

    def expect(node: Any, inputs: Any, outputs: Any, name: str, **_: Any) -> None:
        given = [place for place in node.input if place]
        made = [place for place in node.output if place]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        found[name.removeprefix("test_")] = Case(
            dict(zip(given, inputs, strict=True)), attributes, dict(zip(made, outputs, strict=True))
        )

    state, own = np.random.get_state(), folder.expect
    np.random.seed(0)
    folder.expect = expect
    try:
        for export in sorted(name for name in dir(maker) if name.startswith("export")):
            getattr(maker, export)()
    finally:
        folder.expect = own
        np.random.set_state(state)
    return found


ATTENTION = _cases("attention", "Attention")
ROTARY = _cases("rotaryembedding", "RotaryEmbedding")


def _heads_behind(x: np.ndarray, heads: int | None) -> np.ndarray:
    """(B, T, H, d) of (B, H, T, d), or of (B, T, H * d) where the number of heads is told."""
    return x.swapaxes(1, 2) if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1)


def _as_asked(case: Case, context: np.ndarray) -> np.ndarray:
    """A context (B, T, H, d) with its axes as those of the case's query."""
    if case.inputs["Q"].ndim == 4:
        return context.swapaxes(1, 2)
    return context.reshape(*context.shape[:2], -1)


def _call(case: Case) -> dict[str, Any]:
    """The arguments of `dot_product_attention` that mean the same as the node."""
    inputs, attributes = case.inputs, case.attributes
    shared = attributes.get("kv_num_heads")
    query = _heads_behind(inputs["Q"], attributes.get("q_num_heads"))
    key, value = (_heads_behind(inputs[name], shared) for name in ("K", "V"))
    offset: Any = 0
    if "past_key" in inputs:
        past = [_heads_behind(inputs[name], shared) for name in ("past_key", "past_value")]
        key, value = (np.concatenate(pair, axis=1) for pair in zip(past, (key, value), strict=True))
        offset = past[0].shape[1]
    call: dict[str, Any] = {"query": query, "key": key, "value": value}
    if "nonpad_kv_seqlen" in inputs:
        lengths = inputs["nonpad_kv_seqlen"]
        call["value_mask"] = np.arange(key.shape[1]) < lengths[:, None]
        offset = (lengths - query.shape[1]).astype(np.int32)
    if "attn_mask" in inputs:
        mask = inputs["attn_mask"]
        is_bool = mask.dtype == bool
        behind = [(0, 0)] * (mask.ndim - 1) + [(0, key.shape[1] - mask.shape[-1])]
        mask = np.pad(mask, behind, constant_values=False if is_bool else -np.inf)
        call["mask" if is_bool else "bias"] = mask if is_bool else mask.astype(query.dtype)
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if max(sides) >= 0:
        call["window"] = tuple(None if side < 0 else side for side in sides)
    if attributes.get("softcap"):
        call["softcap"] = attributes["softcap"]
    return call | {
        "scale": attributes.get("scale"),
        "is_causal": bool(attributes.get("is_causal")),
        "query_offset": offset,
    }


def test_the_cases_are_there() -> None:
    seen = {name for case in ATTENTION.values() for name in (*case.inputs, *case.attributes)}
    assert {"past_key", "nonpad_kv_seqlen", "attn_mask", "softcap", "left_window_size"} <= seen
    assert len(ATTENTION) >= 90
    assert len(ROTARY) >= 8


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(backend: Backend, name: str) -> None:
    case = ATTENTION[name]
    given = native(backend.ops, _call(case))
    _check(
        case,
        *(
            backend.ops.to_numpy(array)
            for array in anymha.dot_product_attention(**given, return_scores=True)
        ),
    )


def _check(case: Case, context: np.ndarray, scores: np.ndarray) -> None:
    """A context (B, T, H, d) and probabilities (B, H, T, S) are those that the case expects."""
    expected = case.outputs["Y"]
    # ONNX rounds each step of half precision, this library the result.
    bound = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[str(expected.dtype)]
    got = _as_asked(case, context).astype(np.float64)
    np.testing.assert_allclose(got, expected.astype(np.float64), rtol=bound, atol=bound)
    if case.attributes.get("qk_matmul_output_mode") == AFTER_SOFTMAX:
        expected = case.outputs["qk_matmul_output"].astype(np.float64)
        np.testing.assert_allclose(scores.astype(np.float64), expected, rtol=bound, atol=bound)


BEYOND = "attention_local_window_with_past"
"""Its last queries stand after all keys: a cache has no positions without keys."""
WITH_PAST = [
    name
    for name, case in ATTENTION.items()
    if {"past_key", "nonpad_kv_seqlen"} & set(case.inputs) and name != BEYOND
]
OF_EACH_KIND = {
    (frozenset(ATTENTION[name].inputs), ATTENTION[name].attributes.get("is_causal"),
     "left_window_size" in ATTENTION[name].attributes): name for name in WITH_PAST
}.values()  # fmt: skip
"""One of these for each kind of call, for backends that compile a program for each."""


def _layer_of(backend: Backend, call: dict[str, Any]) -> Any:
    """A layer of one input, queries, keys and values beside each other, that projects nothing."""
    query, value = call["query"], call["value"]
    (heads, width), (shared, out) = query.shape[2:], value.shape[2:]
    sizes = [heads * width, shared * width, shared * out]
    layer = anymha.MultiHeadAttention(
        heads, width, out, use_bias=False, output_shape=heads * out, num_key_value_heads=shared,
        sliding_window=call["window"][0] + 1 if "window" in call else None, scale=call["scale"],
        softcap=call.get("softcap"), query_features=sum(sizes), dtype=str(query.dtype),
        backend=backend.name,
    )  # fmt: skip
    parts = np.split(np.eye(sum(sizes), dtype=query.dtype), np.cumsum(sizes)[:-1], axis=1)
    kernels = dict(zip(("query", "key", "value"), parts, strict=True))
    kernels = {
        name: part.reshape(len(part), *call[name].shape[2:]) for name, part in kernels.items()
    }
    kernels["output"] = np.eye(heads * out, dtype=query.dtype).reshape(heads, out, -1)
    return anymha.set_weights(layer, {f"{name}.kernel": part for name, part in kernels.items()})


def _one_input(*parts: np.ndarray) -> np.ndarray:
    """Queries, keys and values (B, T, H, d) as the layer's input; zero where one is shorter."""
    length = max(part.shape[1] for part in parts)
    flat = [part.reshape(*part.shape[:2], math.prod(part.shape[2:])) for part in parts]
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0))) for part in flat], axis=2
    )


def _masks(call: dict[str, Any], queries: int) -> dict[str, np.ndarray]:
    """The mask and the bias by the layer's names, with all axes, for so many queries."""
    found = {}
    for name in ("mask", "bias"):
        if name in call:
            x = call[name].reshape(*[1] * (4 - call[name].ndim), *call[name].shape)
            more = queries - x.shape[2] if x.shape[2] > 1 else 0
            found[f"attention_{name}"] = np.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
    return found


def _cached(backend: Backend, layer: Any, call: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The output, probabilities and the cache of a call that finds the past in a cache."""
    query, key, value, offset = (call[n] for n in ("query", "key", "value", "query_offset"))
    batch, size = key.shape[:2]
    past = np.broadcast_to(offset, (batch,))[:, None]
    there = call.get("value_mask", np.ones((batch, size), bool))
    index = np.arange(size)
    cache = layer.make_cache(batch, size)
    x = native(backend.ops, {"query": _one_input(query[:, :0], key, value),
                             "value_mask": there & (index < past)})  # fmt: skip
    _, cache = layer(**x, cache=cache)
    # New keys, from the past's length on; queries before all keys have none.
    count = max(int((there & (index >= past)).sum(1).max()), query.shape[1])
    places = past + np.arange(count)
    is_new = (places >= 0) & (places < there.sum(1, keepdims=True))
    rows, places = np.arange(batch)[:, None], places.clip(0, size - 1)
    x = {"query": _one_input(query, key[rows, places], value[rows, places]), "value_mask": is_new}
    x |= _masks(call, count)
    return layer(**native(backend.ops, x), cache=cache, return_attention_scores=True)


@pytest.mark.parametrize(
    ("home", "name"),
    [
        (home, name)
        for home in BACKENDS
        for name in (OF_EACH_KIND if home in ("tensorflow", "jax") else WITH_PAST)
    ],
)
def test_layer_with_a_past(home: str, name: str) -> None:
    backend, case = usable(home), ATTENTION[name]
    call = _call(case)
    query, key, value = (call[name] for name in ("query", "key", "value"))
    layer, ops = _layer_of(backend, call), backend.ops
    if call["is_causal"]:
        output, scores, cache = _cached(backend, layer, call)
        for kind, held in (("key", cache.keys), ("value", cache.values)):
            if f"present_{kind}" in case.outputs:
                np.testing.assert_array_equal(ops.to_numpy(held), case.outputs[f"present_{kind}"])
    else:
        x = {"query": _one_input(query, key[:, :0], value[:, :0]), **_masks(call, query.shape[1])}
        if "value_mask" in call:
            x["value_mask"] = call["value_mask"]
        memory = layer.make_memory(ops.from_numpy(_one_input(query[:, :0], key, value)))
        given = native(ops, x)
        output, scores = layer(**given, memory=memory, return_attention_scores=True)
    count = query.shape[1]
    context = ops.to_numpy(output)[:, :count].reshape(*query.shape[:3], -1)
    _check(case, context, ops.to_numpy(scores)[:, :, :count])


def test_cases_with_a_past_are_causal_and_not() -> None:
    causal = {bool(ATTENTION[name].attributes.get("is_causal")) for name in WITH_PAST}
    assert causal == {True, False}
    assert len(WITH_PAST) >= 32


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embedding(backend: Backend, name: str) -> None:
    """Its tables are given, and random: what turns by tables is the feature's own function."""
    ops, case = backend.ops, ROTARY[name]
    x = _heads_behind(case.inputs["input"], case.attributes.get("num_heads"))
    tables = [case.inputs[f"{kind}_cache"] for kind in ("cos", "sin")]
    if "position_ids" in case.inputs:
        tables = [table[case.inputs["position_ids"]] for table in tables]
    layout = "interleaved" if case.attributes.get("interleaved") else "half"
    rotary = anymha.Rotary(dim=case.attributes.get("rotary_embedding_dim"), layout=layout)
    feature = RotaryPositions.of_heads(rotary, x.shape[-1])
    cos, sin = (ops.from_numpy(table[:, :, None]) for table in tables)
    turned = ops.to_numpy(feature.turned(ops, ops.from_numpy(x), cos, sin))
    (expected,) = case.outputs.values()
    got = turned.swapaxes(1, 2) if expected.ndim == 4 else turned.reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [None, 4])
def test_rotate_with_real_tables(backend: Backend, layout: Any, dim: int | None) -> None:
    """ONNX's reference with the tables of the paper's angles."""
    reference = importlib.import_module("onnx.reference.ops.op_rotary_embedding")
    rng, width = np.random.default_rng(0), dim or 8
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    places = np.array([[0, 1, 2, 3, 4], [7, 90, 2, 40_000, 5]])
    angles = places[..., None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    expected = reference.rotary_embedding(
        x.swapaxes(1, 2),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
        interleaved=layout == "interleaved",
        rotary_embedding_dim=dim,
    )
    rotary = anymha.Rotary(dim=dim, layout=layout)
    given = native(backend.ops, {"x": x, "positions": places})
    turned = backend.ops.to_numpy(anymha.rotate(**given, rotary=rotary))
    # Angles of 40,000 are exact to 0.002 in float32.
    np.testing.assert_allclose(turned.swapaxes(1, 2), expected, rtol=1e-5, atol=1e-2)
    early = places < 100
    np.testing.assert_allclose(turned[early], expected.swapaxes(1, 2)[early], rtol=1e-5, atol=3e-5)
