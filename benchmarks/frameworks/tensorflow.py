"""TensorFlow: our layer, Keras's, and one of `matmul`, each eager, in tf.function and in XLA."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.framework.registry import get_layer
from benchmarks.cases import Arrays, Problem
from benchmarks.entries import (
    EXACT,
    NATIVE,
    OURS,
    Entry,
    Machine,
    Ready,
    absent,
    from_linear,
    installed,
    modern,
    our_call,
    pack,
    to_linear,
    unpack,
)
from benchmarks.frameworks import keras
from benchmarks.measure import peak_memory

LIBRARIES = {"keras": "keras"}
COMPILED = ("tf.function", "XLA")


def machine(device: str) -> Machine:
    """What TensorFlow says about where it runs."""
    import tensorflow as tf

    facts: dict[str, Any] = {
        "tensorflow": tf.__version__,
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "not set"),
    }
    place = "CPU:0" if device == "cpu" else "GPU:0"
    if device == "cuda":
        found: Any = tf.config.list_physical_devices("GPU")
        if not found:
            raise RuntimeError("TensorFlow sees no GPU")
        facts["device"] = tf.config.experimental.get_device_details(found[0]).get("device_name")
    return Machine(facts, lambda call: _peak(call, place), absent(LIBRARIES))


def _peak(call: Callable[[], Any], place: str) -> int | None:
    """The peak that TensorFlow's allocator tells, which keeps what is freed, or the process's."""
    import tensorflow as tf

    resident = peak_memory(call) if place == "CPU:0" else None
    try:
        tf.config.experimental.reset_memory_stats(place)
    except ValueError:  # without oneDNN the processor's allocator is the system's
        return resident
    before = tf.config.experimental.get_memory_info(place)["current"]
    call()
    held = tf.config.experimental.get_memory_info(place)["peak"] - before
    return max(held, resident or 0)


@dataclass(frozen=True)
class _Layer:
    """A layer that TensorFlow can differentiate; as in PyTorch's module."""

    run: Callable[[Any, bool], Any]
    parameters: Sequence[Any]
    canonical: Callable[[Sequence[np.ndarray]], Arrays]


def entries(problem: Problem, device: str) -> list[Entry]:
    """The layers of a case."""
    case = problem.case

    def entry(
        layer: str, form: str, make: Callable[..., _Layer], option: str = "", **options: Any
    ) -> Entry:
        return Entry(layer, form, option, lambda: _ready(problem, form, make(problem, **options)))

    eager = () if case.training else ("",)
    mine = (*eager, *COMPILED)
    theirs = (*eager, *COMPILED) if case.eager else COMPILED
    found = [entry(OURS, form, _ours) for form in mine]
    for wanted, name, option in (
        (case.dropout, NATIVE, {"dropout_rng": "native"}),
        (case.exact, EXACT, {"compute_dtype": "float64"}),
    ):
        found += [entry(OURS, form, _ours, name, **option) for form in COMPILED if wanted]
    if case.peers:
        if installed("keras") and not case.modern:
            found += [entry("keras", form, _keras) for form in theirs]
        found += [entry("tf.matmul", form, _by_hand) for form in theirs]
    return found


def _ready(problem: Problem, form: str, layer: _Layer) -> Ready:
    import tensorflow as tf

    case = problem.case
    wait = tf.test.experimental.sync_devices
    x = tf.constant(problem.x, case.dtype)
    cotangent = tf.constant(problem.cotangent, case.dtype)

    def forward(x: Any) -> Any:
        return layer.run(x, False)

    def train(x: Any, cotangent: Any, dropping: bool) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer.run(x, dropping)
        return output, tape.gradient(output, [x, *layer.parameters], cotangent)

    function: Any = train if case.training else forward
    if form:
        function = tf.function(function, autograph=False, jit_compile=form == "XLA")

    def call(dropping: bool = bool(case.dropout)) -> Any:
        result = function(x, cotangent, dropping) if case.training else function(x)
        wait()
        return result

    def values(result: Any) -> Arrays:
        if case.training:
            output, (d_x, *rest) = result
            gradients = layer.canonical([_array(one) for one in rest])
            return {"output": _array(output), "x": _array(d_x), **gradients}
        if case.scores:
            return {"output": _array(result[0]), "scores": _array(result[1])}
        return {"output": _array(result)}

    return Ready(call, values, lambda: call(False))


def _array(tensor: Any) -> np.ndarray:
    import tensorflow as tf

    return tf.cast(tf.convert_to_tensor(tensor), tf.float32).numpy()


def _ours(problem: Problem, **options: Any) -> _Layer:
    import tensorflow as tf

    layer = get_layer("tensorflow")(**problem.layer_options, **options)
    layer.with_canonical_weights(problem.weights)
    weights = layer.canonical_weights()
    call = our_call(problem, tf.constant)

    def run(x: Any, training: bool) -> Any:
        return layer(x, **call, training=training, seed=7 if training else None)

    return _Layer(
        run, list(weights.values()), lambda arrays: dict(zip(weights, arrays, strict=True))
    )


def _keras(problem: Problem) -> _Layer:
    import tensorflow as tf

    layer = keras.make_layer(problem)
    calls = {
        training: keras.call_options(problem, tf.constant, training) for training in (False, True)
    }
    return _Layer(
        lambda x, training: layer(x, x, **calls[training]),
        [variable.value for variable in layer.trainable_weights],
        lambda arrays: keras.gradients(layer, arrays),
    )


def _by_hand(problem: Problem) -> _Layer:
    """One product for query, key and value, `matmul`, softmax, `matmul`, and the output's."""
    import tensorflow as tf

    case = problem.case
    b, t, h, d = case.batch, case.length, case.heads, case.key_dim
    linear = pack(to_linear(problem.weights))
    own = {n: tf.Variable(tf.constant(a.T, case.dtype), name=n) for n, a in linear.items()}
    seen = problem.allowed(np.arange(t))
    mask = None if seen is None else tf.constant(seen)[:, None]
    least = tf.constant(-1e30 if case.dtype != "float16" else -6e4, case.dtype)

    today = modern(
        problem,
        tf.constant,
        lambda x: x * tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + 1e-6),
        lambda parts: tf.concat([*parts], -1),
    )

    def run(x: Any, training: bool) -> Any:
        projected = tf.matmul(x, own["packed.kernel"]) + own["packed.bias"]
        heads = tf.transpose(tf.reshape(projected, (b, t, 3, h, d)), (2, 0, 3, 1, 4))
        q, k, v = heads[0], heads[1], heads[2]
        if today is not None:
            q, k = today.heads(q, k)
        logits = tf.matmul(q * tf.constant(1 / math.sqrt(d), q.dtype), k, transpose_b=True)
        if mask is not None:
            logits = tf.where(mask, logits, least)
        if today is not None:
            logits = tf.concat([logits, tf.broadcast_to(today.sinks, (b, h, t, 1))], -1)
        every: Any = tf.nn.softmax(logits)
        scores = every[..., :t]
        dropped = tf.nn.dropout(scores, case.dropout) if training else scores
        context = tf.reshape(tf.transpose(tf.matmul(dropped, v), (0, 2, 1, 3)), (b, t, h * d))
        output = tf.matmul(context, own["output.kernel"]) + own["output.bias"]
        return (output, scores) if case.scores else output

    def canonical(arrays: Sequence[np.ndarray]) -> Arrays:
        transposed = {name: array.T for name, array in zip(own, arrays, strict=True)}
        return from_linear(unpack(transposed), problem.weights)

    return _Layer(run, list(own.values()), canonical)
