"""The self-test: injected faults must be caught and named, correct layers must pass."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anymha.framework.registry import Backend, get_layer
from anymha.interchange.layers import set_weights
from anymha.parity.adapters import adapter_for
from anymha.parity.comparison.baseline import Baseline
from anymha.parity.comparison.compare import compare
from anymha.parity.oracle.cases import Arrays, has_option, numpy_dtype
from anymha.parity.oracle.features import SECTIONS, sections_of
from anymha.parity.oracle.truth import fold
from anymha.parity.reports.report import Comparison
from anymha.parity.stages.trace import Request, Trace, problem_of
from tests.selftest.injected_faults import (
    BATCH,
    FAULTS,
    FEATURES,
    HEADS,
    KEYS,
    QUERIES,
    WIDTH,
    Fault,
    call_with_fault,
    weights_with_faults,
)
from tests.selftest.port import Port

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class FaultResult:
    """The result of one injected fault, or of two.

    Args:
        faults: The faults.
        backend: The framework that they are in.
        reports_stages: Whether the port reported its stages.
        caught: Whether the comparison failed, as it must.
        stage: Whether it named the first stage.
        cause: Whether it named the fault; of two, the first.
        both: Whether it named both; of one, as `cause`.
        verdict: The comparison's verdict.
    """

    faults: tuple[str, ...]
    backend: str
    reports_stages: bool
    caught: bool
    stage: bool
    cause: bool
    both: bool
    verdict: str


def inject_all(
    backends: Sequence[Backend], progress: Progress = lambda *_: None, seed: int = 0
) -> Iterator[FaultResult]:
    """Every fault in every framework, with and without reported stages."""
    for fault in FAULTS:
        for backend in backends:
            progress(fault.wrong, backend.name)
            for reports_stages in (True, False):
                yield try_faults(backend, (fault,), reports_stages, seed)


def inject_pairs(
    backends: Sequence[Backend], progress: Progress = lambda *_: None, seed: int = 0
) -> Iterator[FaultResult]:
    """Two faults together, of different stages and of one kind of call."""
    for one, other in itertools.combinations(FAULTS, 2):
        if can_be_combined(one, other):
            for backend in backends:
                progress(f"{one.wrong}, {other.wrong}", backend.name)
                yield try_faults(backend, (one, other), True, seed)


def can_be_combined(one: Fault, other: Fault) -> bool:
    """Whether two faults can be injected at once, and neither hides the other."""
    alike = one.options == other.options and one.dtype == other.dtype
    chance = {"dropout left on", "bfloat16", "batch and time exchanged", "scores averaged",
              "no softmax"}  # fmt: skip
    packs = {"packed in another order", "packed by head", "packed without a transpose",
             "key and value cut wrongly", "value has the key's weights"}  # fmt: skip
    if {one.wrong, other.wrong} <= packs:
        return False  # the second writes over the first
    clear = not chance & {one.wrong, other.wrong}
    return alike and clear and one.case == other.case == ("mask",) and one.stage != other.stage


def try_faults(
    backend: Backend, faults: tuple[Fault, ...], reports_stages: bool, seed: int = 0
) -> FaultResult:
    """Compare a port that has these faults with the layer."""
    if not reports_stages:
        faults = tuple(
            replace(p, cause=p.from_output, stage="output") if p.from_output else p for p in faults
        )
    fault = faults[0]
    ops, wrong = backend.ops, {p.wrong for p in faults}
    inputs, call = call_with_fault(fault.case, fault.dtype, seed)
    layer, weights = make_layer(fault.options, fault.dtype, seed)
    port = Port(
        ops, weights_with_faults(weights, wrong), wrong, reports_stages,
        fault.options.get("sliding_window"),
        fault.options.get("dropout", 0.0), sections_of(layer.config),
    )  # fmt: skip
    arrays = {name: ops.from_numpy(array) for name, array in inputs.items()}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of frameworks, about the fault
        report = compare(layer, port, arrays, **call)
    order = ("query", "key", "value", "logits", "masked_logits", "probabilities",
             "dropped_probabilities", "context", "output", "scores")  # fmt: skip
    first = min(faults, key=lambda p: order.index(p.stage))
    causes = [c.name for c in report.diagnosis.causes] if report.diagnosis else []
    alternatives = report.diagnosis.alternatives if report.diagnosis else ()
    named = {*causes, *(words.partition(" (")[0] for words in alternatives)}
    return FaultResult(
        tuple(p.wrong for p in faults),
        backend.name,
        reports_stages,
        not report.passed,
        report.first_divergence == first.stage,
        bool(causes) and (causes[0] == first.cause or (len(faults) == 1 and first.cause in named)),
        {p.cause for p in faults} <= named,
        report.verdict,
    )


def make_layer(options: Any, dtype: str, seed: int, backend: str = "numpy") -> tuple[Any, Arrays]:
    """A layer with random weights and biases, and the weights."""
    layer = get_layer(backend)(HEADS, WIDTH, query_features=FEATURES, dtype=dtype, **dict(options))
    weights = random_weights(layer, dtype, seed)
    return set_weights(layer, weights), weights


def random_weights(layer: Any, dtype: str, seed: int) -> Arrays:
    """Random weights for a layer, its biases not zero."""
    rng = np.random.default_rng([seed, 7])
    starts = {name: own.initial == "ones" for name, own in layer.config.feature_weights.items()}
    return {
        name: (
            rng.standard_normal(shape) * (0.3 if name.endswith("kernel") else 0.5)
            + starts.get(name, 0)
        ).astype(numpy_dtype(dtype))
        for name, shape in layer.config.weight_shapes().items()
    }


DTYPES = ("float32", "float64", "float16", "bfloat16")

STRUCTURES = 200
"""How many kinds of layers and calls are drawn for each dtype."""


@dataclass(frozen=True)
class Alarm:
    """Two correct layers that the comparison says differ.

    Args:
        dtype: Of both.
        pair: Their backends.
        number: Of the configuration, which it reproduces.
        text: The whole report.
    """

    dtype: str
    pair: tuple[str, str]
    number: int
    text: str


def find_false_alarms(
    backends: Sequence[Backend],
    numbers: Sequence[int],
    dtypes: Sequence[str] = DTYPES,
    progress: Progress = lambda *_: None,
    gradients_of: Callable[[int], bool] = lambda _: True,
) -> Iterator[list[Alarm]]:
    """The alarms of random configurations by their numbers in each dtype, which should be none.

    Every two backends are compared, each way round; a single one with itself: stages, outputs, and
    the gradients of weights, inputs and bias for a random cotangent, in the configurations whose
    numbers `gradients_of` takes.
    """
    layers: dict[Any, Any] = {}  # a layer keeps its compiled programs
    for dtype in dtypes:
        for number in numbers:
            progress("correct layers", f"{dtype} {number}")
            options, request = random_call(number, dtype)
            traces, cotangent = {}, None
            if gradients_of(number):
                shape = (BATCH, QUERIES, FEATURES)
                cotangent = np.random.default_rng(number).standard_normal(shape)
            for backend in backends:
                kind = (backend.name, dtype, repr(sorted(options.items())))
                if kind not in layers:
                    layers[kind] = make_layer(options, dtype, number, backend.name)[0]
                layer = layers[kind]
                layer = layers[kind] = set_weights(layer, random_weights(layer, dtype, number))
                traces[backend.name] = adapter_for(layer).trace(request, cotangent)
            yield [
                Alarm(dtype, pair, number, report.to_text())
                for pair, report in _each_way(request, traces, cotangent)
                if not report.passed
            ]


def _each_way(
    request: Request, traces: dict[str, Trace], cotangent: np.ndarray | None
) -> Iterator[tuple[tuple[str, str], Comparison]]:
    """Every two traces of layers with the same weights; a single one with itself."""
    basis = next(iter(traces.values()))
    assert basis.config is not None
    assert basis.weights is not None
    with np.errstate(all="ignore"):
        folded = fold(problem_of(basis.config, basis.weights, request))
        baselines = {name: Baseline(request, folded, trace) for name, trace in traces.items()}
        for pair in list(itertools.permutations(traces, 2)) or [(name, name) for name in traces]:
            yield pair, baselines[pair[0]].judge(traces[pair[1]], cotangent)


def random_call(number: int, dtype: str) -> tuple[dict[str, Any], Request]:
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
