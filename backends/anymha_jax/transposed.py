"""Linear functions whose transpose is another function than the one that JAX would derive.

A derivative by `jax.custom_vjp` has no forward mode, and one by `jax.custom_jvp` has the transpose
that JAX makes of it. Here the transpose is given, and every other transformation works: `jvp`,
`vmap`, compilation, and derivatives of derivatives, which are those of the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Flat = Callable[..., Any]

_linear = Primitive("anymha_linear")
_linear.multiple_results = True


def linear(push: Flat, pull: Flat, constants: Sequence[Any], moving: Sequence[Any]) -> Any:
    """``push(*constants, *moving)``, an array that is linear in `moving`.

    Args:
        push: The function; it holds no arrays.
        pull: ``pull(*constants, cotangent)`` are the cotangents of `moving`, a sequence. It can be
            differentiated and transformed as `push` can, and holds no arrays either.
        constants: Arrays; derivatives by them are those of `push`.
        moving: Floating arrays.
    """
    args = alike([*constants, *moving])
    return _linear.bind(*args, push=push, pull=pull, count=len(constants))[0]


def alike(arrays: Sequence[Any]) -> Sequence[Any]:
    """The arrays, each of which `jax.shard_map` takes for one that differs where any of them does.

    JAX adds up the cotangents of an array that is the same on all devices; so it sees where.
    """
    every = [_varying(x) for x in arrays]
    axes = frozenset().union(*every)
    return [
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(arrays, every, strict=True)
    ]


def _varying(x: Any) -> frozenset[Any]:
    """The axes of the mesh along which an array differs, in old JAX and new."""
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying


@_linear.def_impl
def _evaluate(*args: Any, push: Flat, pull: Flat, count: int) -> Sequence[Any]:
    return [push(*args)]


@_linear.def_abstract_eval
def _abstract(*avals: Any, push: Flat, pull: Flat, count: int) -> Sequence[Any]:
    return jax.make_jaxpr(push)(*avals).out_avals


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, push: Flat, pull: Flat, count: int
) -> Any:
    constants, moving = primals[:count], primals[count:]
    result = linear(push, pull, constants, moving)
    changed = [i for i in range(count) if type(tangents[i]) is not ad.Zero]
    total = None
    if any(type(tangent) is not ad.Zero for tangent in tangents[count:]):
        total = linear(push, pull, constants, [*map(ad.instantiate_zeros, tangents[count:])])
    if changed:

        def along(*values: Any) -> Any:
            places = dict(zip(changed, values, strict=True))
            return push(*(places.get(i, x) for i, x in enumerate(constants)), *moving)

        own = [tangents[i] for i in changed]
        more = jax.jvp(along, [constants[i] for i in changed], own)[1]
        total = more if total is None else total + more
    return [result], [total]


def _transpose(
    cotangents: Sequence[Any], *args: Any, push: Flat, pull: Flat, count: int
) -> Sequence[Any]:
    known = [None] * count
    if type(cotangents[0]) is ad.Zero:
        return [*known, *(ad.Zero(x.aval) if ad.is_undefined_primal(x) else None
                          for x in args[count:])]  # fmt: skip
    pulled = pull(*args[:count], cotangents[0])
    of_moving = zip(args[count:], pulled, strict=True)
    return [*known, *(g if ad.is_undefined_primal(x) else None for x, g in of_moving)]


def _batch(args: Sequence[Any], axes: Sequence[Any], *, push: Flat, pull: Flat, count: int) -> Any:
    (size,) = {x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None}
    # Each member of the batch has a cotangent of its own, and so an array of its own.
    moving = [
        batching.bdim_at_front(x, axis, size)
        for x, axis in zip(args[count:], axes[count:], strict=True)
    ]
    of_constants = tuple(axes[:count])
    many = partial(_mapped, push, (*of_constants, *(0,) * len(moving)))
    back = partial(_mapped, pull, (*of_constants, 0))
    return [linear(many, back, args[:count], moving)], [0]


def _mapped(function: Flat, axes: tuple[Any, ...], *args: Any) -> Any:
    return jax.vmap(function, axes)(*args)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate))
