"""JAX: our layer beside those of Flax, Equinox, Haiku and Keras and JAX's own attention."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    installed,
    modern,
    our_call,
)
from benchmarks.frameworks import jax_libraries as libraries
from benchmarks.frameworks.jax_libraries import Layer

LIBRARIES = {"flax": "flax", "equinox": "equinox", "dm-haiku": "haiku", "keras": "keras"}


def machine(device: str) -> Machine:
    """What JAX says about where it runs."""
    import jax

    found: Any = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    facts = {"jax": jax.__version__, "device": found.device_kind}
    if device == "cpu":
        return Machine(facts, absent=absent(LIBRARIES))
    # JAX's allocator tells the peak since the start alone: too much for all but the first layer.
    return Machine(facts, lambda call: None, absent(LIBRARIES))


def entries(problem: Problem, device: str) -> list[Entry]:
    """The layers of a case."""
    case = problem.case

    def entry(
        layer: str, form: str, make: Callable[..., Layer], option: str = "", **options: Any
    ) -> Entry:
        return Entry(layer, form, option, lambda: _ready(problem, form, make(problem, **options)))

    mine = ("jit",) if case.training else ("", "jit")
    found = [entry(OURS, form, _ours) for form in mine]
    if case.dropout:
        found.append(entry(OURS, "jit", _ours, NATIVE, dropout_rng="native"))
    if case.exact:
        found.append(entry(OURS, "jit", _ours, EXACT, compute_dtype="float64"))
    if not case.peers:
        return found
    if case.modern:
        return [*found, entry("jax.numpy", "jit", _by_hand)]
    makers: dict[str, Callable[..., Layer]] = {}
    if not case.scores:
        makers |= {"flax": libraries.flax, "equinox": libraries.equinox}
        if not case.dropout:
            makers["haiku"] = libraries.haiku  # it has no dropout
    found += [entry(name, "jit", make) for name, make in makers.items() if installed(name)]
    if installed("keras"):
        found += [entry("keras", form, libraries.keras) for form in ("", "jit")[not case.eager :]]
    if case.scores or case.dropout:
        found.append(entry("jax.numpy", "jit", _by_hand))
    else:
        found.append(entry("jax.nn.dot_product_attention", "jit", _own_attention))
    return found


def _ready(problem: Problem, form: str, layer: Layer) -> Ready:
    import jax
    import jax.numpy as jnp

    case = problem.case
    x, cotangent = jnp.asarray(problem.x, case.dtype), jnp.asarray(problem.cotangent, case.dtype)
    key = jax.random.key(7)

    def forward(parameters: Any, x: Any) -> Any:
        return layer.run(parameters, x, None)

    def train(parameters: Any, x: Any, cotangent: Any, key: Any) -> Any:
        output, pullback = jax.vjp(lambda p, x: layer.run(p, x, key), parameters, x)
        return output, pullback(cotangent)

    function: Any = train if case.training else forward
    if form:
        function = jax.jit(function)

    def call(key: Any = key if case.dropout else None) -> Any:
        arguments = (cotangent, key) if case.training else ()
        return jax.block_until_ready(function(layer.parameters, x, *arguments))

    def values(result: Any) -> Arrays:
        if case.training:
            output, (gradients, d_x) = result
            return {
                "output": _array(output), "x": _array(d_x),
                **layer.canonical(jax.tree.map(_array, gradients)),
            }  # fmt: skip
        if case.scores:
            return {"output": _array(result[0]), "scores": _array(result[1])}
        return {"output": _array(result)}

    return Ready(call, values, lambda: call(None))


def _array(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def _ours(problem: Problem, **options: Any) -> Layer:
    import jax.numpy as jnp

    layer = get_layer("jax")(**problem.layer_options, **options)
    layer = layer.with_canonical_weights(problem.weights)
    call = our_call(problem, jnp.asarray)

    def run(layer: Any, x: Any, key: Any) -> Any:
        return layer(x, **call, training=key is not None, seed=key)

    return Layer(run, layer, lambda gradients: gradients.canonical_weights())


def _projected(problem: Problem, attend: Callable[[Any, Any, Any, Any], Any]) -> Layer:
    """Projections around an attention of (B, T, H, d) arrays."""
    import jax.numpy as jnp

    case = problem.case
    b, t, h, d = case.batch, case.length, case.heads, case.key_dim
    parameters = {n: jnp.asarray(a, case.dtype) for n, a in problem.weights.items()}

    def run(w: Any, x: Any, key: Any) -> Any:
        def project(name: str) -> Any:
            y = x @ w[f"{name}.kernel"].reshape(case.features, h * d)
            return y.reshape(b, t, h, d) + w[f"{name}.bias"]

        context, *scores = attend(project("query"), project("key"), project("value"), key)
        kernel = w["output.kernel"].reshape(h * d, case.features)
        output = context.reshape(b, t, h * d) @ kernel + w["output.bias"]
        return (output, *scores) if case.scores else output

    return Layer(run, parameters, dict)


def _own_attention(problem: Problem) -> Layer:
    import jax
    import jax.numpy as jnp

    case = problem.case
    mask = None
    if case.mask != "causal":
        seen = problem.allowed(np.arange(case.length))
        mask = None if seen is None else jnp.asarray(seen)[:, None]

    def attend(q: Any, k: Any, v: Any, key: Any) -> Any:
        return (jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=case.mask == "causal"),)

    return _projected(problem, attend)


def _by_hand(problem: Problem) -> Layer:
    """Einsum, softmax, einsum: what one writes for scores and dropout, which JAX's own has not."""
    import jax
    import jax.numpy as jnp

    case = problem.case
    seen = problem.allowed(np.arange(case.length))
    mask = None if seen is None else jnp.asarray(seen)[:, None]

    today = modern(
        problem,
        jnp.asarray,
        lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6),
        lambda parts: jnp.concatenate([*parts], -1),
    )

    def attend(q: Any, k: Any, v: Any, key: Any) -> Any:
        if today is not None:  # whose tables are of (T, d), and heads after the length
            q, k = (x.swapaxes(1, 2) for x in today.heads(q.swapaxes(1, 2), k.swapaxes(1, 2)))
        logits = jnp.einsum("bthd,bshd->bhts", q / math.sqrt(case.key_dim), k)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        if today is not None:
            sinks = jnp.broadcast_to(today.sinks, (*logits.shape[:3], 1))
            logits = jnp.concatenate([logits, sinks], -1)
        scores = jax.nn.softmax(logits)[..., : case.length]
        dropped = scores
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - case.dropout, scores.shape)
            dropped = jnp.where(kept, scores / (1 - case.dropout), 0)
        return jnp.einsum("bhts,bshd->bthd", dropped, v), scores

    return _projected(problem, attend)
