"""The faults that the self-test injects: for each its cause, its stage, and a call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anymha.parity.oracle.cases import Arrays, has_option
from anymha.parity.oracle.features import SECTIONS
from anymha.parity.oracle.recipe import Section

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 7, 9, 4, 6
FEATURES = HEADS * WIDTH


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        wrong: Its name in `tests.selftest.port`.
        cause: Its name in the catalogue.
        stage: The first stage that is wrong.
        case: The features that the call must have for it to matter: see `call_with_fault`.
        options: Options of the layer.
        dtype: Of weights and inputs.
        from_output: What its output alone tells in place of the cause.
    """

    wrong: str
    cause: str
    stage: str
    case: tuple[str, ...] = ("mask",)
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    from_output: str = ""


GROUPED = {"num_key_value_heads": 2}
DROPPING = {"dropout": 0.3}
_FAULTS = (
    Fault("mask inverted", "inverted mask", "masked_logits"),
    Fault("mask ignored", "ignored mask", "masked_logits"),
    Fault("mask added", "additive mask", "masked_logits"),
    Fault("mask transposed", "transposed mask", "masked_logits", ("mask", "square")),
    Fault("mask of the heads", "mask of batch and heads exchanged", "masked_logits",
          ("mask", "four")),
    Fault("segments ignored", "segments ignored", "masked_logits", ("segments",)),
    Fault("segment ids shifted", "segment ids shifted by one", "masked_logits", ("segments",)),
    Fault("padding of segments seen", "padding of segments seen", "masked_logits", ("segments",)),
    Fault("lengths of key segments reversed", "segments of other lengths", "masked_logits",
          ("segments",)),
    Fault("lower segments seen", "segments compared by order", "masked_logits",
          ("segments", "causal")),
    Fault("positions not restarted", "positions not restarted in segments", "query",
          ("segments", "restarted"), {"rotary": True}),
    Fault("positions of the first sequence", "rotary of other positions", "query",
          ("positions",), {"rotary": True}),
    Fault("key positions ignored", "rotary of other positions", "key",
          ("positions",), {"rotary": True}),
    Fault("norm on the other side of rotary", "query_key_norm on the other side of rotary", "query",
          (), {"rotary": True, "query_key_norm": "rms"}),
    Fault("cosines and sines exchanged", "rotary with cosines and sines exchanged", "query",
          (), {"rotary": True}),
    Fault("rotary along the heads", "rotary along another axis", "query",
          (), {"rotary": True, "num_key_value_heads": 2}),
    Fault("half the exponents", "rotary of other exponents", "query", (), {"rotary": True}),
    Fault("norms exchanged", "query_key_norm by the weight of another", "query", (),
          {"rotary": True, "query_key_norm": "rms"}),
    Fault("norm by the first head's weight", "query_key_norm by the weight of another head",
          "query", (), {"query_key_norm": {"kind": "rms", "over": "heads"}}),
    Fault("alibi before the softcap", "alibi before the softcap", "logits", (),
          {"alibi": True, "softcap": 0.6}),
    Fault("query columns in pairs", "rotary columns of weights permuted", "query", (),
          {"rotary": True}),
    Fault("keys averaged by group", "heads alike in groups", "key"),
    Fault("scale by the logarithm of the position", "scale that grows with the position", "logits"),
    Fault("the first keys seen by all", "first keys seen by all", "masked_logits", ("causal",)),
    Fault("the first keys seen beside the window", "first keys seen by all", "masked_logits",
          ("causal",), {"sliding_window": 3}),
    Fault("window not asked for", "window not asked for", "masked_logits", ("causal",)),
    Fault("causal by blocks", "causal mask by blocks", "masked_logits", ("causal",)),
    Fault("last segment left out", "segment left out", "masked_logits", ("segments",)),
    Fault("segments of the queries for the keys", "segments of the other side", "masked_logits",
          ("segments",)),
    Fault("segments two and two", "segments joined", "masked_logits", ("segments",)),
    Fault("offset taken off", "wrong query offset", "masked_logits", ("causal", "offset")),
    Fault("query bias in another order", "heads interleaved", "query"),
    Fault("query bias and that of the key", "bias of another projection", "query"),
    Fault("causal ignored", "causal mask ignored", "masked_logits", ("causal",)),
    Fault("causal not asked for", "causal mask not asked for", "masked_logits", ("mask",)),
    Fault("other corner", "causal mask at the other corner", "masked_logits", ("causal",)),
    Fault("next key seen", "causal mask off by one", "masked_logits", ("causal",)),
    Fault("own key not seen", "causal mask off by one", "masked_logits", ("causal",)),
    Fault("causal reversed", "causal mask reversed", "masked_logits", ("causal",)),
    Fault("offset ignored", "query offset ignored", "masked_logits", ("causal", "offset")),
    Fault("window wider", "window off by one", "masked_logits", (), {"sliding_window": 3}),
    Fault("window narrower", "window off by one", "masked_logits", (), {"sliding_window": 3}),
    Fault("window twice as wide", "window of another size", "masked_logits", (),
          {"sliding_window": 3}),
    Fault("window ignored", "window ignored", "masked_logits", (), {"sliding_window": 3}),
    Fault("window of one side", "window of one side", "masked_logits", (), {"sliding_window": 3}),
    Fault("window open to the right", "window of one side", "masked_logits", (),
          {"sliding_window": 3}),
    Fault("window inverted", "another kind of window", "masked_logits", (), {"sliding_window": 3}),
    Fault("window by blocks", "another kind of window", "masked_logits", (),
          {"sliding_window": 3}),
    Fault("zeros before the first key", "padding beside the keys seen", "probabilities",
          ("causal",), {"sliding_window": 3}),
    Fault("lengths one short", "mask of other positions", "masked_logits", ("lengths",)),
    Fault("hidden logits filled", "mask applied wrongly", "masked_logits"),
    Fault("mask of another sequence", "mask of another sequence", "masked_logits"),
    Fault("bias left out", "wrong attention bias", "masked_logits", ("mask", "bias")),
    Fault("bias doubled", "wrong attention bias", "masked_logits", ("mask", "bias")),
    Fault("bias of the heads reversed", "attention bias of other positions", "masked_logits",
          ("mask", "bias")),
    Fault("rows mean", "fully masked rows give the mean of the values", "probabilities",
          ("mask", "empty")),
    Fault("rows NaN", "fully masked rows give NaN", "probabilities", ("mask", "empty")),
    Fault("rows unmasked", "fully masked rows are not masked", "probabilities",
          ("mask", "empty")),
    Fault("rows the first key", "fully masked rows are given a key", "probabilities",
          ("mask", "empty")),
    Fault("rows without the output's bias", "fully masked rows without the output's bias",
          "output", ("mask", "empty")),
    Fault("own key hidden", "own key hidden", "masked_logits"),
    Fault("own key shown", "own key seen in spite of the mask", "masked_logits"),
    Fault("scale missing", "wrong scale", "logits"),
    Fault("scale twice", "wrong scale", "logits"),
    Fault("scale by the model's width", "wrong scale", "logits"),
    Fault("scale by the value's width", "wrong scale", "logits", ("mask",), {"value_dim": 5}),
    Fault("query scaled before its bias", "scale before the bias", "query"),
    Fault("sum with an epsilon", "another softmax", "probabilities"),
    Fault("softmax over queries", "softmax over another axis", "probabilities"),
    Fault("softmax over heads", "softmax over another axis", "probabilities"),
    Fault("probabilities transposed", "probabilities transposed", "context", ("square",)),
    Fault("no softmax", "no softmax", "probabilities"),
    Fault("last head even", "another softmax", "probabilities"),
    Fault("attention over the heads", "attention over the heads", "context", ("square",)),
    Fault("rotary scaling multiplied", "rotary angles multiplied", "query", (), {"rotary": {
        "scaling": {"rope_type": "linear", "factor": 4.0}}}),
    Fault("grouped heads tiled", "grouped heads tiled", "logits", ("mask",), GROUPED),
    Fault("key and value exchanged", "inputs exchanged", "key", ("mask", "three")),
    Fault("batch and time exchanged", "batch and time exchanged", "query", ("square",)),
    Fault("rotary halves", "rotary positions, by halves", "query"),
    Fault("rotary pairs", "rotary positions, by pairs", "query"),
    Fault("dropout left on", "dropout left on", "dropped_probabilities",
          from_output="another result each time: dropout left on, or other random numbers"),
    Fault("dropout does not act", "wrong dropout", "dropped_probabilities",
          ("mask", "training"), DROPPING),
    Fault("dropout not scaled", "wrong dropout", "dropped_probabilities",
          ("mask", "training"), DROPPING),
    Fault("heads merged without exchange", "heads merged wrongly", "context"),
    Fault("heads split without exchange", "heads split wrongly", "query"),
    Fault("memory of the first sequence", "another sequence of the batch", "key"),
    Fault("output reversed", "in another order of positions", "output"),
    Fault("inputs normalized", "normalized once more", "query"),
    Fault("inputs scaled", "input scaled", "query"),
    Fault("positions added", "positions added", "query"),
    Fault("query left in", "residual added", "context"),
    Fault("value activated", "activation too many", "value"),
    Fault("query transposed", "transposed kernel", "query"),
    Fault("value transposed", "transposed kernel", "value"),
    Fault("value scaled by rows", "quantised weights scaled on the other axis", "value"),
    Fault("packed in another order", "packed weights in another order", "query"),
    Fault("packed by head", "packed weights split wrongly", "query"),
    Fault("heads interleaved", "heads interleaved", "query"),
    Fault("query bias left out", "missing bias", "query"),
    Fault("value bias left out", "missing bias", "value"),
    Fault("output bias left out", "missing bias", "output"),
    Fault("value bias doubled", "doubled bias", "value"),
    Fault("output bias for each head", "doubled bias", "output"),
    Fault("value bias subtracted", "bias subtracted or elsewhere", "value"),
    Fault("query projected twice", "projection twice or left out", "query"),
    Fault("heads averaged", "heads averaged", "context"),
    Fault("value bias of the key", "bias of another projection", "value"),
    Fault("output interleaved", "output kernel interleaved", "output"),
    Fault("output by the first head", "output projection not applied by head", "output"),
    Fault("output left out", "output projection left out", "output"),
    Fault("value has the key's weights", "weights of another projection", "value"),
    Fault("twice as many heads", "another number of heads", "query"),
    Fault("one head's values for all", "one head for all", "value"),
    Fault("the first head's query kernel doubled", "weights scaled", "query"),
    Fault("parts of the value's kernel exchanged", "shards loaded wrongly", "value"),
    Fault("key and value cut wrongly", "packed parts cut wrongly", "key"),
    Fault("packed without a transpose", "weights reshaped without a transpose", "query"),
    Fault("heads in another order", "heads permuted", "output"),
    Fault("values cut at a half", "stage clipped", "value"),
    Fault("keys in whole numbers", "quantised with a fixed factor", "key"),
    Fault("bfloat16", "computed in bfloat16", "query"),
    Fault("float32", "computed in float32", "query", ("mask",), {}, "float64"),
    Fault("scores averaged", "in the returned scores: averaged over the heads", "scores"),
    Fault("scores after dropout", "in the returned scores: taken after dropout", "scores",
          ("mask", "training"), DROPPING),
)  # fmt: skip


def option_faults(section: type[Section]) -> Iterator[Fault]:
    """The faults of an option, each in a call with a mask and a bias, whose order matters."""
    value = section.examples[0]
    for wrong, cause, stage in section.faults:
        yield Fault(wrong, cause, stage, ("mask", "bias"), {section.option: value})


_WITH_OPTIONS = (option_faults(section) for section in SECTIONS.values() if has_option(section))
FAULTS: tuple[Fault, ...] = (
    *_FAULTS,
    *(fault for several in _WITH_OPTIONS for fault in several),
)
"""Every mistake of the catalogue at least once."""


def call_with_fault(case: tuple[str, ...], dtype: str, seed: int) -> tuple[Arrays, dict[str, Any]]:
    """Inputs and arguments of a call with these features.

    Args:
        case: "mask", "empty" (a row that sees nothing), "causal", "offset", "bias", "training",
            "square" (as many queries as keys), "three" (key and value differ), "four" (in a batch),
            "segments", "restarted" (positions begin anew in each), "positions" (with gaps),
            "lengths" (a mask of lengths).
        dtype: Of the inputs.
        seed: Of all numbers.
    """
    rng = np.random.default_rng([seed, *".".join(case).encode()])
    batch = HEADS if "four" in case else BATCH
    queries = KEYS if "square" in case else QUERIES

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    inputs = {"query": normal(batch, queries, FEATURES), "value": normal(batch, KEYS, FEATURES)}
    if "three" in case:
        inputs["key"] = normal(batch, KEYS, FEATURES)
    call: dict[str, Any] = {}
    if "mask" in case:
        mask = rng.random((batch, queries, KEYS)) < 0.6
        mask[..., 0] |= ~mask.any(-1)
        if "empty" in case:
            mask[0, 3] = False
        call["attention_mask"] = mask
    if "lengths" in case:
        lengths = np.array([KEYS, KEYS - 3])[:, None, None]
        call["attention_mask"] = np.tile(np.arange(KEYS) < lengths, (1, queries, 1))
    if "bias" in case:
        call["attention_bias"] = normal(HEADS, queries, KEYS)
    if "causal" in case:
        call["use_causal_mask"] = True
    if "training" in case:
        call |= {"training": True, "seed": 5}
    if "segments" in case:
        ids, key_ids = ([0, 0, 0, 1, 1, 2, -1], [0, 0, 0, 0, 1, 1, 2, 2, -1])
        call["segment_ids"], call["key_segment_ids"] = (
            np.tile(np.array(n, np.int32), (batch, 1)) for n in (ids, key_ids)
        )
    if "restarted" in case:
        call["positions"] = np.array([0, 1, 2, 0, 1, 0, 0], np.int32)
        call["key_positions"] = np.array([0, 1, 2, 3, 0, 1, 0, 1, 0], np.int32)
    if "positions" in case:
        call["positions"], call["key_positions"] = (
            np.cumsum(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
            for length in (queries, KEYS)
        )
    if "offset" in case:
        call["query_offset"] = 2
    return inputs, call


def weights_with_faults(weights: Mapping[str, np.ndarray], wrong: Collection[str]) -> Arrays:
    """The weights as a port with these faults loads them."""
    w = dict(weights)
    features, heads, width = w["query.kernel"].shape
    for name in ("query", "key", "value"):
        if f"{name} transposed" in wrong:
            square = w[f"{name}.kernel"].reshape(features, heads * width)
            w[f"{name}.kernel"] = square.T.reshape(features, heads, width)
        if f"{name} scaled by rows" in wrong:
            square = w[f"{name}.kernel"].reshape(features, heads * width)
            scales = np.abs(square).max(0)
            w[f"{name}.kernel"] = (square / scales * scales[:, None]).reshape(features, heads, -1)
        if "heads interleaved" in wrong:
            for part in ("kernel", "bias"):
                flat = w[f"{name}.{part}"].reshape(*w[f"{name}.{part}"].shape[:-2], width, -1)
                w[f"{name}.{part}"] = np.moveaxis(flat, -1, -2)
    if "norm by the first head's weight" in wrong:
        own = w["query_norm.scale"].reshape(heads, width)
        w["query_norm.scale"] = np.tile(own[0], heads).reshape(w["query_norm.scale"].shape)
    if "query columns in pairs" in wrong:
        for part in ("kernel", "bias"):
            array = w[f"query.{part}"]
            pairs = np.stack([array[..., : width // 2], array[..., width // 2 :]], -1)
            w[f"query.{part}"] = pairs.reshape(array.shape)
    if "query bias in another order" in wrong:
        w["query.bias"] = w["query.bias"].T.reshape(heads, width)
    if "query bias and that of the key" in wrong:
        w["query.bias"] = w["query.bias"] + w["key.bias"]
    if "packed in another order" in wrong:
        for part in ("kernel", "bias"):
            q, k, v = (weights[f"{name}.{part}"] for name in ("query", "key", "value"))
            w |= {f"query.{part}": k, f"key.{part}": v, f"value.{part}": q}
    if "packed by head" in wrong:
        block = np.concatenate(
            [weights[f"{n}.kernel"].reshape(features, -1) for n in ("query", "key", "value")], 1
        ).reshape(features, heads, 3, width)
        biases = np.concatenate(
            [weights[f"{n}.bias"].reshape(-1) for n in ("query", "key", "value")]
        ).reshape(heads, 3, width)
        for i, name in enumerate(("query", "key", "value")):
            w[f"{name}.kernel"], w[f"{name}.bias"] = block[:, :, i], biases[:, i]
    if "value has the key's weights" in wrong:
        w |= {f"value.{part}": weights[f"key.{part}"] for part in ("kernel", "bias")}
    if "one head's values for all" in wrong:
        w |= {n: np.broadcast_to(w[n][..., :1, :], w[n].shape)
              for n in ("value.kernel", "value.bias")}  # fmt: skip
    if "the first head's query kernel doubled" in wrong:
        factors = np.where(np.arange(heads) == 0, 2.0, 1.0)[:, None]
        w["query.kernel"] = (w["query.kernel"] * factors).astype(w["query.kernel"].dtype)
    if "parts of the value's kernel exchanged" in wrong:
        one, two = np.split(w["value.kernel"], 2)
        w["value.kernel"] = np.concatenate([two, one])
    if "twice as many heads" in wrong:
        w |= {n: a.reshape(*a.shape[:-2], 2 * heads, -1)
              for n, a in w.items() if not n.startswith("output")}  # fmt: skip
        w["output.kernel"] = w["output.kernel"].reshape(2 * heads, -1, features)
    if "key and value cut wrongly" in wrong:
        for part in ("kernel", "bias"):
            pack = np.stack([weights[f"{n}.{part}"] for n in ("key", "value")], -2)
            blocks = pack.reshape(*pack.shape[:-3], 2, heads, width)
            w |= {f"key.{part}": blocks[..., 0, :, :], f"value.{part}": blocks[..., 1, :, :]}
    if "packed without a transpose" in wrong:
        pack = np.stack([weights[f"{n}.kernel"] for n in ("query", "key", "value")], 1)
        read = np.moveaxis(pack.reshape(3, heads, width, features), -1, 1)
        w |= {f"{n}.kernel": a for n, a in zip(("query", "key", "value"), read, strict=True)}
    if "query and gate split wrongly" in wrong:
        for part in ("kernel", "bias"):
            both = np.stack([weights[f"{n}.{part}"] for n in ("query", "gate")], -2)
            blocks = both.reshape(*both.shape[:-3], 2, heads, width)
            w |= {f"query.{part}": blocks[..., 0, :, :], f"gate.{part}": blocks[..., 1, :, :]}
    if "value bias of the key" in wrong:
        w["value.bias"] = weights["key.bias"]
    if "output interleaved" in wrong:
        kernel = weights["output.kernel"]
        parts = kernel.reshape(width, heads, -1)
        w["output.kernel"] = np.stack([parts[:, h] for h in range(heads)])
    if "heads in another order" in wrong:
        w["output.kernel"] = np.roll(weights["output.kernel"], 1, axis=0)
    return {name: np.ascontiguousarray(array) for name, array in w.items()}
