"""Gradients for backends without autodiff: a tape over the functions of `Ops`.

The core runs unchanged on `Variable` arrays through `Tape`, which notes of every function how a
gradient goes back through it. So NumPy, and any backend of functions alone, has exact gradients of
the one written formula, and there is no second, differentiated copy of it to keep.

References:
    A. Griewank, A. Walther, "Evaluating Derivatives" (2008), chapter 3, for the reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from anymha.framework.dtypes import dtype_name, is_floating
from anymha.framework.protocol import Array, Ops
from anymha.framework.variables import Pull, Tape, Variable, plain


def vjp(
    ops: Ops, function: Callable[[Ops, dict[str, Any]], Any], arrays: Mapping[str, Array]
) -> tuple[Any, Callable[[Any], dict[str, Array]]]:
    """``function(ops, arrays)``, and the pullback that turns its cotangents into gradients.

    Args:
        ops: A backend.
        function: Gives an array or a tuple of arrays; it must use the `ops` that it is given.
        arrays: What it takes, by name; gradients are of those that are floating.

    Returns:
        The function's result, and a function of a cotangent for each result (of its shape) that
        gives the gradient of ``sum(cotangents * results)`` by the names of `arrays`.

    Example:
        >>> import anymha_numpy.ops as ops, numpy as np
        >>> value, pullback = vjp(ops, lambda ops, a: ops.exp(a["x"]) * 2, {"x": np.zeros(2)})
        >>> pullback(np.ones(2))["x"].tolist()
        [2.0, 2.0]
    """
    tape = _RecomputingTape(ops)
    leaves = {
        name: Variable(tape, array) if is_floating(dtype_name(array.dtype)) else array
        for name, array in arrays.items()
    }
    results = function(cast(Ops, tape), dict(leaves))
    several = isinstance(results, tuple)

    def pullback(cotangents: Any) -> dict[str, Array]:
        return _pulled(ops, results if several else (results,), leaves, cotangents)

    return tuple(map(plain, results)) if several else plain(results), pullback


class _RecomputingTape(Tape):
    """A tape with slices and loops; it keeps no more of a loop than what goes into it."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops)
        own = ops.capabilities
        if own.loop is not None and own.eager_loop:
            self.capabilities = replace(
                self.capabilities,
                tile_size=own.tile_size,
                loop=self.loop,
                eager_loop=True,
                narrow=self.narrow,
            )

    def narrow(self, x: Any, start: Any, length: int, /, *, axis: int) -> Any:
        ops, own = self.ops, self.shape(x)

        def pull(g: Array) -> Array:
            zero = ops.asarray(0, dtype=g.dtype, device=ops.device(g))
            around = [
                ops.broadcast_to(zero, (*own[:axis], n, *own[axis + 1 :]))
                for n in (start, own[axis] - start - length)
            ]
            return ops.concat([around[0], g, around[1]], axis=axis)

        return self._unary(x, _narrowed(plain(x), start, length, axis), pull)

    def concat(self, arrays: list[Any], /, *, axis: int) -> Any:
        axis %= len(self.shape(arrays[0]))
        lengths = [self.shape(x)[axis] for x in arrays]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]

        def pull(start: int, length: int) -> Pull:
            return lambda g: _narrowed(g, start, length, axis)

        pulls = list(map(pull, starts, lengths))
        value = self.ops.concat([plain(x) for x in arrays], axis=axis)
        if not any(isinstance(x, Variable) for x in arrays):
            return value
        return Variable(self, value, *zip(arrays, pulls, strict=True))

    def loop(
        self,
        function: Callable[[int, dict[str, Any]], dict[str, Any]],
        count: int,
        mapped: Mapping[str, Any],
        constant: Mapping[str, Any],
        results: Mapping[str, Any],
        /,
    ) -> dict[str, Any]:
        ops: Any = self.ops

        def at(x: Array, index: int) -> Array:
            shape = ops.shape(x)
            return ops.reshape(_narrowed(x, index, 1, 0), shape[1:])

        def own(index: int) -> dict[str, Any]:
            parts = {name: at(plain(x), index) for name, x in mapped.items()}
            return parts | {name: plain(x) for name, x in constant.items()}

        found = [
            {n: plain(x) for n, x in function(index, own(index)).items()} for index in range(count)
        ]

        def pull(result: str, source: str) -> Callable[[Array], Array]:
            return lambda g: gradients(result, g)[source]

        latest: list[Any] = [None, None, {}]

        def gradients(result: str, g: Array) -> dict[str, Array]:
            if latest[0] != result or latest[1] is not g:  # each of the sources asks
                latest[:] = [result, g, computed(result, g)]
            return latest[2]

        def computed(result: str, g: Array) -> dict[str, Array]:
            parts: dict[str, list[Array]] = {}
            sums: dict[str, Array] = {}  # at once: a sum is as large as what is constant
            for index in range(count):
                leaves = {
                    name: Variable(self, x) if is_floating(dtype_name(x.dtype)) else x
                    for name, x in own(index).items()
                }
                value = function(index, dict(leaves))[result]
                for name, gradient in _pulled(ops, (value,), leaves, at(g, index)).items():
                    if name in mapped:
                        parts.setdefault(name, []).append(gradient)
                    else:
                        sums[name] = sums[name] + gradient if name in sums else gradient
            return {name: ops.stack(each) for name, each in parts.items()} | sums

        arrays = {**mapped, **constant}
        return {
            name: Variable(
                self,
                ops.stack([each[name] for each in found]),
                *((x, pull(name, source)) for source, x in arrays.items()),
            )
            for name in results
        }


def _narrowed(x: Array, start: int, length: int, axis: int) -> Array:
    """`length` places of an array along an axis, from `start` on."""
    rest = [slice(None)] * (len(x.shape) - axis - 1)
    return x[(..., slice(start, start + length), *rest)]


def _pulled(
    ops: Ops, results: tuple[Any, ...], leaves: Mapping[str, Any], cotangents: Any
) -> dict[str, Array]:
    gradients: dict[int, Array] = {}
    nodes: dict[int, Variable] = {}

    def give(node: Variable, gradient: Array) -> None:
        before = gradients.get(node.number)
        nodes[node.number] = node
        gradients[node.number] = gradient if before is None else before + gradient

    given = cotangents if isinstance(cotangents, tuple) else (cotangents,)
    for result, cotangent in zip(results, given, strict=True):
        if isinstance(result, Variable):
            give(result, cotangent)
    own = {leaf.number for leaf in leaves.values() if isinstance(leaf, Variable)}
    while len(nodes) > len(nodes.keys() & own):  # the latest first: all its users have given
        number = max(nodes.keys() - own)
        gradient = gradients.pop(number)
        for source, pull in nodes.pop(number).sources:
            give(source, pull(gradient))
    return {
        name: gradients[leaf.number]
        if leaf.number in gradients
        else ops.broadcast_to(ops.asarray(0, dtype=leaf.dtype), ops.shape(leaf.value))
        for name, leaf in leaves.items()
        if isinstance(leaf, Variable)
    }
