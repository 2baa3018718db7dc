"""The tool tested with itself: planted mistakes must be caught and named, honest layers passed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.framework.registry import Backend, get_layer
from anymha.interchange.layers import set_weights
from anymha.parity.adapters import subject
from anymha.parity.comparison.baseline import Standard
from anymha.parity.comparison.compare import compare
from anymha.parity.oracle.cases import Arrays, has_option, numpy_dtype
from anymha.parity.oracle.features import SECTIONS, sections_of
from anymha.parity.oracle.truth import fold
from anymha.parity.reports.report import Comparison
from anymha.parity.selftest.injected_faults import (
    BATCH,
    FEATURES,
    HEADS,
    KEYS,
    PLANTS,
    QUERIES,
    WIDTH,
    Plant,
    misloaded,
    planted_call,
)
from anymha.parity.selftest.port import Port
from anymha.parity.stages.trace import Request, Trace, problem_of

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Found:
    """What became of a planted mistake, or of two.

    Args:
        planted: The mistakes.
        backend: The framework that they are in.
        tells: Whether the port told its stages.
        caught: Whether the comparison failed, as it must.
        stage: Whether it named the first stage.
        cause: Whether it named the mistake; of two, the first.
        both: Whether it named both; of one, as `cause`.
        told: What it said.
    """

    planted: tuple[str, ...]
    backend: str
    tells: bool
    caught: bool
    stage: bool
    cause: bool
    both: bool
    told: str


def plant_all(
    backends: Sequence[Backend], progress: Progress = lambda *_: None, seed: int = 0
) -> Iterator[Found]:
    """Every mistake in every framework, with stages told and without."""
    for plant in PLANTS:
        for backend in backends:
            progress(plant.wrong, backend.name)
            for tells in (True, False):
                yield try_planted(backend, (plant,), tells, seed)


def plant_pairs(
    backends: Sequence[Backend], progress: Progress = lambda *_: None, seed: int = 0
) -> Iterator[Found]:
    """Two mistakes together, of different stages and of one kind of call."""
    for one, other in itertools.combinations(PLANTS, 2):
        if goes_together(one, other):
            for backend in backends:
                progress(f"{one.wrong}, {other.wrong}", backend.name)
                yield try_planted(backend, (one, other), True, seed)


def goes_together(one: Plant, other: Plant) -> bool:
    """Whether two mistakes can be made at once and neither hides the other."""
    alike = one.options == other.options and one.dtype == other.dtype
    chance = {"dropout left on", "bfloat16", "batch and time exchanged", "scores averaged",
              "no softmax"}  # fmt: skip
    clear = not chance & {one.wrong, other.wrong}
    return alike and clear and one.case == other.case == ("mask",) and one.stage != other.stage


def try_planted(backend: Backend, plants: tuple[Plant, ...], tells: bool, seed: int = 0) -> Found:
    """Compare a port with these mistakes with the layer."""
    plant = plants[0]
    ops, wrong = backend.ops, {p.wrong for p in plants}
    inputs, call = planted_call(plant.case, plant.dtype, seed)
    layer, weights = make_layer(plant.options, plant.dtype, seed)
    port = Port(
        ops, misloaded(weights, wrong), wrong, tells, plant.options.get("sliding_window"),
        plant.options.get("dropout", 0.0), sections_of(layer.config),
    )  # fmt: skip
    given = {name: ops.from_numpy(array) for name, array in inputs.items()}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of frameworks, at what the planted mistake does
        report = compare(layer, port, given, **call)
    order = ("query", "key", "value", "logits", "masked_logits", "probabilities",
             "dropped_probabilities", "context", "output", "scores")  # fmt: skip
    first = min(plants, key=lambda p: order.index(p.stage))
    causes = [c.name for c in report.diagnosis.causes] if report.diagnosis else []
    alternatives = report.diagnosis.alternatives if report.diagnosis else ()
    named = {*causes, *(words.partition(" (")[0] for words in alternatives)}
    return Found(
        tuple(p.wrong for p in plants),
        backend.name,
        tells,
        not report.passed,
        report.first_divergence == first.stage,
        bool(causes) and (causes[0] == first.cause or (len(plants) == 1 and first.cause in named)),
        {p.cause for p in plants} <= named,
        report.verdict,
    )


def make_layer(options: Any, dtype: str, seed: int, backend: str = "numpy") -> tuple[Any, Arrays]:
    """A layer with random weights and biases, and these."""
    layer = get_layer(backend)(HEADS, WIDTH, query_features=FEATURES, dtype=dtype, **dict(options))
    weights = random_weights(layer, dtype, seed)
    return set_weights(layer, weights), weights


def random_weights(layer: Any, dtype: str, seed: int) -> Arrays:
    """Random weights for a layer, its biases not zero."""
    rng = np.random.default_rng([seed, 7])
    return {
        name: (rng.standard_normal(shape) * (0.5 if name.endswith("bias") else 0.3)).astype(
            numpy_dtype(dtype)
        )
        for name, shape in layer.config.weight_shapes().items()
    }


DTYPES = ("float32", "float64", "float16", "bfloat16")

STRUCTURES = 200
"""How many kinds of layers and calls are drawn for each dtype."""


@dataclass(frozen=True)
class Alarm:
    """Two honest layers that were said to differ.

    Args:
        dtype: Of both.
        pair: Their backends.
        number: Of the configuration; with it the same numbers come again.
        told: The whole text.
    """

    dtype: str
    pair: tuple[str, str]
    number: int
    told: str


def honest(
    backends: Sequence[Backend],
    count: int,
    dtypes: Sequence[str] = DTYPES,
    progress: Progress = lambda *_: None,
) -> Iterator[list[Alarm]]:
    """The alarms of each random configuration in each dtype, which should be none.

    Every two backends are compared, each way round; a single one with itself.
    """
    layers: dict[Any, Any] = {}  # a layer keeps what it compiles
    for dtype in dtypes:
        for number in range(count):
            progress("honest", f"{dtype} {number}")
            options, request = honest_call(number, dtype)
            traces = {}
            for backend in backends:
                kind = (backend.name, dtype, *sorted(options.items()))
                if kind not in layers:
                    layers[kind] = make_layer(options, dtype, number, backend.name)[0]
                layer = layers[kind]
                layer = layers[kind] = set_weights(layer, random_weights(layer, dtype, number))
                traces[backend.name] = subject(layer).trace(request, None)
            yield [
                Alarm(dtype, pair, number, report.to_text())
                for pair, report in _each_way(request, traces)
                if not report.passed
            ]


def _each_way(
    request: Request, traces: dict[str, Trace]
) -> Iterator[tuple[tuple[str, str], Comparison]]:
    """Every two traces of layers with the same weights; a single one with itself."""
    basis = next(iter(traces.values()))
    assert basis.config is not None
    assert basis.weights is not None
    with np.errstate(all="ignore"):
        folded = fold(problem_of(basis.config, basis.weights, request))
        standards = {name: Standard(request, folded, trace) for name, trace in traces.items()}
        for pair in list(itertools.permutations(traces, 2)) or [(name, name) for name in traces]:
            yield pair, standards[pair[0]].judge(traces[pair[1]])


def honest_call(number: int, dtype: str) -> tuple[dict[str, Any], Request]:
    """A random configuration: options of the layer, and a call. Few shapes, many numbers.

    Options and arguments are drawn anew `STRUCTURES` times for each dtype, as JAX and TensorFlow
    compile each kind of call; weights, inputs, masks and spread are new in every configuration.
    """
    drawn, rng = _rng(number % STRUCTURES, dtype), _rng(number, dtype)
    options: dict[str, Any] = {}
    if drawn.random() < 0.4:
        options["num_key_value_heads"] = 2
    if drawn.random() < 0.3:
        options["value_dim"] = 5
    if drawn.random() < 0.2:
        options["use_bias"] = False
    if drawn.random() < 0.2:
        options["sliding_window"] = 3
    own, masked, padded, biased, causal = drawn.random(5) < (0.3, 0.5, 0.3, 0.2, 0.4)
    for section in SECTIONS.values():
        if has_option(section) and drawn.random() < 0.2:
            options[section.option] = section.examples[0]
    spread = float(rng.choice([0.1, 1.0, 4.0]))
    narrow = numpy_dtype(dtype)

    def normal(*shape: int) -> np.ndarray:
        return (spread * rng.standard_normal(shape)).astype(narrow)

    inputs = {"query": normal(BATCH, QUERIES, FEATURES)}
    if not own:
        inputs["value"] = normal(BATCH, KEYS, FEATURES)
    keys = QUERIES if own else KEYS
    masks = {}
    if masked:
        masks["attention_mask"] = rng.random((BATCH, QUERIES, keys)) < rng.choice([0.2, 0.7])
    if padded:
        masks["value_mask"] = np.arange(keys) < rng.integers(1, keys + 1, (BATCH, 1))
    bias = normal(HEADS, QUERIES, keys) if biased else None
    call = {"use_causal_mask": True} if causal else {}
    return options, Request(inputs, masks, bias, call, inputs)


def _rng(number: int, dtype: str) -> np.random.Generator:
    return np.random.default_rng([number, DTYPES.index(dtype)])
