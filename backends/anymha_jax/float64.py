"""Float64 inside a float32 program: a primitive all of whose transformations stay in float64.

The context ``jax.enable_x64(True)`` around a function is not enough. What JAX itself makes of the
function when it differentiates (products of cotangents, say) is made outside of the context and
falls back to float32. Here each rule of the primitive, for `jvp`, for transposition (which makes
`grad` of `jvp`), for `vmap` and for compilation, enters the context again and gives the primitive
once more, with the transformed function; so transformations nest to any depth.

JAX runs a rule when it likes, also after the caller has returned. So the function is traced once,
at its call: what it takes from outside (the weights of a sublayer that it calls, say) become
arguments of the primitive, which are differentiated as the others, and no code of the caller runs
later. For the same reason no function of the primitive holds an array, which would outlive its
trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, get_opaque_trace_state
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

Flat = Callable[..., Sequence[Any]]
"""Takes arrays and gives a sequence of arrays."""

_call = Primitive("anymha_float64")
_call.multiple_results = True

with jax.core.eval_context():  # also where a traced program imports this
    _NO_TRACE = get_opaque_trace_state(convention="nnx")


def exists() -> bool:
    """Whether float64 exists here already, by JAX's option or its context."""
    return jax.dtypes.canonicalize_dtype("float64") == "float64"


def in_float64(function: Callable[[Mapping[str, Any]], Any], arrays: Mapping[str, Any], /) -> Any:
    """``function(arrays)`` where float64 exists, also in a program that has it switched off."""
    if exists():
        return function(arrays)
    with jax.enable_x64(True):
        values = {name: jnp.asarray(array) for name, array in arrays.items()}
        if get_opaque_trace_state(convention="nnx") == _NO_TRACE:
            return function(values)
        traced, shape = jax.make_jaxpr(function, return_shape=True)(values)
    jaxpr, number = traced.jaxpr, len(traced.consts)

    def flat(*args: Any) -> Sequence[Any]:
        return jax.core.eval_jaxpr(jaxpr, args[:number], *args[number:])

    leaves = _call.bind(*traced.consts, *jax.tree.leaves(values), function=flat)
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


@_call.def_impl
def _evaluate(*args: Any, function: Flat) -> Sequence[Any]:
    with jax.enable_x64(True):
        return function(*args)


@_call.def_abstract_eval
def _abstract(*avals: Any, function: Flat) -> Sequence[Any]:
    with jax.enable_x64(True):
        return jax.make_jaxpr(function)(*avals).out_avals


def _lower(context: Any, *args: Any, function: Flat) -> Any:
    with jax.enable_x64(True):
        if context.dim_var_values:  # where float64 exists, lengths that are symbols are int64
            int64 = ir.RankedTensorType.get([], mlir.dtype_to_ir_type(np.dtype("int64")))
            lengths = [stablehlo.convert(int64, length) for length in context.dim_var_values]
            # What was lowered outside takes int32 lengths.
            module = context.module_context.replace(
                lowering_cache={}, cached_primitive_lowerings={}
            )
            context = context.replace(dim_var_values=lengths, module_context=module)
        return mlir.lower_fun(_evaluate)(context, *args, function=function)


def _batch(args: Sequence[Any], axes: Sequence[Any], *, function: Flat) -> Any:
    results = _call.bind(*args, function=jax.vmap(function, in_axes=tuple(axes)))
    return results, [0] * len(results)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, function: Flat) -> Any:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
    number = len(primals)
    results = _call.bind(*primals, function=function)
    real = [i for i, x in enumerate(results) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def push(*args: Any) -> Sequence[Any]:
        fixed, moved = args[:number], args[number:]

        def along(*values: Any) -> Sequence[Any]:
            return function(*_placed(fixed, moving, values))

        pushed = jax.jvp(along, tuple(fixed[i] for i in moving), moved)[1]
        return [pushed[i] for i in real]

    pushed = _call.bind(*primals, *(tangents[i] for i in moving), function=push)
    still = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]  # integers have no tangents
    return results, _placed(still, real, pushed)


def _transpose(cotangents: Sequence[Any], *args: Any, function: Flat) -> Any:
    linear = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]
    known = [i for i in range(len(args)) if i not in linear]
    nonzero = [i for i, cotangent in enumerate(cotangents) if type(cotangent) is not ad.Zero]
    zeros = [c if type(c) is ad.Zero else None for c in cotangents]
    avals, nothing = [args[i].aval for i in linear], [None] * len(args)

    def pull(*values: Any) -> Sequence[Any]:
        fixed = _placed(nothing, known, values[: len(known)])
        full = _placed(map(ad.instantiate_zeros, zeros), nonzero, values[len(known) :])

        def along(*moved: Any) -> Sequence[Any]:
            return list(function(*_placed(fixed, linear, moved)))

        return jax.linear_transpose(along, *avals)(full)

    given = [args[i] for i in known] + [cotangents[i] for i in nonzero]
    return _placed(nothing, linear, _call.bind(*given, function=pull))


def _placed(items: Iterable[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """`items` as a list with `values` in these places."""
    items = list(items)
    for place, value in zip(places, values, strict=True):
        items[place] = value
    return items


mlir.register_lowering(_call, _lower)
batching.primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _jvp
ad.primitive_transposes[_call] = _transpose
