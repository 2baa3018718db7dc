"""The attention layers of the libraries on JAX, as functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases import Arrays, Problem
from benchmarks.entries import from_linear, to_linear
from benchmarks.frameworks import keras as keras_layer


@dataclass(frozen=True)
class Layer:
    """A layer that JAX can differentiate.

    Args:
        run: Gives the output, or output and scores, from the parameters, the input and the key of
            the dropout, None for none.
        parameters: A pytree.
        canonical: Turns a pytree of their gradients into those of the canonical weights.
    """

    run: Callable[[Any, Any, Any], Any]
    parameters: Any
    canonical: Callable[[Any], Arrays]


def _mask(problem: Problem, *shape: int) -> Any:
    """The mask, with the axes that a library wants; None where there is none."""
    import jax.numpy as jnp

    seen = problem.allowed(np.arange(problem.case.length))
    if seen is None:
        return None
    return jnp.asarray(np.broadcast_to(seen, shape) if shape else seen[:, None])


def flax(problem: Problem) -> Layer:
    """`flax.nnx.MultiHeadAttention`."""
    import jax.numpy as jnp
    from flax import nnx

    case, mask = problem.case, _mask(problem)
    layer = nnx.MultiHeadAttention(
        case.heads, case.features, dropout_rate=case.dropout, broadcast_dropout=False,
        dtype=case.dtype, param_dtype=case.dtype, decode=False, rngs=nnx.Rngs(0), keep_rngs=False,
    )  # fmt: skip
    graph, state, rest = nnx.split(layer, nnx.Param, ...)
    parts = {"query": "query", "key": "key", "value": "value", "out": "output"}
    parameters = {
        own: {part: jnp.asarray(problem.weights[f"{name}.{part}"], case.dtype)
              for part in ("kernel", "bias")}
        for own, name in parts.items()
    }  # fmt: skip

    def run(parameters: Any, x: Any, key: Any) -> Any:
        nnx.replace_by_pure_dict(state, parameters)
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graph, state, rest)(x, mask=mask, deterministic=key is None, rngs=rngs)

    def canonical(gradients: Any) -> Arrays:
        return {
            f"{parts[own]}.{part}": array
            for own, held in gradients.items()
            for part, array in held.items()
        }

    return Layer(run, parameters, canonical)


def equinox(problem: Problem) -> Layer:
    """`equinox.nn.MultiheadAttention`, which takes one sequence, under `jax.vmap`."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    case = problem.case
    mask = _mask(problem, case.batch, case.length, case.length)
    layer = eqx.nn.MultiheadAttention(
        case.heads, case.features, dropout_p=case.dropout, key=jax.random.key(0),
        use_query_bias=True, use_key_bias=True, use_value_bias=True, use_output_bias=True,
        dtype=jnp.dtype(case.dtype),
    )  # fmt: skip
    own = ("weight", "bias")

    def leaves(layer: Any) -> list[Any]:
        names = ("query", "key", "value", "output")
        return [getattr(getattr(layer, f"{n}_proj"), part) for n in names for part in own]

    linear = to_linear(problem.weights)
    layer = eqx.tree_at(leaves, layer, [jnp.asarray(a, case.dtype) for a in linear.values()])
    parameters, static = eqx.partition(layer, eqx.is_array)

    def run(parameters: Any, x: Any, key: Any) -> Any:
        layer = eqx.combine(parameters, static)

        def one(x: Any, mask: Any, key: Any) -> Any:
            return layer(x, x, x, mask, key=key, inference=key is None)

        keys = None if key is None else jax.random.split(key, case.batch)
        axes = (0, None if mask is None else 0, None if keys is None else 0)
        return jax.vmap(one, axes)(x, mask, keys)

    def canonical(gradients: Any) -> Arrays:
        arrays = dict(zip(linear, leaves(gradients), strict=True))
        return from_linear(arrays, problem.weights)

    return Layer(run, parameters, canonical)


def haiku(problem: Problem) -> Layer:
    """`haiku.MultiHeadAttention`."""
    import haiku as hk  # pyright: ignore[reportMissingImports]
    import jax
    import jax.numpy as jnp

    case, mask = problem.case, _mask(problem)

    def forward(x: Any) -> Any:
        layer = hk.MultiHeadAttention(
            case.heads, case.key_dim, w_init=hk.initializers.Constant(0), model_size=case.features
        )
        return layer(x, x, x, mask=mask)

    made = hk.without_apply_rng(hk.transform(forward))
    shape = jax.ShapeDtypeStruct((case.batch, case.length, case.features), case.dtype)
    held = jax.eval_shape(made.init, jax.random.key(0), shape)
    names = {path: "output" if path.endswith("linear") else path.split("/")[-1] for path in held}
    parts = {"w": "kernel", "b": "bias"}
    parameters = {
        path: {
            own: jnp.asarray(problem.weights[f"{names[path]}.{part}"], case.dtype).reshape(
                held[path][own].shape
            )
            for own, part in parts.items()
        }
        for path in held
    }

    def canonical(gradients: Any) -> Arrays:
        found = {
            f"{names[path]}.{parts[own]}": array
            for path, arrays in gradients.items()
            for own, array in arrays.items()
        }
        return {name: array.reshape(problem.weights[name].shape) for name, array in found.items()}

    return Layer(lambda parameters, x, key: made.apply(parameters, x), parameters, canonical)


def keras(problem: Problem) -> Layer:
    """`keras.layers.MultiHeadAttention` without state."""
    import jax.numpy as jnp

    layer = keras_layer.make_layer(problem)
    calls = {
        training: keras_layer.call_options(problem, jnp.asarray, training)
        for training in (False, True)
    }

    def run(parameters: Any, x: Any, key: Any) -> Any:
        rest = [variable.value for variable in layer.non_trainable_variables]
        if key is not None:
            rest = [_seed(key) for _ in rest]
        result, _ = layer.stateless_call(parameters, rest, x, x, **calls[key is not None])
        return result

    return Layer(
        run,
        [variable.value for variable in layer.trainable_weights],
        lambda arrays: keras_layer.gradients(layer, arrays),
    )


def _seed(key: Any) -> Any:
    """The words of a key: the state of Keras's generator."""
    import jax

    return jax.random.key_data(key)
