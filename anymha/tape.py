"""Gradients for backends without autodiff: a tape over the functions of `Ops`.

The core runs unchanged on `Traced` arrays through `TapeOps`, which notes of every function how a
gradient goes back through it. So NumPy, and any backend of functions alone, has exact gradients of
the one written formula, and there is no second, differentiated copy of it to keep.

References:
    A. Griewank, A. Walther, "Evaluating Derivatives" (2008), chapter 3, for the reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from anymha.dtypes import dtype_name, is_floating
from anymha.ops import Array, Ops
from anymha.traced import TapeOps, Traced, plain


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
    tape = TapeOps(ops)
    leaves = {
        name: Traced(tape, array) if is_floating(dtype_name(array.dtype)) else array
        for name, array in arrays.items()
    }
    results = function(cast(Ops, tape), dict(leaves))
    several = isinstance(results, tuple)

    def pullback(cotangents: Any) -> dict[str, Array]:
        return _pulled(ops, results if several else (results,), leaves, cotangents)

    return tuple(map(plain, results)) if several else plain(results), pullback


def _pulled(
    ops: Ops, results: tuple[Any, ...], leaves: Mapping[str, Any], cotangents: Any
) -> dict[str, Array]:
    gradients: dict[int, Array] = {}
    nodes: dict[int, Traced] = {}

    def give(node: Traced, gradient: Array) -> None:
        before = gradients.get(node.number)
        nodes[node.number] = node
        gradients[node.number] = gradient if before is None else before + gradient

    given = cotangents if isinstance(cotangents, tuple) else (cotangents,)
    for result, cotangent in zip(results, given, strict=True):
        if isinstance(result, Traced):
            give(result, cotangent)
    own = {leaf.number for leaf in leaves.values() if isinstance(leaf, Traced)}
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
        if isinstance(leaf, Traced)
    }
