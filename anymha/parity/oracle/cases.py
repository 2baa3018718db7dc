"""The matrix of cases: small problems; each makes one feature of the layer matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import ml_dtypes
import numpy as np

from anymha.options.config import AttentionConfig
from anymha.parity.oracle.features import SECTIONS
from anymha.parity.oracle.recipe import Arrays, Section


@dataclass(frozen=True)
class MatrixCase:
    """One problem: options, sizes, and the arguments of the call."""

    name: str  # Its name, unique in the matrix
    # Options of the config other than its defaults
    options: Mapping[str, Any] = field(default_factory=dict)
    # Arguments of the call; arrays among them are made from `inputs`
    call: Mapping[str, Any] = field(default_factory=dict)
    query: tuple[int, ...] = (2, 7)  # Shape of the query without its features
    # Shape of key and value without their features; None: the query is all three
    value: tuple[int, ...] | None = None
    widths: tuple[int, int, int] = (12, 12, 12)  # Widths D_q, D_v, D_k
    # Further arrays of the call: names of masks, "attention_bias", "nan" (NaN at the positions that
    # padding masks exclude)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def config(self) -> AttentionConfig:
        """The layer's options, weights' widths included."""
        names = ("query_features", "value_features", "key_features")
        widths = dict(zip(names, self.widths, strict=True))
        return AttentionConfig(**{"num_heads": 4, "key_dim": 6, **widths, **self.options})


@dataclass(frozen=True)
class OracleProblem:
    """A case with its numbers, all NumPy arrays in the dtype of the case."""

    case: MatrixCase
    weights: Arrays  # Canonical weights
    inputs: Arrays  # "query", and "value", "key" and "attention_bias" where the case has them
    masks: Arrays  # Boolean masks by argument
    d_output: np.ndarray  # Cotangent of the output, for gradients
    d_scores: np.ndarray  # Cotangent of the scores


def make_problem(case: MatrixCase, seed: int = 0) -> OracleProblem:
    """The numbers of a case: weights and inputs that make logits of order one."""
    config = case.config
    dtype = numpy_dtype(config.dtype)

    def rng(name: str) -> np.random.Generator:  # one for each array: none depends on another
        return np.random.default_rng([seed, *case.name.encode(), *name.encode()])

    def normal(name: str, shape: tuple[int, ...], spread: float = 1.0) -> np.ndarray:
        return (spread * rng(name).standard_normal(shape)).astype(dtype)

    spread = 1.5 / np.sqrt(case.widths[0])
    weights = {
        name: normal(name, shape, spread if name.endswith("kernel") else 0.5)
        for name, shape in config.weight_shapes().items()
    }
    for name, own in config.feature_weights.items():
        weights[name] += own.initial == "ones"
    inputs = {"query": normal("query", (*case.query, case.widths[0]))}
    if case.value is not None:
        inputs["value"] = normal("value", (*case.value, case.widths[1]))
        inputs["key"] = normal("key", (*case.value, case.widths[2]))
    masks = {}
    for name, shape in case.inputs.items():
        if name == "attention_bias":
            inputs[name] = normal(name, shape, 2.0)
        elif name != "nan":
            masks[name] = _mask(rng(name), name, shape)
    if "nan" in case.inputs:
        seen = masks["value_mask"][..., None]
        inputs |= {n: np.where(seen, inputs[n], np.nan).astype(dtype) for n in ("value", "key")}
    output, scores = result_shapes(case)
    names = (config.dtype, config.compute_dtype or config.dtype)
    narrow = min(map(numpy_dtype, names), key=lambda dtype: dtype.itemsize)
    d_output = rng("d_output").standard_normal(output).astype(narrow)
    d_scores = rng("d_scores").standard_normal(scores).astype(narrow)
    return OracleProblem(case, weights, inputs, masks, d_output, d_scores)


def _mask(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "attention_mask":
        mask = rng.random(shape) < 0.6
        mask[..., 0, :] = False  # the first query attends to nothing
        return mask
    # Padding: the first n positions count; at least half, or no softmax is left to differentiate.
    lengths = rng.integers((shape[-1] + 1) // 2, shape[-1], size=shape[:-1])
    return np.arange(shape[-1]) < lengths[..., None]


def trio(inputs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Query, value and key; a missing one is the very object that it defaults to."""
    query = inputs["query"]
    value = inputs.get("value", query)
    return query, value, inputs.get("key", value)


def axes_of(config: AttentionConfig, rank: int) -> tuple[list[int], list[int]]:
    """The batch axes and the attention axes of inputs of this rank."""
    named: Any = config.attention_axes or range(1, rank - 1)
    attention = [axis % rank for axis in named]
    return [axis for axis in range(rank - 1) if axis not in attention], attention


def result_shapes(case: MatrixCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of output and scores."""
    config = case.config
    batch, attention = axes_of(config, len(case.query) + 1)
    keys = case.value or case.query
    lengths = [shape[axis] for shape in (case.query, keys) for axis in attention]
    features: Any = case.widths[:1] if config.output_shape is None else config.output_shape
    scores = (*(case.query[axis] for axis in batch), config.num_heads, *lengths)
    return (*case.query, *features), scores


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, "bfloat16" included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


_CROSS: dict[str, Any] = {"value": (2, 9), "widths": (12, 10, 8)}
_IDS = np.array([[0, 0, 0, 1, 1, 2, -1], [4, 4, 4, -2, 7, 7, 4]], np.int32)
_KEY_IDS = np.array([[0, 0, 0, 0, 1, 1, 2, 2, -1], [4, 7, 4, 7, -1, 4, 7, 9, 4]], np.int32)
_PADDED = {"query_mask": (2, 7), "value_mask": (2, 9)}
_EVERYTHING: dict[str, Any] = {
    **_CROSS,
    "options": {"num_key_value_heads": 2, "value_dim": 5, "output_shape": (3, 2)},
    "call": {"use_causal_mask": True, "query_offset": 2},
    "inputs": {**_PADDED, "attention_mask": (2, 4, 7, 9), "attention_bias": (4, 7, 9)},
}


def _typed(dtype: str, **options: Any) -> dict[str, Any]:
    return {**_EVERYTHING, "options": {**_EVERYTHING["options"], "dtype": dtype, **options}}


_FEATURES: tuple[MatrixCase, ...] = (
    MatrixCase("self"),
    MatrixCase("cross", **_CROSS),
    MatrixCase("value_dim", {"value_dim": 5}),
    MatrixCase("causal", call={"use_causal_mask": True}),
    MatrixCase("causal, offset", call={"use_causal_mask": True, "query_offset": 2}, **_CROSS),
    MatrixCase("causal, offset per batch", **_CROSS,
               call={"use_causal_mask": True, "query_offset": np.array([0, 3], np.int32)}),
    MatrixCase("window", {"sliding_window": 2}),
    MatrixCase("window, causal", {"sliding_window": 3}, {"use_causal_mask": True}),
    MatrixCase("padding", **_CROSS, inputs=_PADDED),
    MatrixCase("padding holds NaN", **_CROSS, inputs={"value_mask": (2, 9), "nan": ()}),
    MatrixCase("key mask", **_CROSS, inputs={"key_mask": (2, 9)}),
    MatrixCase("mask (T, S)", inputs={"attention_mask": (7, 7)}),
    MatrixCase("mask (B, T, S)", inputs={"attention_mask": (2, 7, 7)}),
    MatrixCase("mask (B, H, T, S)", inputs={"attention_mask": (2, 4, 7, 7)}),
    MatrixCase("rotary, positions",
               {"rotary": {"layout": "interleaved", "columns": "last", "dim": 4, "base": 50.0}},
               {"positions": np.array([[3, 1, 4, 1, 5, 9, 2], [0, 2, 4, 6, 8, 10, 12]], np.int32),
                "key_positions": np.arange(9, 0, -1, dtype=np.int32)}, **_CROSS),
    MatrixCase("segments", call={"segment_ids": _IDS}),
    MatrixCase("segments, causal", {"sliding_window": 3},
               {"segment_ids": _IDS, "use_causal_mask": True}),
    MatrixCase("segments, cross", {"num_key_value_heads": 2, "rotary": True, "dropout": 0.3},
               {"segment_ids": _IDS, "key_segment_ids": _KEY_IDS, "training": True, "seed": 3,
                "positions": np.array([0, 1, 2, 0, 1, 0, 0], np.int32),
                "key_positions": np.array([0, 1, 2, 3, 0, 1, 0, 1, 0], np.int32)}, **_CROSS,
               inputs={"value_mask": (2, 9)}),
    MatrixCase("every row masked", inputs={"attention_mask": (1, 7)}),
    MatrixCase("bias (H, T, S)", inputs={"attention_bias": (4, 7, 7)}),
    MatrixCase("bias (B, 1, 1, S)", inputs={"attention_bias": (2, 1, 1, 7)}),
    MatrixCase("N-D, two axes", query=(2, 3, 4), value=(2, 2, 5),
               inputs={"attention_mask": (2, 3, 4, 2, 5), "value_mask": (2, 2, 5)}),
    MatrixCase("N-D, one axis of two", {"attention_axes": (1,)}, {"use_causal_mask": True},
               query=(2, 5, 3)),
    MatrixCase("N-D, negative axes", {"attention_axes": (-2, -4)}, query=(3, 2, 4)),
    MatrixCase("grouped heads", {"num_key_value_heads": 2}),
    MatrixCase("one key head", {"num_key_value_heads": 1}),
    MatrixCase("output shape", {"output_shape": (2, 3)}),
    MatrixCase("scale", {"scale": 0.9}),
    MatrixCase("large logits", {"scale": 8.0}),  # their exp is infinite
    MatrixCase("no bias", {"use_bias": False}),
    MatrixCase("two biases of four", {"use_bias": ("query", "value")}),
    MatrixCase("dropout", {"dropout": 0.3}, {"training": True, "seed": 11}),
    MatrixCase("everything", **_EVERYTHING),
    MatrixCase("float16", **_typed("float16")),
    MatrixCase("bfloat16", **_typed("bfloat16")),
    MatrixCase("float64", **_typed("float64")),
    MatrixCase("float32 in bfloat16", **_typed("float32", compute_dtype="bfloat16")),
)  # fmt: skip

_REPRODUCIBLE: tuple[MatrixCase, ...] = (
    MatrixCase("reproducible", **_typed("float32", compute_dtype="float64")),
    MatrixCase("reproducible, dropout", {"dropout": 0.1, "compute_dtype": "float64"},
               {"training": True, "seed": 5, "use_causal_mask": True}),
    MatrixCase("reproducible, 2^20 outputs",
               {"num_heads": 2, "key_dim": 16, "compute_dtype": "float64"},
               {"use_causal_mask": True}, query=(64, 64), widths=(256, 256, 256)),
)  # fmt: skip


def option_cases(section: type[Section]) -> Iterator[MatrixCase]:
    """Cases that make an option matter: alone with each of its examples, and with everything."""
    option = section.option
    for value in section.examples:
        shown = next(iter(value.values())) if isinstance(value, Mapping) else value
        name = option if len(section.examples) == 1 else f"{option} {shown}"
        yield MatrixCase(name, {option: value}, **_CROSS)
    value = section.examples[-1]
    training = {"training": True, "seed": 11}
    yield MatrixCase(f"{option}, dropout", {"dropout": 0.3, option: value}, training)
    yield MatrixCase(f"{option}, everything", **_typed("float32", **{option: value}))
    for dtype in ("float16", "bfloat16"):
        yield MatrixCase(f"{option}, {dtype}", **_typed(dtype, **{option: value}))
    typed = _typed("float32", compute_dtype="float64", **{option: value})
    yield MatrixCase(f"{option}, reproducible", **typed)


def has_option(section: type[Section]) -> bool:
    """Whether the layer has the section's option."""
    return section.option in {field.name for field in fields(AttentionConfig)}


_OPTIONS = (option_cases(section) for section in SECTIONS.values() if has_option(section))
MATRIX: tuple[MatrixCase, ...] = (
    *_FEATURES,
    *(case for several in _OPTIONS for case in several),
    *_REPRODUCIBLE,
)
